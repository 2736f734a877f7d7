from __future__ import annotations

import pytest
import torch

from prfl.reward.head import RewardHead, sigma_embedding
from prfl.utils.errors import PrflError


def features(batch=3, tokens=7, width=6, blocks=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, tokens, width, generator=generator, dtype=torch.float64) for _ in range(blocks)]


def head(**changes):
    torch.manual_seed(1)
    settings = dict(blocks=2, inner=8, heads=2, n_queries=2, hidden=12)
    made = RewardHead(6, ["motion", "look"], **{**settings, **changes}).double()
    if made.film is not None:  # it starts as the identity; move it so that a test can see it
        torch.nn.init.normal_(made.film.weight, std=0.3)
    return made


SIGMA = torch.tensor([0.1, 0.5, 0.97], dtype=torch.float64)


@pytest.mark.parametrize("pooling", ["query", "mean"])
@pytest.mark.parametrize("film", [False, True])
def test_gradients_against_finite_differences(pooling, film):
    made, inputs = head(pooling=pooling, film=film), features()
    for hidden in inputs:
        hidden.requires_grad_()
    names = ["project.weight", *(["pool.query", "pool.key.weight"] if pooling == "query" else [])]
    weights = [made.get_parameter(name) for name in names]

    def logits(*values):
        return torch.func.functional_call(made, dict(zip(names, values[2:], strict=True)), (list(values[:2]), SIGMA))

    assert torch.autograd.gradcheck(logits, (*inputs, *weights), fast_mode=True)


@pytest.mark.parametrize("pooling", ["query", "mean"])
def test_the_order_of_tokens_does_not_matter(pooling):
    made, inputs = head(pooling=pooling, film=True), features()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(3))
    shuffled = [hidden[:, order] for hidden in inputs]
    torch.testing.assert_close(made(shuffled, SIGMA), made(inputs, SIGMA), rtol=1e-10, atol=1e-12)
    if pooling == "query":  # shuffling one block's tokens against the other's is another video
        assert (made([shuffled[0], inputs[1]], SIGMA) - made(inputs, SIGMA)).abs().max() > 1e-6


def test_samples_do_not_mix():
    made, inputs = head(film=True), features()
    alone = torch.cat([made([hidden[i : i + 1] for hidden in inputs], SIGMA[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, made(inputs, SIGMA))


def plain(made, inputs, sigma):
    """The head as its docstrings have it, token by token: softmax(q (h W_K)^T / sqrt(d)) (h W_V) + q, or the mean."""
    dtype = made.project.weight.dtype
    normalised = [norm(hidden.to(dtype)) for norm, hidden in zip(made.norms, inputs, strict=True)]
    tokens = made.project(torch.cat(normalised, dim=2))
    if made.film is not None:
        scale, shift = made.film(sigma_embedding(sigma)).unsqueeze(1).chunk(2, dim=2)
        tokens = tokens * (1 + scale) + shift
    if made.settings["pooling"] == "mean":
        return made.mlp(tokens.mean(1))
    pool = made.pool
    query = pool.query.expand(len(tokens), -1, -1)
    split = [x.unflatten(2, (pool.heads, -1)).transpose(1, 2) for x in (query, pool.key(tokens), pool.value(tokens))]
    gathered = torch.nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
    return made.mlp((gathered + query).flatten(1))


@pytest.mark.parametrize("pooling", ["query", "mean"])
@pytest.mark.parametrize("film", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_pooling_without_keys_and_values_is_the_formula(pooling, film, dtype, tolerance):
    made = head(pooling=pooling, film=film).to(dtype)
    for norm in made.norms:  # they start as the identity
        torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    inputs = [(3 * hidden + 1).to(dtype).requires_grad_() for hidden in features(tokens=9)]
    named = {name: each for name, each in made.named_parameters() if name != "pool.key.bias"}
    found = []
    for run in (made, plain):
        logits = made(inputs, SIGMA.to(dtype)) if run is made else plain(made, inputs, SIGMA.to(dtype))
        found.append((logits, *torch.autograd.grad(logits.sin().sum(), [*inputs, *named.values()])))
    for name, ours, theirs in zip(["logits", "first", "second", *named], *found, strict=True):
        error, largest = (ours - theirs).abs().max(), theirs.abs().max()
        assert error <= tolerance * max(1, largest), f"{name}: {error:.2g} of {largest:.2g}"
    if pooling == "query":  # the bias of the keys adds one number to all scores of a query, which softmax takes off
        with torch.no_grad():
            made.pool.key.bias += 1
        torch.testing.assert_close(plain(made, inputs, SIGMA.to(dtype)), found[0][0], rtol=tolerance, atol=tolerance)


def test_mean_pooling_is_blind_to_where_the_query_can_look():
    """Two videos whose normalised tokens have one mean: the mean cannot tell them apart, the query can."""
    mean, query = head(pooling="mean", blocks=1), head(blocks=1)
    tokens = torch.nn.functional.layer_norm(features(tokens=4)[0], (6,))
    inputs, opposed = ([torch.cat([x, -x], 1)] for x in (tokens, tokens.flip(-1)))
    torch.testing.assert_close(mean(inputs, SIGMA), mean(opposed, SIGMA), rtol=1e-6, atol=1e-9)
    assert (query(inputs, SIGMA) - query(opposed, SIGMA)).abs().max() > 1e-4


def test_film_starts_as_identity_and_then_reads_sigma():
    inputs = features()
    torch.manual_seed(1)
    fresh = RewardHead(6, ["motion"], blocks=2, inner=8, heads=2, film=True).double()
    torch.testing.assert_close(fresh(inputs, SIGMA), fresh(inputs, 1 - SIGMA))
    moved, plain = head(film=True), head(film=False)
    assert (moved(inputs, SIGMA) - moved(inputs, 1 - SIGMA)).abs().max() > 1e-4
    torch.testing.assert_close(plain(inputs, SIGMA), plain(inputs, 1 - SIGMA))


def test_sigma_embedding_separates_high_sigmas():
    near = sigma_embedding(torch.tensor([0.95, 0.98, 1.0], dtype=torch.float64))
    assert torch.cdist(near, near).fill_diagonal_(9).min() > 1


def test_half_precision_features_are_read_in_the_heads_own_type():
    made = head().float()
    logits = made([hidden.bfloat16() for hidden in features()], SIGMA.float())
    assert logits.dtype == torch.float32 and logits.shape == (3, 2)


def test_settings_build_the_same_head():
    made = head(film=True, pooling="mean")
    again = RewardHead(**made.settings).double()
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(features(), SIGMA), made(features(), SIGMA))


@pytest.mark.parametrize("dimensions", [[], ["motion", "motion"]])
def test_dimensions_need_distinct_names(dimensions):
    with pytest.raises(PrflError, match="dimensions"):
        RewardHead(6, dimensions)


def test_heads_must_divide_inner():
    with pytest.raises(PrflError, match="do not split over 3 heads"):
        RewardHead(6, ["motion"], inner=8, heads=3)
