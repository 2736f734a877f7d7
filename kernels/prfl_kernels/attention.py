"""Softmax attention without a matrix of scores, forward and backward, on rows as they lie.

The forward pass keeps q, k, v, the output and one logarithm a query and head; the backward rebuilds the weights from
them.  Without a gradient to come not even the logarithm is written.  The backward is deterministic.  On CPU the same in
torch, with the scores in memory and the same saved tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prfl_kernels.dispatch import refuse_forward_mode, runs_triton


def attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Compute softmax(scale q k^T + bias) v, per head (``reference.attention``); arXiv 2205.14135, 2307.08691.

    query: (B, T, H, C).  key, value: (B, S, H, C), of query's dtype.  Strides are taken as they are; only channels that
    are not side by side are copied.  bias: (B, S) in float32, added to the logits of every head and query: zero, log m
    for a key that stands for m equal ones, -inf for one that is not to be seen (not all of them); it receives no
    gradient.  scale: 1 / sqrt(C) if None.  Returns (B, T, H, C), contiguous, in query's dtype.
    As ``torch.ops.prfl.attention`` it is one operation to torch.compile and to selective checkpointing, whose first
    result is this one.  On a GPU C is one of 16, 32, 64, 128.
    Raises ValueError where shapes or dtypes do not fit, and for a bias that requires a gradient.
    """
    _check(query, key, value, bias)
    refuse_forward_mode("attention", query, key, value, bias)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    return torch.ops.prfl.attention(query, key, value, bias, scale, save)[0]


def _check(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> None:
    batch, _, heads, channels = query.shape
    keys = key.shape[1]
    if key.shape != (batch, keys, heads, channels) or value.shape != key.shape or not keys:
        wanted = f"({batch}, S, {heads}, {channels}) with S > 0"
        raise ValueError(f"key and value must be {wanted}, and are {tuple(key.shape)} and {tuple(value.shape)}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key and value must have one dtype, and are {query.dtype}, {key.dtype}, {value.dtype}")
    if bias is not None and (bias.shape != (batch, keys) or bias.requires_grad):
        raise ValueError(f"bias must be ({batch}, {keys}) without a gradient, and is {tuple(bias.shape)}")


@torch.library.custom_op("prfl::attention", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, save: bool
) -> tuple[Tensor, Tensor]:
    """Compute the output, and the log-sum-exp of the logits (B, H, T), which is empty where it is not to be saved."""
    out, lse = _outputs(query, save)
    if runs_triton(query):
        from prfl_kernels import attention_triton

        query, key, value = _rows(query, key, value)
        attention_triton.forward(query, key, value, _plain(bias), out, lse if save else None, scale)
        return out, lse

    logits = _logits(query, key, bias, scale)
    log_total = logits.logsumexp(-1)
    weights = (logits - log_total[..., None]).exp()
    out.copy_(torch.einsum("bhts,bshc->bthc", weights, value.to(logits.dtype)))
    if save:
        lse.copy_(log_total)
    return out, lse


@_forward.register_fake
def _(query, key, value, bias, scale, save):  # type: ignore[no-untyped-def]
    return _outputs(query, save)


@torch.library.custom_op("prfl::attention_query_gradient", mutates_args=())
def _query_gradient(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute dq, and delta (B, H, T): the sum of out dout over a head's channels, which the keys' gradient needs."""
    d_query, delta = _empty(query), torch.empty_like(lse)
    if runs_triton(query):
        from prfl_kernels import attention_triton

        grad, query, key, value = _rows(grad, query, key, value)
        attention_triton.query_gradient(grad, query, key, value, _plain(bias), out, lse, d_query, delta, scale)
        return d_query, delta

    wide = lse.dtype
    delta.copy_((out.to(wide) * grad.to(wide)).sum(-1).mT)
    _, d_logits = _weights_and_gradient(grad, query, key, value, bias, lse, delta, scale)
    d_query.copy_(torch.einsum("bhts,bshc->bthc", d_logits, key.to(wide)) * scale)
    return d_query, delta


@_query_gradient.register_fake
def _(grad, query, key, value, bias, out, lse, scale):  # type: ignore[no-untyped-def]
    return _empty(query), torch.empty_like(lse)


@torch.library.custom_op("prfl::attention_key_gradient", mutates_args=())
def _key_gradient(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None,
    lse: Tensor, delta: Tensor, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute dk and dv."""
    d_key, d_value = _empty(key), _empty(value)
    if runs_triton(query):
        from prfl_kernels import attention_triton

        grad, query, key, value = _rows(grad, query, key, value)
        attention_triton.key_gradient(grad, query, key, value, _plain(bias), lse, delta, d_key, d_value, scale)
        return d_key, d_value

    weights, d_logits = _weights_and_gradient(grad, query, key, value, bias, lse, delta, scale)
    d_key.copy_(torch.einsum("bhts,bthc->bshc", d_logits, query.to(lse.dtype)) * scale)
    d_value.copy_(torch.einsum("bhts,bthc->bshc", weights, grad.to(lse.dtype)))
    return d_key, d_value


@_key_gradient.register_fake
def _(grad, query, key, value, bias, lse, delta, scale):  # type: ignore[no-untyped-def]
    return _empty(key), _empty(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, bias, ctx.scale, save = inputs
    if not save:
        raise RuntimeError("prfl::attention with save=False under autograd: its backward pass needs the log-sum-exp")
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, bias, *output)


def _differentiate(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6

    query, key, value, bias, out, lse = ctx.saved_tensors
    d_query, delta = _query_gradient(grad, query, key, value, bias, out, lse, ctx.scale)
    if not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):  # keys and values of a frozen text
        return d_query, None, None, None, None, None

    d_key, d_value = _key_gradient(grad, query, key, value, bias, lse, delta, ctx.scale)
    return d_query, d_key, d_value, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _outputs(query: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    """Allocate the output and the log-sum-exp, the latter empty unless it is to be saved."""
    batch, tokens, heads, _ = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    return _empty(query), query.new_empty((batch, heads, tokens) if save else (0,), dtype=wide)


def _empty(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _logits(query: Tensor, key: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Compute the logits (B, H, T, S), in float32 at least."""
    wide = torch.promote_types(query.dtype, torch.float32)
    logits = torch.einsum("bthc,bshc->bhts", query.to(wide), key.to(wide)) * scale
    return logits if bias is None else logits + bias[:, None, None].to(wide)


def _weights_and_gradient(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None,
    lse: Tensor, delta: Tensor, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute softmax's weights and the gradient of its logits, both (B, H, T, S)."""
    weights = (_logits(query, key, bias, scale) - lse[..., None]).exp()
    d_weights = torch.einsum("bthc,bshc->bhts", grad.to(lse.dtype), value.to(lse.dtype))
    return weights, weights * (d_weights - delta[..., None])


def _rows(*tensors: Tensor) -> list[Tensor]:
    """Copy only those tensors whose channels of a head are not side by side; all else stays as it lies."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _plain(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()
