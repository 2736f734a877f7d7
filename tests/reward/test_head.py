from __future__ import annotations

import pytest
import torch

from prfl.errors import PrflError
from prfl.reward.head import RewardHead, sigma_embedding


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


def test_query_pooling_is_the_papers_formula():
    """One head, one query: softmax(q (h W_K)^T / sqrt(d)) (h W_V) + q."""
    pool = head(n_queries=1, heads=1).pool
    tokens = features(width=8)[0]
    key, value = pool.key(tokens), pool.value(tokens)
    weight = (pool.query @ key.transpose(1, 2) / 8**0.5).softmax(-1)
    torch.testing.assert_close(pool(tokens), (weight @ value)[:, 0] + pool.query)


def test_mean_pooling_is_blind_to_where_the_query_can_look():
    """Two token sets with the same projected mean: the mean cannot tell them apart, the query can."""
    mean, query = head(pooling="mean").pool, head().pool
    tokens = features(width=8)[0]
    spread = torch.cat([tokens * 3 - 2 * tokens.mean(1, keepdim=True), tokens[:, :0]], dim=1)
    torch.testing.assert_close(mean(tokens), mean(spread))
    assert (query(tokens) - query(spread)).abs().max() > 1e-3


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
