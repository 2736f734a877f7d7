"""The rows of bench/study_steering.py: methods and rewards, the generators that they steer, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

from bench import steering_pool
from prfl.backbone import Backbone
from prfl.config import load_config
from prfl.config.schema import Config
from prfl.factory.backbone import build_backbone, policy_adapter_name
from prfl.factory.evaluation import sampling_settings
from prfl.factory.policy import finished_run_config, load_policy
from prfl.factory.reward import load_reward
from prfl.factory.steering import decode_price
from prfl.reward.pixel import PixelReward
from prfl.rollout.sampling import SamplingSettings
from prfl.rollout.solvers import SOLVERS, SolverSchedule
from prfl.steering.best_of import BestOf
from prfl.steering.budget import Method, calls_of, within
from prfl.steering.calls import Calls, Prices
from prfl.steering.dlbs import BeamSearch
from prfl.steering.doit import Doit
from prfl.steering.dts import TreeSearch
from prfl.steering.fk import FkSteering
from prfl.steering.guidance import GuidedSampling
from prfl.steering.latsearch import LatSearch
from prfl.steering.looks import latent_look, pixel_look, random_look
from prfl.steering.noise import NoiseSearch
from prfl.steering.process import Look, Process
from prfl.steering.sampling import process_of
from prfl.steering.svdd import Svdd

CONFIG = "configs/tiny/best.yaml"
PIXEL = Path("runs/study-reward/pixel-0/reward")  # of bench/study_reward.py
STEPS = (20, 10)  # of the chains: with half of them, twice as many can be had


@dataclass(frozen=True)
class Row:
    """equal_to: the row whose network calls are this one's budget."""

    method: Method
    reward: str = "head"
    solver: str = "euler"
    equal_to: Row | None = None

    @property
    def pooled(self) -> bool:
        """Whether it only chooses among chains that are drawn without noise."""
        return isinstance(self.method, BestOf) and self.solver == "euler"


AT = {f"at {share:g}": (share,) for share in (0.5, 0.75)} | {"at the end": (1.0,)}
HALVING = {"0.4 and 0.7": (0.4, 0.7), "0.5 and 0.75": (0.5, 0.75)}
NOISY = "ancestral"
PLAIN = "one sample"
AIMED = 90  # network calls
METHODS = {
    PLAIN: Row(BestOf(1), "random"),
    **{f"best of {n}, {name}": Row(BestOf(n, decide_at=at)) for n in (2, 4, 8, 16) for name, at in AT.items()},
    "best of 7, at 0.5": Row(BestOf(7, decide_at=(0.5,))),
    "best of 5, at 0.75": Row(BestOf(5, decide_at=(0.75,))),
    "best of 10, at 0.75": Row(BestOf(10, decide_at=(0.75,))),
    "best of 14, at 0.5": Row(BestOf(14, decide_at=(0.5,))),
    "halving 12, 0.5 and 0.75": Row(BestOf(12, decide_at=(0.5, 0.75))),
    "halving 4, 0.5 and 0.75": Row(BestOf(4, decide_at=(0.5, 0.75))),
    "halving 6, 0.5 and 0.75": Row(BestOf(6, decide_at=(0.5, 0.75))),
    **{f"halving {n}, {name}": Row(BestOf(n, decide_at=at)) for n in (8, 16) for name, at in HALVING.items()},
    "one sample, ancestral": Row(BestOf(1), "random", NOISY),
    "best of 4, at the end, ancestral": Row(BestOf(4, decide_at=(1.0,)), "head", NOISY),
    "best of 8, at the end, ancestral": Row(BestOf(8, decide_at=(1.0,)), "head", NOISY),
    "best of 9, at 0.75, ancestral": Row(BestOf(9, decide_at=(0.75,)), "head", NOISY),
    "best of 4, at the end, ancestral (read again)": Row(BestOf(4, decide_at=(1.0,)), "head again", NOISY),
    "best of 7, at the end, ancestral (read again)": Row(BestOf(7, decide_at=(1.0,)), "head again", NOISY),
    "svdd of 8": Row(Svdd(8), "head", NOISY),
    "svdd of 32, every 2": Row(Svdd(32, every=2), "head", NOISY),
    "fk of 4": Row(FkSteering(4), "head", NOISY),
    "fk of 7": Row(FkSteering(7), "head", NOISY),
    "fk of 6, every 2": Row(FkSteering(6, every=2), "head", NOISY),
    **{f"fk of {n}, strength 4": Row(FkSteering(n, strength=4.0), "head", NOISY) for n in (4, 7)},
    "fk of 6, every 2, strength 4": Row(FkSteering(6, every=2, strength=4.0), "head", NOISY),
    **{f"fk of {n}, every 1, strength 4": Row(FkSteering(n, every=1, strength=4.0), "head", NOISY) for n in (3, 5)},
    "fk of 4, max": Row(FkSteering(4, potential="max"), "head", NOISY),
    "dlbs, 2 beams of 2": Row(BeamSearch(2, children=2), "head", NOISY),
    "tree of 4": Row(TreeSearch(4), "head", NOISY),
    "tree of 4, greedy": Row(TreeSearch(4, greedy=True), "head", NOISY),
    "latsearch of 6": Row(LatSearch(6)),
    "doit": Row(Doit(4)),
    "noise, 3 rounds of 3": Row(NoiseSearch(3)),
    "noise, gradient, 3 rounds": Row(NoiseSearch(1, look_at=0.3, gradient=True, rate=0.3)),
    "guidance": Row(GuidedSampling(1)),
    "guidance, strength 3": Row(GuidedSampling(1, strength=3.0)),
}
COMPARED = ("best of 8, at 0.5", "best of 8, at 0.75", "best of 8, at the end")
READ_AGAIN = [f"best of {n}, at the end" for n in (4, 8)]
CEILING = [f"best of {n}, at the end" for n in (2, 4, 8, 16)]  # the oracle judges finished videos
ROWS = (
    METHODS
    | {f"{name} (pixel)": replace(METHODS[name], reward="pixel", equal_to=METHODS[name]) for name in COMPARED}
    | {f"{name} (random)": replace(METHODS[name], reward="random") for name in COMPARED}
    | {f"{name} (read again)": replace(METHODS[name], reward="head again") for name in READ_AGAIN}
    | {f"{name} (oracle)": replace(METHODS[name], reward="oracle") for name in CEILING}
)

