"""Images as conditions: asks in prompt files, the first frame of each clip, and what the cache finds them by."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from prfl.backbone import Ask, load_backbone
from prfl.backbone.first_frame import FRAME
from prfl.backbone.wan.image_to_video import TOKENS, WanImageBackbone
from prfl.config import load_config
from prfl.config.schema import Config
from prfl.data.cache import LatentCache, source_of
from prfl.data.dataset import PairDataset, load_dataset
from prfl.data.encoding import build_cache
from prfl.data.examples import draw_examples, examples
from prfl.data.manifest import PreferencePair, write_manifest
from prfl.data.prompts import read_prompts
from prfl.data.video import read_video, write_video
from prfl.factory.data import encode_prompts
from prfl.factory.prompts import check_prompts, load_prompts
from prfl.factory.resume_identity import input_contents
from prfl.objective.sft import drop_prompts
from prfl.utils import rng
from prfl.utils.errors import PrflError
from prfl.utils.pictures import read_picture, write_picture
from tests.wan_image import CLIP, first_frames, save_tiny_wan_image

PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_wan_image(tmp_path_factory.mktemp("models") / "tiny-i2v")


@pytest.fixture
def model(folder: Path) -> WanImageBackbone:
    return load_backbone(folder)


# ------------------------------------------------------------------------------------------------- prompt files


def write_prompts(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_prompts_name_their_first_frames(tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "p.jsonl", [{"prompt": "a cat", "image": "images/a.png"}, {"prompt": "a dog"}])
    first, second = read_prompts(path)
    assert isinstance(first, Ask) and (first.prompt, first.image) == ("a cat", tmp_path / "images/a.png")
    assert second == "a dog" and not isinstance(second, Ask)


def test_a_prompt_counts_once_whatever_its_image(tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "p.jsonl", [{"prompt": "a cat", "image": f"{name}.png"} for name in "ab"])
    with pytest.raises(PrflError, match=r"p\.jsonl:2: the prompt 'a cat' stands already.*\n.*whatever its image"):
        read_prompts(path)


def config_of(folder: Path, tmp_path: Path, rows: list[dict]) -> Config:
    config = {
        "version": 1, "run": str(tmp_path / "run"), "seed": 0,
        "backbone": {"model": str(folder), "device": "cpu", "adapter": {"rank": 2, "alpha": 2}},
        "data": {
            "prompts": {"train": str(write_prompts(tmp_path / "p.jsonl", rows))}, "cache": str(tmp_path / "cache"),
            "frames": 9, "height": 16, "width": 16, "fps": 8,
        },
        "reward": {"space": "latent", "path": "absent"}, "rollout": {"steps": 2}, "objective": {"name": "prfl"},
        "training": {"steps": 2, "batch": 2, "learning_rate": 1e-3}, "evaluation": {"every": 0},
    }  # fmt: skip
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(config))
    return load_config(tmp_path / "x.yaml", [])


def with_pictures(tmp_path: Path) -> list[dict]:
    return [{"prompt": ask.prompt, "image": str(ask.image)} for ask in first_frames(tmp_path / "pictures", PROMPTS)]


def test_prompts_get_the_size_of_the_runs_clips(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, tmp_path, with_pictures(tmp_path))
    asks = load_prompts(config.data)["train"]
    assert [ask.clip for ask in asks] == [CLIP, CLIP]


def test_models_and_prompts_that_do_not_fit(
    folder: Path, model: WanImageBackbone, tiny_backbone, tmp_path: Path
) -> None:
    rows = with_pictures(tmp_path)
    check_prompts(config_of(folder, tmp_path, rows), model)
    with pytest.raises(PrflError, match=r"data\.prompts\.train: .*takes no first frame"):
        check_prompts(config_of(folder, tmp_path, rows), tiny_backbone)
    with pytest.raises(
        PrflError, match=r"data\.prompts\.train: .*needs a first frame, and the prompt 'a dog' has none"
    ):
        check_prompts(config_of(folder, tmp_path, [*rows, {"prompt": "a dog"}]), model)
    with pytest.raises(PrflError, match=r"data\.prompts\.train: 1 first frames are not there.*absent\.png"):
        check_prompts(config_of(folder, tmp_path, [*rows, {"prompt": "a dog", "image": "absent.png"}]), model)


def test_a_resumed_run_notices_another_picture(folder: Path, model: WanImageBackbone, tmp_path: Path) -> None:
    config, key = config_of(folder, tmp_path, with_pictures(tmp_path)), "data.prompts.train (content)"
    config = config.model_copy(update={"reward": None})
    before = input_contents(config, model, None)[key]
    assert input_contents(config, model, None)[key] == before
    write_picture(tmp_path / "pictures/first-1.png", torch.zeros(3, 16, 16))
    assert input_contents(config, model, None)[key] != before


def test_prompts_are_encoded_once_with_their_frames(folder: Path, model: WanImageBackbone, tmp_path: Path) -> None:
    config = config_of(folder, tmp_path, with_pictures(tmp_path))
    asks = load_prompts(config.data)["train"]
    assert encode_prompts(config, model, asks, iter) == 4, "each prompt, and its first frame without one"
    again = load_backbone(folder)
    again.text._load = again.text._load_image = None  # type: ignore[assignment] # neither encoder is needed
    assert encode_prompts(config, again, asks, iter) == 0
    condition = again.condition([asks[1], asks[1].unconditional])
    fresh = load_backbone(folder).condition([asks[1]])
    assert condition.asks == (asks[1], asks[1].unconditional)
    for name, tensor in fresh.tensors.items():
        torch.testing.assert_close(condition.tensors[name][:1], tensor)


# ------------------------------------------------------------------------------------------------- the cache


def test_the_key_holds_image_size_and_fps(model: WanImageBackbone, tmp_path: Path) -> None:
    (ask,) = first_frames(tmp_path, PROMPTS[:1])
    cache = LatentCache.for_backbone(model, tmp_path / "cache", CLIP)
    changes = {"fps": 16, "frames": 5, "height": 32, "width": 32}
    others = [Ask(ask.prompt, ask.image, replace(CLIP, **{name: value})) for name, value in changes.items()]
    names = {cache.prompt_file(each) for each in (ask, ask.unconditional, Ask(ask.prompt), *others)}
    assert len(names) == 7
    copy = tmp_path / "copy.png"
    copy.write_bytes(ask.image.read_bytes())
    assert source_of(Ask(ask.prompt, copy, CLIP)) == source_of(ask), "a file may be renamed"
    write_picture(ask.image, torch.zeros(3, 16, 16))
    assert cache.prompt_file(ask) not in names
    with pytest.raises(PrflError, match=r"absent\.png"):
        source_of(Ask("a", tmp_path / "absent.png", CLIP))


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Two pairs, of videos with first frames of their own."""
    rows = []
    for prompt in PROMPTS:
        paths = [Path(f"clips/{prompt.replace(' ', '-')}-{index}.mp4") for index in range(2)]
        for index, path in enumerate(paths):
            noise = rng.normal((3, 9, 16, 16), 0, prompt, 0, [index])[0]
            write_video(tmp_path / path, (0.3 * noise).clamp(-1, 1), 8)
        rows.append(PreferencePair(prompt, *(tmp_path / path for path in paths), {"light": "a"}, "train"))
    path = tmp_path / "manifest.jsonl"
    write_manifest(path, rows)
    return path


