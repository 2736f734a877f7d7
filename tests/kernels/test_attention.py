"""The operator on CPU: the reference's result and gradients, what it saves, and how the compiler and checkpointing
see it.  The Triton source is in triton/test_attention.py."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from prfl.backbone.wan.text import fold_padding
from prfl.estimate.live_tensors import SavedBytes
from prfl_kernels import reference
from prfl_kernels.attention import attention
from prfl_kernels.dispatch import interpreting
from tests.kernels.checks import assert_as_good, random

OPERATOR = torch.ops.prfl.attention.default
pytestmark = pytest.mark.skipif(interpreting(), reason="on CPU this is the torch path")


def inputs(queries: int = 5, keys: int = 7, channels: int = 4, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Two samples, three heads; q, k and v are chunks of wider rows, as a joint projection leaves them."""
    lying = [random(2, tokens, 6, channels, seed=i) for i, tokens in enumerate((queries, keys, keys))]
    return [x.to(dtype)[:, :, 1:4].detach().requires_grad_() for x in lying]


BIAS = torch.tensor([[0.0, 1, 2, 3, 4, 5, 6], [0, 0, float("-inf"), 0, 2, 0, float("-inf")]], dtype=torch.float64)


def results(attend, given: list[Tensor], bias: Tensor | None = None, scale: float | None = None) -> dict[str, Tensor]:
    out = attend(*given, bias, scale)
    grads = torch.autograd.grad(out, given, random(*out.shape, seed=9).to(out.dtype))
    return dict(zip(("out", "query", "key", "value"), (out.detach(), *grads), strict=True))


@pytest.mark.parametrize("bias", [None, BIAS], ids=["", "bias"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_it_is_the_reference(bias: Tensor | None, scale: float | None) -> None:
    ours, wanted = (results(attend, inputs(), bias, scale) for attend in (attention, reference.attention))
    for name, value in wanted.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=1e-12)
    assert ours["out"].is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_as_exact_as_torch(dtype: torch.dtype) -> None:
    given, bias = inputs(40, 30, 16, dtype), random(2, 30, seed=5, dtype=torch.float32)
    exact = results(reference.attention, [x.detach().double().requires_grad_() for x in given], bias.double())
    assert_as_good(results(attention, given, bias), results(reference.attention, given, bias), exact)


@pytest.mark.parametrize("attend", [reference.attention, attention])
def test_gradients_against_finite_differences(attend) -> None:
    assert torch.autograd.gradcheck(lambda *each: attend(*each, BIAS), inputs(3, 7, 2))


def test_folded_text_is_the_padded_text() -> None:
    """Zero tokens have one key and one value; the bias of ``fold_padding`` makes a few of them weigh as all."""
    lengths, width = torch.tensor([2, 5]), 12
    text = random(2, 5, width) * (torch.arange(5) < lengths[:, None])[..., None]
    query, weights, constants = random(2, 3, 3, 4, seed=1), random(2, width, width, seed=2), random(2, width, seed=3)

    def attend(tokens: Tensor, bias: Tensor | None) -> Tensor:
        key, value = ((tokens @ w + c).unflatten(-1, (3, -1)) for w, c in zip(weights, constants, strict=True))
        return attention(query, key, value, bias)

    folded, bias = fold_padding(text, lengths, 64)
    padded = torch.nn.functional.pad(text, (0, 0, 0, 64 - 5))
    torch.testing.assert_close(attend(folded, bias), attend(padded, None), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_opcheck() -> None:
    query, key, value = inputs()
    for given in ((query, key, value), [x.detach() for x in (query, key, value)]):
        torch.library.opcheck(OPERATOR, (*given, BIAS, 0.5, given[0].requires_grad))
    plain = [x.detach() for x in (query, key, value)]
    out, lse = OPERATOR(*plain, None, 0.5, True)
    grad = random(*out.shape)
    torch.library.opcheck(torch.ops.prfl.attention_query_gradient.default, (grad, *plain, None, out, lse, 0.5))
    torch.library.opcheck(torch.ops.prfl.attention_key_gradient.default, (grad, *plain, None, lse, lse, 0.5))


def test_it_compiles_whole() -> None:
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    eager = results(attention, inputs(), BIAS)
    for name, value in results(compiled, inputs(), BIAS).items():
        assert torch.equal(value, eager[name]), name


def test_what_is_saved() -> None:
    """q, k, v, the output, and four bytes a query and head; of a forward pass without gradient nothing."""
    query, key, value = (x.detach().clone().requires_grad_() for x in inputs(40, 30, 16, torch.bfloat16))
    with (saved := SavedBytes()):
        out = attention(query, key, value)
    assert saved.live == sum(x.nbytes for x in (query, key, value, out)) + 4 * 2 * 40 * 3
    with (saved := SavedBytes()), torch.no_grad():
        attention(query, key, value)
    assert saved.peak == 0


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_selective_checkpointing_keeps_it() -> None:
    """One call, not two, of the forward pass, and the same gradients."""

    def block(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(query.sin(), key.sin(), value).cos()

    def policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op == OPERATOR else CheckpointPolicy.PREFER_RECOMPUTE

    given = inputs()
    wanted = torch.autograd.grad(block(*given).sum(), given)
    for contexts, calls in ((partial(create_selective_checkpoint_contexts, policy), 1), (None, 2)):
        more = {} if contexts is None else {"context_fn": contexts}
        with Counted() as counted:
            found = torch.autograd.grad(checkpoint(block, *given, use_reentrant=False, **more).sum(), given)
        assert counted.names.count("prfl.attention.default") == calls
        assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("with_gradient", [(0,), (0, 1), (2,)])
def test_keys_of_a_frozen_text_cost_no_backward(with_gradient: tuple[int, ...]) -> None:
    given = inputs()
    wanted = torch.autograd.grad(reference.attention(*given).sum(), given)
    for i, x in enumerate(given):
        x.requires_grad_(i in with_gradient)
    with Counted() as counted:
        attention(*given).sum().backward()
    assert ("prfl.attention_key_gradient.default" in counted.names) == (with_gradient != (0,))
    for i, x in enumerate(given):
        assert (x.grad is not None) == (i in with_gradient)
        if x.grad is not None:
            torch.testing.assert_close(x.grad, wanted[i], rtol=1e-12, atol=1e-12)


def test_inputs_that_do_not_fit() -> None:
    query, key, value = inputs()
    with pytest.raises(ValueError, match=r"key and value must be \(2, S, 3, 4\) with S > 0"):
        attention(query, key[:, :, :2], value)
    with pytest.raises(ValueError, match="must have one dtype"):
        attention(query, key.float(), value)
    for bias in (BIAS[:, :3], BIAS.clone().requires_grad_()):
        with pytest.raises(ValueError, match=r"bias must be \(2, 7\) without a gradient"):
            attention(query, key, value, bias)
    with pytest.raises(RuntimeError, match="save=False under autograd"):
        OPERATOR(query, key, value, None, 1.0, False)
