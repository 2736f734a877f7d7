"""Two adapters on one network: switching, gradients with checkpointing, and misuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prfl.backbone import LoraSpec, adapters, load_backbone
from prfl.backbone.adapters import load_state, state_of
from prfl.backbone.network import reach
from prfl.backbone.wan.model import WanBackbone
from prfl.estimate.live_tensors import SavedBytes
from prfl.utils.errors import PrflError

TARGETS = ["attn1.to_q", "attn2.to_k", "ffn.net.2"]
SIGMA = torch.tensor([0.3, 0.9])


def randomise(backbone: WanBackbone, name: str, seed: int) -> None:
    """B = 0 would hide which adapter is active."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in backbone.parameters(name).values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3


@pytest.fixture
def backbone(tiny_backbone: WanBackbone) -> WanBackbone:
    """With a trainable policy adapter on all blocks and a reward adapter on the first two."""
    tiny_backbone.add_adapter("policy", LoraSpec(rank=2, alpha=2, targets=TARGETS))
    tiny_backbone.add_adapter("reward", LoraSpec(rank=2, alpha=2, targets=TARGETS, blocks=[0, 1]))
    randomise(tiny_backbone, "policy", 1)
    randomise(tiny_backbone, "reward", 2)
    return tiny_backbone


@pytest.fixture
def velocity(backbone: WanBackbone) -> Callable[[], Tensor]:
    condition = backbone.condition(["a red circle moves left", "a blue square"])
    latents = torch.randn(2, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    return lambda: backbone.velocity(latents, SIGMA, condition)


def gradient(backbone: WanBackbone, name: str, run: Callable[[], None]) -> dict[str, Tensor]:
    for parameter in backbone.transformer.parameters():
        parameter.grad = None
    run()
    own = backbone.parameters(name)
    return {key: parameter.grad.clone() for key, parameter in own.items() if parameter.grad is not None}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor], **tolerance: float) -> None:
    assert left.keys() == right.keys() and left
    for key in left:
        torch.testing.assert_close(left[key], right[key], **tolerance)


def flags(backbone: WanBackbone) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in backbone.transformer.named_parameters()}


def test_a_new_adapter_changes_nothing_bit_for_bit(tiny_backbone: WanBackbone) -> None:
    condition, latents = tiny_backbone.condition(["a", "red"]), torch.randn(2, 4, 2, 4, 4)
    before = tiny_backbone.velocity(latents, SIGMA, condition)
    tiny_backbone.add_adapter("policy", LoraSpec(rank=4, alpha=8, targets=TARGETS))
    assert tiny_backbone.active_adapter is None
    assert torch.equal(tiny_backbone.velocity(latents, SIGMA, condition), before)
    with tiny_backbone.adapter("policy"):
        assert torch.equal(tiny_backbone.velocity(latents, SIGMA, condition), before)


def test_each_adapter_and_the_base_are_themselves(backbone: WanBackbone, velocity: Callable[[], Tensor]) -> None:
    base = velocity()
    outputs = {}
    for name in ("policy", "reward"):
        with backbone.adapter(name):
            assert backbone.active_adapter == name
            outputs[name] = velocity()
            assert not any(flag for key, flag in flags(backbone).items() if ".lora_" not in key)
            with backbone.adapter(None):
                assert torch.equal(velocity(), base)
            with backbone.adapter(name), backbone.adapter(name):
                assert torch.equal(velocity(), outputs[name])
            assert torch.equal(velocity(), outputs[name])
    assert torch.equal(velocity(), base) and backbone.active_adapter is None
    assert (outputs["policy"] - base).abs().max() > 1e-2 and (outputs["reward"] - base).abs().max() > 1e-2
    assert (outputs["policy"] - outputs["reward"]).abs().max() > 1e-2


