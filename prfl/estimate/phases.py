"""What each phase of a run adds to the memory at its peak, one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from prfl.backbone import Backbone
from prfl.backbone.cheaper import EXACT
from prfl.config.schema import Config
from prfl.estimate.live_tensors import LiveBytes
from prfl.estimate.nfe import evaluation_samples
from prfl.estimate.parts import Part, Shapes, module_bytes, parks_vae, sum_bytes
from prfl.estimate.stored_latents import all_plans, earlier_outputs, leads_on
from prfl.factory.backbone import POLICY, device_kind, policy_adapter_name
from prfl.factory.evaluation import sampling_settings
from prfl.factory.objective import build_scorer
from prfl.factory.reward import Reward
from prfl.factory.rollout import build_cheaper
from prfl.objective.reward_gradient import retains_graph
from prfl.reward.ensemble import RewardEnsemble
from prfl.reward.frames import decode_frames
from prfl.reward.latent import LatentReward
from prfl.reward.scorer import PixelScorer
from prfl.rollout.guidance import guided_network
from prfl.rollout.trajectory import Network


def all_phases(config: Config, model: Backbone, reward: Reward | None, shapes: Shapes, trained: int) -> Iterator[Part]:
    """Yield the phases of a run in their order.  trained: bytes of the trained parameters' gradients."""
    training = config.training
    part = training.batch // training.accumulation
    vae = module_bytes(model.vae) if parks_vae(config) else 0

    # Before the training.
    yield encoding_prompts(config, model)
    if config.data.has_clips:
        yield measure(f"filling the cache: encode {config.data.encode_batch}", partial(_encode, config, shapes), vae)

    # A step.
    if preference := config.preference:
        assert reward is not None
        scored = part * preference.samples_compared
        yield from reward_phases(config, model, reward, shapes, scored, held=0)
    else:
        call = network_call(config, model, shapes, part, gradient=True)
        if config.follows_reward:
            assert reward is not None
            yield rollout_call(config, model, shapes, part)
            held = call.saved if any(retains_graph(model, step_plan) for step_plan in all_plans(config, model)) else 0
            assert config.reward is not None
            yield from reward_phases(config, model, reward, shapes, min(part, config.reward.batch or part), held)
        yield call
    yield Part("optimizer step (one more copy of what is trained)", trained)

    # The evaluation.
    if evaluation_samples(config):
        batch = _evaluation_batch(config)
        if batch > part:
            call = network_call(config, model, shapes, batch, gradient=False)
            earlier = earlier_outputs(sampling_settings(config).chain(model.default_shift))
            size = call.bytes + earlier * sum_bytes([shapes.latents(batch)])
            yield replace(call, name=f"evaluation: draw {batch}", bytes=size)
        decoding = measure(f"evaluation: decode {batch}", partial(_decode, model, shapes, batch), vae)
        if model.offload:  # the transformer waits on the host
            away = sum(map(module_bytes, (model.transformer, *model.copies.values())))
            decoding = replace(decoding, bytes=max(0, decoding.bytes - away))
        yield decoding


def encoding_prompts(config: Config, model: Backbone) -> Part:
    """Return the phase of the text encoder.

    ``encode_prompts`` has the rest of the model wait on the host; filling a cache does not.
    """
    here = module_bytes(model.text_encoder)
    if device_kind(config) == "cpu" or config.data.has_clips:
        here += sum(map(module_bytes, (model.transformer, *model.copies.values(), model.vae)))
    return Part("encoding the prompts: the text encoder, freed afterwards", here, alone=True)


def measure(name: str, run: Callable[[], Tensor], weights: int) -> Part:
    """Measure a phase without gradients.  weights: bytes that are on the device for this phase alone."""
    with LiveBytes() as counted, torch.no_grad():
        run()
    return Part(name, counted.peak + weights)


def _encode(config: Config, shapes: Shapes) -> Tensor:
    return shapes.model.encode(shapes.pixels(config.data.encode_batch).clone())


def _decode(model: Backbone, shapes: Shapes, batch: int) -> Tensor:
    return model.decode(shapes.latents(batch)).float().clamp(-1, 1)


def _evaluation_batch(config: Config) -> int:
    evaluation = config.evaluation
    of_round = evaluation.prompts_per_round * evaluation.samples_per_prompt if evaluation.every else 0
    return min(evaluation.batch, max(of_round, evaluation.final_samples))


def guided(config: Config, model: Backbone, shapes: Shapes, batch: int) -> Network:
    """Return the network as training calls it."""
    guidance, follows_reward = config.rollout.guidance, config.follows_reward
    return guided_network(
        model.velocity,
        shapes.condition(batch),
        shapes.condition(batch),
        scale=guidance.scale if follows_reward else 1.0,
        gradient=guidance.gradient if follows_reward else "none",
    )


def network_call(config: Config, model: Backbone, shapes: Shapes, batch: int, *, gradient: bool) -> Part:
    """Measure one network call as training makes it: guided, under the adapter, with or without its backward pass.

    Measured with three and with four checkpoints of blocks: every further one adds what the fourth added.
    """
    latents, network = shapes.latents(batch), guided(config, model, shapes, batch)
    # Where one walked step leads on to another, the cotangent goes on to the latents.
    chained = config.follows_reward and any(leads_on(step_plan.plan) for step_plan in all_plans(config, model))

    def run() -> Part:
        leaf = latents.clone().requires_grad_(chained and gradient)
        policy = policy_adapter_name(config)
        dropout = model.dropping(policy, no_seeds(batch))
        with LiveBytes() as counted, torch.set_grad_enabled(gradient), model.adapter(policy), dropout:
            output = network(leaf, torch.tensor(0.5))
            saved = counted.live
            if gradient:
                output.backward(torch.zeros_like(output))
        name = "walk back: a network call, forward and backward" if config.follows_reward else "forward and backward"
        return Part(name, counted.peak, saved) if gradient else Part("rollout: one network call", counted.peak)

    return for_all_blocks(model, run)


