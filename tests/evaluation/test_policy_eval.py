"""Measuring a policy beside its base, the files that come of it, and the report made of them."""

from __future__ import annotations

import io
import json
import re

import av
import pytest
import torch

from prfl.evaluation import plots
from prfl.evaluation.media import browser_mp4, enlarge
from prfl.evaluation.page.videos import verdict
from prfl.evaluation.policy_eval import Outcome, compare, flat, measure, summarise, write_results
from prfl.evaluation.report import write_report
from prfl.evaluation.reward_eval import evaluate, held_out, levels, save_rows
from prfl.evaluation.tables import policy_table
from prfl.rollout.sampling import SamplingSettings, jobs
from prfl.utils.files import written_by_prfl
from prfl.utils.metrics_file import records

PROMPTS = ["a red circle moves left", "a blue square moves up", "a <b>green</b> triangle & moves"]
SETTINGS = SamplingSettings(frames=5, height=8, width=8, steps=2, batch=4)


def judge(pixels, prompts):
    bright = (pixels.mean((1, 2, 3, 4)) > 0).float()
    return {"shape": bright, "speed": torch.ones(len(prompts)), "all": bright}


def reward(latents, sigma, condition):
    assert float(sigma.abs().max()) == 0
    return {"shape": latents.mean((1, 2, 3, 4))}


def outcome(name: str, gain: float = 0.0, prompts: int = 6, each: int = 3) -> Outcome:
    draw = torch.Generator().manual_seed(0)
    names, indices = jobs([f"prompt {n}" for n in range(prompts)], each)
    good = (torch.rand(len(names), generator=draw) < 0.4 + gain).float()
    scores = {"judge/shape": good, "judge/all": good, "reward/shape": good + gain, "motion": good}
    spread = {f"prompt {n}": 0.3 - gain for n in range(prompts)}
    pixels = torch.rand(3, 3, 5, 32, 32, generator=draw) * 2 - 1
    return Outcome(name, SETTINGS, names, indices, scores, spread, pixels, seconds=1.5)


