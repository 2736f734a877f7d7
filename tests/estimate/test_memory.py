"""The prediction against real models, measured without the counter that made it: what autograd's hooks see kept."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prfl.backbone import Backbone, Condition
from prfl.backbone.checkpointing import run_block
from prfl.backbone.wan.text import text_condition
from prfl.config.schema import Config
from prfl.estimate import memory, phases
from prfl.estimate.live_tensors import LiveBytes, fused_on_meta
from prfl.estimate.memory import Memory, predict_memory
from prfl.estimate.parts import Part, Shapes, module_bytes, pinned
from prfl.estimate.rewards import reward_on_meta
from prfl.estimate.work import Work
from prfl.factory.backbone import POLICY, build_architecture
from prfl.factory.objective import build_method, build_scorer
from prfl.factory.rollout import build_cheaper, build_schedule
from prfl.objective.reused_rollout import ReusedRollout
from prfl.reward.frames import decode_frames
from prfl.reward.latent import LatentReward
from prfl.reward.pixel import PixelNetwork, PixelReward
from prfl.rollout.guidance import guided_network
from prfl.rollout.trajectory import rollout
from prfl.utils.host_store import HostStore
from prfl.utils.rng import ChainNoises
from tests.models import copied_architecture, copied_backbone
from tests.slow import slow_unless

TOKENS = 9  # of the prompt "a circle": one for each byte, and the end


def network_call(config: Config, *, gradient: bool = True) -> Part:
    model = copied_architecture(config)
    for parameter in model.parameters("policy").values():
        parameter.grad = torch.zeros_like(parameter)  # as predict_memory does: they are a part of their own
    with fused_on_meta("cpu"):
        return phases.network_call(config, model, Shapes(model, config), 2, gradient=gradient)


def predicted(config: Config) -> tuple[Memory, dict[str, Part]]:
    found = predict_memory(config, copied_architecture(config))
    return found, {part.name.split(":")[0]: part for part in [*found.fixed, *found.phases]}


def kept_bytes(model: Backbone, run: Callable[[], Tensor], also: tuple[Tensor, ...] = ()) -> int:
    """Bytes of the distinct storages that autograd keeps of ``run``, less weights and ``also``."""
    known = [*model.transformer.parameters(), *model.transformer.buffers(), *model.vae.parameters(), *also]
    ours = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    class Attention(deque):
        """What checkpointing keeps of attention: the hooks do not see it."""

        def append(self, results: Any) -> None:
            super().append(results)
            output, *small = results
            if not model.running.offload:
                pack(output())
            for tensor in small:
                if isinstance(tensor, Tensor):
                    pack(tensor)

    with pytest.MonkeyPatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        patch.setattr("prfl.backbone.checkpointing.deque", Attention)

        def block(block: Any, hidden: Tensor, text: Tensor, modulation: Tensor, rotary: Any, **more: Any) -> Tensor:
            for shared in (text, modulation, *rotary):  # arguments of checkpointed blocks: the hooks miss the last two
                pack(shared)
            return run_block(block, hidden, text, modulation, rotary, **more)

        patch.setattr("prfl.backbone.wan.model.run_block", block)
        run()
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in ours)


def inputs(model: Backbone, batch: int = 2) -> tuple[Tensor, Condition]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, *model.latent_shape(17, 32, 32), generator=generator)
    embeds = torch.randn(batch, TOKENS, model.facts.text_width, generator=generator).to(model.facts.dtype)
    return latents, text_condition(embeds, torch.full((batch,), TOKENS))


SETTINGS = [
    [],
    ["backbone.checkpointing=full"],
    ["backbone.checkpointing=attention"],
    ["backbone.checkpointing=full", "backbone.offload=true"],
    ["backbone.checkpointing=attention", "backbone.offload=true"],
    ["backbone.dtype=bfloat16"],
    ["backbone.dtype=bfloat16", "backbone.checkpointing=full"],
    ["backbone.dtype=bfloat16", "backbone.checkpointing=attention"],
    ["backbone.adapter.targets=[to_q, ffn.net.0.proj, ffn.net.2]", "backbone.adapter.rank=16"],
    ["backbone.adapter.dropout=0.1"],
    ["backbone.adapter.blocks=last_half"],
    ["backbone.adapter.blocks=[0, 3]", "backbone.checkpointing=full"],
    ["rollout.guidance={scale: 3.0, gradient: cond}"],
    ["rollout.guidance={scale: 3.0, gradient: both}"],
]


# One of each: nothing, recomputation, with offload, another type, dropout, some blocks, guidance.
USUAL = [SETTINGS[index] for index in (0, 1, 4, 7, 9, 11, 13)]


@pytest.mark.parametrize("overrides", slow_unless(USUAL.__contains__, SETTINGS), ids=" ".join)
def test_activations_saved_by_the_network_call(make: Callable[..., Config], overrides: list[str]) -> None:
    config = make(*overrides)
    model = copied_backbone(config)
    latents, condition = inputs(model)
    guidance = config.rollout.guidance
    network = guided_network(
        model.velocity, condition, inputs(model)[1], scale=guidance.scale, gradient=guidance.gradient
    )
    outputs: list[Tensor] = []
    with model.adapter("policy"), model.adapter("policy", torch.arange(2)):
        kept = kept_bytes(model, lambda: outputs.append(network(latents, torch.tensor(0.5))) or outputs[0])
    assert network_call(config).saved == pytest.approx(kept + outputs[0].nbytes, rel=0.02)


@pytest.mark.parametrize("checkpointing", ["none", "attention", "full"])
def test_activations_saved_by_the_reward(make: Callable[..., Config], checkpointing: str) -> None:
    config = make(f"backbone.checkpointing={checkpointing}")
    model = copied_backbone(config)
    latents, condition = inputs(model)
    leaf = latents.requires_grad_()
    torch.manual_seed(0)
    head = reward_on_meta(config, build_architecture(config))[0]
    assert isinstance(head, LatentReward) and head.blocks == (0,)
    own = type(head.head)(**head.head.settings)  # type: ignore[arg-type]
    reward = LatentReward(own, model, head.blocks).freeze()
    weights = (leaf, *own.parameters())
    kept = kept_bytes(model, lambda: reward.logits(leaf, torch.tensor(0.5), condition)["reward"], weights)
    empty = build_architecture(config)
    with fused_on_meta("cpu"):
        on_meta, _ = reward_on_meta(config, empty)
        assert on_meta is not None
        (phase,) = phases.reward_phases(config, empty, on_meta, Shapes(empty, config), 2, held=0)
    assert phase.saved == pytest.approx(kept, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode",
    slow_unless(["none", "full"].__contains__, ["none", "attention", "full", "full backbone.offload=true"]),
)
def test_it_is_a_straight_line_in_the_number_of_blocks(
    make: Callable[..., Config], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(*f"backbone.checkpointing={mode}".split())
    continued = [network_call(config, gradient=gradient) for gradient in (False, True)]
    monkeypatch.setattr(phases, "for_all_blocks", lambda model, run: run())
    whole = [network_call(config, gradient=gradient) for gradient in (False, True)]
    assert [replace(part, work=Work()) for part in continued] == [replace(part, work=Work()) for part in whole]
    for one, other in zip(continued, whole, strict=True):  # sums of floating point, in another order
        assert one.work.amounts == pytest.approx(other.work.amounts, rel=1e-9)


def test_the_allocator_sees_the_predicted_peak(make: Callable[..., Config]) -> None:
    """torch's own profiler on a real forward and backward pass: its peak is the predicted one to a few percent."""
    config = make("data.height=64", "data.width=64", "backbone.checkpointing=full")
    model = copied_backbone(config)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, *model.latent_shape(17, 64, 64), generator=generator)
    parameters = list(model.parameters("policy").values())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    condition = inputs(model)[1]
    with torch.profiler.profile(profile_memory=True) as profile, model.adapter("policy"):
        velocity = model.velocity(latents, torch.tensor(0.5), condition)
        velocity.backward(torch.zeros_like(velocity), inputs=parameters)
    assert profile.profiler is not None
    changes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = torch.tensor(changes).cumsum(0)
    assert network_call(config).bytes == pytest.approx(int(live.max()), rel=0.05)