def test_each_clip_of_a_pair_has_its_own_first_frame(
    model: WanImageBackbone, folder: Path, manifest: Path, tmp_path: Path
) -> None:
    report = build_cache(model, manifest, tmp_path / "cache", CLIP, progress=False)
    assert (report.encoded, report.prompts) == (4, 8)
    data = load_dataset(model, manifest, tmp_path / "cache", CLIP)
    assert isinstance(data, PairDataset)
    drawn = draw_examples(data, examples(data, "bradley_terry", ["light"]), 0, [0, 1])
    rows = torch.cat([data.a, data.b]).tolist()
    videos = [tmp_path / f"clips/{prompt.replace(' ', '-')}-{side}.mp4" for side in range(2) for prompt in PROMPTS]
    frame_of = dict(zip(rows, videos, strict=True))
    for number, row in enumerate(drawn.rows):
        ask = drawn.condition.asks[number]
        first = read_video(frame_of[row], CLIP)[:, 0]
        assert torch.equal(read_picture(ask.image), first) and ask.prompt == drawn.prompts[number % 2]
        alone = load_backbone(folder).condition([ask])
        for name in (FRAME, TOKENS):
            torch.testing.assert_close(drawn.condition.tensors[name][number], alone.tensors[name][0])

    # Without its prompt a clip keeps its frame.
    dropped = drop_prompts(drawn.condition, data.unconditional(drawn.condition), [True, False, True, False])
    assert [ask.prompt == "" for ask in dropped.asks] == [True, False, True, False]
    assert torch.equal(dropped.tensors[FRAME], drawn.condition.tensors[FRAME])


def test_a_frame_that_was_removed_is_made_again(model: WanImageBackbone, manifest: Path, tmp_path: Path) -> None:
    build_cache(model, manifest, tmp_path / "cache", CLIP, progress=False)
    frames = sorted((tmp_path / "cache/frames").iterdir())
    frames[0].unlink()
    report = build_cache(model, manifest, tmp_path / "cache", CLIP, progress=False)
    assert (report.encoded, report.prompts) == (1, 0) and sorted((tmp_path / "cache/frames").iterdir()) == frames
