"""What each phase of a run adds to the memory at its peak, one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from prfl.backbone import Backbone, Condition
from prfl.backbone.cheaper import EXACT
from prfl.backbone.kernels import cheaper_calls
from prfl.backbone.network import base_blocks, with_lists
from prfl.config.schema import Config
from prfl.config.sections.experts import guided as guided_by
from prfl.estimate.nfe import evaluation_samples
from prfl.estimate.parts import Part, Shapes, module_bytes, parks_vae, predictor_bytes, sum_bytes
from prfl.estimate.stored_latents import earlier_outputs, leads_on
from prfl.estimate.work import Counted
from prfl.factory.backbone import POLICY, device_kind, policy_adapter_name
from prfl.factory.evaluation import sampling_settings
from prfl.factory.experts import trained_sigma
from prfl.factory.objective import build_scorer
from prfl.factory.reward import Reward
from prfl.factory.rollout import build_cheaper
from prfl.objective.reward_gradient import retains_graph
from prfl.reward.ensemble import RewardEnsemble
from prfl.reward.frames import decode_frames
from prfl.reward.latent import LatentReward
from prfl.reward.scorer import PixelScorer
from prfl.reward.several import LatentBeside
from prfl.rollout.guidance import guided_network
from prfl.rollout.trajectory import Network


def all_phases(config: Config, model: Backbone, reward: Reward | None, shapes: Shapes, trained: int) -> Iterator[Part]:
    """Yield the phases of a run in their order.  trained: bytes of the trained parameters' gradients."""
    training = config.training
    part = training.batch // training.accumulation
    vae = module_bytes(model.networks["vae"]) if parks_vae(config) else 0

    # Before the training.
    yield encoding_prompts(config, model)
    if "image" in model.facts.takes:
        yield measure("encoding the first frames, one by one", partial(_encode, shapes, 1), vae)
    if config.reads_clips:
        yield measure(
            f"filling the cache: encode {config.data.encode_batch}",
            partial(_encode, shapes, config.data.encode_batch),
            vae,
        )

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
            held = call.saved if any(retains_graph(model, step_plan) for step_plan in shapes.plans) else 0
            assert config.reward is not None
            yield from reward_phases(config, model, reward, shapes, min(part, config.reward.batch or part), held)
        yield call
    yield Part("optimizer step (one more copy of what is trained)", trained)

    # The evaluation.
    if evaluation_samples(config):
        batch = _evaluation_batch(config)
        if batch > part:
            call = network_call(config, model, shapes, batch, gradient=False)
            earlier = earlier_outputs(sampling_settings(config).chain(model, shapes.latent))
            size = call.bytes + earlier * sum_bytes([shapes.latents(batch)])
            yield replace(call, name=f"evaluation: draw {batch}", bytes=size, role=None)
        decoder = decoding(model, shapes, batch, f"evaluation: decode {batch}", vae)
        if model.running.offload:  # the transformer waits on the host
            away = predictor_bytes(config, model)
            decoder = replace(decoder, bytes=max(0, decoder.bytes - away))
        yield decoder


def encoding_prompts(config: Config, model: Backbone) -> Part:
    """Return the phase of the text encoder.

    ``encode_prompts`` has the rest of the model wait on the host; filling a cache does not.
    """
    here = module_bytes(model.text.encoder())
    if device_kind(config) == "cpu" or config.reads_clips:
        here += predictor_bytes(config, model) + module_bytes(model.networks["vae"])
    return Part("encoding the prompts: the text encoder, freed afterwards", here, alone=True)


def measure(name: str, run: Callable[[], Tensor], weights: int) -> Part:
    """Measure a phase without gradients.  weights: bytes that are on the device for this phase alone."""
    with Counted() as counted, torch.no_grad():
        run()
    return Part(name, counted.peak + weights, work=counted.work)


FEW_FRAMES = 3  # latent ones, from which on every further one adds as much as the one before


