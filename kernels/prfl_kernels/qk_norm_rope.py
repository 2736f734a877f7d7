"""RMS norm of q and k over all heads and rotary embedding, in one pass; backward from the output.

With n = x rstd w and y = R n, R the rotation of every pair and g = R^T dy:

    dx = rstd (w g - xhat mean(w g xhat)),    xhat = R^-1 y / w,    mean(w g xhat) = mean(dy y)

so that the outputs, which attention keeps in any case, and rstd are all that has to be saved.  The division wants
weights that are not small (``output_suffices``); else the inputs are saved.  On CPU the same in torch, with the same
saved tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prfl_kernels import reference
from prfl_kernels.dispatch import refuse_forward_mode, runs_triton

MIN_WEIGHT = 1e-2  # |weight| below it: y is then not divided by the weight
# Of the weights of a pair: rotated back, the smaller one's channel carries the rounding of the larger one's.  Of Wan
# 1.3B's width, with every pair at 16, the bfloat16 gradient is 1.68e-3 from float64's (from the input 1.66e-3), at 100
# 2.24e-3; where dy = y + noise, which makes the mean large, 5.8e-3 and 3.4e-2.
MAX_RATIO = 16.0


def qk_norm_rope(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    eps: float = 1e-6,
    from_output: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute ``reference.qk_norm_rope`` of q and k in one launch: (q', k'), (B, T, D) contiguous, in their dtype.

    q, k: (B, T, D), of one shape and dtype; rows may be strided (chunks of one projection), channels that are not side
    by side are copied.  k None: only q is normalised (q and text keys in cross-attention are two calls), k' is None.
    q_weight, k_weight: (D,), of one dtype.  cos, sin: (1, T, 1, D / heads) as diffusers' WanRotaryPosEmbed gives them,
    or as ``pack_tables`` makes of them, once for all blocks; or None: no rotation.  Computed in float32 (float64 for
    float64), rounded once, at the end.
    from_output: the backward rebuilds the inputs from the outputs.  The caller decides it once for a model, by
    ``output_suffices(q_weight, k_weight)``; where it is False the inputs are saved.
    For frozen norms: weights, cos and sin receive no gradient.
    Raises ValueError where shapes or dtypes do not fit, and where weight, cos or sin requires a gradient.
    """
    _check(q, k, q_weight, k_weight, cos, sin, heads)
    refuse_forward_mode("qk_norm_rope", q, k, q_weight, k_weight, cos, sin)
    training = torch.is_grad_enabled()
    if training and any(frozen is not None and frozen.requires_grad for frozen in (q_weight, k_weight, cos, sin)):
        raise ValueError("qk_norm_rope is for frozen norms, but a weight or table requires a gradient: use torch there")

    if cos is not None and sin is not None and cos.shape[-1] != q.shape[-1] // heads // 2:
        cos, sin = pack_tables(cos, sin)
    save = training and (q.requires_grad or (k is not None and k.requires_grad))
    q_out, k_out, _ = _forward(q, k, q_weight, k_weight, cos, sin, heads, eps, save, from_output)
    return q_out, None if k is None else k_out


def pack_tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Put one value of each pair side by side: (1, T, 1, C / 2) of diffusers' (1, T, 1, C), half of which is not read.

    A thread then reads its own in one go.  Called once for all blocks, not by each of them.
    """
    return cos[..., 0::2].contiguous(), sin[..., 1::2].contiguous()


def unpack_tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat every value for its pair, as diffusers has them: (1, T, 1, C)."""
    return cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)


def output_suffices(*weights: Tensor) -> bool:
    """Tell whether the backward may rebuild the normalised input from the output: no weight is small, or in its pair.

    weights: (D,).  Waits for the device: ask once for a frozen weight, not in every call.
    """
    for weight in weights:
        size = weight.detach().abs().float()
        pairs = size.unflatten(0, (-1, 2)) if len(size) % 2 == 0 else size[:, None]
        if size.min() < MIN_WEIGHT or (pairs.amax(1) > MAX_RATIO * pairs.amin(1)).any():
            return False
    return True


