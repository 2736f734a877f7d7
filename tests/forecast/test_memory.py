"""The prediction against real models, measured without the counter that made it: what autograd's hooks see kept."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from prfl import build
from prfl.backbone import Condition, WanBackbone
from prfl.config import load_config
from prfl.config.schema import Config
from prfl.draws import ChainNoises
from prfl.forecast import memory
from prfl.forecast.live_bytes import fused_on_meta
from prfl.forecast.memory import Memory, Part, predict_memory
from prfl.objective.scorer import decode_frames
from prfl.reward.latent import LatentReward
from prfl.rollout import rollout

TOKENS = 9  # of the prompt "a circle": one for each byte, and the end


@pytest.fixture
def make(tmp_path: Path, make_tiny_pipeline: Callable[..., Path]) -> Callable[..., Config]:
    """make("a.b=value", ...): PRFL on a random model of five blocks, unless changed."""
    folder = make_tiny_pipeline(tmp_path / "five", num_layers=5)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a circle\n")
    config = {
        "version": 1,
        "run": str(tmp_path / "run"),
        "seed": 0,
        "backbone": {"model": str(folder), "device": "cpu", "adapter": {"rank": 2, "alpha": 2}},
        "data": {
            "prompts": {"train": str(prompts)}, "cache": str(tmp_path), "frames": 17, "height": 32, "width": 32,
            "fps": 8,
        },
        "reward": {"space": "latent", "path": str(tmp_path / "absent")},
        "rollout": {"steps": 6},
        "objective": {"name": "prfl"},
        "training": {"steps": 5, "batch": 4, "accumulation": 2, "learning_rate": 1e-4},
        "evaluation": {"every": 0},
    }  # fmt: skip
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(config))
    return lambda *overrides: load_config(path, overrides)


def network_call(config: Config, *, gradient: bool = True) -> Part:
    model = build.architecture(config)
    with fused_on_meta("cpu"):
        return memory.network_call(config, model, memory.Shapes(model, config), 2, gradient=gradient)


def predicted(config: Config) -> tuple[Memory, dict[str, Part]]:
    found = predict_memory(config, build.architecture(config))
    return found, {part.name.split(":")[0]: part for part in [*found.fixed, *found.phases]}


def kept_bytes(model: WanBackbone, run: Callable[[], Tensor], also: tuple[Tensor, ...] = ()) -> int:
    """Bytes of the distinct storages that autograd keeps of ``run``, less weights and ``also``."""
    known = [*model.transformer.parameters(), *model.transformer.buffers(), *model.vae.parameters(), *also]
    ours = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in ours)


def inputs(model: WanBackbone, batch: int = 2) -> tuple[Tensor, Condition]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, *model.latent_shape(17, 32, 32), generator=generator)
    embeds = torch.randn(batch, TOKENS, model.text_width, generator=generator).to(model.dtype)
    return latents, Condition(embeds, torch.full((batch,), TOKENS))


SETTINGS = [
    [],
    ["backbone.checkpointing=full"],
    ["backbone.dtype=bfloat16"],
    ["backbone.dtype=bfloat16", "backbone.checkpointing=full"],
    ["backbone.adapter.targets=[to_q, ffn.net.0.proj, ffn.net.2]", "backbone.adapter.rank=16"],
    ["backbone.adapter.dropout=0.1"],
    ["rollout.guidance={scale: 3.0, gradient: cond}"],
    ["rollout.guidance={scale: 3.0, gradient: both}"],
]


@pytest.mark.parametrize("overrides", SETTINGS, ids=" ".join)
def test_activations_saved_by_the_network_call(make: Callable[..., Config], overrides: list[str]) -> None:
    config = make(*overrides)
    model = build.backbone(config)
    latents, condition = inputs(model)
    guidance = config.rollout.guidance
    network = memory.guided_network(
        model.velocity, condition, inputs(model)[1], scale=guidance.scale, gradient=guidance.gradient
    )
    outputs: list[Tensor] = []
    with model.adapter("policy"):
        kept = kept_bytes(model, lambda: outputs.append(network(latents, torch.tensor(0.5))) or outputs[0])
    # Checkpointing holds a little that the hooks do not see: what its blocks share, as arguments.
    tolerance = 0.02 if config.backbone.checkpointing == "none" else 0.08
    assert network_call(config).saved == pytest.approx(kept + outputs[0].nbytes, rel=tolerance)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_activations_saved_by_the_reward(make: Callable[..., Config], checkpointing: str) -> None:
    config = make(f"backbone.checkpointing={checkpointing}")
    model = build.backbone(config)
    latents, condition = inputs(model)
    leaf = latents.requires_grad_()
    torch.manual_seed(0)
    head = memory.reward_on_meta(config, build.architecture(config))[0]
    assert isinstance(head, LatentReward) and head.blocks == (0,)
    own = type(head.head)(**head.head.settings)  # type: ignore[arg-type]
    reward = LatentReward(own, model, head.blocks).freeze()
    weights = (leaf, *own.parameters())
    kept = kept_bytes(model, lambda: reward.logits(leaf, torch.tensor(0.5), condition)["reward"], weights)
    empty = build.architecture(config)
    with fused_on_meta("cpu"):
        on_meta, _ = memory.reward_on_meta(config, empty)
        assert on_meta is not None
        (phase,) = memory.reward_phases(config, empty, on_meta, memory.Shapes(empty, config), 2, held=0)
    assert phase.saved == pytest.approx(kept, rel=0.02 if checkpointing == "none" else 0.08)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_it_is_a_straight_line_in_the_number_of_blocks(
    make: Callable[..., Config], checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(f"backbone.checkpointing={checkpointing}")
    continued = [network_call(config, gradient=gradient) for gradient in (False, True)]
    monkeypatch.setattr(memory, "for_all_blocks", lambda model, run: run())
    assert continued == [network_call(config, gradient=gradient) for gradient in (False, True)]


def test_the_allocator_sees_the_predicted_peak(make: Callable[..., Config]) -> None:
    """torch's own profiler on a real forward and backward pass: its peak is the predicted one to a few percent."""
    config = make("data.height=64", "data.width=64", "backbone.checkpointing=full")
    model = build.backbone(config)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, *model.latent_shape(17, 64, 64), generator=generator)
    parameters = list(model.adapter_parameters("policy").values())
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
    model = build.backbone(make())
    kept = {}
    for frame in (1, 4):
        leaf = inputs(model, 1)[0].requires_grad_()
        kept[frame] = kept_bytes(model, lambda leaf=leaf, frame=frame: decode_frames(model, leaf, [frame])[0])
    assert kept[4] < 1.5 * kept[1]


