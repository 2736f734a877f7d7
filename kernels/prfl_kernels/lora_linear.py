"""Linear layers with low-rank adapters over the same input: one read of it, and nothing saved that can be rebuilt.

    y = x W^T + bias + scale (x A^T) B^T                                  (LoRA, arXiv 2106.09685)
    ds = scale dy B    dx = dy W + ds A    dA = ds^T x    dB = scale dy^T s,    s = x A^T

The large products are torch's own (cuBLAS).  W is frozen, so only dA and dB need activations: s, which is rank wide,
and x, which is rebuilt for dA where ``source`` says from what.  With dropout the mask is drawn again from its seed.
Shape suffixes: B batch, T tokens, M = B T rows, D width of the input, N of the output, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prfl_kernels.dispatch import refuse_forward_mode, runs_triton

HALF = (torch.bfloat16, torch.float16)


class Projection(NamedTuple):
    """One frozen linear layer and its adapter."""

    weight: Tensor  # (N, D), frozen
    bias: Tensor | None  # (N,), frozen
    lora_a: Tensor  # (R, D), a float32 master, computed in x's dtype
    lora_b: Tensor  # (N, R), likewise
    scale: float


class Normed(NamedTuple):
    """The input is AdaLN of x, (1 + scale) (x - mean) rstd + shift, as ``gated_residual_norm`` gives it."""

    x: Tensor  # (B, T, D)
    mean: Tensor  # (B, T), float32
    rstd: Tensor  # (B, T), float32
    scale: Tensor  # (B, 1, D), (B, T, D) or (D,)
    shift: Tensor  # likewise


class Gelu(NamedTuple):
    """The input is gelu(h), approximated by tanh, as in Wan's feed-forward network."""

    h: Tensor  # (B, T, D)


