"""The shapes world: the renderer is seeded, the oracle exact, the shipped model loads and draws what it is told."""

import math
import random
from dataclasses import replace

import pytest
import torch

from prfl.data.manifest import read_manifest
from prfl.toy import clips, oracle, renderer

CAPTIONS = [a.caption for a in renderer.all_attributes()]


def fresh(count: int, **flaws: float) -> tuple[list[renderer.Scene], torch.Tensor]:
    scenes = renderer.sample_scenes(11, 0, count, CAPTIONS, **flaws)
    return scenes, renderer.render(scenes)


def test_rendering_is_a_function_of_seed_and_index():
    first, again, other = (renderer.sample_scenes(3, index, 4, CAPTIONS, 0.5, 0.5) for index in (0, 0, 1))
    assert first == again != other
    assert torch.equal(renderer.render(first), renderer.render(again))


def test_videos_fill_the_stated_range_and_never_touch_the_border():
    _, videos = fresh(256)
    assert videos.shape == (256, 3, renderer.FRAMES, renderer.SIZE, renderer.SIZE)
    assert videos.min() >= -1 and videos.max() <= 1
    border = torch.cat([videos[..., 0, :].flatten(), videos[..., :, 0].flatten(), videos[..., -1].flatten()])
    assert torch.equal(border, torch.zeros_like(border)), "a shape was cut off"


def test_caption_parses_back_and_nonsense_does_not():
    for attributes in renderer.all_attributes():
        assert renderer.Attributes.parse(attributes.caption) == attributes
    for text in ("", "a cat", "a red circle moves left", "a pink circle moves left slowly"):
        with pytest.raises(ValueError):
            renderer.Attributes.parse(text)


def test_splits_share_no_caption():
    splits = renderer.split_prompts()
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [88, 24, 32]
    assert sorted(sum(splits.values(), [])) == sorted(CAPTIONS)


def test_samples_are_labelled_for_their_own_caption_and_for_neighbours(tmp_path):
    splits = renderer.split_prompts()
    counts = {"train": 1, "validation": 1}

    def draw(prompts, _):  # every sample is a good one of its caption
        rng = random.Random(0)
        return renderer.render([renderer.make_scene(rng, renderer.Attributes.parse(prompt)) for prompt in prompts])

    manifest = clips.labelled(tmp_path, splits, counts, draw, other_captions=3)
    rows = read_manifest(manifest)
    matching = [row for row in rows if all(row.label.values())]
    assert len(matching) == 88 + 24 and {row.prompt for row in matching if row.split == "validation"} == set(
        splits["validation"]
    )
    others = [row for row in rows if row not in matching]
    assert len(others) == 3 * 88 and {row.split for row in others} == {"train"}
    prompt_of = {row.video: row.prompt for row in matching}
    for row in others:
        assert row.prompt in splits["train"] and sum(1 - value for value in row.label.values()) == 1
        captioned, shown = renderer.Attributes.parse(row.prompt), renderer.Attributes.parse(prompt_of[row.video])
        assert all(
            row.label[name] == (getattr(captioned, name) == getattr(shown, name)) for name in renderer.ATTRIBUTES
        )


def test_oracle_accepts_fresh_renders():
    scenes, videos = fresh(256)
    verdict = oracle.judge(videos, [s.captioned.caption for s in scenes])
    assert verdict["all"].float().mean() >= 0.98


@pytest.mark.parametrize("name", renderer.ATTRIBUTES)
def test_oracle_rejects_a_swapped_attribute(name):
    scenes, videos = fresh(64)
    rng = random.Random(0)
    captions = [renderer.swap_attribute(s.captioned, name, rng).caption for s in scenes]
    assert oracle.judge(videos, captions)["all"].float().mean() <= 0.02


@pytest.mark.parametrize("flaw", renderer.FLAWS)
def test_oracle_sees_every_flaw(flaw):
    rng = random.Random(0)
    scenes = [renderer.make_scene(rng, a, None, flaw) for a in renderer.all_attributes()]
    assert oracle.judge(renderer.render(scenes), CAPTIONS)["steadiness"].float().mean() <= 0.02


@pytest.mark.parametrize("video", [torch.zeros, torch.ones, torch.randn], ids=["grey", "white", "noise"])
def test_oracle_rejects_what_is_no_shape(video):
    assert not oracle.judge(video(8, 3, renderer.FRAMES, 32, 32), CAPTIONS[:8])["all"].any()


def test_flaw_shares_are_what_was_asked_for():
    scenes = renderer.sample_scenes(11, 0, 2000, CAPTIONS, wrong=0.2, unsteady=0.3)
    assert sum(s.captioned != s.drawn for s in scenes) / 2000 == pytest.approx(0.2, abs=0.03)
    assert sum(bool(s.flaw) for s in scenes) / 2000 == pytest.approx(0.3, abs=0.03)


def test_size_is_reported_beside_the_verdict_and_not_in_it():
    """A policy that draws everything 18 % larger is still right in everything: the report shows it."""
    scenes, videos = fresh(96)
    captions = [scene.captioned.caption for scene in scenes]
    grown = renderer.render([replace(scene, radius=scene.radius * math.sqrt(1.18)) for scene in scenes])
    as_drawn, swollen = (clips.judge(each, captions) for each in (videos, grown))
    assert float(as_drawn["measured/size"].mean()) == pytest.approx(1, abs=0.03)
    ratio = swollen["measured/size"] / as_drawn["measured/size"]
    assert float(ratio.median()) == pytest.approx(1.18, abs=0.02)
    verdicts = {*oracle.DIMENSIONS, "all"}
    assert as_drawn.keys() == swollen.keys() == verdicts | {"measured/size"}
    assert float(swollen["all"].mean()) > 0.9