def test_the_decoder_keeps_nothing_of_frames_without_gradient(make: Callable[..., Config]) -> None:
    """A late frame alone costs what an early one costs, though all before it are decoded."""
    model = copied_backbone(make())
    kept = {}
    for frame in (1, 4):
        leaf = inputs(model, 1)[0].requires_grad_()
        kept[frame] = kept_bytes(model, lambda leaf=leaf, frame=frame: decode_frames(model, leaf, [frame])[0])
    assert kept[4] < 1.5 * kept[1]


def test_parts_of_a_lora_run(make: Callable[..., Config]) -> None:
    config = make("training.ema_decay=0.9")
    found, parts = predicted(config)
    model = copied_backbone(config)
    adapter = sum(p.nbytes for p in model.parameters("policy").values())
    for name, factor in (("adapter weights", 1), ("gradients", 1), ("optimizer (two averages)", 2)):
        assert parts[name].bytes == factor * adapter
    assert parts["EMA of the weights"].bytes == adapter
    assert parts["VAE weights"].bytes == sum(p.nbytes for p in model.vae.parameters())
    assert found.trainable == sum(p.numel() for p in model.parameters("policy").values())
    later = [part.bytes for part in found.phases if not part.alone]
    assert found.peak == sum(part.bytes for part in found.fixed) + max(later)