def lora_linears(
    x: Tensor,
    projections: Sequence[Projection],
    *,
    source: Normed | Gelu | None = None,
    dropout: float = 0.0,
    seeds: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Compute x W^T + bias + scale (drop(x) A^T) B^T for every projection; ``reference.lora_linear`` is one of them.

    x: (B, T, D) or (M, D); one that is not contiguous is copied for the products.  Returns one (..., N) each.
    source: what x was computed from, and which is kept anyway; then x itself is not saved.  It is not checked against
        x, and gets no gradient: that flows through x.  Saved for backward otherwise: s (rank wide) and parameters.
    dropout: of the low-rank branch's input; the projections of a group share one mask.
    seeds: (S,) int64, each of the masks of M / S rows that follow each other, a sample's say: a row's mask depends on
        its seed and its place among those, not on the batch.  Without, one seed comes from torch's generator of x's
        device, so a checkpoint that restores that state draws the same mask again.
    Under autocast x and the weights are cast to its dtype, as for ``F.linear``; no cast weight is saved.
    The gradients of lora_a and lora_b have their dtype.  There are no second derivatives.
    Raises ValueError where weight or bias is not frozen, or shapes or dtypes do not fit.
    """
    autocast = _autocast_dtype(x)
    _check(x, projections, source, dropout, seeds, dtype=None if autocast else x.dtype)
    if dropout:  # without it, all that has no gradient to come is torch's own
        factors = [factor for projection in projections for factor in (projection.lora_a, projection.lora_b)]
        refuse_forward_mode("lora_linears with dropout", x, *factors)

    seed = seeds if dropout else None
    if dropout and seeds is None:
        seed = torch.randint(2**63 - 1, (), device=x.device)

    trained = (any(p.lora_a.requires_grad for p in projections), any(p.lora_b.requires_grad for p in projections))
    parts = tuple(part.detach() for part in source or ())  # no edge, or what they came from would get zeros
    scales = tuple(p.scale for p in projections)
    weights, biases, lora_as, lora_bs = ([p[i] for p in projections] for i in range(4))
    x = x.to(autocast or x.dtype)

    if torch.is_grad_enabled() and (x.requires_grad or any(trained)):
        tensors = (*weights, *biases, *lora_as, *lora_bs)
        return _LoraLinears.apply(
            x, seed, type(source).__name__, dropout, scales, trained, len(parts), *parts, *tensors
        )
    return tuple(_forward(x, seed, dropout, scales, weights, biases, lora_as, lora_bs)[0])


def _forward(
    x: Tensor,
    seed: Tensor | None,
    dropout: float,
    scales: Sequence[float],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
) -> tuple[list[Tensor], Tensor]:
    """Compute the outputs, and s of all projections (M, sum of R)."""
    with _without_autocast(x):
        # s of all projections at once.
        down, rows = _cast_cat(lora_as, x.dtype), x.contiguous().view(-1, x.shape[-1])
        low = _low_product(rows, down.T) if seed is None else lora_down(rows, down, seed, dropout)

        outputs = []
        parts = low.split([len(a) for a in lora_as], 1)
        for scale, weight, bias, lora_b, part in zip(scales, weights, biases, lora_bs, parts, strict=True):
            bias = None if bias is None else bias.to(x.dtype)
            # The base product reads x as it lies: a copy of other strides would give other last bits than the plain
            # layer.
            out = torch.nn.functional.linear(x, weight.to(x.dtype), bias).contiguous()
            flat, up = out.view(-1, len(weight)), lora_b.to(x.dtype).T
            if torch.compiler.is_compiling():
                # By torch 2.11 a compiled function's output that was changed in place has a gradient of zeros.
                out = torch.addmm(flat, part, up, alpha=scale).view(out.shape)
            else:
                flat.addmm_(part, up, alpha=scale)
            outputs.append(out)
        return outputs, low


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        seed: Tensor | None,
        kind: str,
        dropout: float,
        scales: tuple[float, ...],
        trained: tuple[bool, bool],
        parts: int,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        """Compute the outputs.  tensors: the parts of the source, then all weights, biases, lora_as and lora_bs."""
        count = len(scales)
        source, factors = tensors[:parts], tensors[parts:]
        weights, biases, lora_as, lora_bs = (factors[i * count : (i + 1) * count] for i in range(4))
        outputs, low = _forward(x, seed, dropout, scales, weights, biases, lora_as, lora_bs)

        origin = source if parts else (x,)
        kept = origin if trained[0] else ()
        ctx.save_for_backward(*weights, *lora_as, *lora_bs, low if trained[1] else None, seed, *kept)
        ctx.kind, ctx.dropout, ctx.scales, ctx.shape, ctx.parts = kind, dropout, scales, x.shape, parts
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        count, before = len(ctx.scales), 7 + ctx.parts  # of the arguments, before the weights
        wants = [ctx.needs_input_grad[before + i * count : before + (i + 1) * count] for i in range(4)]
        wants_x, wants_a, wants_b = ctx.needs_input_grad[0], any(wants[2]), any(wants[3])

        saved = ctx.saved_tensors  # read once: a checkpoint gives them no second time
        weights, lora_as, lora_bs = (saved[i * count : (i + 1) * count] for i in range(3))
        low, seed, *origin = saved[3 * count :]

        # dy of each projection that has one, as rows.
        d_outs = {i: grad.reshape(-1, grad.shape[-1]) for i, grad in enumerate(grads) if grad is not None}
        if not d_outs:
            return (None,) * len(ctx.needs_input_grad)
        grad_x: Any = None
        grad_a: list[Tensor | None] = [None] * count
        grad_b: list[Tensor | None] = [None] * count
        (index, first), *rest = d_outs.items()

        with _without_autocast(first):
            if wants_x or wants_a:  # ds = scale dy B
                lows = [_low_product(d, lora_bs[i].to(d.dtype)).mul_(ctx.scales[i]) for i, d in d_outs.items()]
                low_grad = torch.cat(lows, 1)

            if wants_x:  # dx = dy W + ds A
                grad_x = first @ weights[index].to(first.dtype)
                for i, d_out in rest:
                    grad_x.addmm_(d_out, weights[i].to(d_out.dtype))
                down = _cast_cat([lora_as[i] for i in d_outs], first.dtype)
                if seed is None:
                    grad_x.addmm_(low_grad, down)
                else:
                    lora_up_(grad_x, low_grad, down, seed, ctx.dropout)
                grad_x = grad_x.view(ctx.shape)

            if wants_a:  # dA = ds^T x, of all projections at once
                if ctx.parts or seed is not None:
                    norm = origin[1:] if ctx.kind == "Normed" else (None,) * 4
                    joined = lora_grad_a(low_grad, origin[0], *norm, ctx.kind, seed, ctx.dropout)
                else:
                    joined = _wide_product(low_grad.T, origin[0].reshape(-1, ctx.shape[-1]))
                for i, part in zip(d_outs, joined.split([len(lora_as[i]) for i in d_outs]), strict=True):
                    grad_a[i] = part.to(lora_as[i].dtype) if wants[2][i] else None

            if wants_b:  # dB = scale dy^T s
                parts = low.split([len(a) for a in lora_as], 1)
                for i, d_out in d_outs.items():
                    if wants[3][i]:
                        grad_b[i] = _wide_product(d_out.T, parts[i]).mul_(ctx.scales[i]).to(lora_bs[i].dtype)

        return (grad_x, *(None,) * (before - 1 + 2 * count), *grad_a, *grad_b)


@torch.library.custom_op("prfl_kernels::lora_down", mutates_args=())
def lora_down(x: Tensor, lora_a: Tensor, seed: Tensor, dropout: float) -> Tensor:
    """drop(x) A^T, the mask drawn from the seed (or (S,) seeds).  x: (M, D), contiguous.  lora_a: (R, D).

    Returns (M, R).
    """
    if runs_triton(x):
        from prfl_kernels import lora_linear_triton

        return lora_linear_triton.down(x, lora_a, seed, dropout)
    return (x * kept_inputs(seed, x.shape, dropout)) @ lora_a.T / (1 - dropout)


@torch.library.custom_op("prfl_kernels::lora_up_", mutates_args=("grad_x",))
def lora_up_(grad_x: Tensor, low_grad: Tensor, lora_a: Tensor, seed: Tensor, dropout: float) -> None:
    """grad_x += drop(ds A), with the mask of ``lora_down``.  grad_x: (M, D), contiguous.  low_grad: ds, (M, R)."""
    if runs_triton(grad_x):
        from prfl_kernels import lora_linear_triton

        lora_linear_triton.up(grad_x, low_grad, lora_a, seed, dropout)
        return
    kept = kept_inputs(seed, grad_x.shape, dropout)
    grad_x.addcmul_(low_grad @ lora_a, kept.to(grad_x.dtype), value=1 / (1 - dropout))


@torch.library.custom_op("prfl_kernels::lora_grad_a", mutates_args=())
def lora_grad_a(
    low_grad: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    kind: str,
    seed: Tensor | None,
    dropout: float,
) -> Tensor:
    """dA = ds^T drop(input), the input rebuilt from x: x itself, its AdaLN (kind "Normed") or its gelu ("Gelu").

    low_grad: ds, (M, R).  x: (B, T, D) or (M, D).  mean, rstd, scale, shift: as in ``Normed``.
    Returns (R, D), in float32 at least.
    """
    if runs_triton(x):
        from prfl_kernels import lora_linear_triton

        return lora_linear_triton.grad_a(low_grad, x, mean, rstd, scale, shift, kind, seed, dropout)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if mean is not None and rstd is not None and scale is not None and shift is not None:
        wide = (wide - mean.unsqueeze(-1)) * rstd.unsqueeze(-1) * (1 + scale.to(wide.dtype)) + shift.to(wide.dtype)
    elif kind == "Gelu":
        wide = torch.nn.functional.gelu(wide, approximate="tanh")
    rows = wide.to(low_grad.dtype).reshape(-1, x.shape[-1])
    if seed is None:
        return _wide_product(low_grad.T, rows)
    return _wide_product(low_grad.T, rows * kept_inputs(seed, rows.shape, dropout)) / (1 - dropout)


@lora_down.register_fake
def _(x: Tensor, lora_a: Tensor, seed: Tensor, dropout: float) -> Tensor:
    return x.new_empty(len(x), len(lora_a))


@lora_up_.register_fake
def _(grad_x: Tensor, low_grad: Tensor, lora_a: Tensor, seed: Tensor, dropout: float) -> None:
    return None


@lora_grad_a.register_fake
def _(low_grad: Tensor, x: Tensor, *others: Any) -> Tensor:
    return low_grad.new_empty(low_grad.shape[1], x.shape[-1], dtype=torch.promote_types(low_grad.dtype, torch.float32))


def kept_inputs(seed: Tensor, shape: Sequence[int], dropout: float) -> Tensor:
    """Draw dropout's mask (M, D), True where the input is kept.  seed: one, or (S,), each of M / S rows."""
    rows = shape[0] // seed.numel()
    kept = torch.empty(shape, dtype=torch.bool, device=seed.device)
    for part, number in zip(kept.split(rows), seed.reshape(-1).tolist(), strict=True):
        part.bernoulli_(1 - dropout, generator=torch.Generator(seed.device).manual_seed(number))
    return kept


@torch.library.custom_op("prfl_kernels::dropped", mutates_args=())
def dropped(x: Tensor, seeds: Tensor, dropout: float) -> Tensor:
    """x (..., D) where its mask keeps it, over 1 - dropout, else 0: for plain layers.  seeds: as in ``lora_linears``.

    Its backward keeps the seeds alone, and draws the mask again.
    """
    kept = kept_inputs(seeds, (x.shape[:-1].numel(), x.shape[-1]), dropout)
    return x * kept.view(x.shape) / (1 - dropout)


@dropped.register_fake
def _(x: Tensor, seeds: Tensor, dropout: float) -> Tensor:
    return torch.empty_like(x)


def _keep_seeds(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.dropout = inputs[2]


def _dropped_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return dropped(gradient, *ctx.saved_tensors, ctx.dropout), None, None


dropped.register_autograd(_dropped_backward, setup_context=_keep_seeds)


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply in float32 at least, for a float32 master; rounded on the way only where torch knows no other."""
    if left.dtype in HALF and left.device.type != "cpu":
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).to(torch.promote_types(left.dtype, torch.float32))


def _low_product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply to a result that is rank wide, over a long sum: cuBLAS splits it, and its parts are added in float32.

    By itself cuBLAS may add them in half precision, which torch allows it for all products or for none.
    """
    return _wide_product(left, right).to(left.dtype)


def _cast_cat(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([tensor.to(dtype) for tensor in tensors])


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast gives ``F.linear``, where it is on; it leaves float64 alone."""
    kind = x.device.type
    if x.dtype == torch.float64 or kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _without_autocast(x: Tensor) -> AbstractContextManager:
    """Switch autocast off: the dtypes are settled, and a backward may run under another autocast than its forward."""
    kind = x.device.type
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


def _check(
    x: Tensor,
    projections: Sequence[Projection],
    source: Normed | Gelu | None,
    dropout: float,
    seeds: Tensor | None,
    dtype: torch.dtype | None,
) -> None:
    """Raise ValueError where something does not fit.  dtype: of weights and biases; None where they will be cast."""
    if x.dim() not in (2, 3):
        raise ValueError(f"x must be (B, T, D) or (M, D), not {tuple(x.shape)}")
    if not projections:
        raise ValueError("there must be a projection")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, not {dropout}")
    if seeds is not None and x.shape[:-1].numel() % seeds.numel():
        raise ValueError(f"{x.shape[:-1].numel()} rows cannot be shared out to {seeds.numel()} seeds")

    width = x.shape[-1]
    for index, (weight, bias, lora_a, lora_b, _) in enumerate(projections):
        rank, out = len(lora_a), len(weight)
        _fits(f"projection {index}: weight", weight, (out, width))
        _fits(f"projection {index}: lora_a", lora_a, (rank, width))
        _fits(f"projection {index}: lora_b", lora_b, (out, rank))
        if bias is not None:
            _fits(f"projection {index}: bias", bias, (out,))
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.requires_grad:
                raise ValueError(f"projection {index}: {name} requires a gradient and would get none: freeze it")
            if tensor is not None and dtype not in (None, tensor.dtype):
                raise ValueError(f"projection {index}: {name} is {tensor.dtype} and x {dtype}, without autocast")

    if source is not None:
        _fits(f"source: {source._fields[0]}", source[0], tuple(x.shape))
    if isinstance(source, Normed):
        rows, whole = tuple(x.shape[:-1]), tuple(x.shape)
        for name in ("mean", "rstd"):
            _fits(f"source: {name}", getattr(source, name), rows)
        for name in ("scale", "shift"):
            _fits(f"source: {name}", getattr(source, name), whole, (*whole[:-2], 1, width), (width,))


def _fits(name: str, tensor: Tensor, *shapes: tuple[int, ...]) -> None:
    if tuple(tensor.shape) not in shapes:
        raise ValueError(f"{name} is {tuple(tensor.shape)}, not {' or '.join(map(str, shapes))}")
