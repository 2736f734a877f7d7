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
    "SteeringRewardConfig.path": rewarded(HEAD, "path: heads/second"),
    "SteeringRewardConfig.weight": rewarded(f"{HEAD}, weight: 1.0", f"{HEAD}, weight: -1.0"),
    "SteeringRewardConfig.weights": rewarded(f"{HEAD}, weights: {{light: 1.0}}", f"{HEAD}, weights: {{calm: 1.0}}"),
    "SteeringRewardConfig.aggregate": rewarded(f"{HEAD}, aggregate: sum", f"{HEAD}, aggregate: logsigmoid"),
    "BestOfConfig.decide_at": steered("best_of", "decide_at", ("[0.5]", "[0.25, 1]")),
}