def decoding(model: Backbone, shapes: Shapes, batch: int, name: str, weights: int) -> Part:
    """Measure the decoding of whole videos: of three and of four latent frames, continued in a straight line.

    The first frame of a causal decoder, and the one behind it, are not like the others."""
    count = shapes.latent[1]

    def run(frames: int) -> Part:
        return measure(name, partial(_decode, model, shapes.latents(batch)[:, :, :frames]), weights)

    if count <= 2 * FEW_FRAMES or not model.facts.prefix_decodes:  # which may decode in groups
        part = run(count)
    else:
        part = continued(run(FEW_FRAMES), run(FEW_FRAMES + 1), count - FEW_FRAMES - 1)
    return replace(part, work=part.work * (1 / batch), role="decoder")


def _encode(shapes: Shapes, batch: int) -> Tensor:
    return shapes.model.encode(shapes.pixels(batch).clone())


def _decode(model: Backbone, latents: Tensor) -> Tensor:
    return model.decode(latents).float().clamp(-1, 1)


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
        scale=2.0 if follows_reward and guided_by(guidance.scale) else 1.0,  # whatever it is
        gradient=guidance.gradient if follows_reward else "none",
    )


def network_call(
    config: Config, model: Backbone, shapes: Shapes, batch: int, *, gradient: bool, saved_alone: bool = False
) -> Part:
    """Measure one network call as training makes it: guided, under the adapter, with or without its backward pass.

    saved_alone: of a call with gradient, only what it saves is asked for, and the backward pass is left out.
    Measured with three and with four checkpoints of blocks: every further one adds what the fourth added.
    """
    latents, network = shapes.latents(batch), guided(config, model, shapes, batch)
    # Where one walked step leads on to another, the cotangent goes on to the latents.
    chained = config.follows_reward and any(leads_on(step_plan.plan) for step_plan in shapes.plans)

    def run() -> Part:
        leaf = latents.clone().requires_grad_(chained and gradient)
        policy = policy_adapter_name(config)
        selected = model.adapter(policy, no_seeds(batch))
        with Counted() as counted, torch.set_grad_enabled(gradient), selected:
            output = network(leaf, torch.tensor(trained_sigma(config, model.facts)))
            saved = counted.live
            if gradient and not saved_alone:
                output.backward(torch.zeros_like(output))
        name = "walk back: a network call, forward and backward" if config.follows_reward else "forward and backward"
        work = counted.work * (1 / batch)
        if gradient:
            return Part(name, counted.peak, saved, work=work, role="gradient")
        return Part("rollout: one network call", counted.peak, work=work, role="rollout")

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
        selected = model.adapter(policy_adapter_name(config), no_seeds(batch))
        with Counted() as counted, torch.no_grad(), selected:
            calls = cheaper_calls(model, how)
            for node in range(2):
                with calls.at(node):
                    network(shapes.latents(batch), torch.tensor(0.5))
        return Part(exact.name, counted.peak)

    return replace(exact, bytes=max(exact.bytes, for_all_blocks(model, run).bytes))