def rollout_call(config: Config, model: Backbone, shapes: Shapes, batch: int) -> Part:
    """Measure a network call of the rollout: the larger of an exact one and a cheaper one.

    A cheaper one has what its step cache holds between two calls; the cache is taken to skip nothing.
    """
    exact, how = network_call(config, model, shapes, batch, gradient=False), build_cheaper(config)
    if how == EXACT:
        return exact
    network = guided(config, model, shapes, batch)

    def run() -> Part:
        dropout = model.dropping(policy_adapter_name(config), no_seeds(batch))
        with LiveBytes() as counted, torch.no_grad(), model.adapter(policy_adapter_name(config)), dropout:
            calls = model.cheaper(how)
            for node in range(2):
                with calls.at(node):
                    network(shapes.latents(batch), torch.tensor(0.5))
        return Part(exact.name, counted.peak)

    return max(exact, for_all_blocks(model, run), key=lambda part: part.bytes)


def for_all_blocks(model: Backbone, run: Callable[[], Part]) -> Part:
    """Call ``run`` with three and with four checkpoints of blocks, and continue the straight line to all of them.

    (From three on: with offload, the last block and two more are alive at once.)  Blocks that are not alike, as where
    an adapter is on some of them, are run one and all.
    """
    total, group = model.num_blocks, model.blocks_a_checkpoint
    if total <= 4 * group or not _blocks_alike(model):
        return run()
    three, four = (_with_blocks(model, count * group, run) for count in (3, 4))
    further = total // group - 4
    return Part(
        four.name,
        four.bytes + further * (four.bytes - three.bytes),
        four.saved + further * (four.saved - three.saved),
    )


def _blocks_alike(model: Backbone) -> bool:
    """Return whether the policy's adapter is on all blocks or none, and all keep the same for the backward pass."""
    if len(set(model.block_modes or ())) > 1:
        return False
    name = f".lora_A.{POLICY}."
    adapted = [any(name in key for key, _ in block.named_parameters()) for block in model.transformer.blocks]
    return len(set(adapted)) == 1


def _with_blocks(model: Backbone, count: int, run: Callable[[], Part]) -> Part:
    with fewer_blocks(model, count):
        return run()


@contextmanager
def fewer_blocks(model: Backbone, count: int) -> Iterator[None]:
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
    config: Config, model: Backbone, reward: Reward, shapes: Shapes, batch: int, held: int
) -> Iterator[Part]:
    """Yield the reward's forward and backward.  held: bytes of a network call's graph that stay alive beside it."""
    trains = config.trains_reward
    latents, condition = shapes.latents(batch), shapes.condition(batch)

    # A latent reward, trained or followed.
    if isinstance(reward, LatentReward | RewardEnsemble):
        leaf = latents.requires_grad_(not trains)
        trained = trains and isinstance(reward, LatentReward)
        dropout = reward.dropping(no_seeds(batch)) if trained else nullcontext()  # type: ignore[union-attr]
        with LiveBytes() as counted, reward.selected(), dropout:
            scores = reward.logits(leaf, torch.tensor(0.5), condition)
            saved = counted.live
            backward(scores, leaf, trains)
        yield Part("reward: forward and backward", held + counted.peak, saved)
        return

    # A pixel reward that is trained: the decoder only makes its input.
    if preference := config.preference:
        yield measure("decoder: forward", partial(_decode, model, shapes, batch), 0)
        pixels = shapes.pixels(batch)[:, :, : preference.frames]
        leaf, times = pixels, torch.linspace(0, 1, pixels.shape[2])
        with LiveBytes() as counted:
            scores = reward.logits(leaf, condition, times)
            saved = counted.live
            backward(scores, leaf, trains)
        yield Part("reward: forward and backward", counted.peak, saved)
        return

    # A pixel reward that is followed: the decoder's graph is kept for the gradient.
    leaf = latents.requires_grad_()
    scorer = build_scorer(config, model, reward)
    assert isinstance(scorer, PixelScorer)
    count = latents.shape[2]
    chosen = costliest_frames(count, scorer.frames)
    with LiveBytes() as counted, scorer.selected():
        pixels, times = decode_frames(model, leaf, chosen)
        decoder, decoder_peak = counted.live, counted.peak
        scores = scorer.read(pixels, times, condition, chosen, count)
        saved = counted.live - decoder
        backward(scores, leaf, trains)
    yield Part("decoder: forward, kept for the reward's gradient", held + decoder_peak, decoder)
    yield Part("reward and decoder: forward and backward", held + counted.peak, saved)


def no_seeds(batch: int) -> Tensor:
    """Return seeds of dropout masks, on ``meta``, where none is drawn."""
    return torch.zeros(batch, dtype=torch.int64, device="meta")


def backward(scores: dict[str, Tensor], leaf: Tensor, trains: bool) -> None:
    total = torch.stack(list(scores.values())).sum()
    if trains:
        total.backward()
    else:
        torch.autograd.grad(total, leaf)


def costliest_frames(count: int, frames: str | int) -> list[int]:
    """Return the draw of latent frames that keeps the most: what lies between the first and the last drawn stays."""
    number = count if frames == "all" else 1 if frames == "one" else min(int(frames), count)
    return [*range(number - 1), count - 1]
