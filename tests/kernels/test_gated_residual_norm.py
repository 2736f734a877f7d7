"""Gate + residual + norm on the CPU: gradients, what is saved, its operations' contract, a Wan block made of it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prfl.estimate.live_tensors import SavedBytes
from prfl_kernels import gated_residual_norm as op
from prfl_kernels import reference
from prfl_kernels.gated_residual_norm import gated_residual, gated_residual_norm
from tests.kernels.checks import assert_as_good, random
from tests.slow import slow_unless

BATCH, TOKENS, WIDTH = 2, 5, 7
SHARED, OWN, AFFINE = "B1D", "BTD", "D"
FORMS = {
    "shared": (SHARED, SHARED, SHARED),
    "per token": (OWN, OWN, OWN),
    "affine": (None, AFFINE, AFFINE),
    "mixed": (OWN, AFFINE, SHARED),
}
Inputs = dict[str, Tensor | None]


def make(
    forms: tuple[str | None, str, str],
    shape: tuple[int, int, int] = (BATCH, TOKENS, WIDTH),
    y: bool = True,
    dtype: torch.dtype = torch.float64,
    modulation: torch.dtype | None = None,
    device: str = "cpu",
) -> Inputs:
    """x, y, gate, scale, shift.  What is per token comes as Wan 2.2 gives it, as views of one (B, T, 6, D) tensor."""
    batch, tokens, width = shape
    modulation = modulation or dtype
    views = random(batch, tokens, 6, width, seed=3, dtype=modulation, device=device).unbind(2)
    inputs: Inputs = {
        "x": 3 + random(*shape, seed=1, dtype=dtype, device=device),
        "y": random(*shape, seed=2, dtype=dtype, device=device) if y else None,
    }
    for i, (name, form) in enumerate(zip(("gate", "scale", "shift"), forms, strict=True)):
        sizes = {SHARED: (batch, 1, width), AFFINE: (width,)}
        if form == OWN:
            inputs[name] = views[2 * i]
        else:
            inputs[name] = None if form is None else random(*sizes[form], seed=4 + i, dtype=modulation, device=device)
    return inputs


def results(function: Callable, inputs: Inputs, double: bool = False) -> dict[str, Tensor]:
    """Both outputs, and the gradient of each input; double: in float64, from the same inputs."""
    leaves = {
        name: None if each is None else (each.double() if double else each).detach().requires_grad_()
        for name, each in inputs.items()
    }
    total, normed = function(*leaves.values())[:2]
    upstream = [random(*total.shape, seed=8 + i, dtype=inputs["x"].dtype).to(total) for i in range(2)]
    given = {name: each for name, each in leaves.items() if each is not None}
    gradients = torch.autograd.grad((total, normed), list(given.values()), upstream)
    return {
        "total": total,
        "normed": normed,
        **{f"d {name}": each for name, each in zip(given, gradients, strict=True)},
    }


def check(inputs: Inputs, function: Callable = gated_residual_norm) -> None:
    """As good as torch's autograd over the reference in the same type."""
    exact = results(reference.gated_residual_norm, inputs, double=True)
    ours = results(function, inputs)
    if inputs["x"].dtype == torch.float64:  # where torch's own error is none
        torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-11, check_dtype=False)
    else:
        assert_as_good(ours, results(reference.gated_residual_norm, inputs), exact)