def test_parts_of_a_lora_run(make: Callable[..., Config]) -> None:
    config = make("training.ema_decay=0.9")
    found, parts = predicted(config)
    model = build.backbone(config)
    adapter = sum(p.nbytes for p in model.adapter_parameters("policy").values())
    for name, factor in (("adapter weights", 1), ("gradients", 1), ("optimizer (two averages)", 2)):
        assert parts[name].bytes == factor * adapter
    assert parts["EMA of the weights"].bytes == adapter
    assert parts["VAE weights"].bytes == sum(p.nbytes for p in model.vae.parameters())
    assert found.trainable == sum(p.numel() for p in model.adapter_parameters("policy").values())
    assert found.peak == sum(part.bytes for part in found.fixed) + max(part.bytes for part in found.phases)
    assert "first 1 of 5 blocks" in found.assumed


def test_all_weights_need_the_frozen_base_as_well(make: Callable[..., Config]) -> None:
    def fixed(*overrides: str) -> dict[str, int]:
        config = make("backbone.train=full", "backbone.adapter=null", "backbone.dtype=bfloat16", *overrides)
        model = build.architecture(config)
        reward, _ = memory.reward_on_meta(config, model)
        trained = memory.trained_parameters(config, model, reward)
        parts = memory.fixed_parts(config, model, reward, trained, memory.Shapes(model, config))
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
    model = build.backbone(config)
    latents, condition = inputs(model)
    outputs: list[Tensor] = []
    with model.adapter("policy"):  # weights that are trained are no activations
        run = lambda: outputs.append(model.velocity(latents, torch.tensor(0.5), condition)) or outputs[0]  # noqa: E731
        kept = kept_bytes(model, run)
    tolerance = 0.02 if config.backbone.checkpointing == "none" else 0.08
    assert network_call(config).saved == pytest.approx(kept + outputs[0].nbytes, rel=tolerance)


def test_checkpointing_and_smaller_videos_take_less(make: Callable[..., Config]) -> None:
    plain = network_call(make()).bytes
    for override in ("backbone.checkpointing=full", "data.height=16"):
        assert network_call(make(override)).bytes < plain, override


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
    model = build.architecture(config)
    method = build.method(config, build.chain(config, model))
    most = max(len({m for s in span for m in method.choose(s).plan.trains}) for span in (range(3), range(3, 5)))
    tensors = 4 * (2 * most + 1) * 4 * math.prod(model.latent_shape(17, 32, 32))
    assert parts[name].bytes == tensors + parts["adapter weights"].bytes
    assert name not in predicted(make("rollout.gradients_per_rollout=3", "backbone.device=cuda"))[1], "in host memory"


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


@pytest.mark.parametrize(
    "head", ["{space: latent, head: {dimensions: [a], blocks: [2]}}", "{space: pixel, head: {dimensions: [a]}}"]
)
def test_reward_training(make: Callable[..., Config], head: str) -> None:
    config = make("backbone.adapter=null", f"reward={head}", "objective={name: preference, loss: bradley_terry}",
                  "data.manifest=absent.jsonl")  # fmt: skip
    found, parts = predicted(config)
    assert not found.assumed and parts["reward"].saved > 0 and parts["filling the cache"].bytes > 0
    assert parts["gradients"].bytes == parts["trained weights"].bytes == 4 * found.trainable


@pytest.mark.parametrize("solver", ["euler", "flow_sde", "unipc"])
def test_a_multistep_chain_holds_its_earlier_outputs(make: Callable[..., Config], solver: str) -> None:
    config = make(f"rollout.solver={solver}")
    chain = build.chain(config, build.architecture(config))
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def network(latents: Tensor, sigma: Tensor) -> Tensor:
        nonlocal most
        output = 0.1 * latents
        alive.append(weakref.ref(output))
        most = max(most, sum(ref() is not None for ref in alive))
        return output

    model = build.backbone(config)
    latents, _ = inputs(model)
    noises = ChainNoises(model.latent_shape(17, 32, 32), 0, 0, [0, 1])
    rollout(network, latents, chain, noises=noises, keep=set())
    _, parts = predicted(config)
    part = parts.get("earlier outputs of a multistep solver")
    assert (part.bytes if part else 0) == (most - 1) * latents.nbytes
    assert (part is not None) == (solver == "unipc")
