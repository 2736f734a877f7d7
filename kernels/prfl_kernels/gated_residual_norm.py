"""Gate + residual + LayerNorm + modulate in one pass, which is what joins the parts of a Wan block (AdaLN).

With x' = x + gate y (kept anyway: it is the stream) and n = (x' - mean) rstd the backward needs nothing else saved:
dx = dx' + rstd (w - <w> - n <w n>), w = (1 + scale) dnormed, <.> the mean over the width; dy = gate dx.  Gradients of
gate, scale and shift (an adapter on the time embedding, full fine-tuning) are neither computed nor saved for unless
they are wanted; where tokens share them they are summed in two stages, in the same order every time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from prfl_kernels import reference
from prfl_kernels.dispatch import refuse_forward_mode, runs_triton


class NormedSum(NamedTuple):
    x: Tensor  # (B, T, D), the sum; the very tensor that came in where nothing was added
    normed: Tensor  # (B, T, D)
    mean: Tensor  # (B, T), of x, float32 (float64 for float64); no gradient flows through mean and rstd
    rstd: Tensor  # (B, T), 1 / sqrt(variance + eps)


def gated_residual_norm(
    x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> NormedSum:
    """``reference.gated_residual_norm`` in one pass; with its statistics another operation can rebuild ``normed``.

    x, y: (B, T, D); without y nothing is added.  gate, scale, shift: (B, 1, D), (B, T, D), or (D,) for a plain affine
    norm (scale = weight - 1, in float32); any strides with a contiguous last dimension are read in place.  Without
    gate it is 1.  The sum is rounded to x's dtype before the norm; the norm is in float32 at least.
    Raises ValueError for shapes that do not fit, and for a gate without y.
    """
    _check(x, y, gate=gate, scale=scale, shift=shift)
    if y is None:
        return NormedSum(x, *_norm(x, scale, shift, eps))
    return NormedSum(*_sum_norm(x, y, gate, scale, shift, eps))


def gated_residual(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """x + gate y in x's dtype, computed in float32 at least: the end of a block.  Shapes as in gated_residual_norm."""
    _check(x, y, gate=gate)
    return (x + y).to(x.dtype) if gate is None else _sum(x, y, gate)


def _check(x: Tensor, y: Tensor | None, **modulation: Tensor | None) -> None:
    if x.ndim != 3 or (y is not None and y.shape != x.shape):
        raise ValueError(f"x and y must both be (B, T, D), not {tuple(x.shape)} and {y is None or tuple(y.shape)}")
    if y is None and modulation["gate"] is not None:
        raise ValueError("a gate needs a y to gate")
    refuse_forward_mode("gated_residual_norm", x, y, *modulation.values())
    batch, tokens, width = x.shape
    for name, each in modulation.items():
        if each is not None and each.shape not in ((width,), (batch, 1, width), (batch, tokens, width)):
            raise ValueError(
                f"{name} must be ({width},), ({batch}, 1, {width}) or ({batch}, {tokens}, {width}), "
                f"not {tuple(each.shape)}"
            )


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


# The three forwards.


@torch.library.custom_op("prfl::gated_residual_norm", mutates_args=())
def _sum_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if runs_triton(x):
        from prfl_kernels.gated_residual_norm_triton import forward

        return forward(x, y, gate, (scale, shift), eps)
    total, normed = reference.gated_residual_norm(x, y, gate, scale, shift, eps)
    return total.contiguous(), normed.contiguous(), *_statistics(total, eps)


@torch.library.custom_op("prfl::modulated_layer_norm", mutates_args=())
def _norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    if runs_triton(x):
        from prfl_kernels.gated_residual_norm_triton import forward

        return forward(x, None, None, (scale, shift), eps)[1:]
    return reference.modulated_layer_norm(x, scale, shift, eps).contiguous(), *_statistics(x, eps)


