"""Cheaper network calls: what they change and what not, and everything as before when they are over."""

from __future__ import annotations

import sys
from collections.abc import Set

import pytest
import torch
from torch import Tensor, nn

from prfl.backbone import eight_bits as eight
from prfl.backbone import load_backbone
from prfl.backbone.cheaper import Cheaper
from prfl.backbone.eight_bits import Float8Linear
from prfl.backbone.network import add_copy, train_all
from prfl.backbone.wan.cheaper import CheaperCalls
from prfl.backbone.wan.kernels import SWAPPED
from prfl.backbone.wan.model import WanBackbone
from prfl.config import load_config
from prfl.factory.backbone import check_cheaper
from prfl.utils.errors import PrflError
from tests.backbone.test_kernels import with_adapter

PROMPTS = ["a red circle", "a"]
FLOAT8, INT8, BOTH = Cheaper(products="float8"), Cheaper(attention="int8"), Cheaper("float8", "int8")
WAYS = {"float8": FLOAT8, "int8": INT8, "both": BOTH, "cache": Cheaper(cache=0.5)}


def latents(seed: int = 1, batch: int = 2) -> Tensor:
    return torch.randn(batch, 4, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def called(backbone: WanBackbone, calls: CheaperCalls | None = None, node: int = 0, adapter: str | None = "policy"):
    """The velocity at some latents, by a cheaper call or an exact one."""
    with backbone.adapter(adapter):
        condition = backbone.condition(PROMPTS)
        if calls is None:
            return backbone.velocity(latents(), torch.tensor([0.3, 0.8]), condition)
        with calls.at(node):
            return backbone.velocity(latents(), torch.tensor([0.3, 0.8]), condition)


def off(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("way", ["float8", "int8", "both"])
@pytest.mark.parametrize("which", [(), ("lora_linear",), SWAPPED], ids="+".join)
def test_with_adapters_and_kernels_the_same_rounding(
    tiny_backbone: WanBackbone, which: tuple[str, ...], way: str
) -> None:
    """Near the exact call, and the same however the blocks are computed: ``project`` calls float8 layers one by one."""
    backbone = with_adapter(tiny_backbone)
    exact, plain = called(backbone), called(backbone, backbone.cheaper(WAYS[way]))
    backbone.use_kernels(which)
    found = called(backbone, backbone.cheaper(WAYS[way]))
    assert 1e-3 < off(found, exact) < 0.1
    assert off(found, plain) < 0.2 * off(found, exact), "values at the edge between two roundings may change sides"
    assert off(called(backbone), exact) < 1e-5


@pytest.mark.parametrize("way", WAYS)
def test_afterwards_all_is_as_before_bit_for_bit(tiny_backbone: WanBackbone, way: str) -> None:
    backbone = with_adapter(tiny_backbone)
    exact = called(backbone)
    classes = [type(module) for module in backbone.transformer.modules()]
    processors = [block.attn1.processor for block in backbone.transformer.blocks]
    calls = backbone.cheaper(WAYS[way], exact={3})
    called(backbone, calls)
    with pytest.raises(ZeroDivisionError), torch.no_grad(), calls.at(1):
        raise ZeroDivisionError
    assert [type(module) for module in backbone.transformer.modules()] == classes
    assert all(a is b.attn1.processor for a, b in zip(processors, backbone.transformer.blocks, strict=True))
    assert backbone.step_cache is None
    assert torch.equal(called(backbone), exact)
    assert torch.equal(called(backbone, calls, node=3), exact), "a node that is to be exact"


def test_a_call_with_gradient_is_refused(tiny_backbone: WanBackbone) -> None:
    with pytest.raises(AssertionError, match="no gradient"), tiny_backbone.cheaper(FLOAT8).at(0):
        pass


def test_only_the_base_inside_the_blocks_is_in_float8(
    tiny_backbone: WanBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = with_adapter(tiny_backbone)
    seen: set[int] = set()
    real = eight.float8_linear
    monkeypatch.setattr(eight, "float8_linear", lambda x, w, b: seen.add(w.data_ptr()) or real(x, w, b))
    called(backbone, backbone.cheaper(FLOAT8))
    names = {name for name, weight in backbone.transformer.named_parameters() if weight.data_ptr() in seen}
    every = {name for name, w in backbone.transformer.named_parameters() if name.startswith("blocks.") and w.ndim == 2}
    assert names == {name for name in every if ".lora_" not in name and "norm" not in name} and len(names) == 30


def test_an_adapter_keeps_its_own_precision(tiny_backbone: WanBackbone) -> None:
    """Whose base is zero: what is left is the adapter's product, exactly."""
    layer = with_adapter(tiny_backbone).transformer.blocks[0].ffn.net[2]
    base, x = layer.get_base_layer(), torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), tiny_backbone.adapter("policy"):
        base.weight.zero_()
        expected = layer(x)
        with tiny_backbone.cheaper(FLOAT8).at(0):
            assert type(base) is Float8Linear
            assert torch.equal(layer(x), expected)
        assert type(base) is nn.Linear and expected.abs().max() > 0.1


@pytest.mark.parametrize("in_place", [True, False])
def test_all_weights_trained_in_float32_under_autocast(tiny_pipeline_folder, in_place: bool) -> None:
    backbone = load_backbone(tiny_pipeline_folder, torch.bfloat16)
    if in_place:
        train_all(backbone)
    else:
        add_copy(backbone, "policy")
    adapter = None if in_place else "policy"
    exact = called(backbone, adapter=adapter)
    with backbone.adapter(adapter):
        calls = backbone.cheaper(BOTH)
    found = called(backbone, calls, adapter=adapter)
    assert 1e-3 < off(found, exact) < 0.1


def test_text_attention_stays_exact(tiny_backbone: WanBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(eight, "QUERIES_AND_KEYS", lambda x: seen.append(x.shape[1]) or x)
    monkeypatch.setattr(eight, "VALUES", lambda x: x)
    tokens = 3 * 2 * 2
    exact, found = called(tiny_backbone, adapter=None), called(tiny_backbone, tiny_backbone.cheaper(INT8), adapter=None)
    assert seen == [tokens] * 6, "queries and keys of three blocks, among the video's tokens"
    assert off(found, exact) < 1e-6, "without the rounding there is nothing else"


# ------------------------------------------------------------------------------------------------- the step cache


@torch.no_grad()
def chain(
    backbone: WanBackbone, how: Cheaper, samples: list[int], exact: Set[int] = frozenset(), branches: int = 1
) -> tuple[list[Tensor], CheaperCalls, list[list[int]]]:
    """Velocities at five nodes, for these samples of a batch; and how many samples each block saw at each call."""
    conditions = [backbone.condition([PROMPTS[sample] for sample in samples]) for _ in range(branches)]
    noise, step = latents(1)[samples], latents(2)[samples] * torch.tensor([0.0, 0.3])[samples].reshape(-1, 1, 1, 1, 1)
    seen: list[list[int]] = [[] for _ in backbone.transformer.blocks]
    hooks = [
        block.register_forward_hook(lambda _, given, __, own=own: own.append(len(given[0])))
        for block, own in zip(backbone.transformer.blocks, seen, strict=True)
    ]
    found = []
    with backbone.adapter("policy"):
        calls = backbone.cheaper(how, exact)
        for node in range(5):
            for condition in conditions:
                with calls.at(node):
                    # The first sample hardly moves, the second does.
                    found.append(backbone.velocity(noise + node * step, torch.tensor(0.9 - 1e-5 * node), condition))
    for hook in hooks:
        hook.remove()
    return found, calls, seen


def test_a_threshold_that_nothing_reaches_computes_all(tiny_backbone: WanBackbone) -> None:
    backbone = with_adapter(tiny_backbone)
    exact, _, _ = chain(backbone, Cheaper(), [0, 1])
    found, calls, seen = chain(backbone, Cheaper(cache=1e-12), [0, 1])
    assert all(map(torch.equal, found, exact)) and calls.cached == 0.0
    assert seen == [[2] * 5] * 3


def test_a_huge_threshold_skips_all_but_the_first_and_the_exact(tiny_backbone: WanBackbone) -> None:
    backbone = with_adapter(tiny_backbone)
    exact, _, _ = chain(backbone, Cheaper(), [0, 1])
    found, calls, seen = chain(backbone, Cheaper(cache=1e9), [0, 1], exact={3})
    assert seen == [[2] * 5, [2, 2], [2, 2]]
    assert calls.cached == pytest.approx(3 / 5)
    assert torch.equal(found[0], exact[0]) and torch.equal(found[3], exact[3])
    for node in (1, 2, 4):
        assert 0 < off(found[node][1], exact[node][1]) < 0.9
    assert off(found[4][1], exact[4][1]) < off(found[2][1], exact[2][1]), "an exact call is what is taken next"


def test_what_is_added_is_what_the_other_blocks_added(tiny_backbone: WanBackbone) -> None:
    """A second call at the same place takes the cache's, and is the first one to the rounding of a difference."""
    backbone = with_adapter(tiny_backbone)
    calls = backbone.cheaper(Cheaper(cache=0.01))
    condition = backbone.condition(PROMPTS)
    with torch.no_grad():
        found = []
        for node in range(2):
            with calls.at(node):
                found.append(backbone.velocity(latents(), torch.tensor(0.5), condition))
    assert calls.cached == 0.5 and 0 < off(found[1], found[0]) < 1e-5 or torch.equal(found[0], found[1])


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_sample_does_not_depend_on_its_neighbours(tiny_backbone: WanBackbone, dropout: float) -> None:
    backbone = with_adapter(tiny_backbone, dropout=dropout)
    seeds = torch.tensor([5, 6])
    with backbone.adapter("policy", seeds):
        both, calls, seen = chain(backbone, Cheaper(cache=0.02), [0, 1])
    assert seen[1] == [2, 1, 1, 1, 1] and calls.cached == 0.4, "one sample is skipped, the other is not"
    for sample in (0, 1):
        with backbone.adapter("policy", seeds[sample : sample + 1]):
            alone, _, _ = chain(backbone, Cheaper(cache=0.02), [sample])
        for found, expected in zip(both, alone, strict=True):
            torch.testing.assert_close(found[sample], expected[0], rtol=2e-5, atol=2e-5)


def test_branches_of_guidance_have_their_own(tiny_backbone: WanBackbone) -> None:
    """Two conditions in turn: each is compared with itself, so the second is not taken for a change of the first."""
    backbone = with_adapter(tiny_backbone)
    one, _, _ = chain(backbone, Cheaper(cache=0.02), [0, 1])
    two, calls, seen = chain(backbone, Cheaper(cache=0.02), [0, 1], branches=2)
    assert seen[1] == [2, 2, *[1] * 8] and calls.cached == 0.4
    assert all(map(torch.equal, two[::2], one)) and all(map(torch.equal, two[1::2], one))


def test_a_new_rollout_begins_with_nothing(tiny_backbone: WanBackbone) -> None:
    backbone = with_adapter(tiny_backbone)
    first, _, _ = chain(backbone, Cheaper(cache=0.02), [0, 1])
    again, _, seen = chain(backbone, Cheaper(cache=0.02), [0, 1])
    assert seen[1][0] == 2 and all(map(torch.equal, first, again))


# ------------------------------------------------------------------------------------------------- where it cannot run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.cheaper.products=float8", "rollout.cheaper.products: An A100 has no float8 .*8.9.* exact"),
        (
            "rollout.cheaper.attention=int8",
            "rollout.cheaper.attention: .*pip install sageattention.*install sageattention",
        ),
    ],
)
def test_what_this_gpu_cannot_do_is_refused_with_a_remedy(
    override: str, message: str, tiny_backbone: WanBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "An A100")
    monkeypatch.setitem(sys.modules, "sageattention", None)
    config = load_config("configs/tiny/best.yaml", ["backbone.device=cuda", override])
    with pytest.raises(PrflError, match=f"(?s){message}"):
        check_cheaper(config, tiny_backbone)
    check_cheaper(load_config("configs/tiny/best.yaml", ["backbone.device=cpu", override]), tiny_backbone)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    if "products" in override:
        check_cheaper(config, tiny_backbone)
