"""One score with its gradient, by each reward that others trained, beside the latent head's.

The networks have the published sizes and random weights, which take as long as trained ones.  A pixel reward's gradient
is that at the decoded pixels: the decoder is a piece by itself (piece_cases: ``decode``).  These are different rewards,
so nothing is compared.

``reward_on_cpu`` has the same widths and the same 480 x 832 pixels, but one frame (or what a reward reads of a video),
and of each network the first layers only, so many that a run has about ``CPU_TFLOP``: the share of the whole's
arithmetic is a fact of its row.  Whole networks are counted, by bench/public_rewards.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.initialization import no_init_weights

from bench.cases.piece_cases import LATENT, config, facts, inputs, weights
from bench.harness import worlds
from bench.harness.facts import REPOSITORY
from bench.harness.problem import Case, Outputs, Problem, Work
from bench.harness.report import SHARE, TFLOP
from prfl.backbone import Backbone
from prfl.backbone.condition import Ask, Condition
from prfl.config import load_config
from prfl.config.schema import Config
from prfl.config.sections.public_rewards import CallableConfig, CriticConfig
from prfl.estimate.live_tensors import fused_on_meta
from prfl.estimate.parts import Shapes
from prfl.estimate.phases import reward_phases
from prfl.estimate.work import Counted
from prfl.estimate.work import Work as CountedWork
from prfl.factory.backbone import build_architecture
from prfl.factory.objective import build_reward_gradient
from prfl.factory.reward import PUBLIC_REWARDS, Reward, build_new_reward
from prfl.objective.loss import loss_gradient

CPU_WORLD = "wan-1.3b"
CPU_TFLOP = 0.1  # of a run on a CPU, about: a second or two on one core
CPU_SHAPE = ("data.frames=1", "backbone.device=cpu")
CPU_BLOCK = 0  # the head's, of those that its config has
NOT_ON_CPU = {  # what is not run there, and why
    "pickscore": "its network is that of hps",
    "hpsv3": "its network is of videoalign's kind, and one layer of each stack is a TFLOP",
}
READ = {"action": 16, "coherence": 16, "videoalign": 4}  # frames that a reward of whole videos reads, at least
# bench/study_critic.py measures the critic; a user's own function has no size.
KINDS: Mapping[str, Any] = {
    section.key.removeprefix("reward."): kind.untrained
    for section, kind in PUBLIC_REWARDS.items()
    if section not in (CallableConfig, CriticConfig)
}


def cases(world: str) -> list[Case]:
    if world == "tiny":
        names = (name for name in KINDS if name not in NOT_ON_CPU)
        return [Case("reward_on_cpu", reward_on_cpu, {}, (LATENT, *names), memory=False)]
    return [Case("reward", reward, {"world": world}, (LATENT, *KINDS), worlds.WORLDS[world].needs)]


def reward(world: str) -> Problem:
    """Measure whole networks on all frames of the world's video."""
    plain = config(world)
    model = worlds.backbone(plain)
    latents, condition = inputs(plain, model)
    size = len(latents), 3, plain.data.frames, plain.data.height, plain.data.width

    def of_pixels(name: str) -> Work:
        with torch.device(model.facts.device):
            return pixel_work(KINDS[name](), size, condition)

    def of_latents() -> Work:
        return latent_work(plain, model, worlds.reward(world, plain, model))

    works = {name: partial(of_pixels, name) for name in KINDS}
    return Problem({LATENT: of_latents, **works}, LATENT, **facts(plain, latents))


def reward_on_cpu() -> Problem:
    """Measure what a CPU runs in seconds: one frame, and the first layers of each network."""
    plain = config(CPU_WORLD, *CPU_SHAPE)
    works = {name: partial(shortened, name, plain) for name in KINDS if name not in NOT_ON_CPU}
    shapes = {"pixels": [plain.data.height, plain.data.width]}
    of_latents = partial(shortened_head, plain)
    return Problem({LATENT: of_latents, **works}, LATENT, torch.float32, shapes=shapes)


