"""The peak memory of a run, by part, before it starts.

The network, the decoder and the reward are run forward and backward on ``meta`` at the run's own shapes, and their
tensors are counted (``live_bytes``): dtype, adapter and checkpointing are in the count because they are in the code.
Not in it: cuDNN's workspaces, the CUDA context, the allocator's gaps.  Leave a tenth of the memory for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from prfl import build
from prfl.backbone import Condition, WanBackbone
from prfl.backbone.architecture import cast
from prfl.backbone.wan import TEXT_TOKENS
from prfl.config.schema import Config, PixelRewardConfig, PreferenceConfig
from prfl.config.steering_schema import SteeringConfig
from prfl.errors import located
from prfl.forecast.live_bytes import LiveBytes, fused_on_meta
from prfl.forecast.rewards import reward_on_meta
from prfl.forecast.work import evaluation_samples
from prfl.objective import sft
from prfl.objective.pathwise import Choice, holds_edge
from prfl.objective.reuse import span
from prfl.objective.scorer import PixelScorer, decode_frames
from prfl.reward.ensemble import RewardEnsemble
from prfl.reward.latent import LatentReward
from prfl.reward.pixel import PixelReward
from prfl.rollout import Plan, guided_network
from prfl.solvers import Coefficients

ADAM_MOMENTS = 2


@dataclass(frozen=True)
class Part:
    """Bytes of one thing.  saved: how many of them autograd keeps for the backward pass (of a phase).  alone: a phase
    before the training, with all there is by then: what is fixed is not alive yet."""

    name: str
    bytes: int
    saved: int = 0
    alone: bool = False


@dataclass(frozen=True)
class Memory:
    """fixed: what is alive all the time.  phases: what each phase of a step adds at its peak, one after another.

    trainable: number of trained parameters.  assumed: in words, what was not known; empty where everything was.
    host: bytes that a GPU run moves to host memory (``backbone.offload``).
    """

    fixed: list[Part]
    phases: list[Part]
    trainable: int
    assumed: str = ""
    host: int = 0

    @property
    def largest(self) -> Part:
        return max(self.phases, key=self._with_fixed)

    @property
    def peak(self) -> int:
        return self._with_fixed(self.largest)

    def _with_fixed(self, phase: Part) -> int:
        return phase.bytes + (0 if phase.alone else sum(part.bytes for part in self.fixed))


def device_kind(config: Config) -> str:
    """cpu or cuda: what the config asks for, here or elsewhere; ``auto`` is what is here."""
    chosen = config.backbone.device
    return chosen if chosen != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def predict_memory(config: Config, model: WanBackbone) -> Memory:
    """model: ``build.architecture(config)``; it gets gradients, so use it for nothing else."""
    model.offload = offloads(config)
    reward, assumed = reward_on_meta(config, model)
    trained = trained_parameters(config, model, reward)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    shapes = Shapes(model, config)
    fixed = list(fixed_parts(config, model, reward, trained, shapes))
    fixed += without_autocast(model)
    with fused_on_meta(device_kind(config)):
        phases = list(
            _phases(config, model, reward, shapes, sum_bytes([p.grad for p in trained if p.grad is not None]))
        )
        host = host_bytes(config, model, shapes) if model.offload else 0
    if config.rollout.gradients_per_rollout > 1 and device_kind(config) == "cuda":
        host += stored_rollout(config, model)[0] * pinned(sum_bytes([shapes.latents(config.training.batch)]))
    return Memory(fixed, phases, sum(parameter.numel() for parameter in trained), assumed, host)


def without_autocast(model: WanBackbone) -> Iterator[Part]:
    """``meta`` knows no autocast: weights that are wider than what is computed in are made that narrow, and the copies
    that autocast makes of them (one of each, until a call ends) are a part of their own."""
    for network in {model.transformer, *model.copies.values()}:
        if network.patch_embedding.weight.dtype != model.dtype:
            yield Part(
                f"the weights in {str(model.dtype).removeprefix('torch.')}, by autocast",
                module_bytes(cast(network, model.dtype)),
            )


def offloads(config: Config) -> bool:
    """Whether anything leaves the device: on a CPU, host memory is the same memory."""
    return config.backbone.offload and device_kind(config) == "cuda"


def parks_vae(config: Config) -> bool:
    """Whether the VAE is off the device but for the cache and the evaluation: a pixel reward decodes in every step."""
    return device_kind(config) == "cuda" and not isinstance(config.reward, PixelRewardConfig)


def host_bytes(config: Config, model: WanBackbone, shapes: Shapes) -> int:
    """Host memory of one network call's checkpointed blocks and of the rollout's latents."""
    part = config.training.batch // config.training.accumulation
    with_store = network_call(config, model, shapes, part, gradient=True).saved
    model.offload = False
    without = network_call(config, model, shapes, part, gradient=True).saved
    model.offload = True
    tokens = math.prod(shapes.latent[1:]) // math.prod(model.patch_size)
    hidden = part * tokens * model.width * model.dtype.itemsize  # of which the blocks keep one or two
    rolled = 0
    if isinstance(config.objective, SteeringConfig):  # all but the end of the rollout, which is wanted first
        rolled = max(len(_rolled(choice, config.rollout.steps)) for choice in _choices(config, model)) - 1
    return (without - with_store) // hidden * pinned(hidden) + rolled * pinned(sum_bytes([shapes.latents(part)]))


def pinned(size: int) -> int:
    """torch takes pinned memory in powers of two."""
    return 1 << (size - 1).bit_length()


def trained_parameters(config: Config, model: WanBackbone, reward: build.Reward | None) -> list[nn.Parameter]:
    if isinstance(config.objective, PreferenceConfig):
        assert isinstance(reward, LatentReward | PixelReward)
        return list(reward.parameters().values())
    return list(sft.trained_parameters(model, build.policy_adapter(config)).values())


def sum_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def module_bytes(module: nn.Module) -> int:
    return sum_bytes([*module.parameters(), *module.buffers()])


class Shapes:
    """Tensors of a run's shapes, on ``meta``."""

    def __init__(self, model: WanBackbone, config: Config) -> None:
        self.model = model
        self.clip = config.data.frames, config.data.height, config.data.width
        with located("data"):
            self.latent = model.latent_shape(*self.clip)
        self.tokens = text_tokens(config)

    def latents(self, batch: int) -> Tensor:
        return torch.empty(batch, *self.latent, device="meta")

    def pixels(self, batch: int) -> Tensor:
        return torch.empty(batch, 3, *self.clip, device="meta")

    def condition(self, batch: int) -> Condition:
        embeds = torch.empty(batch, self.tokens, self.model.text_width, device="meta", dtype=self.model.dtype)
        return Condition(embeds, torch.full((batch,), self.tokens))


