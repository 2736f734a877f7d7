"""Scorers with known answers: one that sees the label through the noise, one that knows the prompt only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from prfl.backbone.wan.text import text_condition
from prfl.data.dataset import LatentDataset, PairDataset
from prfl.evaluation.reward_eval import (
    MEASURES,
    Level,
    accuracy_by_bin,
    evaluate,
    held_out,
    levels,
    load_rows,
    pixel_scorer,
    results_of,
    save_rows,
    score,
)
from prfl.evaluation.tables import ranking_tables
from prfl.reward.pixel import PixelReward

AT = [Level("point", 0.0, 0.0), Level("bin", 0.4, 0.6), Level("point", 1.0, 1.0)]


def common(latents, conditions, prompts) -> dict:
    device = torch.device("cpu")
    return dict(latents=latents, conditions=conditions, prompts=prompts, device=device, skipped=[])


def dataset(prompts: int = 12, each: int = 6) -> LatentDataset:
    """Latents whose mean is 0.3 times the label of ``shape``; ``speed`` shows nowhere."""
    draw = torch.Generator().manual_seed(0)
    names = [f"prompt {number}" for number in range(prompts) for _ in range(each)]
    labels = {name: torch.randint(2, (len(names),), generator=draw).float() for name in ("shape", "speed")}
    latents = 0.3 * labels["shape"].view(-1, 1, 1, 1, 1).expand(-1, 2, 2, 3, 3).clone()
    conditions = {
        name: text_condition(torch.full((1, 2, 4), float(number)), torch.tensor([2]))
        for number, name in enumerate(["", *dict.fromkeys(names)])
    }
    return LatentDataset(**common(latents, conditions, names), video=torch.arange(len(names)), labels=labels)


def seeing(latents, sigma, condition):
    mean = latents.flatten(1).mean(1)
    return {"shape": 8 * (mean - 0.5), "speed": 8 * (mean - 0.5)}


def knowing_the_prompt(latents, sigma, condition):
    return {"shape": condition.tensors["prompt_embeds"][:, 0, 0].clone()}


def row_of(rows, scorer, dimension, label):
    return next(r for r in rows if (r.scorer, r.dimension, r.level.label) == (scorer, dimension, label))


def test_accuracy_falls_from_one_to_chance_with_noise():
    rows = evaluate({"seeing": seeing}, held_out(dataset()), AT, noise_draws=4, batch=10, resamples=200)
    clean, middle, floor = (row_of(rows, "seeing", "shape", level.label) for level in AT)
    assert [clean.accuracy.value, clean.auc.value] == pytest.approx([1.0, 1.0])
    assert 0.6 < middle.accuracy.value < 1.0
    assert floor.accuracy.low < 0.5 < floor.accuracy.high
    assert row_of(rows, "seeing", "speed", "0.000").accuracy.value < 0.7
    assert floor.level.label == "1.000 (floor)"


def test_a_scorer_that_knows_only_the_prompt_has_half():
    rows = evaluate({"prompt": knowing_the_prompt}, held_out(dataset()), AT, noise_draws=2, resamples=50)
    assert {row.dimension for row in rows} == {"shape"}
    assert [row.accuracy.value for row in rows] == pytest.approx([0.5] * len(rows))


def test_scorers_see_the_same_latents_whatever_the_batch():
    data = held_out(dataset(prompts=4))
    small = score({"a": seeing, "b": seeing}, data, AT, noise_draws=2, batch=5)
    large = score({"a": seeing}, data, AT, noise_draws=2, batch=24)
    for level in AT:
        assert torch.equal(small["a", level]["shape"], small["b", level]["shape"])
        torch.testing.assert_close(small["a", level]["all"], large["a", level]["all"])


def test_all_samples_of_a_prompt_share_sigma_and_draws_fill_the_bin():
    sigmas = []

    def watching(latents, sigma, condition):
        sigmas.append(sigma)
        return {"shape": sigma}

    score({"w": watching}, held_out(dataset(prompts=3, each=4)), [AT[1]], noise_draws=5, batch=12)
    sigma = torch.stack(sigmas).reshape(5, 3, 4)
    assert (sigma == sigma[..., :1]).all()
    assert sigma.min() >= 0.4 and sigma.max() <= 0.6
    strata = ((sigma[:, :, 0] - 0.4) / 0.2 * 5).floor()
    assert torch.equal(strata, torch.arange(5.0)[:, None].expand(5, 3))


def test_overall_label_needs_every_one_and_its_score_is_a_log_probability():
    data = held_out(dataset())
    assert torch.equal(data.labels["all"], data.labels["shape"] * data.labels["speed"])
    rows = evaluate({"seeing": seeing}, data, AT[:1], noise_draws=1, resamples=50)
    row = row_of(rows, "seeing", "all", "0.000")
    assert 0 <= row.ece.value <= 1
    assert max(row.reliability.predicted) <= 1


def test_ties_are_calibrated_on_the_training_samples():
    train = held_out(dataset())
    rows = evaluate({"seeing": seeing}, held_out(dataset(prompts=5)), AT[:1], train=train, noise_draws=1, resamples=50)
    row = row_of(rows, "seeing", "shape", "0.000")
    assert row.accuracy_ties.value == 1.0  # clean scores are 0 or 2.4 apart: the threshold lies between
    assert 0 < row.threshold < 2.5


def test_the_head_of_the_samples_has_their_pairs_only():
    data = held_out(dataset())
    head = data.head(9)  # one prompt of six samples, and half of the next
    whole = held_out(dataset(prompts=2))
    assert head.prompts == data.prompts[:9]
    for name, pairs in head.pairs.items():
        assert pairs.first.max() < 9 and pairs.second.max() < 9
        assert len(pairs) == 15 + 3 < len(whole.pairs[name])
    assert data.head(10**6) is data


def test_preference_pairs_are_scored_without_labels():
    latents = torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1, 1, 1).expand(-1, 2, 2, 3, 3).clone()
    conditions = {name: text_condition(torch.ones(1, 1, 4), torch.tensor([1])) for name in ("", "p", "q")}
    data = PairDataset(
        **common(latents, conditions, ["p", "p", "q", "q"]),
        a=torch.tensor([0, 1, 2, 0]),
        b=torch.tensor([1, 0, 1, 2]),
        preference={"shape": torch.tensor([0.0, 1.0, 1.0, 0.5])},
    )
    rows = evaluate({"seeing": seeing}, held_out(data), AT[:1], noise_draws=1, resamples=50)
    assert [(row.accuracy.value, row.pairs, row.ties, row.auc) for row in rows] == [(1.0, 3, 1, None)]


def test_rows_survive_a_file_and_make_tables(tmp_path):
    data = held_out(dataset(prompts=4))
    rows = evaluate({"seeing": seeing, "prompt": knowing_the_prompt}, data, AT, train=data, noise_draws=1, resamples=20)
    save_rows(tmp_path / "reward_eval.json", rows, domain="in")
    facts, again = load_rows(tmp_path / "reward_eval.json")
    assert facts == {"domain": "in"} and again == rows
    assert list(accuracy_by_bin(rows, "seeing")["shape"]) == ["0.4-0.6"]


def test_accuracies_make_one_table_whose_columns_are_dimensions():
    """Two scorers are compared side by side, in a table for each dimension."""
    scorers, accuracy = {"seeing": seeing, "prompt": knowing_the_prompt}, MEASURES["accuracy"]
    rows = evaluate(scorers, held_out(dataset()), AT, noise_draws=4, resamples=200)
    dimensions = list(dict.fromkeys(row.dimension for row in rows))
    (table,) = ranking_tables([row for row in rows if row.scorer == "seeing"], accuracy).values()
    assert [column.header for column in table.columns] == ["sigma", *dimensions] and len(dimensions) > 1
    cells = [list(column.cells) for column in table.columns]
    assert cells[0][-1] == "pairs" and cells[1][-1] == str(rows[0].pairs)
    clean, noise = cells[0].index("0.000"), cells[0].index("1.000 (floor)")
    assert str(cells[1][clean]).startswith("1.00 ±") and cells[1][clean].style == ""
    assert cells[1][noise].style == "dim", "no better than chance"
    assert len(table.rows) == len(AT) + 2 + 1, "levels, the titles of their kinds, pairs"
    several = ranking_tables(rows, accuracy)
    side_by_side = {title.split(":")[0]: [column.header for column in one.columns] for title, one in several.items()}
    assert side_by_side == {
        dimension: ["sigma", *(scorers if dimension == "shape" else ["seeing"])] for dimension in dimensions
    }


def test_levels_are_finer_near_noise_and_hold_the_samplers_own():
    noise_levels = levels([1.0, 0.5, 0.0])
    bins = [level for level in noise_levels if level.kind == "bin"]
    assert bins[0].low == 0 and bins[-1].high == 1
    assert sum(level.low >= 0.9 for level in bins) >= 4
    assert [level.low for level in noise_levels if level.kind == "sampler"] == [1.0, 0.5, 0.0]


def test_pixel_scorer_decodes_the_clean_prediction_of_the_base(tiny_backbone):
    class Brightness(PixelReward):
        def __init__(self):
            pass

        def logits(self, pixels, condition, times=None):
            return {"bright": pixels.mean((1, 2, 3, 4))}

    scorer = pixel_scorer(tiny_backbone, Brightness())
    condition = tiny_backbone.condition(["a red circle"])
    latents = torch.randn(1, *tiny_backbone.latent_shape(5, 8, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        velocity = tiny_backbone.velocity(latents, torch.tensor([0.5]), condition)
        expected = tiny_backbone.decode(latents - 0.5 * velocity).mean()
        assert float(scorer(latents, torch.tensor([0.5]), condition)["bright"]) == pytest.approx(
            float(expected), abs=1e-5
        )


def test_results_of_other_clips_stay(tmp_path: Path) -> None:
    """Two manifests in one folder, and two folders of one name."""
    run, clips = tmp_path / "run", ["a/set/manifest.jsonl", "a/set/hard.jsonl", "b/set/manifest.jsonl"]
    run.mkdir()
    for _ in range(2):  # the second time in place of their own
        for manifest in clips:
            path = results_of(run, tmp_path / manifest)
            path.write_text(json.dumps({"clips": str(tmp_path / manifest), "rows": []}))
    clips_of = {path.name: json.loads(path.read_text())["clips"] for path in run.iterdir()}
    names = ["reward_eval-set.json", "reward_eval-set-hard.json", "reward_eval-set-2.json"]
    assert clips_of == {name: str(tmp_path / manifest) for name, manifest in zip(names, clips, strict=True)}
    (run / "reward_eval-set.json").write_text("half a li")
    assert results_of(run, tmp_path / "c/set/manifest.jsonl") == run / "reward_eval-set.json"