def test_every_sample_is_scored_in_order_and_batches_do_not_matter(tiny_backbone):
    common = dict(name="base", adapter=None, judge=judge, rewards={"reward": reward})
    result = measure(tiny_backbone, PROMPTS, 2, SETTINGS, **common, keep_videos=2)
    assert result.prompts == [prompt for prompt in PROMPTS for _ in range(2)]
    assert result.indices == [0, 1] * 3
    assert set(result.scores) == {"motion", "judge/shape", "judge/speed", "judge/all", "reward/shape"}
    assert all(values.shape == (6,) for values in result.scores.values())
    assert result.pixels.shape == (2, 3, 5, 8, 8)
    assert list(result.spread) == PROMPTS
    whole = measure(tiny_backbone, PROMPTS, 2, SamplingSettings(5, 8, 8, 2, batch=6), **common)
    torch.testing.assert_close(whole.scores["reward/shape"], result.scores["reward/shape"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.pixels[:2], result.pixels, rtol=1e-4, atol=1e-4)


def test_a_policy_equal_to_its_base_differs_by_exactly_zero():
    difference = compare(outcome("policy"), outcome("base"))
    assert {(d.value, d.low, d.high) for d in difference.values()} == {(0.0, 0.0, 0.0)}


def test_a_gain_is_found_with_its_interval():
    difference = compare(outcome("policy", 0.4, prompts=40), outcome("base", prompts=40))
    assert difference["judge/all"].low > 0.2
    assert difference["diversity"].value == pytest.approx(-0.4)
    assert flat(summarise(outcome("base")))["diversity"] == pytest.approx(0.3)


def test_outcomes_of_other_samples_are_not_compared():
    with pytest.raises(AssertionError, match="not the same samples"):
        compare(outcome("policy", prompts=5), outcome("base"))


def test_results_file_holds_rows_summaries_and_playable_videos(tmp_path):
    path = write_results(tmp_path, [outcome("base"), outcome("policy", 0.3)], fps=8.0)
    assert written_by_prfl(tmp_path), "no clips are ever cut from samples"
    results = json.loads(path.read_text())
    assert results["samples"] == len(results["rows"]) == 18
    assert results["rows"][4]["sample"] == 1 and results["rows"][4]["prompt"] == "prompt 1"
    assert results["outcomes"]["policy"]["difference"]["judge/all"]["value"] > 0
    for entry in results["videos"]:
        assert results["rows"][entry["row"]]["sample"] == 0
        for file in entry["files"].values():
            with av.open(str(tmp_path / file)) as container:
                stream = container.streams.video[0]
                assert (stream.codec_context.name, stream.pix_fmt, stream.frames) == ("h264", "yuv420p", 5)
                assert min(stream.width, stream.height) >= 128
    assert policy_table([outcome("base"), outcome("policy")]).row_count == 5


def test_small_videos_are_enlarged_without_blur_and_odd_sides_made_even():
    pixels = torch.rand(3, 2, 5, 7) * 2 - 1
    large = enlarge(pixels, 16)
    assert large.shape == (3, 2, 20, 28)
    assert torch.equal(large[:, :, ::4, ::4], pixels)
    with av.open(io.BytesIO(browser_mp4(torch.zeros(3, 2, 201, 203), fps=8.0))) as container:
        frame = next(container.decode(video=0))
        assert (frame.width, frame.height) == (202, 200)
        assert abs(int(frame.to_ndarray(format="rgb24").mean()) - 128) <= 2


def run_folder(path):
    """A run as training leaves it."""
    (path / "config.yaml").write_text("run: <here>\nseed: 0\n")
    (path / "environment.json").write_text(json.dumps({"python": "3", "device": "cpu"}))
    lines = [{"step": s, "loss": 1 / s, "reward/shape": s / 100, "seconds/step": 0.5} for s in range(1, 101)]
    lines += [{"step": 50, "judge/all": 0.5}, {"step": 100, "judge/all": 0.6}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 101, "lo')
    write_results(path / "samples" / "step-000050", [outcome("base")], fps=8.0)
    last = outcome("policy", 0.3)
    last.prompts[0] = base_prompt = "<script>alert(1)</script>"
    first = outcome("base")
    first.prompts[0] = base_prompt
    write_results(path / "samples" / "final", [first, last], fps=8.0)
    from tests.evaluation.test_reward_eval import dataset, knowing_the_prompt, seeing

    scorers = {"frozen head": seeing, "mean pooling": knowing_the_prompt}
    rows = evaluate(scorers, held_out(dataset(prompts=6)), levels(), noise_draws=1, resamples=20)
    save_rows(path / "reward_eval.json", rows, domain="in")
    return rows


def test_report_is_one_file_that_loads_nothing(tmp_path):
    run_folder(tmp_path)
    page = write_report(tmp_path, title="tiny & <fine>").read_text()
    assert not re.search(r"https?://|src=\"(?!data:)|href=\"(?!samples/)|@import|url\(|<script", page)
    assert page.count("data:video/mp4;base64,") == 6  # three prompts, before and after, of the final results
    # A picture a plot: six curves, three measures by sigma for each of two dimensions and for both, calibration.
    assert page.count("data:image/png;base64,") == 4 + 9 + 1
    assert "tiny &amp; &lt;fine&gt;" in page and "run: &lt;here&gt;" in page
    for heading in ("Results", "Before and after", "How well the reward ranks", "Curves", "Config", "Environment"):
        assert f"<h2>{heading}</h2>" in page
    assert "policy − base" in page
    for tag in ("section", "table", "details", "figure", "div", "article"):
        assert len(re.findall(f"<{tag}[ >]", page)) == page.count(f"</{tag}>"), tag


def test_report_of_an_almost_empty_run_leaves_the_rest_out(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    page = write_report(tmp_path).read_text()
    assert "<h2>Config</h2>" in page and "Curves" not in page and "Before and after" not in page


def test_half_written_last_line_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"st')
    assert records(tmp_path / "metrics.jsonl") == ([{"step": 1, "phase": "training", "loss": 0.5}], 1)


def test_verdict_names_what_is_wrong():
    assert "wrong: speed" in verdict({"judge/shape": 1.0, "judge/speed": 0.0, "judge/all": 0.0})
    assert "right" in verdict({"judge/shape": 1.0, "judge/all": 1.0})
    assert "aesthetic 0.37" in verdict({"judge/aesthetic": 0.37})
    assert verdict({"reward/shape": 0.5, "reward/total": 1.25}) == "<small>reward +1.25</small>"


def test_running_mean_is_that_of_a_loop():
    values = torch.arange(10.0).numpy() ** 2
    expected = [values[max(0, i - 2) : i + 3].mean() for i in range(10)]
    assert plots.running_mean(values, 2) == pytest.approx(expected)