def text_tokens(config: Config) -> int:
    """The longest prompt in tokens, or more: no tokenizer makes more tokens of a text than it has bytes, and an end."""
    known = build.prompts(config.data.prompts).values()
    longest = max(len(prompt.encode()) + 1 for some in known for prompt in some)
    return min(longest, TEXT_TOKENS)


# ------------------------------------------------------------------------------------------------- alive all the time


def fixed_parts(
    config: Config, model: WanBackbone, reward: build.Reward | None, trained: list[nn.Parameter], shapes: Shapes
) -> Iterator[Part]:
    own = [p for n, p in model.transformer.named_parameters() if ".lora_" not in n]
    name = "frozen base, which reward and distance read" if model.copies else "transformer weights"
    yield Part(name, sum_bytes([*own, *model.transformer.buffers()]))
    if model.copies:
        yield Part("trained copy of all weights, in float32", sum(map(module_bytes, model.copies.values())))
    if not parks_vae(config):
        yield Part("VAE weights", module_bytes(model.vae))
    size = sum_bytes(trained)
    if config.backbone.train == "lora":
        yield Part("trained weights" if isinstance(config.objective, PreferenceConfig) else "adapter weights", size)
    yield Part("gradients", size)
    yield Part("optimizer (two averages)", ADAM_MOMENTS * size)
    if config.training.ema_decay is not None:
        yield Part("EMA of the weights", size)
    if reward is not None and isinstance(config.objective, SteeringConfig):
        yield Part("reward weights", sum_bytes(reward_tensors(reward)))
    part = config.training.batch // config.training.accumulation
    count = 4  # clean, noise and noisy, and what is predicted
    if isinstance(config.objective, SteeringConfig):
        alive = [_latents_of(choice, config.rollout.steps, offloads(config)) for choice in _choices(config, model)]
        count = max(alive)
    latents = count * sum_bytes([shapes.latents(part)])
    yield Part("latents and prompt embeddings", latents + sum_bytes([shapes.condition(part).prompt_embeds]))
    if isinstance(config.objective, SteeringConfig) and (earlier := earlier_outputs(build.chain(config, model))):
        yield Part("earlier outputs of a multistep solver", earlier * sum_bytes([shapes.latents(part)]))
    if config.rollout.gradients_per_rollout > 1:
        waiting, here = stored_rollout(config, model)
        of_all = sum_bytes([shapes.latents(config.training.batch)])
        on_cpu = waiting * of_all + size if device_kind(config) == "cpu" else 0
        yield Part("rollout that several steps use, and the weights that made it", here * of_all + on_cpu)