def test_a_vae_that_nothing_decodes_with_is_not_on_the_gpu(make: Callable[..., Config], tmp_path: Path) -> None:
    watched = ["backbone.device=cuda", f"data.prompts.validation={tmp_path}/prompts2.txt", "evaluation.every=1"]
    (tmp_path / "prompts2.txt").write_text("a bar\n")
    _, latent = predicted(make(*watched))
    _, here = predicted(make(*watched[1:], "backbone.device=cpu"))
    vae = module_bytes(build_architecture(make()).vae)
    assert "VAE weights" not in latent and here["VAE weights"].bytes == vae
    assert latent["evaluation"].bytes == here["evaluation"].bytes + vae


@pytest.mark.slow
def test_encoding_the_prompts_comes_before_all_else(make: Callable[..., Config]) -> None:
    """Alone; VAE and transformer are there too on a CPU, and while a cache is filled."""
    model = build_architecture(make())
    encoder, vae, transformer = map(module_bytes, (model.text.encoder(), model.vae, model.transformer))
    for overrides, expected in (
        ([], encoder + vae + transformer),
        (["backbone.device=cuda"], encoder),
        (["backbone.device=cuda", "objective.sft={}", "data.manifest=absent.jsonl"], encoder + vae + transformer),
    ):
        found, parts = predicted(make(*overrides))
        assert parts["encoding the prompts"].alone and parts["encoding the prompts"].bytes == expected
    huge = memory.Memory([Part("fixed", 5)], [Part("before", 9, alone=True), Part("later", 3)], 1)
    assert huge.peak == 9 and huge.largest.name == "before"
    assert "first 1 of 5 blocks" in found.assumed


def test_all_weights_need_the_frozen_base_as_well(make: Callable[..., Config]) -> None:
    def fixed(*overrides: str) -> dict[str, int]:
        config = make("backbone.train=full", "backbone.adapter=null", "backbone.dtype=bfloat16", *overrides)
        model = build_architecture(config)
        reward, _ = reward_on_meta(config, model)
        trained = memory.trained_parameters(config, model, reward)
        parts = memory.fixed_parts(config, model, reward, trained, Shapes(model, config))
        return {part.name: part.bytes for part in parts}

    steered = fixed()
    copy, base = (
        steered["trained copy of all weights, in float32"],
        steered["frozen base, which reward and distance read"],
    )
    assert 1.8 * base < copy <= 2 * base, "norms stay in float32"
    assert steered["optimizer (two averages)"] == 2 * steered["gradients"] > 1.9 * copy
    alone = fixed("reward=null", "objective={name: sft}", "data.manifest=absent.jsonl")
    assert alone["transformer weights"] == copy and not any("base" in name for name in alone)