def sum_and_nothing(x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """``gated_residual`` with the norm by the reference, so that it fits where both outputs are looked at."""
    total = gated_residual(x, y, gate)
    return total, reference.modulated_layer_norm(total, scale, shift)


@pytest.mark.parametrize("forms", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(
    "function", [reference.gated_residual_norm, gated_residual_norm, sum_and_nothing], ids=lambda f: f.__name__
)
def test_gradients_against_finite_differences(function: Callable, forms: tuple) -> None:
    inputs = [each if each is None else each.detach().requires_grad_() for each in make(forms, (2, 3, 4)).values()]
    assert torch.autograd.gradcheck(lambda *tensors: function(*tensors)[:2], inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("forms", FORMS.values(), ids=FORMS)
def test_as_good_as_autograd_over_the_reference(forms: tuple, dtype: torch.dtype) -> None:
    for modulation in (dtype, torch.promote_types(dtype, torch.float32)):
        check(make(forms, (2, 9, 48), dtype=dtype, modulation=modulation))
        check(make(forms, (2, 9, 48), dtype=dtype, modulation=modulation), sum_and_nothing)
        check(make((None, *forms[1:]), (2, 9, 48), y=False, dtype=dtype, modulation=modulation))


def scale_without_one(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    return gated_residual_norm(x, y, gate, scale - 1, shift)[:2]


def without_the_gate(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    return gated_residual_norm(x, y, 0 * gate + 1, scale, shift)[:2]


def the_neighbours_modulation(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple:
    return gated_residual_norm(x, y, gate, scale.roll(1, 1), shift)[:2]


@pytest.mark.parametrize("wrong", [scale_without_one, without_the_gate, the_neighbours_modulation])
def test_the_tolerance_sees_a_mistake(wrong: Callable) -> None:
    with pytest.raises(AssertionError, match="normed: error"):
        check(make(FORMS["per token"], dtype=torch.bfloat16), wrong)


def test_normed_is_rebuilt_from_the_statistics() -> None:
    inputs = make(FORMS["per token"])
    inputs["x"].requires_grad_()
    out = gated_residual_norm(**inputs)
    rebuilt = (1 + inputs["scale"]) * (out.x - out.mean[..., None]) * out.rstd[..., None] + inputs["shift"]
    torch.testing.assert_close(rebuilt, out.normed, rtol=1e-12, atol=1e-12)
    assert (out.x.requires_grad, out.normed.requires_grad) == (True, True)
    assert (out.mean.requires_grad, out.rstd.requires_grad) == (False, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_types_and_shapes(dtype: torch.dtype) -> None:
    out = gated_residual_norm(**make(FORMS["mixed"], dtype=dtype, modulation=torch.float32))
    wide = torch.promote_types(dtype, torch.float32)
    assert [each.dtype for each in out] == [dtype, dtype, wide, wide]
    assert [each.shape for each in out] == [(BATCH, TOKENS, WIDTH)] * 2 + [(BATCH, TOKENS)] * 2


def test_without_y_the_stream_is_the_tensor_itself() -> None:
    inputs = make(FORMS["affine"], y=False)
    assert gated_residual_norm(**inputs).x is inputs["x"]


def test_a_part_computed_in_another_type() -> None:
    """Under autocast the stream is float32 and what attention adds to it bfloat16."""
    inputs = make(FORMS["shared"], dtype=torch.float32)
    inputs["y"] = inputs["y"].bfloat16()
    check(inputs)
    check(inputs, sum_and_nothing)


def test_the_norm_of_numbers_far_from_zero() -> None:
    """E[x^2] - mean^2 has nothing left here in float32."""
    inputs = make(FORMS["shared"], (2, 3, 64), dtype=torch.float32)
    inputs["x"] = inputs["x"] + 3000
    check(inputs)


# What is saved.

SIZE = 2 * 64 * 48  # elements of a hidden state


def saved(gate: bool = False, scale: bool = False, forms: str = "shared", y: bool = True) -> int:
    """Bytes that autograd keeps, less those of x'."""
    chosen = FORMS[forms] if y else (None, *FORMS[forms][1:])
    inputs = make(chosen, (2, 64, 48), y=y, dtype=torch.bfloat16, modulation=torch.float32)
    for name, wanted in (("x", True), ("y", y), ("gate", gate), ("scale", scale), ("shift", scale)):
        if wanted:
            inputs[name] = inputs[name].detach().requires_grad_()
    with (counted := SavedBytes()):
        out = gated_residual_norm(**inputs)
        end = gated_residual(out.x, inputs["y"], inputs["gate"]) if y else out.x  # keeps nothing more than that
    assert end.requires_grad
    return counted.live - 2 * SIZE


def test_only_the_sum_and_small_things_are_saved() -> None:
    statistics, shared = 2 * 2 * 64 * 4, 2 * 48 * 4
    assert saved() == statistics + 2 * shared  # gate and scale; neither y, normed nor shift
    assert saved(y=False) == statistics + shared
    assert saved(scale=True) == statistics + 3 * shared
    assert saved(gate=True) == statistics + 2 * shared + 2 * SIZE  # only now y
    assert saved(forms="affine", y=False) == statistics + 48 * 4
    assert saved(forms="per token") == statistics + 4 * 6 * SIZE  # views of the one (B, T, 6, D) tensor


# The contract of the operations.


@pytest.mark.parametrize("form", slow_unless("mixed".__eq__, FORMS))
def test_opcheck(form: str) -> None:
    made = make(FORMS[form])
    inputs = {name: each if each is None else each.detach().requires_grad_() for name, each in made.items()}
    x, y, gate, scale, shift = inputs.values()
    frozen = [None if each is None else each.detach() for each in (gate, scale, shift)]
    torch.library.opcheck(op._sum_norm, (x, y, gate, scale, shift, 1e-6))
    torch.library.opcheck(op._sum_norm, (x, y, *frozen, 1e-6))
    torch.library.opcheck(op._norm, (x, scale, shift, 1e-6))
    x, y, gate, scale, shift = (None if each is None else each.detach() for each in inputs.values())
    mean, rstd = gated_residual_norm(x, y, gate, scale, shift)[2:]
    given = None if gate is None else y
    torch.library.opcheck(op._norm_backward, (x, x, x, mean, rstd, given, gate, scale, shift, True))
    torch.library.opcheck(op._norm_backward, (None, x, x, mean, rstd, None, None, scale, None, False))
    if gate is not None:
        torch.library.opcheck(op._sum, (x, y, inputs["gate"]))
        torch.library.opcheck(op._sum_backward, (x, y, gate))
        torch.library.opcheck(op._sum_backward, (x, None, gate))


def both(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    """Each of the three operations, one after the other."""
    first = gated_residual_norm(*tensors)
    second = gated_residual_norm(first.x, None, None, *tensors[3:])
    return gated_residual(first.x, second.normed, tensors[2]), first.normed


@pytest.mark.parametrize("forms", FORMS.values(), ids=FORMS)
def test_compiled_whole_it_gives_the_same(forms: tuple) -> None:
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    inputs = make(forms)
    eager = results(both, inputs)
    for name, value in results(compiled, inputs).items():
        torch.testing.assert_close(value, eager[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("forms", FORMS.values(), ids=FORMS)
def test_under_checkpointing(forms: tuple) -> None:
    """A recomputed tensor may be asked for only once."""
    inputs = make(forms)
    kept = results(both, inputs)
    recomputed = results(lambda *tensors: checkpoint(both, *tensors, use_reentrant=False), inputs)
    assert all(torch.equal(value, recomputed[name]) for name, value in kept.items())


def test_on_meta_for_predictions() -> None:
    inputs = {name: each.to("meta").requires_grad_() for name, each in make(FORMS["shared"]).items()}
    out = gated_residual_norm(**inputs)
    gradients = torch.autograd.grad(out.x.sum() + out.normed.sum(), list(inputs.values()))
    assert [each.shape for each in gradients] == [each.shape for each in inputs.values()]


def test_what_does_not_fit_is_refused() -> None:
    x, gate = random(2, 5, 4), random(2, 1, 4)
    with pytest.raises(ValueError, match=r"scale must be \(4,\), \(2, 1, 4\) or \(2, 5, 4\), not \(1, 5, 4\)"):
        gated_residual_norm(x, x, gate, random(1, 5, 4), gate)
    with pytest.raises(ValueError, match=r"must both be \(B, T, D\), not \(2, 5, 4\) and \(2, 1, 4\)"):
        gated_residual(x, gate, gate)
    with pytest.raises(ValueError, match="a gate needs a y"):
        gated_residual_norm(x, None, gate, gate, gate)


# A whole Wan block made of it.


def block_of_ours(block: nn.Module, x: Tensor, text: Tensor, time: Tensor) -> Tensor:
    """WanTransformerBlock.forward with its norms and residuals by the operation."""
    modulation = (block.scale_shift_table + time).unbind(-2)
    shift1, scale1, gate1, shift3, scale3, gate3 = (each[:, None] if time.ndim == 3 else each for each in modulation)
    first = gated_residual_norm(x, None, None, scale1, shift1, block.norm1.eps)
    added = block.attn1(first.normed, None, None, None)
    affine = block.norm2.weight - 1, block.norm2.bias
    second = gated_residual_norm(first.x, added, gate1, *affine, block.norm2.eps)
    added = block.attn2(second.normed, text, None, None)
    third = gated_residual_norm(second.x, added, None, scale3, shift3, block.norm3.eps)
    return gated_residual(third.x, block.ffn(third.normed), gate3)


def theirs(block: nn.Module, x: Tensor, text: Tensor, time: Tensor) -> Tensor:
    return block(x, text, time, None)


@pytest.mark.parametrize("per_token", [False, True], ids=["3-D", "4-D"])
def test_a_wan_block(per_token: bool) -> None:
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock  # the rest does not need it

    torch.manual_seed(0)
    block = WanTransformerBlock(48, 96, 4, cross_attn_norm=True)
    torch.nn.init.normal_(block.norm2.weight, 1, 0.3)
    torch.nn.init.normal_(block.norm2.bias)
    time_shape = (2, 9, 6, 48) if per_token else (2, 6, 48)

    def run(function: Callable, dtype: torch.dtype) -> dict[str, Tensor]:
        """Weights and inputs rounded to bfloat16; norms' parameters, table and time in float32, as diffusers has it."""
        wide = torch.promote_types(dtype, torch.float32)
        block.bfloat16().to(dtype)
        for each in (block.norm2, SimpleNamespace(parameters=lambda: [block.scale_shift_table])):
            for parameter in each.parameters():
                parameter.data = parameter.data.to(wide)
        x, text = (random(2, n, 48, seed=n, dtype=torch.bfloat16).to(dtype).requires_grad_() for n in (9, 6))
        time = random(*time_shape, seed=3, dtype=torch.bfloat16).to(wide).requires_grad_()
        out = function(block, x, text, time)
        leaves = {"x": x, "text": text, "time": time, "table": block.scale_shift_table, "norm2": block.norm2.weight}
        upstream = random(2, 9, 48, seed=4, dtype=torch.bfloat16).to(dtype)
        return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), upstream), strict=True)) | {"out": out}

    exact = run(block_of_ours, torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        assert_as_good(run(block_of_ours, dtype), run(theirs, dtype), exact)
    for name, value in run(theirs, torch.float32).items():  # what is exact is theirs, too
        torch.testing.assert_close(value.double(), exact[name], rtol=1e-4, atol=1e-4, msg=name)