def stored_rollout(config: Config, model: WanBackbone) -> tuple[int, int]:
    """What a rollout for several steps keeps of a sample, at most: latents that wait in host memory; its outputs and
    its end, which stay where they are made."""
    choices, steps = _choices(config, model), config.rollout.gradients_per_rollout
    spans = [span(choices[first : first + steps], 1, held_edge=False) for first in range(0, len(choices), steps)]
    return max(len(own.latents - {own.path[-1]}) for own in spans), max(len(own.outputs) for own in spans) + 1


def earlier_outputs(chain: Coefficients) -> int:
    """How many network outputs a rollout holds at most beside the one that it has just made."""
    return max(map(len, chain.b)) - 1


def reward_tensors(reward: build.Reward) -> list[Tensor]:
    if isinstance(reward, RewardEnsemble):
        return [tensor for member in reward.members for tensor in member.state().values()]
    if isinstance(reward, LatentReward | PixelReward):
        return list(reward.state().values())
    return [p for part in (reward.vision, reward.projection, reward.mlp) for p in part.parameters()]


# ------------------------------------------------------------------------------------------------- one after another


def _phases(
    config: Config, model: WanBackbone, reward: build.Reward | None, shapes: Shapes, trained: int
) -> Iterator[Part]:
    objective, training = config.objective, config.training
    part = training.batch // training.accumulation
    vae = module_bytes(model.vae) if parks_vae(config) else 0
    yield encoding_prompts(config, model)
    if build.has_clips(config):
        yield measure(f"filling the cache: encode {config.data.encode_batch}", partial(_encode, config, shapes), vae)
    if isinstance(objective, PreferenceConfig):
        assert reward is not None
        sides = part * (1 if objective.loss == "bce" else 2)
        yield from reward_phases(config, model, reward, shapes, sides, held=0)
    else:
        call = network_call(config, model, shapes, part, gradient=True)
        if isinstance(objective, SteeringConfig):
            assert reward is not None
            yield network_call(config, model, shapes, part, gradient=False)
            held = call.saved if any(holds_edge(model, choice) for choice in _choices(config, model)) else 0
            assert config.reward is not None
            yield from reward_phases(config, model, reward, shapes, min(part, config.reward.batch or part), held)
        yield call
    yield Part("optimizer step (one more copy of what is trained)", trained)
    if evaluation_samples(config):
        batch = _evaluation_batch(config)
        if batch > part:
            call = network_call(config, model, shapes, batch, gradient=False)
            earlier = earlier_outputs(build.sampling(config).chain(model.default_shift))
            size = call.bytes + earlier * sum_bytes([shapes.latents(batch)])
            yield replace(call, name=f"evaluation: draw {batch}", bytes=size)
        yield measure(f"evaluation: decode {batch}", partial(_decode, model, shapes, batch), vae)