def _check(
    q: Tensor, k: Tensor | None, q_weight: Tensor, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    heads: int,
) -> None:  # fmt: skip
    if q.ndim != 3 or q.shape[-1] % heads:
        raise ValueError(f"q must be (B, T, D) with D a multiple of {heads} heads, and is {tuple(q.shape)}")
    if (k is None) != (k_weight is None) or (cos is None) != (sin is None):
        raise ValueError("k and k_weight, cos and sin come together or not at all")

    tokens, width = q.shape[1:]
    if k is not None and (k.shape != q.shape or k.dtype != q.dtype):
        raise ValueError(f"k is {tuple(k.shape)} {k.dtype}, q {tuple(q.shape)} {q.dtype}: call it for each of them")
    for weight in (q_weight, k_weight):
        if weight is not None and (weight.shape != (width,) or weight.dtype != q_weight.dtype):
            raise ValueError(f"weights must be ({width},) of one dtype; one is {tuple(weight.shape)} {weight.dtype}")

    channels = width // heads
    for table in (cos, sin):
        if table is None:
            continue
        if table.shape not in ((1, tokens, 1, channels), (1, tokens, 1, channels // 2)) or channels % 2:
            wanted = f"(1, {tokens}, 1, {channels})"
            raise ValueError(f"cos and sin must be {wanted}, even in the last; one is {tuple(table.shape)}")
    if cos is not None and sin is not None and cos.shape != sin.shape:
        raise ValueError(f"cos and sin must have one shape, and are {tuple(cos.shape)} and {tuple(sin.shape)}")


@torch.library.custom_op("prfl::qk_norm_rope", mutates_args=())
def _forward(
    q: Tensor, k: Tensor | None, q_weight: Tensor, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    heads: int, eps: float, save: bool, from_output: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute (q', k', rstd (1 or 2, B, T)), empty where there is no k or nothing to save.

    cos, sin: packed.  from_output: for the backward.
    """
    q_out, k_out, rstd = _outputs(q, k, save)
    if runs_triton(q):
        from prfl_kernels import qk_norm_rope_triton

        qk_norm_rope_triton.forward(
            _rows(q), _rows(k), *_packed(q_weight, k_weight, cos, sin), q_out, k_out, rstd if save else None, heads, eps
        )
        return q_out, k_out, rstd

    for i, (x, weight, out) in enumerate(((q, q_weight, q_out), (k, k_weight, k_out))):
        if x is not None and weight is not None:
            whole_cos, whole_sin = (None, None) if cos is None or sin is None else unpack_tables(cos, sin)
            out.copy_(reference.qk_norm_rope(x, weight, whole_cos, whole_sin, heads, eps))
            if save:
                rstd[i] = (x.to(rstd.dtype).square().mean(-1) + eps).rsqrt()
    return q_out, k_out, rstd


@_forward.register_fake
def _(q, k, q_weight, k_weight, cos, sin, heads, eps, save, from_output):  # type: ignore[no-untyped-def]
    return _outputs(q, k, save)


@torch.library.custom_op("prfl::qk_norm_rope_backward", mutates_args=())
def _backward(
    q_grad: Tensor, k_grad: Tensor | None, q_saved: Tensor, k_saved: Tensor | None, rstd: Tensor,
    q_weight: Tensor, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, heads: int, from_output: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute (dq, dk), dk empty where there is no k.  saved: the outputs with from_output, else the inputs."""
    q_out, k_out, _ = _outputs(q_grad, k_grad, False)
    if runs_triton(q_grad):
        from prfl_kernels import qk_norm_rope_triton

        qk_norm_rope_triton.backward(
            _rows(q_grad), _rows(k_grad), _rows(q_saved), _rows(k_saved), rstd,
            *_packed(q_weight, k_weight, cos, sin), q_out, k_out, heads, from_output,
        )  # fmt: skip
        return q_out, k_out

    sources = ((q_grad, q_saved, q_weight, q_out), (k_grad, k_saved, k_weight, k_out))
    for i, (grad, saved, weight, out) in enumerate(sources):
        if grad is None or saved is None or weight is None:
            continue
        scale = rstd[i, ..., None]
        grad, saved, weight = (tensor.to(rstd.dtype) for tensor in (grad, saved, weight))
        g = _rotated_back(grad, cos, sin, heads, transpose=True) * weight
        if from_output:  # the rotation keeps products: dy . y is what (R^T dy) . (R^-1 y) is
            mean = (grad * saved).mean(-1, keepdim=True)
            xhat = _rotated_back(saved, cos, sin, heads, transpose=False) / weight
        else:
            xhat = saved * scale
            mean = (g * xhat).mean(-1, keepdim=True)

        out.copy_(scale * (g - xhat * mean))
    return q_out, k_out


@_backward.register_fake
def _(q_grad, k_grad, q_saved, k_saved, rstd, q_weight, k_weight, cos, sin, heads, from_output):  # type: ignore[no-untyped-def]
    return _outputs(q_grad, k_grad, False)[:2]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, q_weight, k_weight, cos, sin, ctx.heads, _, _, ctx.from_output = inputs
    q_out, k_out, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    saved = (q_out, None if k is None else k_out) if ctx.from_output else (q, k)
    ctx.save_for_backward(*saved, rstd, q_weight, k_weight, cos, sin)


def _differentiate(ctx: Any, q_grad: Tensor | None, k_grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    q_saved, k_saved, *rest = ctx.saved_tensors
    q_grad = torch.zeros_like(q_saved) if q_grad is None else q_grad
    if k_saved is None:
        k_grad = None
    elif k_grad is None:
        k_grad = torch.zeros_like(k_saved)
    q_in, k_in = _backward(q_grad, k_grad, q_saved, k_saved, *rest, ctx.heads, ctx.from_output)
    return q_in, None if k_saved is None else k_in, *[None] * 8


_forward.register_autograd(_differentiate, setup_context=_save)


def _outputs(q: Tensor, k: Tensor | None, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate q', k' and rstd; an operator returns no None, so what is not needed has no elements."""
    rstd = (1 if k is None else 2, *q.shape[:2]) if save else (0,)
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(0 if k is None else k.shape), q.new_empty(rstd, dtype=wide)


def _rows(x: Tensor | None) -> Tensor | None:
    """Copy a tensor only where its channels are not side by side; rows may be apart."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _packed(
    q_weight: Tensor, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    k_weight, cos, sin = (None if tensor is None else tensor.contiguous() for tensor in (k_weight, cos, sin))
    return q_weight.contiguous(), k_weight, cos, sin


def _rotated_back(x: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int, transpose: bool) -> Tensor:
    """Compute R^T x, or R^-1 x = R^T x / (cos^2 + sin^2): tables rounded to bfloat16 are no exact rotation."""
    if cos is None or sin is None:
        return x
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    if not transpose:
        square = cos.square() + sin.square()
        cos, sin = cos / square, sin / square
    even, odd = x.unflatten(-1, (heads, -1, 2)).unbind(-1)
    return torch.stack([even * cos + odd * sin, odd * cos - even * sin], -1).flatten(-3)