@pytest.mark.parametrize("override", ["backbone.checkpointing=none", "backbone.checkpointing=full"])
def test_activations_when_all_weights_are_trained(make: Callable[..., Config], override: str) -> None:
    """Of the copy, in all its blocks; the base keeps its own."""
    config = make("backbone.train=full", "backbone.adapter=null", override)
    model = copied_backbone(config)
    latents, condition = inputs(model)
    outputs: list[Tensor] = []
    with model.adapter("policy"):  # weights that are trained are no activations
        run = lambda: outputs.append(model.velocity(latents, torch.tensor(0.5), condition)) or outputs[0]  # noqa: E731
        kept = kept_bytes(model, run, (latents,))
    assert network_call(config).saved == pytest.approx(kept + outputs[0].nbytes, rel=0.02)


@pytest.mark.parametrize("mode", ["none", "full"])
def test_all_weights_in_bfloat16(make: Callable[..., Config], mode: str) -> None:
    """Autocast's copies of the weights are kept for the backward pass, or (checkpointed) until the call ends."""
    own = ["backbone.train=full", "backbone.adapter=null", "backbone.dtype=bfloat16", f"backbone.checkpointing={mode}"]
    found, parts = predicted(make(*own))
    model = copied_backbone(make(*own))
    latents, condition = inputs(model)
    outputs: list[Tensor] = []
    with model.adapter("policy"):
        run = lambda: outputs.append(model.velocity(latents, torch.tensor(0.5), condition)) or outputs[0]  # noqa: E731
        kept = kept_bytes(model, run, (latents,)) + outputs[0].nbytes
    copies = parts["the weights in bfloat16, by autocast"].bytes
    whole = sum(p.nbytes for p in model.networks["policy/transformer"].parameters())
    assert whole / 2 <= copies < 0.6 * whole and found.peak > 4 * whole
    assert parts["walk back"].saved + (copies if mode == "none" else 0) == pytest.approx(kept, rel=0.05)


@pytest.mark.slow
def test_checkpointing_and_smaller_videos_take_less(make: Callable[..., Config]) -> None:
    plain = network_call(make()).bytes
    for override in ("backbone.checkpointing=attention", "data.height=16"):
        assert network_call(make(override)).bytes < plain, override
    attention, full = ("backbone.checkpointing=attention",), ("backbone.checkpointing=full",)
    assert network_call(make(*attention)).bytes > network_call(make(*full)).bytes
    for mode in (attention, full):
        assert network_call(make(*mode, "backbone.offload=true")).saved < network_call(make(*mode)).saved