def for_all_blocks(model: Backbone, run: Callable[[], Part]) -> Part:
    """Call ``run`` with three and with four checkpoints of blocks, and continue the straight line to all of them.

    (From three on: with offload, the last block and two more are alive at once.)  Blocks that are not alike, as where
    an adapter is on some of them, are run one and all.
    """
    facts = model.facts
    total, group = facts.num_blocks, model.running.blocks_together(facts.kernels, facts.lean_group)
    if total <= 4 * group or not _blocks_alike(model):
        return run()
    three, four = (_with_blocks(model, count * group, run) for count in (3, 4))
    return continued(three, four, total // group - 4)


def continued(one_less: Part, part: Part, further: int) -> Part:
    """A part with so many more of what it has one more of than ``one_less``, in a straight line."""
    return replace(
        part,
        bytes=part.bytes + further * (part.bytes - one_less.bytes),
        saved=part.saved + further * (part.saved - one_less.saved),
        work=part.work * (1 + further) + one_less.work * -further,
    )


def _blocks_alike(model: Backbone) -> bool:
    """Return whether the policy's adapter is on all blocks or none, and all keep the same for the backward pass."""
    if len(set(model.running.block_modes or ())) > 1:
        return False
    if any(len(lists) > 1 for lists in model.facts.blocks.values()):  # lists of different blocks
        return False
    name = f".lora_A.{POLICY}."
    adapted = {any(name in key for key, _ in block.named_parameters()) for block in base_blocks(model)}
    return len(adapted) == 1


def _with_blocks(model: Backbone, count: int, run: Callable[[], Part]) -> Part:
    with fewer_blocks(model, count):
        return run()


@contextmanager
def fewer_blocks(model: Backbone, count: int) -> Iterator[None]:
    """Every network with the first blocks alone of its one list."""
    whole = [(network, names[0], getattr(network, names[0])) for network, names in with_lists(model)]
    for network, name, blocks in whole:
        setattr(network, name, blocks[:count])
    try:
        yield
    finally:
        for network, name, blocks in whole:
            setattr(network, name, blocks)


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
        selected = reward.selected(no_seeds(batch)) if trained else reward.selected()  # type: ignore[call-arg]
        with Counted() as counted, selected:
            scores = reward.logits(leaf, torch.tensor(0.5), condition)
            saved = counted.live
            backward(scores, leaf, trains)
        yield reward_part("reward: forward and backward", held + counted.peak, saved, counted, batch)
        return

    # A latent reward beside one on pixels: its graph is kept while the other's is made.
    if isinstance(reward, LatentBeside):
        (part,) = reward_phases(config, model, reward.latent, shapes, batch, held)
        yield part
        yield from reward_phases(config, model, reward.pixel, shapes, batch, held + part.saved)
        return

    # A pixel reward that is trained: the decoder only makes its input.
    if preference := config.preference:
        yield replace(decoding(model, shapes, batch, "decoder: forward", 0), role="reward")
        pixels = shapes.pixels(batch)[:, :, : preference.frames]
        leaf, times = pixels, torch.linspace(0, 1, pixels.shape[2])
        with Counted() as counted:
            scores = reward.logits(leaf, condition, times)
            saved = counted.live
            backward(scores, leaf, trains)
        yield reward_part("reward: forward and backward", counted.peak, saved, counted, batch)
        return

    # A pixel reward that is followed: the decoder's graph is kept for the gradient.
    leaf = latents.requires_grad_()
    scorer = build_scorer(config, model, reward)
    assert isinstance(scorer, PixelScorer)
    draws = [costliest_frames(latents.shape[2], scorer.frames)]
    if len(draws[0]) == 1 and not model.facts.prefix_decodes:  # which decodes in groups: the first may be the largest
        draws.append([0])
    decoded = [decoder_phases(scorer, leaf, condition, draw, held) for draw in draws]
    yield from max(decoded, key=lambda parts: parts[1].bytes)


def decoder_phases(
    scorer: PixelScorer, leaf: Tensor, condition: Condition, chosen: list[int], held: int
) -> tuple[Part, Part]:
    """Return the decoder's forward, and the reward's and the decoder's forward and backward, of these latent frames."""
    with Counted() as counted, scorer.selected():
        pixels, times = decode_frames(scorer.backbone, leaf, chosen)
        decoder, decoder_peak = counted.live, counted.peak
        scores = scorer.read(pixels, times, condition, chosen, leaf.shape[2])
        saved = counted.live - decoder
        backward(scores, leaf, trains=False)
    forward = Part("decoder: forward, kept for the reward's gradient", held + decoder_peak, decoder)
    name = "reward and decoder: forward and backward"
    return forward, reward_part(name, held + counted.peak, saved, counted, len(leaf))


def reward_part(name: str, size: int, saved: int, counted: Counted, batch: int) -> Part:
    return Part(name, size, saved, work=counted.work * (1 / batch), role="reward")


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