def encoding_prompts(config: Config, model: WanBackbone) -> Part:
    """The text encoder.  ``remember`` has the rest of the model wait on the host; filling a cache does not."""
    here = module_bytes(model.text_encoder)
    if device_kind(config) == "cpu" or build.has_clips(config):
        here += sum(map(module_bytes, (model.transformer, *model.copies.values(), model.vae)))
    return Part("encoding the prompts: the text encoder, freed afterwards", here, alone=True)


def measure(name: str, run: Callable[[], Tensor], weights: int) -> Part:
    """A phase without gradients.  weights: bytes that are on the device for this phase alone."""
    with LiveBytes() as counted, torch.no_grad():
        run()
    return Part(name, counted.peak + weights)


def _encode(config: Config, shapes: Shapes) -> Tensor:
    return shapes.model.encode(shapes.pixels(config.data.encode_batch).clone())


def _decode(model: WanBackbone, shapes: Shapes, batch: int) -> Tensor:
    return model.decode(shapes.latents(batch)).float().clamp(-1, 1)


def _evaluation_batch(config: Config) -> int:
    own = config.evaluation
    most = max(own.prompts_per_round * own.samples_per_prompt if own.every else 0, own.final_samples)
    return min(own.batch, most)


def _choices(config: Config, model: WanBackbone) -> list[Choice]:
    """What the steps of the run differentiate: some methods draw how much that is."""
    method = build.method(config, build.chain(config, model))
    return [method.choose(step) for step in range(config.training.steps)]


def _leads_on(plan: Plan) -> bool:
    useful = plan.useful_nodes
    return any(plan.passes(k, useful) for k in plan.evaluations)


def _rolled(choice: Choice, steps: int) -> set[int]:
    """The nodes whose latents outlive the rollout."""
    return {*choice.kept(steps, False), *choice.noised, *choice.seeds}


def _latents_of(choice: Choice, steps: int, offload: bool) -> int:
    """Latents that are alive together: the start, what the rollout keeps, what is scored, and a seed for each.

    With offload three of the rollout's are on the device: the one in use, the next, and its end, which never leaves.
    """
    rolled = len(_rolled(choice, steps))
    return 1 + (min(rolled, 3) if offload else rolled) + len(choice.seeds) - 1


def network_call(config: Config, model: WanBackbone, shapes: Shapes, batch: int, *, gradient: bool) -> Part:
    """One network call as training makes it: guided, under the adapter, with or without its backward pass.

    Measured with two and with three blocks: every further one adds what the third added.
    """
    steering = isinstance(config.objective, SteeringConfig)
    guidance = config.rollout.guidance
    latents, condition = shapes.latents(batch), shapes.condition(batch)
    # Where one walked step leads on to another, the cotangent goes on to the latents.
    chained = steering and any(_leads_on(choice.plan) for choice in _choices(config, model))
    network = guided_network(
        model.velocity,
        condition,
        shapes.condition(batch),
        scale=guidance.scale if steering else 1.0,
        gradient=guidance.gradient if steering else "none",
    )

    def run() -> Part:
        leaf = latents.clone().requires_grad_(chained and gradient)
        with LiveBytes() as counted, torch.set_grad_enabled(gradient), model.adapter(build.policy_adapter(config)):
            output = network(leaf, torch.tensor(0.5))
            saved = counted.live
            if gradient:
                output.backward(torch.zeros_like(output))
        name = "walk back: a network call, forward and backward" if steering else "forward and backward"
        return Part(name, counted.peak, saved) if gradient else Part("rollout: one network call", counted.peak)

    return for_all_blocks(model, run)