@pytest.mark.slow
@pytest.mark.parametrize("mode", slow_unless("full".__eq__, ["attention", "full"]))
def test_what_is_offloaded(make: Callable[..., Config], mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes in host memory against the stores of a real step; on a CPU it is the same memory, so nothing is gained."""
    own = [f"backbone.checkpointing={mode}", "backbone.offload=true", "objective={name: vader, last_steps: 3}"]
    config = make(*own)
    found, parts = predicted(make(*own, "backbone.device=cuda"))
    stores: set[HostStore] = set()
    put = HostStore.put
    monkeypatch.setattr(HostStore, "put", lambda self, tensor: (stores.add(self), put(self, tensor))[1])
    model = copied_backbone(config)
    latents, condition = inputs(model)
    with model.adapter("policy"):
        output = model.velocity(latents, torch.tensor(0.5), condition)
    blocks = sum(store.bytes for store in stores)
    assert output.requires_grad and blocks > 0
    tensors = [one.bytes for store in stores for group in store.groups for one in group] + 3 * [latents.nbytes]
    assert found.host == sum(2 ** math.ceil(math.log2(size)) for size in tensors)  # as torch pins memory
    _, without = predicted(make(*own, "backbone.device=cuda", "backbone.offload=false"))
    assert without["walk back"].saved == parts["walk back"].saved + blocks
    kept = [p["latents and prompt embeddings"].bytes for p in (without, parts)]
    assert kept[0] - kept[1] == latents.nbytes, "of three, the one that is taken and the next"
    here, _ = predicted(config)
    assert here.host == 0 and here.peak == predicted(make(*own, "backbone.offload=false"))[0].peak


@pytest.mark.slow
def test_a_reward_scored_in_parts(make: Callable[..., Config]) -> None:
    sizes = [predicted(make(*more))[1]["reward"].saved for more in ([], ["reward.batch=1"], ["reward.batch=5"])]
    # What the head makes of its weights does not depend on the batch; beside so few tokens it shows.
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.1) and sizes[2] == sizes[0]


def test_a_held_graph_lives_beside_the_reward(make: Callable[..., Config]) -> None:
    _, plain = predicted(make("backbone.checkpointing=full", "objective={name: vader, last_steps: 2}"))
    _, held = predicted(make("backbone.checkpointing=full", "objective={name: vader, last_steps: 1}"))
    assert held["reward"].bytes == plain["reward"].bytes + held["walk back"].saved


def test_a_rollout_that_is_reused_is_kept(make: Callable[..., Config]) -> None:
    """Of each sample of the batch, at most x[m] and f[m] for each of three drawn steps, and where the rollout ends."""
    name = "rollout that several steps use, and the weights that made it"
    config = make("rollout.gradients_per_rollout=3")
    _, parts = predicted(config)
    assert name not in predicted(make())[1]
    model = build_architecture(config)
    method = build_method(config, model)
    most = max(len({m for s in span for m in method.plan(s).plan.trains}) for span in (range(3), range(3, 5)))
    tensors = 4 * (2 * most + 1) * 4 * math.prod(model.latent_shape(17, 32, 32))
    assert parts[name].bytes == tensors + parts["adapter weights"].bytes
    found, parts = predicted(make("rollout.gradients_per_rollout=3", "backbone.device=cuda"))
    assert parts[name].bytes == tensors * (most + 1) // (2 * most + 1), "the outputs, and the end"
    own, stored = copied_backbone(config), ReusedRollout(3, 4)
    stored.begin(0, own.parameters("policy"))
    weights = sum(tensor.nbytes for tensor in stored.weights.values())
    assert found.host == most * pinned(tensors // (2 * most + 1)) + weights, "the latents, and the weights that made it"


@pytest.mark.slow
def test_methods_that_draw_are_predicted_at_their_most(make: Callable[..., Config]) -> None:
    """AlignProp's deepest draw walks as DRaFT-K does; DRTune's inputs need no gradient, however many its steps."""
    found = {
        name: predicted(make(f"objective={{name: {method}}}"))[1]
        for name, method in {
            "one": "vader", "two": "vader, last_steps: 2", "random": "alignprop", "stopped": "drtune, trained_steps: 4",
            "leaps": "leapalign", "dense": "dense_process", "exact": "dense_process, beta: 1.0", "lv": "draft_lv",
        }.items()
    }  # fmt: skip
    walk = {name: parts["walk back"].bytes for name, parts in found.items()}
    assert walk["one"] == walk["stopped"] == walk["dense"] == walk["lv"] < walk["two"]
    assert walk["two"] == walk["random"] == walk["leaps"] == walk["exact"]
    kept = {name: parts["latents and prompt embeddings"].bytes for name, parts in found.items()}
    assert kept["one"] < kept["two"] < kept["random"] and kept["dense"] > kept["one"]


def test_a_pixel_reward_keeps_the_decoder(make: Callable[..., Config]) -> None:
    pixel = ["reward.space=pixel", "data.frames=9"]
    _, everything = predicted(make(*pixel, "objective={name: vader}"))
    _, one = predicted(make(*pixel, "objective={name: vader, frames: one}"))
    assert everything["decoder"].saved > 1.5 * one["decoder"].saved > 0


@pytest.mark.slow
def test_frames_that_are_scored_by_themselves_are_predicted_so(make: Callable[..., Config]) -> None:
    """Against a real forward and backward pass through decoder and reward; one frame's activations at a time."""
    own = ["reward.space=pixel", "objective={name: instructvideo, last_steps: 1, temporal_decay: 0.5}"]
    own += ["data.manifest=absent.jsonl", "data.height=64", "data.width=64"]
    config = make(*own)
    model = copied_backbone(config)
    network = PixelNetwork(model.facts.text_width, ["reward"])
    scorer = build_scorer(config, model, PixelReward(network).freeze())
    latents = torch.randn(2, *model.latent_shape(17, 64, 64))
    with LiveBytes() as counted:
        scores = scorer(latents.requires_grad_(), torch.tensor(0.0), inputs(model)[1], 0)
        torch.autograd.grad(scores["reward"].sum(), latents)
    _, parts = predicted(config)
    assert parts["reward and decoder"].bytes == pytest.approx(counted.peak, rel=0.02)
    assert (
        parts["reward and decoder"].saved
        < 0.1
        * predicted(make(*own[2:], own[0], "objective={name: vader}", "objective.sft={}"))[1][
            "reward and decoder"
        ].saved
    )


@pytest.mark.parametrize(
    "head", ["{space: latent, head: {dimensions: [a], blocks: [2]}}", "{space: pixel, head: {dimensions: [a]}}"]
)
def test_reward_training(make: Callable[..., Config], head: str) -> None:
    config = make("backbone.adapter=null", f"reward={head}", "objective={name: preference, loss: bradley_terry}",
                  "data.manifest=absent.jsonl")  # fmt: skip
    found, parts = predicted(config)
    assert not found.assumed and parts["reward"].saved > 0 and parts["filling the cache"].bytes > 0
    assert parts["gradients"].bytes == parts["trained weights"].bytes == 4 * found.trainable


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["euler", "flow_sde", "unipc"])
def test_a_multistep_chain_holds_its_earlier_outputs(make: Callable[..., Config], solver: str) -> None:
    config = make(f"rollout.solver={solver}")
    chain = build_schedule(config, build_architecture(config))
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def network(latents: Tensor, sigma: Tensor) -> Tensor:
        nonlocal most
        output = 0.1 * latents
        alive.append(weakref.ref(output))
        most = max(most, sum(ref() is not None for ref in alive))
        return output

    model = copied_backbone(config)
    latents, _ = inputs(model)
    noises = ChainNoises(model.latent_shape(17, 32, 32), 0, 0, [0, 1])
    rollout(network, latents, chain, noises=noises, keep=set())
    _, parts = predicted(config)
    part = parts.get("earlier outputs of a multistep solver")
    assert (part.bytes if part else 0) == (most - 1) * latents.nbytes
    assert (part is not None) == (solver == "unipc")


@pytest.mark.slow
def test_what_a_step_cache_holds_is_counted(make: Callable[..., Config]) -> None:
    """Two hidden states of each branch of guidance, beside the call: as many bytes as really live in two calls."""
    guided = "rollout.guidance={scale: 2.0, gradient: cond}"
    plain, config = make(guided), make(guided, "rollout.cheaper.cache=0.1")
    parts = [{p.name: p for p in predict_memory(c, copied_architecture(c)).phases} for c in (plain, config)]
    before, after = (own["rollout: one network call"].bytes for own in parts)
    hidden = 2 * 5 * 4 * 4 * 24 * 4  # samples, tokens, channels, float32
    assert before + 4 * hidden <= after <= before + 7 * hidden

    model = copied_backbone(config)
    network = guided_network(
        model.velocity, model.condition(["a circle"] * 2), model.condition([""] * 2), scale=2.0, gradient="cond"
    )
    with LiveBytes() as counted, torch.no_grad(), model.adapter(POLICY):
        calls = model.cheaper(build_cheaper(config), exact={0, 1})
        for node in range(2):
            with calls.at(node):
                network(torch.randn(2, 4, 5, 8, 8), torch.tensor(0.5))
    assert after == pytest.approx(counted.peak, rel=0.1)
