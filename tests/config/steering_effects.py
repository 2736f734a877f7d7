"""The effect of every key of ``steering``, as effects.py has those of the other sections."""

from __future__ import annotations

START = "prfl.yaml"


def steered(method: str, key: str, values: tuple[object, ...], *shared: str) -> tuple:
    """What steered samples are, at each value of the key."""
    return ("steered", START, [f"steering={{name: {method}}}", *shared], *([f"steering.{key}={v}"] for v in values))


def rewarded(*settings: str) -> tuple:
    """What steered samples are, with each of these settings of the one reward."""
    return ("steered", START, ["steering={name: best_of}"], *([f"steering.rewards=[{{{text}}}]"] for text in settings))


HEAD = "path: heads/latent"
STEERING_EFFECTS: dict[str, tuple] = {
    "SteeringBase.chains": steered("best_of", "chains", (2, 3)),
    "SteeringBase.keep": steered("best_of", "keep", (1, 2)),
    "SteeringBase.budget": steered("best_of", "budget", (20, 40)),
    "SteeringBase.solver": steered("best_of", "solver", ("euler", "unipc")),
    "SteeringBase.eta": steered("best_of", "eta", (0.5, 1.0), "steering.solver=ancestral"),
    "SteeringBase.final_levels": steered("best_of", "final_levels", ("[]", "[0.5]"), "steering.decide_at=[1.0]"),
    "SteeringRewardConfig.path": rewarded(HEAD, "path: heads/second"),
    "SteeringRewardConfig.weight": rewarded(f"{HEAD}, weight: 1.0", f"{HEAD}, weight: -1.0"),
    "SteeringRewardConfig.weights": rewarded(f"{HEAD}, weights: {{light: 1.0}}", f"{HEAD}, weights: {{calm: 1.0}}"),
    "SteeringRewardConfig.aggregate": rewarded(f"{HEAD}, aggregate: sum", f"{HEAD}, aggregate: logsigmoid"),
    "BestOfConfig.decide_at": steered("best_of", "decide_at", ("[0.5]", "[0.25, 1]")),
    "SvddConfig.strength": steered("svdd", "strength", (0.0, 1e5)),
    "SvddConfig.every": steered("svdd", "every", (1, 2)),
    "SvddConfig.greedy": steered("svdd", "greedy", ("false", "true")),
    "FkConfig.strength": steered("fk", "strength", (0.0, 1e5), "steering.every=1"),  # a random head hardly differs
    "FkConfig.every": steered("fk", "every", (1, 2)),
    "BeamSearchConfig.children": steered("dlbs", "children", (1, 2)),
    "BeamSearchConfig.every": steered("dlbs", "every", (1, 2)),
    "BeamSearchConfig.lookahead": steered("dlbs", "lookahead", (0, 1), "steering.every=2"),
    "GuidedSamplingConfig.strength": steered("guidance", "strength", (0.0, 1.0)),
    "GuidedSamplingConfig.latest": steered("guidance", "latest", (0.5, 0.9)),
    "GuidedSamplingConfig.longest": steered("guidance", "longest", (1e-3, 1.0)),
    "GuidedSamplingConfig.from_step": steered("guidance", "from_step", (0.0, 0.5)),
    "TreeSearchConfig.strength": steered("dts", "strength", (0.0, 1e5), "steering.every=1"),
    "TreeSearchConfig.width": steered("dts", "width", (1, 3), "steering.every=1"),
    "TreeSearchConfig.every": steered("dts", "every", (1, 2)),
    "TreeSearchConfig.greedy": steered("dts", "greedy", ("false", "true"), "steering.every=1"),
    "LatSearchConfig.temperature": steered("latsearch", "temperature", (1.0, 1e-5)),
    "LatSearchConfig.look_at": steered("latsearch", "look_at", ("[0.5]", "[0.25, 0.5]")),
    "DoitConfig.strength": steered("doit", "strength", (0.0, 1e5)),
    "DoitConfig.every": steered("doit", "every", (1, 2)),
    "DoitConfig.rollout_steps": steered("doit", "rollout_steps", (2, 3)),
    "DoitConfig.longest": steered("doit", "longest", (1e-3, 1.0), "steering.strength=1e5"),
    "NoiseSearchConfig.rounds": steered("noise", "rounds", (1, 2)),
    "NoiseSearchConfig.look_at": steered("noise", "look_at", (0.25, 0.5)),
    "NoiseSearchConfig.rate": steered("noise", "rate", (0.0, 1.0)),
    "NoiseSearchConfig.gradient": steered("noise", "gradient", ("false", "true"), "steering.rounds=2"),
    "GuidedSamplingConfig.to_step": steered("guidance", "to_step", (0.5, 1.0)),
}
