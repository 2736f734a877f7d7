"""What the names on a page mean, in a few words that stand beside them."""

from __future__ import annotations

from prfl.utils.metrics_file import measure_name

# The longest name, or beginning of one, that fits is taken; {} is what follows the beginning.
MEANINGS = {
    # Scores of samples.
    "judge/all": "share of samples that the judge finds right in everything; nothing is trained on it",
    "judge/": "the judge's score of {}: 1 right, 0 wrong, where it says yes or no",
    "measured/": "{}, as the judge measures it in the decoded video",
    "reward/total": "the trained reward, added up as the objective does; what the training pushes up",
    "reward/": "the trained reward's score of {} (a logit: 0 is an even chance of being good)",
    "held_out/total": "a reward that nothing is trained on, all its dimensions together",
    "held_out/": "its score of {}; nothing is trained on it",
    "motion": "mean change from one latent frame to the next; less means stiller videos",
    "diversity": "how far two samples of one prompt are apart; 0 means that all are alike",
    "distance": "how far the policy's predictions are from the base's (mean square); 0 is the base",
    "hacking": "how many measures fell while the trained reward rose",
    "kept/step": "the step of the best round so far",
    "kept/": "what the best round so far has of {}",
    "accuracy/": "share of held-out pairs that the reward orders rightly, at {}; 0.5 is chance",
    # Numbers of a training step.
    "loss": "what the optimizer makes small",
    "reward": "the trained reward of this step's samples; it varies with the prompts and the trained step",
    "reward_std": "its deviation over the samples of a step",
    "gradient_norm": "length of the gradient, before it is clipped",
    "learning_rate": "how far one step of the optimizer goes",
    "node": "which latent of the sampling chain the reward was read at",
    "sigma": "noise level there: 1 is pure noise, 0 the clean video",
    "sampled_step": "which step of the sampling chain was trained",
    "rollout_age": "how many optimizer steps ago the samples were drawn",
    "drift": "how far the policy has moved since they were drawn",
    "peak_gib": "largest memory so far, GiB",
    "seconds/step": "time of a whole step, seconds",
    "seconds/": "time of it that {} took, seconds",
    "regulariser/": "{} of the steps that keep the policy on its data",
}


def meaning(name: str) -> str:
    """Explain a measure or a metric; "" where its name says nothing to us."""
    measure = measure_name(name)
    if measure in MEANINGS:
        return MEANINGS[measure]
    for beginning in sorted(MEANINGS, key=len, reverse=True):
        if beginning.endswith("/") and measure.startswith(beginning):
            return MEANINGS[beginning].replace("{}", measure.removeprefix(beginning))
    return ""