# What a setting of Feynman-Kac steering is chosen from, on a seed that no other row is drawn with (--rows tried).
TRIED = {
    f"fk of {n}, every {every}, strength {strength} (read again)": Row(
        FkSteering(n, every=every, strength=float(strength)), "head again", NOISY
    )
    for n, every, strength in product(range(3, 12), (1, 2, 3), (2, 4, 8))
}


class World:
    """A generator at one guidance scale and seed, and the rewards that steer it."""

    def __init__(self, policy: Path | None, guidance: float, seed: int, steps: int, batch: int = 64) -> None:
        base = [f"evaluation.seed={seed}", f"evaluation.guidance_scale={guidance}", f"evaluation.steps={steps}"]
        self.config: Config = load_config(CONFIG, base)
        if policy is not None:
            self.config = finished_run_config(policy, base)
        self.model: Backbone = build_backbone(self.config)
        self.adapter = None
        if policy is not None:
            load_policy(self.config, self.model)
            self.adapter = policy_adapter_name(self.config)
        self.settings: SamplingSettings = replace(sampling_settings(self.config), batch=batch)
        self.prices = prices(guidance)
        self.head = load_reward("shapes", self.model, adapter_name="steering")
        self.seed = seed

    def look(self, reward: str) -> Look:
        if reward == "pixel":
            return pixel_look(pixel_reward(self.model), self.model, aggregate="logsigmoid")
        if reward == "random":
            return random_look(self.seed)
        assert reward in ("head", "head again"), "the oracle is asked of the pool alone"
        look = latent_look(self.head, aggregate="logsigmoid")  # type: ignore[arg-type] # a latent one
        return look if reward == "head" else replace(look, levels=steering_pool.AGAIN_AT)

    def schedule(self, solver: str, steps: int) -> SolverSchedule:
        shape = self.model.latent_shape(self.settings.frames, self.settings.height, self.settings.width)
        sigmas = self.model.sigmas(steps, shape, self.settings.shift)
        return SOLVERS[solver](sigmas, **({"eta": 1.0} if solver == NOISY else {}))

    def begin(self, prompts: Sequence[str], indices: Sequence[int]) -> Process:
        looks, schedule = [self.look("head")], self.schedule("euler", self.settings.steps)
        return process_of(self.model, prompts, indices, self.settings, schedule, looks, adapter=self.adapter)


def pixel_reward(model: Backbone) -> PixelReward:
    return PixelReward.from_pretrained(PIXEL, device=model.facts.device)


@cache
def prices(guidance: float) -> Prices:
    return Prices(1.0 if guidance == 1 else 2.0, decode_price(load_config(CONFIG)))


@cache
def a_world() -> World:
    """Of which only what all of them have in common is asked."""
    return World(None, 1.0, 0, STEPS[0])


@cache
def method_of(row: Row, guidance: float, steps: int) -> tuple[Method, Calls]:
    """The row's method, with as many chains as the calls of another row allow, and what one video costs."""
    facts = a_world().schedule(row.solver, steps), [cost_of(row.reward)], prices(guidance)
    method = row.method
    if row.equal_to is not None:
        method = within(method_of(row.equal_to, guidance, steps)[1].total, method, *facts)
    return method, calls_of(method, *facts)


@cache
def cost_of(reward: str) -> Look:
    """A look that costs what the reward's does.  The oracle's verdict is free: it is a ceiling."""
    if reward == "pixel":
        return Look(lambda clean, sigma, condition: clean, clean=True, decodes=1)
    return a_world().look("random" if reward == "oracle" else reward)