def shortened(name: str, plain: Config) -> Work:
    """Make the work of a reward's first layers."""
    size = 1, 3, READ.get(name, 1), plain.data.height, plain.data.width
    condition = Condition({}, (Ask("a dog runs on the beach"),))
    with torch.device("meta"):
        on_meta = KINDS[name]()
    whole = arithmetic(on_meta, size, condition)
    shorten(on_meta, CPU_TFLOP / whole)
    cut = arithmetic(on_meta, size, condition)

    with no_init_weights():  # what is cut off is never drawn, and takes no memory
        network = KINDS[name]()
    shorten(network, CPU_TFLOP / whole)
    draw(module for part in network.networks for module in part.modules())
    return pixel_work(network, size, condition)._replace(facts={TFLOP: cut, SHARE: cut / whole})


def shortened_head(plain: Config) -> Work:
    """Make the work of a latent head behind the first of the blocks that it reads otherwise."""
    whole, cut = (head_arithmetic(plain, overrides) for overrides in ((), (f"reward.head.blocks=[{CPU_BLOCK}]",)))
    with no_init_weights():
        model = worlds.backbone(plain)
    unread = set(model.networks["transformer"].blocks[CPU_BLOCK + 1 :].modules())
    draw(module for network in model.networks.values() for module in network.modules() if module not in unread)
    reward = new_head(model, f"reward.head.blocks=[{CPU_BLOCK}]").freeze()
    return latent_work(plain, model, reward)._replace(facts={TFLOP: cut, SHARE: cut / whole})


def new_head(model: Backbone, *overrides: str) -> Any:
    """Make the new head that the world's config describes."""
    file, *plain = worlds.WORLDS[CPU_WORLD].latent
    return build_new_reward(load_config(REPOSITORY / file, [*plain, *overrides]), model)


def head_arithmetic(plain: Config, overrides: Iterable[str]) -> float:
    """Count the TFLOP of a new head's score and its gradient."""
    model = build_architecture(plain)
    with torch.device("meta"):
        head = new_head(model, *overrides).freeze()
    with fused_on_meta("cpu"):
        (part,) = reward_phases(plain, model, head, Shapes(model, plain), 1, held=0)
    return teraflops(part.work)


def latent_work(plain: Config, model: Backbone, reward: Reward) -> Work:
    """Score latents at sigma 0.5, with the gradient at the latents."""
    latents, condition = inputs(plain, model)
    objective = build_reward_gradient(plain, model, reward, None)

    def run(_: Any) -> Outputs:
        sigma = torch.tensor(0.5, device=model.facts.device)
        return {"gradient": loss_gradient(objective.scorer, objective.loss, latents, sigma, condition, 0)[0]}

    return Work(run, constant=weights(model))


def pixel_work(network: Any, size: tuple[int, ...], condition: Condition) -> Work:
    """Score random pixels, with the gradient at them."""
    pixels = (torch.rand(size) - 0.5).requires_grad_()

    def run(_: Any) -> None:
        scores = network(pixels, condition)
        torch.autograd.grad(torch.stack(list(scores.values())).sum(), pixels)

    return Work(run, constant=[*network.parameters(), pixels])


def arithmetic(on_meta: Any, size: tuple[int, ...], condition: Condition) -> float:
    """Count the TFLOP of a score and its gradient; V-JEPA 2's predictor is not counted, which is small."""
    with torch.device("meta"), fused_on_meta("cpu"):
        work = pixel_work(on_meta, size, condition)
        with Counted() as counted:
            work.run(None)
    return teraflops(counted.work)


def teraflops(work: CountedWork) -> float:
    return sum(amount for (_, unit), amount in work.amounts.items() if unit == "GFLOP") / 1e3


def shorten(reward: Any, share: float) -> None:
    """Keep this share of the layers of every stack, from the first on, and at least one."""
    for stack, put in list(stacks(reward)):
        put(stack[: max(1, round(share * len(stack)))])


def stacks(reward: Any) -> Iterator[tuple[nn.ModuleList, Callable[[nn.Module], None]]]:
    """Yield the stacks of layers of a reward's networks, each with what puts another in its place."""
    for module in [module for network in reward.networks for module in network.modules()]:
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) >= 4:
                yield child, partial(setattr, module, name)


@torch.no_grad()
def draw(modules: Iterable[nn.Module]) -> None:
    """Draw the weights of networks that were made without: matrices small, norms one, biases zero."""
    for module in modules:
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                parameter.zero_()
            elif name == "weight":
                parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(0, 0.02)