def for_all_blocks(model: WanBackbone, run: Callable[[], Part]) -> Part:
    """``run`` with two and with three blocks, continued to all of them: memory is a straight line in their number."""
    total = model.num_blocks
    if total <= 3:
        return run()
    two, three = (_with_blocks(model, count, run) for count in (2, 3))
    further = total - 3
    return Part(
        three.name,
        three.bytes + further * (three.bytes - two.bytes),
        three.saved + further * (three.saved - two.saved),
    )


def _with_blocks(model: WanBackbone, count: int, run: Callable[[], Part]) -> Part:
    with fewer_blocks(model, count):
        return run()


@contextmanager
def fewer_blocks(model: WanBackbone, count: int) -> Iterator[None]:
    networks = [model.transformer, *model.copies.values()]
    blocks = [network.blocks for network in networks]
    for network in networks:
        network.blocks = network.blocks[:count]
    model.num_blocks = count
    try:
        yield
    finally:
        for network, all_of_them in zip(networks, blocks, strict=True):
            network.blocks = all_of_them
        model.num_blocks = len(blocks[0])


def reward_phases(
    config: Config, model: WanBackbone, reward: build.Reward, shapes: Shapes, batch: int, held: int
) -> Iterator[Part]:
    """Forward and backward of the reward.  held: bytes of a network call's graph that stay alive beside it."""
    trains = isinstance(config.objective, PreferenceConfig)
    latents, condition = shapes.latents(batch), shapes.condition(batch)
    if isinstance(reward, LatentReward | RewardEnsemble):
        leaf = latents.requires_grad_(not trains)
        with LiveBytes() as counted, reward.selected():
            scores = reward.logits(leaf, torch.tensor(0.5), condition)
            saved = counted.live
            backward(scores, leaf, trains)
        yield Part("reward: forward and backward", held + counted.peak, saved)
        return
    if trains:
        assert isinstance(config.objective, PreferenceConfig)
        yield measure("decoder: forward", partial(_decode, model, shapes, batch), 0)
        pixels = shapes.pixels(batch)[:, :, : config.objective.frames]
        leaf, times = pixels, torch.linspace(0, 1, pixels.shape[2])
        with LiveBytes() as counted:
            scores = reward.logits(leaf, condition, times)
            saved = counted.live
            backward(scores, leaf, trains)
        yield Part("reward: forward and backward", counted.peak, saved)
        return
    leaf = latents.requires_grad_()
    assert isinstance(config.objective, SteeringConfig)
    frames = config.objective.frames
    with LiveBytes() as counted, PixelScorer(reward, model, config.seed).selected():
        pixels, times = decode_frames(model, leaf, costliest_frames(latents.shape[2], frames))
        decoder, decoder_peak = counted.live, counted.peak
        scores = reward.logits(pixels, condition, times)
        saved = counted.live - decoder
        backward(scores, leaf, trains)
    yield Part("decoder: forward, kept for the reward's gradient", held + decoder_peak, decoder)
    yield Part("reward and decoder: forward and backward", held + counted.peak, saved)


def backward(scores: dict[str, Tensor], leaf: Tensor, trains: bool) -> None:
    total = torch.stack(list(scores.values())).sum()
    if trains:
        total.backward()
    else:
        torch.autograd.grad(total, leaf)


def costliest_frames(count: int, frames: str | int) -> list[int]:
    """The draw of latent frames that keeps the most: everything between the first and the last drawn stays."""
    number = count if frames == "all" else 1 if frames == "one" else min(int(frames), count)
    return [*range(number - 1), count - 1]
