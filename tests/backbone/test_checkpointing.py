"""Blocks computed again, with and without their attention, on the device and through host memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from prfl.backbone import LoraSpec
from prfl.backbone.checkpointing import run_block
from prfl.backbone.wan.model import WanBackbone
from prfl.data.conditions import remember
from prfl.utils.errors import PrflError
from prfl.utils.host_store import HostStore

MODES = [("full", False), ("full", True), ("attention", False), ("attention", True)]
PROMPTS = ["a red circle", "a"]
TARGETS = ["attn1.to_q", "attn2.to_k", "ffn.net.2"]


# ------------------------------------------------------------------------------------------------------- a toy, float64


class Toy(torch.nn.Module):
    """Self-attention, attention to a text, and what is around them."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.ModuleList(torch.nn.Linear(width, width, dtype=torch.float64) for _ in range(4))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q, k, v, out = self.linear
        heads = lambda y: y.unflatten(-1, (2, -1)).transpose(1, 2)  # noqa: E731
        x = x + F.scaled_dot_product_attention(heads(q(x)), heads(k(x)), heads(v(x))).transpose(1, 2).flatten(2)
        more = F.scaled_dot_product_attention(heads(x), heads(text), heads(text)).transpose(1, 2).flatten(2)
        return x + out(more).sin()


def toy_gradients(run: Callable[..., Tensor]) -> list[Tensor]:
    blocks, generator = [Toy(), Toy(), Toy()], torch.Generator().manual_seed(1)
    x, text = (torch.randn(2, n, 6, generator=generator, dtype=torch.float64, requires_grad=True) for n in (7, 3))
    hidden = x.sin()
    for block in blocks:
        hidden = run(block, hidden, text)
    parameters = [p for block in blocks for p in block.parameters()]
    return list(torch.autograd.grad(hidden.cos().sum(), [x, text, *parameters]))


@pytest.mark.parametrize("mode, offload", MODES)
def test_a_toy_of_odd_shapes_in_float64(mode: Any, offload: bool) -> None:
    expected = toy_gradients(lambda block, *inputs: block(*inputs))
    store = HostStore() if offload else None
    found = toy_gradients(lambda block, *inputs: run_block(block, *inputs, mode=mode, store=store))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        assert theirs.abs().max() > 0


def test_attention_that_is_not_fused_is_refused() -> None:
    """It would be computed again without a word."""
    with pytest.raises(PrflError, match="no fused self-attention"):
        toy_gradients(lambda block, x, text: run_block(lambda x, _: x.softmax(-1), x, text, mode="attention"))


def test_one_backward_pass() -> None:
    x, text = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, 6, dtype=torch.float64)
    loss = run_block(Toy(), x, text, mode="attention").sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


# ------------------------------------------------------------------------------------------------------- Wan


@pytest.fixture
def backbone(tiny_backbone: WanBackbone) -> WanBackbone:
    remember(tiny_backbone, PROMPTS)
    tiny_backbone.add_adapter("policy", LoraSpec(rank=2, alpha=2, targets=TARGETS))
    generator = torch.Generator().manual_seed(1)
    for parameter in tiny_backbone.parameters("policy").values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return tiny_backbone


def velocity(backbone: WanBackbone, leaf: Tensor | None = None) -> Tensor:
    latents = torch.randn(2, 4, 3, 6, 4, generator=torch.Generator().manual_seed(0)) if leaf is None else leaf
    return backbone.velocity(latents, torch.tensor([0.3, 0.9]), backbone.condition(PROMPTS))