@torch.library.custom_op("prfl::gated_residual", mutates_args=())
def _sum(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    if runs_triton(x):
        from prfl_kernels.gated_residual_norm_triton import forward

        return forward(x, y, gate, None, 0.0)[0]
    wide = _wide(x)
    return (x.to(wide) + gate.to(wide) * y.to(wide)).to(x.dtype).contiguous()


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(x.to(_wide(x)), -1, correction=0)
    return mean.contiguous(), (variance + eps).rsqrt().contiguous()


# The two backwards.  A gradient that is not wanted is an empty tensor: an operation has no optional results.


@torch.library.custom_op("prfl::gated_residual_norm_backward", mutates_args=())
def _norm_backward(
    d_total: Tensor | None,
    d_normed: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor | None,
    d_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute dx, dy (with gate), and the gradients of gate (with y), scale (with d_scale) and shift (unless None)."""
    wanted = (gate if y is not None else None, scale if d_scale else None, shift)
    if runs_triton(x):
        from prfl_kernels.gated_residual_norm_triton import backward

        per_token = [_per_token(modulation, x) for modulation in wanted]
        dx, dy, sums = backward(d_total, d_normed, x, (mean, rstd), y, gate, scale, per_token)
    else:
        wide = _wide(x)
        outer, normed = d_normed.to(wide), (x.to(wide) - mean[..., None]) * rstd[..., None]
        inner = outer * (1 + scale.to(wide))

        # The norm's own backward, then the gradient of the sum itself.
        gradient = inner - inner.mean(-1, keepdim=True) - normed * (inner * normed).mean(-1, keepdim=True)
        gradient = gradient * rstd[..., None]
        if d_total is not None:
            gradient = gradient + d_total.to(wide)

        dx, dy, d_gate = _gated(gradient, y, gate, x)
        sums = [d_gate, outer * normed if d_scale else None, None if shift is None else outer.clone()]

    d_gate, d_scale_, d_shift = (_reduced(part, each, x) for part, each in zip(sums, wanted, strict=True))
    return dx, x.new_empty(0) if dy is None else dy, d_gate, d_scale_, d_shift


@torch.library.custom_op("prfl::gated_residual_backward", mutates_args=())
def _sum_backward(d_total: Tensor, y: Tensor | None, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Compute dy, and the gradient of gate (with y)."""
    wanted = None if y is None else gate
    if runs_triton(d_total):
        from prfl_kernels.gated_residual_norm_triton import backward

        per_token = [_per_token(wanted, d_total), None, None]
        _, dy, (d_gate, _, _) = backward(d_total, None, None, None, y, gate, None, per_token)
    else:
        _, dy, d_gate = _gated(d_total.to(_wide(d_total)), y, gate, d_total)
    return dy, _reduced(d_gate, wanted, d_total)


def _gated(
    gradient: Tensor, y: Tensor | None, gate: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """From the sum's gradient, compute dx and dy in like's dtype, and the product whose sum is the gate's gradient."""
    wide = gradient.dtype
    dy = None if gate is None else (gate.to(wide) * gradient).to(like.dtype).contiguous()
    return gradient.to(like.dtype).contiguous(), dy, None if y is None else gradient * y.to(wide)


def _per_token(modulation: Tensor | None, x: Tensor) -> bool | None:
    """Tell whether every token has its own modulation; None where no gradient of it is wanted."""
    return None if modulation is None else modulation.ndim == 3 and modulation.shape[1] == x.shape[1]


def _reduced(part: Tensor | None, wanted: Tensor | None, x: Tensor) -> Tensor:
    """Sum a gradient to the shape of what it is the gradient of; an empty tensor where none is wanted."""
    if part is None or wanted is None:
        return x.new_empty(0)
    return part.sum_to_size(wanted.shape).to(wanted.dtype).contiguous()


# Their shapes, for torch.compile and the meta device.


@_sum_norm.register_fake
def _(x: Tensor, y: Tensor, gate: Any, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), *_fake_normed(x)


@_norm.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, ...]:
    return _fake_normed(x)


def _fake_normed(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *(x.new_empty(x.shape[:2], dtype=_wide(x)) for _ in range(2))


@_sum.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@_norm_backward.register_fake
def _(d_total, d_normed, x, mean, rstd, y, gate, scale, shift, d_scale):  # type: ignore[no-untyped-def]
    wanted = (gate if y is not None else None, scale if d_scale else None, shift)
    dy = x.new_empty(0 if gate is None else x.shape)
    return x.new_empty(x.shape), dy, *(_fake_gradient(each, x) for each in wanted)


@_sum_backward.register_fake
def _(d_total: Tensor, y: Tensor | None, gate: Tensor) -> tuple[Tensor, Tensor]:
    return d_total.new_empty(d_total.shape), _fake_gradient(None if y is None else gate, d_total)


def _fake_gradient(wanted: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0) if wanted is None else wanted.new_empty(wanted.shape)


# What autograd keeps, and what it gets.


def _keep_sum_norm(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, y, gate, scale, shift, _ = inputs
    total, _, mean, rstd = output
    _keep(ctx, total, mean, rstd, y, gate, scale, shift, ctx.needs_input_grad[2:5])


def _keep_norm(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, scale, shift, _ = inputs
    _, mean, rstd = output
    _keep(ctx, x, mean, rstd, None, None, scale, shift, (False, *ctx.needs_input_grad[1:3]))


def _keep(ctx: Any, x: Any, mean: Any, rstd: Any, y: Any, gate: Any, scale: Any, shift: Any, needs: tuple) -> None:
    d_gate, ctx.d_scale, d_shift = needs
    ctx.y_dtype = None if y is None else y.dtype
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, mean, rstd, y if d_gate else None, gate, scale, shift if d_shift else None)


def _sum_norm_gradients(ctx: Any, d_total: Tensor, d_normed: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: checkpointing lets nobody look twice
    dx, dy, *modulation = _norm_backward(d_total, d_normed, *saved, ctx.d_scale)
    dy = dx if saved[4] is None else dy
    return dx, dy.to(ctx.y_dtype), *(_or_none(each) for each in modulation), None


def _norm_gradients(ctx: Any, d_normed: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    dx, _, _, d_scale, d_shift = _norm_backward(None, d_normed, *ctx.saved_tensors, ctx.d_scale)
    return dx, _or_none(d_scale), _or_none(d_shift), None


def _keep_sum(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, y, gate = inputs
    ctx.y_dtype = y.dtype
    ctx.save_for_backward(y if ctx.needs_input_grad[2] else None, gate)


def _sum_gradients(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
    dy, d_gate = _sum_backward(d_total, *ctx.saved_tensors)
    return d_total, dy.to(ctx.y_dtype), _or_none(d_gate)


def _or_none(gradient: Tensor) -> Tensor | None:
    return gradient if gradient.numel() else None


_sum_norm.register_autograd(_sum_norm_gradients, setup_context=_keep_sum_norm)
_norm.register_autograd(_norm_gradients, setup_context=_keep_norm)
_sum.register_autograd(_sum_gradients, setup_context=_keep_sum)
