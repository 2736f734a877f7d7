"""qk_norm_rope on CPU: torch's mathematics with the kernel's saved tensors, and the operator around both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers import transformer_wan
from torch import Tensor

from prfl.estimate.live_tensors import SavedBytes
from prfl_kernels.qk_norm_rope import MIN_WEIGHT, output_suffices, pack_tables, qk_norm_rope, unpack_tables
from prfl_kernels.reference import qk_norm_rope as reference
from tests.kernels.checks import assert_as_good, distance, random
from tests.slow import slow_unless

BATCH, TOKENS, HEADS, CHANNELS = 2, 5, 3, 6
WIDTH = HEADS * CHANNELS


def inputs(dtype: torch.dtype = torch.float64, rotate: bool = True, tables: torch.dtype = torch.float32) -> Any:
    """(q, k), (q_weight, k_weight), (cos, sin): q and k are chunks of one projection's output."""
    q, k, _ = random(BATCH, TOKENS, 3 * WIDTH, seed=1, dtype=dtype).chunk(3, -1)
    weights = tuple(random(WIDTH, seed=seed, dtype=dtype).abs() + 0.25 for seed in (2, 3))
    pairs = random(TOKENS, CHANNELS // 2, seed=4).mul(3).repeat_interleave(2, -1)[None, :, None]
    cos_sin = (pairs.cos().to(tables), pairs.sin().to(tables)) if rotate else (None, None)
    return (q.detach().requires_grad_(), k.detach().requires_grad_()), weights, cos_sin


@pytest.mark.parametrize("rotate", [True, False])
def test_the_reference_is_diffusers_and_its_gradient_is_right(rotate: bool) -> None:
    (q, _), (weight, _), tables = inputs(rotate=rotate)
    assert torch.autograd.gradcheck(lambda q: reference(q, weight, *tables, HEADS), q)
    expected = F.rms_norm(q, (WIDTH,), weight, 1e-6)
    if rotate:
        even, odd = expected.unflatten(-1, (HEADS, -1, 2)).unbind(-1)
        turned = torch.complex(even, odd) * torch.complex(tables[0][..., 0::2], tables[1][..., 1::2])
        expected = torch.view_as_real(turned).flatten(-3)
    torch.testing.assert_close(reference(q, weight, *tables, HEADS), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("from_output", [True, False])
@pytest.mark.parametrize("rotate", [True, False])
def test_finite_differences(rotate: bool, from_output: bool) -> None:
    x, weights, cos_sin = inputs(rotate=rotate)
    assert torch.autograd.gradcheck(
        lambda q, k: qk_norm_rope(q, k, *weights, *cos_sin, HEADS, 1e-6, from_output), x, fast_mode=True
    )
    assert torch.autograd.gradcheck(
        lambda q: qk_norm_rope(q, None, weights[0], None, *cos_sin, HEADS, 1e-6, from_output)[0], x[:1], fast_mode=True
    )


def compared(
    dtype: torch.dtype, from_output: bool, weights: Any = None, tables: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], ...]:
    x, made, cos_sin = inputs(dtype, tables=tables)
    weights = made if weights is None else weights
    grads = [random(BATCH, TOKENS, WIDTH, seed=seed, dtype=dtype) for seed in (5, 6)]

    def results(run: Any, x: Any) -> dict[str, Tensor]:
        outs = run(x)
        gradients = torch.autograd.grad(outs, x, [grad.to(x[0].dtype) for grad in grads])
        return dict(zip(("q", "k", "dq", "dk"), (*(out.detach() for out in outs), *gradients), strict=True))

    def plain(x: Any) -> Any:
        return [reference(each, w.to(each.dtype), *cos_sin, HEADS) for each, w in zip(x, weights, strict=True)]

    ours = results(lambda x: qk_norm_rope(*x, *weights, *cos_sin, HEADS, 1e-6, from_output), x)
    return ours, results(plain, x), results(plain, [each.detach().double().requires_grad_() for each in x])


@pytest.mark.parametrize("tables", [torch.float32, torch.bfloat16], ids=str)
def test_rounded_tables_are_no_rotation_and_the_gradient_is_exact(tables: torch.dtype) -> None:
    assert_as_good(*compared(torch.float64, True, tables=tables))


@pytest.mark.parametrize("from_output", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_good_as_torch(dtype: torch.dtype, from_output: bool) -> None:
    ours, torchs, exact = compared(dtype, from_output)
    assert_as_good(ours, torchs, exact)
    for planted in ({"q": ours["k"]}, {"dk": 1.05 * ours["dk"]}):
        with pytest.raises(AssertionError, match="error"):
            assert_as_good(ours | planted, torchs, exact)


def test_where_a_weight_is_small_the_input_is_saved() -> None:
    fine = torch.linspace(-1.5, -0.5, WIDTH, dtype=torch.bfloat16)
    zero, uneven = fine.clone(), fine.clone()
    zero[0] = 0
    uneven[0::2] *= 3 * MIN_WEIGHT
    uneven[1::2] *= 20
    assert output_suffices(fine) and output_suffices(fine, fine[1:])
    assert not output_suffices(fine, zero) and not output_suffices(fine * MIN_WEIGHT)
    assert uneven.abs().min() > MIN_WEIGHT and not output_suffices(uneven, fine)
    for weight in (zero, uneven):
        assert_as_good(*compared(torch.bfloat16, False, (fine, weight)))
        with pytest.raises(AssertionError, match="dk: "):  # what the guard is for
            assert_as_good(*compared(torch.bfloat16, True, (fine, weight)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_at_least_as_exact_as_diffusers_processor(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers rounds between norm and rotation, and we do not.  Its own tables, of float32."""
    taken: dict[str, Tensor] = {}

    def take(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        taken.update(q=query.flatten(2), k=key.flatten(2))
        return query

    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", take)
    torch.manual_seed(0)
    attention = transformer_wan.WanAttention(
        dim=48, heads=2, dim_head=24, eps=1e-6, processor=transformer_wan.WanAttnProcessor()
    )
    for norm in (attention.norm_q, attention.norm_k):
        torch.nn.init.uniform_(norm.weight, 0.3, 2)
    attention.to(dtype).requires_grad_(False)
    latents = torch.zeros(1, 1, 3, 4, 6)
    tables = transformer_wan.WanRotaryPosEmbed(24, (1, 2, 2), 32)(latents)
    assert all(table.dtype == torch.float32 and table.shape == (1, 18, 1, 24) for table in tables)
    hidden = random(1, 18, 48, seed=1, dtype=dtype)
    q, k = (project(hidden).requires_grad_() for project in (attention.to_q, attention.to_k))
    monkeypatch.setattr(transformer_wan, "_get_qkv_projections", lambda *_: (q, k, q))
    grads = [random(1, 18, 48, seed=seed, dtype=dtype) for seed in (2, 3)]
    attention(hidden, rotary_emb=tables)
    theirs = dict(taken)
    weights = attention.norm_q.weight, attention.norm_k.weight
    ours = dict(zip("qk", qk_norm_rope(q, k, *weights, *tables, 2, from_output=output_suffices(*weights)), strict=True))
    wide = [each.detach().double().requires_grad_() for each in (q, k)]
    exact = {name: reference(x, w.double(), *tables, 2) for name, x, w in zip("qk", wide, weights, strict=True)}
    for outs, x in ((ours, (q, k)), (theirs, (q, k)), (exact, wide)):
        gradients = torch.autograd.grad([outs["q"], outs["k"]], x, [grad.to(x[0].dtype) for grad in grads])
        outs.update(dq=gradients[0], dk=gradients[1])
    assert_as_good(ours, theirs, exact)
    for name in "qk":
        assert distance(ours[name], exact[name]) <= distance(theirs[name], exact[name])


@pytest.mark.parametrize("from_output", [True, False])
@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("dtype", slow_unless(torch.bfloat16.__eq__, [torch.float32, torch.bfloat16]), ids=str)
def test_the_operators_keep_torchs_contract(dtype: torch.dtype, save: bool, from_output: bool) -> None:
    (q, k), weights, tables = inputs(dtype)
    tables = pack_tables(*tables)
    if not save:
        q, k = q.detach(), k.detach()
    rest = HEADS, 1e-6, save, from_output
    torch.library.opcheck(torch.ops.prfl.qk_norm_rope.default, (q, k, *weights, *tables, *rest))
    torch.library.opcheck(torch.ops.prfl.qk_norm_rope.default, (q, None, weights[0], None, None, None, *rest))
    if save:
        saved = [random(BATCH, TOKENS, WIDTH, seed=seed, dtype=dtype) for seed in (1, 2)]
        rstd = random(2, BATCH, TOKENS, dtype=torch.float32)
        arguments = (q.detach(), k.detach(), *saved, rstd, *weights, *tables, HEADS, from_output)
        torch.library.opcheck(torch.ops.prfl.qk_norm_rope_backward.default, arguments)


@pytest.mark.parametrize("alone", [True, False])
def test_compiled_whole(alone: bool) -> None:
    (q, k), weights, tables = inputs(torch.float32)

    def loss(q: Tensor, k: Tensor) -> Tensor:
        if alone:
            return qk_norm_rope(q, None, weights[0], None, *tables, HEADS, from_output=True)[0].square().sum() + k.sum()
        outs = qk_norm_rope(q, k, *weights, *tables, HEADS, from_output=True)
        return (outs[0].sin() * outs[1]).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    plain, ours = loss(q, k), compiled(q, k)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(torch.autograd.grad(ours, (q, k)), torch.autograd.grad(plain, (q, k)))
    with torch.no_grad():
        torch.testing.assert_close(compiled(q, k), plain)


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (each.unflatten(2, (HEADS, -1)).transpose(1, 2) for each in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)


def test_only_the_outputs_and_a_number_a_token_are_saved() -> None:
    x, weights, tables = inputs(torch.bfloat16)
    tables = pack_tables(*tables)  # as for all blocks: half of what they were
    one = BATCH * TOKENS * WIDTH * 2  # bytes
    own = 2 * BATCH * TOKENS * 4 + sum(each.untyped_storage().nbytes() for each in (*weights, *tables))
    value = random(BATCH, TOKENS, WIDTH, seed=7, dtype=torch.bfloat16)

    def saved(from_output: bool | None) -> int:
        q, k = (each.detach().clone().requires_grad_() for each in x)
        bytes_ = SavedBytes()
        with bytes_:
            if from_output is None:
                q, k = (each + 0 for each in (q, k))
            else:
                q, k = qk_norm_rope(q, k, *weights, *tables, HEADS, from_output=from_output)  # type: ignore[assignment]
            out = attended(q, k, value)
            live = bytes_.live
        del out
        return live

    attention = saved(None)
    assert saved(True) == attention + own
    assert saved(False) == attention + own + 2 * one
    with torch.no_grad():
        rstd = torch.ops.prfl.qk_norm_rope(*x, *weights, *tables, HEADS, 1e-6, False, True)[2]
    assert not rstd.numel()


@pytest.mark.parametrize("from_output", [True, False])
def test_packed_tables_give_the_same_bits(from_output: bool) -> None:
    x, weights, tables = inputs(torch.float32)
    packed = pack_tables(*tables)
    assert all(map(torch.equal, unpack_tables(*packed), tables))
    results = []
    for own in (tables, packed):
        outs = qk_norm_rope(*x, *weights, *own, HEADS, from_output=from_output)
        results.append([*outs, *torch.autograd.grad(outs, x, [torch.ones_like(out) for out in outs])])
    assert all(map(torch.equal, *results))
    with pytest.raises(ValueError, match="cos and sin must have one shape"):
        qk_norm_rope(*x, *weights, tables[0], packed[1], HEADS)


def test_attention_sees_a_view() -> None:
    x, weights, tables = inputs()
    for out in qk_norm_rope(*x, *weights, *tables, HEADS):
        assert out is not None and out.is_contiguous()
        assert out.unflatten(2, (HEADS, -1)).data_ptr() == out.data_ptr()


@pytest.mark.parametrize("from_output", [True, False])
def test_an_output_or_a_gradient_that_nobody_wants(from_output: bool) -> None:
    (q, k), weights, tables = inputs()
    want = torch.autograd.grad(reference(k, weights[1], *tables, HEADS).sin().sum(), k)[0]
    outs = qk_norm_rope(q, k, *weights, *tables, HEADS, from_output=from_output)
    got = torch.autograd.grad(outs[1].sin().sum(), (q, k))
    assert not got[0].any()
    torch.testing.assert_close(got[1], want)
    still = qk_norm_rope(q.detach(), k, *weights, *tables, HEADS, from_output=from_output)
    torch.testing.assert_close(torch.autograd.grad((still[0] + still[1].sin()).sum(), k)[0], want)


def test_no_tokens() -> None:
    q = torch.zeros(1, 0, WIDTH, requires_grad=True)
    out, _ = qk_norm_rope(q, None, torch.ones(WIDTH), None, None, None, HEADS)
    assert out.shape == torch.autograd.grad(out.sum(), q)[0].shape == (1, 0, WIDTH)


def test_what_does_not_fit_is_refused() -> None:
    (q, k), (w, v), (cos, sin) = inputs()
    for arguments, match in (
        ((q, k, w, v, cos, sin, 4), "a multiple of 4 heads"),
        ((q, k, w, None, cos, sin, HEADS), "come together"),
        ((q, k, w, v, cos, None, HEADS), "come together"),
        ((q, k[:, 1:], w, v, cos, sin, HEADS), "call it for each of them"),
        ((q, k.float(), w, v, cos, sin, HEADS), "call it for each of them"),
        ((q, k, w, v.float(), cos, sin, HEADS), "of one dtype"),
        ((q, k, w[1:], v, cos, sin, HEADS), "weights must be"),
        ((q, k, w, v, cos[:, 1:], sin, HEADS), "cos and sin must be"),
        ((q, k, w, v, cos[..., :3].repeat(1, 1, 1, 1), sin[..., :3], 6), "even in the last"),
        ((q, k, w.clone().requires_grad_(), v, cos, sin, HEADS), "for frozen norms"),
        ((q, k, w, v, cos, sin.clone().requires_grad_(), HEADS), "for frozen norms"),
    ):
        with pytest.raises(ValueError, match=match):
            qk_norm_rope(*arguments)
    with torch.no_grad():
        assert qk_norm_rope(q, None, w.clone().requires_grad_(), None, cos, sin, HEADS)[1] is None