def gradients(backbone: WanBackbone) -> list[Tensor]:
    leaf = torch.randn(2, 4, 3, 6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with backbone.adapter("policy"):
        own = list(backbone.parameters("policy").values())
        return list(torch.autograd.grad(velocity(backbone, leaf).sin().sum(), [leaf, *own]))


@pytest.mark.parametrize("mode, offload", MODES)
def test_gradients_equal_those_without(backbone: WanBackbone, mode: Any, offload: bool) -> None:
    expected = gradients(backbone)
    backbone.running.checkpointing, backbone.running.offload = mode, offload
    for ours, theirs in zip(gradients(backbone), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        assert theirs.abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("mode, compiler", [("full", "aot_eager"), ("attention", "inductor")])
def test_compiled_blocks(backbone: WanBackbone, mode: Any, compiler: str) -> None:
    """They call fused attention as one operation, which is kept there too.  (One writes no C++: that takes 30 s.)"""
    expected = gradients(backbone)
    backbone.running.checkpointing, backbone.running.offload = mode, True
    backbone.transformer.compile_repeated_blocks(backend=compiler)
    torch._dynamo.reset()
    counters.clear()
    with Calls() as calls:
        found = gradients(backbone)
    assert counters["frames"]["ok"] >= 1 and not counters["graph_break"]
    assert calls.self_attention == (3 if mode == "attention" else 6)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


class Calls(TorchDispatchMode):
    """Counts fused attention, told apart by the number of keys."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __init__(self) -> None:
        super().__init__()
        self.self_attention = self.cross_attention = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            own = args[0].shape[-2] == args[1].shape[-2]
            self.self_attention += own
            self.cross_attention += not own
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode, times", [("none", (3, 3)), ("full", (6, 6)), ("attention", (3, 6))])
def test_attention_is_not_computed_again(backbone: WanBackbone, mode: Any, times: tuple[int, int]) -> None:
    backbone.running.checkpointing = mode
    with Calls() as calls:
        gradients(backbone)
    assert (calls.self_attention, calls.cross_attention) == times


@pytest.mark.parametrize("mode", ["full", "attention"])
@pytest.mark.parametrize("wrong", ["reward", None])
def test_recomputation_under_another_adapter_raises(backbone: WanBackbone, mode: Any, wrong: str | None) -> None:
    backbone.add_adapter("reward", LoraSpec(rank=2, alpha=2, targets=TARGETS))
    backbone.running.checkpointing, backbone.running.offload = mode, True
    with backbone.adapter("policy"):
        loss = velocity(backbone).sum()
    with backbone.adapter(wrong), pytest.raises(PrflError, match="ran forward under adapter 'policy'"):
        loss.backward()


# ------------------------------------------------------------------------------------------------------- host memory


@pytest.mark.parametrize("mode, tensors", [("full", 3), ("attention", 6)])
def test_what_the_blocks_keep_lives_in_the_store(
    backbone: WanBackbone, mode: Any, tensors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nowhere else: what is changed there changes the gradient."""
    stores: list[HostStore] = []
    new_group = HostStore.new_group
    monkeypatch.setattr(HostStore, "new_group", lambda self: (stores.append(self), new_group(self))[1])
    backbone.running.checkpointing, backbone.running.offload = mode, True
    own = list(backbone.parameters("policy").values())
    with backbone.adapter("policy"):
        right = torch.autograd.grad(velocity(backbone).sin().sum(), own)
        for index in range(tensors):
            loss = velocity(backbone).sin().sum()
            parked = [one for group in stores[-1].groups for one in group]
            assert len(parked) == tensors and stores[-1].bytes == tensors * 2 * 18 * 24 * 4
            assert parked[index].host is not None
            parked[index].host.mul_(1.5)
            wrong = torch.autograd.grad(loss, own)
            assert any(not torch.equal(a, b) for a, b in zip(wrong, right, strict=True)), index


class Stream:
    """Stands for a stream of a GPU: what is queued on it runs only when somebody waits for it."""

    def __init__(self) -> None:
        self.log: list[tuple] = []

    def wait_stream(self, other: Stream) -> None:
        self.log.append(("wait for stream", id(other)))

    def wait_event(self, event: int) -> None:
        self.log.append(("wait for event", event))

    def record_event(self) -> int:
        Stream.events += 1
        self.log.append(("record", Stream.events))
        return Stream.events

    events = 0


def test_copies_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of waiting on a GPU, with streams that only write it down (the copies themselves run at once)."""
    computing, copying = Stream(), Stream()
    monkeypatch.setattr("prfl.utils.host_store.streams", lambda device: (computing, copying))
    monkeypatch.setattr("prfl.utils.host_store.LEAVING", 1)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    plain = torch.empty_strided
    monkeypatch.setattr(torch, "empty_strided", lambda *a, pin_memory=False, **k: plain(*a, **k))
    store, base, tensors = HostStore(), Stream.events, [torch.full((3, 2), float(i)).T for i in range(3)]
    parked = []
    for tensor in tensors:
        store.new_group()
        parked.append(store.put(tensor))
    assert [entry for kind, entry in computing.log] == [base + 1, base + 2], "all but the last have left"
    store.settle()
    assert [entry for kind, entry in computing.log] == [base + 1, base + 2, base + 3]
    each = [(("wait for stream", id(computing)), ("record", base + n)) for n in (1, 2, 3)]
    assert copying.log == [entry for pair in each for entry in pair]
    del computing.log[:], copying.log[:]
    for index in (2, 1, 0):
        taken = store.take(parked[index])
        assert torch.equal(taken, tensors[index]) and taken.stride() == tensors[index].stride()
        # 2 and 1 are sent for with the first, 0 with the second: each is waited for when it is taken.
        assert computing.log.pop() == ("wait for event", base + 4 + 2 - index) and not computing.log
        assert Counter(kind for kind, _ in copying.log)["record"] == min(3, 4 - index)
    assert torch.equal(store.take(parked[2]), tensors[2]), "it can be taken again"
    parked[1].taken = False
    store.take(parked[2])
    del computing.log[:]
    on_its_way = parked[1].coming
    assert on_its_way is not None
    del store, parked
    assert computing.log == [("wait for event", on_its_way[1])], "its memory is still being written to"