def test_requires_grad_and_the_active_adapter_come_back(backbone: WanBackbone) -> None:
    for parameter in backbone.parameters("reward").values():
        parameter.requires_grad_(False)
    before = flags(backbone)
    assert {name for name, flag in before.items() if flag} == {n for n in before if ".policy." in n}
    with backbone.adapter("policy"):
        with pytest.raises(RuntimeError), backbone.adapter("reward"):
            assert flags(backbone) == before  # peft alone would take the policy's gradients off
            raise RuntimeError
        assert backbone.active_adapter == "policy" and flags(backbone) == before
        backbone.transformer.set_adapter("reward")  # behind our back
        assert flags(backbone) != before
    assert backbone.active_adapter is None and flags(backbone) == before


def test_layers_are_those_of_now(tiny_backbone: WanBackbone) -> None:
    """They are remembered, and an adapter that comes or goes, by a pipeline's own means too, is noticed."""
    network = tiny_backbone.transformer
    walked = lambda: [module for module in network.modules() if isinstance(module, adapters.LoraLayer)]  # noqa: E731
    assert adapters.lora_layers(network) == walked() == []
    network.add_adapter(adapters.LoraConfig(r=1, target_modules=["to_q"]), adapter_name="theirs")
    first = len(walked())
    assert adapters.lora_layers(network) == walked() and first
    tiny_backbone.add_adapter("policy", LoraSpec(rank=2, alpha=2, targets=TARGETS))
    assert adapters.lora_layers(network) == walked() and len(walked()) > first
    network.unload_lora()
    assert adapters.lora_layers(network) == walked() == []
    network.add_adapter(adapters.LoraConfig(r=1, target_modules=["to_k"]), adapter_name="theirs")
    assert adapters.lora_layers(network) == walked() and len(walked()) == first


def test_adding_an_adapter_leaves_the_others_alone(tiny_backbone: WanBackbone) -> None:
    tiny_backbone.transformer.blocks[0].requires_grad_(True)
    tiny_backbone.add_adapter("policy", LoraSpec(rank=2, alpha=2, targets=TARGETS))
    state, random_state = state_of(tiny_backbone.parameters("policy")), torch.random.get_rng_state()
    before = flags(tiny_backbone)
    with tiny_backbone.adapter("policy"):
        tiny_backbone.add_adapter("reward", LoraSpec(rank=2, alpha=2, targets=TARGETS, dropout=0.5))
        assert tiny_backbone.active_adapter == "policy"
    after = flags(tiny_backbone)
    assert {name: after[name] for name in before} == before and after["blocks.0.attn1.to_q.base_layer.weight"]
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert all(torch.equal(value, state[key]) for key, value in state_of(tiny_backbone.parameters("policy")).items())
    assert not any(module.training for module in tiny_backbone.transformer.modules())  # no dropout in eval mode


@pytest.mark.parametrize("name", ["policy", "reward"])
def test_gradient_with_checkpointing_equals_without(
    backbone: WanBackbone, velocity: Callable[[], Tensor], name: str
) -> None:
    def run() -> None:
        with backbone.adapter(name):
            velocity().sin().sum().backward()

    plain = gradient(backbone, name, run)
    backbone.running.checkpointing = "full"
    assert_same(gradient(backbone, name, run), plain, rtol=0, atol=0)
    assert len(plain) == (18 if name == "policy" else 12)
    assert all(p.grad is None for n, p in backbone.transformer.named_parameters() if f".{name}." not in n)


def test_checkpointing_keeps_fewer_activations(backbone: WanBackbone, velocity: Callable[[], Tensor]) -> None:
    def saved_bytes() -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with backbone.adapter("policy"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            velocity().sum().backward()
        return sum(sizes.values())

    plain = saved_bytes()
    backbone.running.checkpointing = "full"
    assert saved_bytes() < plain


def test_the_adapter_gradient_is_that_of_512_tokens(backbone: WanBackbone) -> None:
    condition, latents = backbone.condition(["a red circle", ""]), torch.randn(2, 4, 2, 4, 4)
    text = torch.nn.functional.pad(
        condition.tensors["prompt_embeds"], (0, 0, 0, 512 - condition.tensors["prompt_embeds"].shape[1])
    )

    def folded() -> None:
        with backbone.adapter("policy"):
            backbone.velocity(latents, SIGMA, condition).sin().sum().backward()

    def padded() -> None:
        with backbone.adapter("policy"):
            backbone.transformer(latents, SIGMA * 1000, text, return_dict=False)[0].sin().sum().backward()

    assert_same(gradient(backbone, "policy", folded), gradient(backbone, "policy", padded), rtol=1e-4, atol=1e-4)


def test_policy_step_and_reward_on_one_network_two_phase_equals_joint(
    backbone: WanBackbone, velocity: Callable[[], Tensor]
) -> None:
    """Without checkpointing one graph may cross both adapters, because switching leaves requires_grad alone."""
    condition, sigma = backbone.condition(["a red circle", "a"]), torch.tensor(0.5)
    for parameter in backbone.parameters("reward").values():
        parameter.requires_grad_(False)

    def score(latents: Tensor) -> Tensor:
        with backbone.adapter("reward"):
            return backbone.features(latents, sigma, condition, [1])[0].cos().sum()

    def joint() -> None:
        with backbone.adapter("policy"):
            score(1.0 - 0.4 * velocity()).backward()

    def two_phase() -> None:
        with torch.no_grad(), backbone.adapter("policy"):
            start = 1.0 - 0.4 * velocity()
        with backbone.adapter("reward"):
            start.requires_grad_()
            (seed,) = torch.autograd.grad(score(start), start)
        with backbone.adapter("policy"):
            velocity().backward(-0.4 * seed)

    expected = gradient(backbone, "policy", joint)
    for mode in ("none", "full"):
        backbone.running.checkpointing = mode
        assert_same(gradient(backbone, "policy", two_phase), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrong", ["reward", None])
def test_recomputation_under_another_adapter_raises(
    backbone: WanBackbone, velocity: Callable[[], Tensor], wrong: str | None
) -> None:
    backbone.running.checkpointing = "full"
    with backbone.adapter("policy"):
        loss = velocity().sum()
    with backbone.adapter(wrong), pytest.raises(PrflError, match="ran forward under adapter 'policy'"):
        loss.backward()


def test_a_switch_behind_our_back_raises_too(backbone: WanBackbone, velocity: Callable[[], Tensor]) -> None:
    backbone.running.checkpointing = "full"
    with backbone.adapter("policy"), pytest.raises(PrflError, match="again under 'reward'"):
        loss = velocity().sum()
        backbone.transformer.set_adapter("reward")
        loss.backward()


def test_without_the_guard_the_gradient_is_silently_wrong(
    backbone: WanBackbone, velocity: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the guard is for: two adapters of the same shape, and PyTorch's own checks see nothing."""
    backbone.add_adapter("other", LoraSpec(rank=2, alpha=2, targets=TARGETS))
    randomise(backbone, "other", 3)
    backbone.running.checkpointing = "full"

    def policy_gradient(at_backward: str) -> Tensor:
        own = list(backbone.parameters("policy").values())
        with backbone.adapter("policy"):
            loss = velocity().sin().sum()
        with backbone.adapter(at_backward):
            return torch.cat([value.flatten() for value in torch.autograd.grad(loss, own)])

    right = policy_gradient("policy")
    with pytest.raises(PrflError):
        policy_gradient("other")
    monkeypatch.setattr(adapters, "same_adapter_only", lambda _network, block: block)
    assert torch.equal(policy_gradient("policy"), right)
    wrong = policy_gradient("other")  # no error
    assert (wrong - right).norm() > 0.1 * right.norm()


def test_names_targets_and_blocks_that_do_not_exist(backbone: WanBackbone) -> None:
    with pytest.raises(PrflError, match="there is no adapter 'polcy'"), backbone.adapter("polcy"):
        pass
    with pytest.raises(PrflError, match=r"\['to_z'\] match no linear layer[\s\S]*attn1.to_q"):
        backbone.add_adapter("x", LoraSpec(rank=2, alpha=2, targets=["to_q", "to_z"]))
    with pytest.raises(PrflError, match="match no linear layer"):
        backbone.add_adapter("x", LoraSpec(rank=2, alpha=2, targets=[]))
    with pytest.raises(PrflError, match="0 to 2"):
        backbone.add_adapter("x", LoraSpec(rank=2, alpha=2, targets=["to_q"], blocks=[0, 3]))
    for name in ("policy", "a.b", ""):
        with pytest.raises(PrflError, match="new adapter"):
            backbone.add_adapter(name, LoraSpec(rank=2, alpha=2, targets=["to_q"]))
    assert adapters.adapter_names(backbone.transformer) == ["policy", "reward"]


def test_targets_and_blocks_choose_the_layers(backbone: WanBackbone) -> None:
    layers = {key.rsplit(".lora_", 1)[0] for key in backbone.parameters("reward")}
    assert layers == {f"blocks.{block}.{target}" for block in (0, 1) for target in TARGETS}
    backbone.add_adapter("wide", LoraSpec(rank=1, alpha=1, targets=["to_q", "to_k", "to_v", "to_out.0", "proj"]))
    layers = {key.rsplit(".lora_", 1)[0] for key in backbone.parameters("wide")}
    assert len(layers) == 3 * (8 + 1) and "blocks.2.ffn.net.0.proj" in layers


def test_the_seed_decides_the_new_weights(tiny_backbone: WanBackbone) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        tiny_backbone.add_adapter(name, LoraSpec(rank=2, alpha=2, targets=TARGETS, seed=seed))
    key = "blocks.0.attn1.to_q.lora_A.weight"
    a, b, c = (state_of(tiny_backbone.parameters(name))[key] for name in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_state_round_trip(backbone: WanBackbone, velocity: Callable[[], Tensor]) -> None:
    state = state_of(backbone.parameters("policy"))
    with backbone.adapter("policy"):
        expected = velocity()
    randomise(backbone, "policy", 9)
    with backbone.adapter("policy"):
        assert not torch.equal(velocity(), expected)
    parameters = backbone.parameters("policy")
    load_state(backbone.parameters("policy"), "policy", state)
    assert all(backbone.parameters("policy")[key] is value for key, value in parameters.items())
    with backbone.adapter("policy"):
        assert torch.equal(velocity(), expected)
    with pytest.raises(PrflError, match="6 tensors differ"):
        load_state(backbone.parameters("reward"), "reward", state)
    with pytest.raises(PrflError, match="1 tensors differ"):
        load_state(backbone.parameters("policy"), "policy", {**state, next(iter(state)): torch.zeros(3, 3)})


def test_half_precision_base_has_float32_master_weights(tiny_pipeline_folder) -> None:
    backbone = load_backbone(tiny_pipeline_folder, dtype=torch.bfloat16)
    backbone.add_adapter("policy", LoraSpec(rank=2, alpha=2, targets=TARGETS))
    assert {p.dtype for p in backbone.parameters("policy").values()} == {torch.float32}
    assert (
        backbone.facts.dtype == torch.bfloat16
        and backbone.transformer.blocks[0].attn1.to_v.weight.dtype == torch.bfloat16
    )
    with backbone.adapter("policy"):
        backbone.velocity(torch.randn(2, 4, 2, 4, 4), SIGMA, backbone.condition(["a", "red"])).sum().backward()
    gradients = [p.grad for p in backbone.parameters("policy").values()]
    assert all(g is not None and g.dtype == torch.float32 for g in gradients)


def half_precision_gradients(folder: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> tuple[dict[str, Tensor], int]:
    """Gradients under a policy on attention and feed-forward, and the bytes that autograd keeps.

    way: ``ours``, ``peft`` (computes in the adapter's float32), ``half`` (peft with a bfloat16 adapter), or ``exact``
    (a float32 model of the same weights).
    """
    backbone = load_backbone(folder, dtype=torch.bfloat16)
    if way == "exact":
        backbone.transformer.float()
        backbone.facts = replace(backbone.facts, dtype=torch.float32)
    with monkeypatch.context() as patch:
        if way in ("peft", "half"):
            patch.setattr(adapters, "compute_in_input_type", lambda layer, name: None)
        targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
        backbone.add_adapter("policy", LoraSpec(rank=4, alpha=4, targets=targets))
    randomise(backbone, "policy", 1)
    for parameter in backbone.parameters("policy").values() if way == "half" else ():
        parameter.data = parameter.data.bfloat16()
    weights = {p.untyped_storage().data_ptr() for p in backbone.transformer.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    latents = torch.randn(2, 4, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    condition = backbone.condition(["a red circle", "a"])
    with backbone.adapter("policy"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        velocity = backbone.velocity(latents, SIGMA, condition)
        size = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in weights)
        velocity.sin().sum().backward()
    return {key: p.grad for key, p in backbone.parameters("policy").items() if p.grad is not None}, size


def test_an_adapter_keeps_no_float32_copies(tiny_pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """peft does, of each layer's input.  The gradients are float32, and as near the exact ones as bfloat16 allows."""
    ours, kept = half_precision_gradients(tiny_pipeline_folder, monkeypatch, "ours")
    peft, kept_by_peft = half_precision_gradients(tiny_pipeline_folder, monkeypatch, "peft")
    exact, _ = half_precision_gradients(tiny_pipeline_folder, monkeypatch, "exact")
    assert len(ours) == 3 * 2 * 10 and all(gradient.dtype == torch.float32 for gradient in ours.values())
    _, least = half_precision_gradients(tiny_pipeline_folder, monkeypatch, "half")
    casts = 2 * sum(gradient.numel() for gradient in ours.values())  # of the weights: nothing at a real model's tokens
    assert kept <= least + casts and kept_by_peft > 1.25 * kept

    def error(found: dict[str, Tensor]) -> float:
        difference = sum(float((found[key] - exact[key]).square().sum()) for key in exact)
        return (difference / sum(float(exact[key].square().sum()) for key in exact)) ** 0.5

    assert error(ours) < 2 * error(peft) < 0.01, "bfloat16 itself is good to 0.004"


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_an_adapter_on_the_last_blocks_needs_no_graph_below_them(
    tiny_backbone: WanBackbone, checkpointing: str
) -> None:
    """Its gradient is that of the same adapter on all blocks, and nothing of the first two blocks is kept."""
    tiny_backbone.running.checkpointing = checkpointing  # type: ignore[assignment]
    for name, blocks in (("everywhere", None), ("last", [2])):
        tiny_backbone.add_adapter(name, LoraSpec(rank=2, alpha=2, targets=TARGETS, blocks=blocks))
    generator = torch.Generator().manual_seed(0)
    for key, parameter in tiny_backbone.parameters("last").items():
        value = torch.randn(parameter.shape, generator=generator) * 0.3
        parameter.data.copy_(value)
        tiny_backbone.parameters("everywhere")[key].data.copy_(value)
    latents, condition = torch.randn(2, 4, 2, 4, 4, generator=generator), tiny_backbone.condition(["a", "red"])
    gradients, kept = {}, {}
    for name in ("everywhere", "last"):
        with SavedBytes(list(tiny_backbone.transformer.parameters())) as saved, tiny_backbone.adapter(name):
            tiny_backbone.velocity(latents, SIGMA, condition).square().sum().backward()
        gradients[name] = {key: p.grad for key, p in tiny_backbone.parameters(name).items()}
        kept[name] = saved.peak
    for key, gradient in gradients["last"].items():
        torch.testing.assert_close(gradient, gradients["everywhere"][key])
    assert kept["last"] < 0.6 * kept["everywhere"]


def test_how_far_an_adapter_reaches_and_what_it_will_be(backbone):
    assert reach(backbone, "policy") == (9, 3)
    assert reach(backbone, "reward") == (6, 2)
    own = {name: tuple(p.shape) for name, p in backbone.parameters("reward").items()}
    assert adapters.lora_shapes(backbone.transformer, LoraSpec(2, 2, TARGETS, blocks=[0, 1]), ["blocks"]) == own
