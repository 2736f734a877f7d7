from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from prfl.data import cache as cache_module
from prfl.data.cache import LatentCache
from prfl.data.dataset import LatentDataset, PairDataset, load_dataset
from prfl.data.encoding import build_cache
from prfl.data.manifest import LabelledVideo, PreferencePair, write_manifest
from prfl.data.video import read_video, write_video
from prfl.utils import decoding
from prfl.utils.errors import PrflError
from prfl.utils.video_size import VideoSize

CLIP = dict(frames=5, height=16, width=16, fps=8.0)


def clip(seed: int) -> torch.Tensor:
    """Smooth noise (3, 5, 16, 16): another one for each seed."""
    coarse = torch.rand(1, 3, 5, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (5, 16, 16), mode="trilinear")[0]


@pytest.fixture
def manifest(tmp_path) -> Path:
    """Five videos of two prompts, in three formats; the last two files have the same bytes."""
    rows = []
    for index, suffix in enumerate(["mp4", "webm", "gif", "mp4", "mp4"]):
        path = tmp_path / "set" / f"{index}.{suffix}"
        write_video(path, clip(min(index, 3)), 8)
        prompt, split = ("a red circle", "train") if index < 3 else ("a blue square", "test")
        label = {"motion": float(index % 2)} | ({"text": 0.5} if index == 1 else {})
        rows.append(LabelledVideo(path, prompt, label, split))
    write_manifest(tmp_path / "set" / "m.jsonl", rows)
    return tmp_path / "set" / "m.jsonl"


@pytest.fixture
def counted(tiny_backbone, monkeypatch):
    """The backbone, and the batch sizes that its VAE was called with."""
    calls: list[int] = []
    encode = tiny_backbone.encode
    monkeypatch.setattr(tiny_backbone, "encode", lambda pixels: (calls.append(len(pixels)), encode(pixels))[1])
    return tiny_backbone, calls


def build(backbone, manifest, **changes):
    size = VideoSize(**{name: changes.pop(name, value) for name, value in CLIP.items()})
    settings = {"batch_size": 2, "progress": False, **changes}
    return build_cache(backbone, manifest, manifest.parent.parent / "cache", size, **settings)


def load(backbone, manifest, **changes):
    size = VideoSize(**{name: changes.pop(name, value) for name, value in CLIP.items()})
    return load_dataset(backbone, manifest, manifest.parent.parent / "cache", size, **changes)


def test_latents_and_conditions_are_the_backbones_own(counted, manifest):
    backbone, calls = counted
    report = build(backbone, manifest)
    assert (report.encoded, report.reused, report.failed, report.prompts) == (4, 1, (), 3)  # equal bytes: once
    assert calls == [2, 2]
    data = load(backbone, manifest)
    assert isinstance(data, LatentDataset) and len(data) == 5
    batch = data.get([4, 0, 2])
    expected = torch.stack(
        [read_video(manifest.parent / name, VideoSize(**CLIP)) for name in ("4.mp4", "0.mp4", "2.gif")]
    )
    torch.testing.assert_close(batch.latents, backbone.encode(expected), atol=1e-5, rtol=1e-5)
    assert batch.prompts == ["a blue square", "a red circle", "a red circle"]
    condition = backbone.condition(batch.prompts)
    torch.testing.assert_close(
        batch.condition.tensors["prompt_embeds"], condition.tensors["prompt_embeds"], atol=1e-5, rtol=1e-5
    )
    assert batch.condition.tensors["lengths"].tolist() == condition.tensors["lengths"].tolist()
    torch.testing.assert_close(
        data.conditions[""].tensors["prompt_embeds"], backbone.condition([""]).tensors["prompt_embeds"]
    )
    assert batch.labels["motion"].tolist() == [0, 0, 0]
    assert torch.isnan(batch.labels["text"]).all() and data.get([1]).labels["text"].tolist() == [0.5]
    assert torch.equal(data.latents[3], data.latents[4])


def test_a_second_run_does_nothing_and_renamed_files_are_found(counted, manifest):
    backbone, calls = counted
    build(backbone, manifest)
    before = load(backbone, manifest).latents
    os.rename(manifest.parent / "0.mp4", manifest.parent / "renamed.mp4")
    manifest.write_text(manifest.read_text().replace("0.mp4", "renamed.mp4"))
    calls.clear()
    report = build(backbone, manifest)
    assert (report.encoded, report.reused, report.prompts, calls) == (0, 5, 0, [])
    assert torch.equal(load(backbone, manifest).latents, before)


def test_it_goes_on_where_it_was_stopped(counted, manifest, monkeypatch):
    """Stopped in the middle of the second batch's writing: what is there is whole, the rest is made by the next run."""
    backbone, calls = counted
    write, written = cache_module.write_entry, []

    def stopping(file, *others):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(file)
        write(file, *others)

    monkeypatch.setattr(cache_module, "write_entry", stopping)
    with pytest.raises(KeyboardInterrupt):
        build(backbone, manifest)
    monkeypatch.setattr(cache_module, "write_entry", write)
    calls.clear()
    report = build(backbone, manifest)
    assert (report.encoded, report.reused, calls) == (1, 4, [1])
    assert len(load(backbone, manifest)) == 5


@pytest.mark.parametrize("stop", [0.0, 0.5, 0.999])
def test_half_written_entries_do_not_exist(counted, manifest, monkeypatch, stop):
    backbone, _ = counted
    write_bytes = Path.write_bytes

    def partly(path, data):
        write_bytes(path, data[: int(len(data) * stop)])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", partly)
    with pytest.raises(PrflError, match="No space left"):
        build(backbone, manifest)
    monkeypatch.undo()
    assert [p for p in (manifest.parent.parent / "cache").rglob("*") if p.is_file()] == []


def test_a_damaged_entry_is_refused_and_then_made_again(counted, manifest):
    backbone, calls = counted
    build(backbone, manifest)
    entry = sorted((manifest.parent.parent / "cache" / "latents").iterdir())[0]
    good = entry.read_bytes()
    lying = (10**15).to_bytes(8, "little") + good[8:]
    for bad in (good[:-1], good[:4], b"", lying):
        entry.write_bytes(bad)
        with pytest.raises(PrflError, match="is damaged"):
            load(backbone, manifest)
        calls.clear()
        assert build(backbone, manifest).encoded == 1 and calls == [1]
        load(backbone, manifest)
        assert entry.with_suffix(".damaged").read_bytes() == bad and load_file(entry).keys() == {"latents"}


def test_entries_of_before_there_were_hashes_are_taken_by_what_they_say(counted, manifest, capsys):
    backbone, calls = counted
    build(backbone, manifest)
    before = load(backbone, manifest).latents
    entries = sorted((manifest.parent.parent / "cache").rglob("*.safetensors"))
    for entry in entries:
        with safe_open(entry, framework="pt") as opened:
            notes = opened.metadata()
        save_file(load_file(entry), entry, metadata={k: notes[k] for k in notes.keys() & {"video", "clip", "prompt"}})
    calls.clear()
    capsys.readouterr()
    report = build(backbone, manifest)
    assert (report.encoded, report.reused, report.prompts, calls) == (0, 5, 0, [])
    output = capsys.readouterr().out
    assert "4 entries are of an earlier version" in output and "3 entries are of an earlier version" in output
    assert torch.equal(load(backbone, manifest).latents, before)
    latents = next(entry for entry in entries if entry.parent.name == "latents")
    other = json.dumps({**CLIP, "fps": 4.0, "window": "start"})
    save_file(load_file(latents), latents, metadata={"video": "0.mp4", "clip": other})
    assert build(backbone, manifest).encoded == 1
    assert "it is of another clip" in capsys.readouterr().out


CHANGES = ["content", "size", "fps", "window", "model", "statistics", "vae dtype"]


@pytest.mark.parametrize("change", CHANGES)
def test_a_stale_entry_cannot_be_used(tiny_backbone, manifest, monkeypatch, change):
    build(tiny_backbone, manifest)
    load(tiny_backbone, manifest)
    settings = {}
    if change == "content":
        write_video(manifest.parent / "0.mp4", clip(9), 8)
    elif change == "size":
        settings = {"height": 24}
    elif change == "fps":
        settings = {"fps": 10.0}
    elif change == "window":
        settings = {"window": "centre"}
    elif change == "vae dtype":
        tiny_backbone.facts = replace(tiny_backbone.facts, vae_dtype=torch.bfloat16)
    else:
        key = {"model": "model_id", "statistics": "latents_mean"}[change]
        other = {**tiny_backbone.facts.identity, key: "other"}
        tiny_backbone.facts = replace(tiny_backbone.facts, identity=other)
    with pytest.raises(PrflError, match="not in the cache for this model, size and rate"):
        load(tiny_backbone, manifest, **settings)


def test_a_new_prompt_is_not_in_the_cache(tiny_backbone, manifest):
    build(tiny_backbone, manifest)
    manifest.write_text(manifest.read_text().replace("blue square", "green square"))
    with pytest.raises(PrflError, match="'a green square' is not in the cache"):
        load(tiny_backbone, manifest)
    assert build(tiny_backbone, manifest).prompts == 1
    load(tiny_backbone, manifest)


def test_every_unreadable_file_is_listed_with_its_reason(counted, manifest):
    backbone, _ = counted
    (manifest.parent / "0.mp4").write_bytes(b"")
    write_video(manifest.parent / "2.gif", clip(2)[:, :3], 8)
    with pytest.raises(PrflError) as caught:
        build(backbone, manifest)
    text = str(caught.value)
    assert "2 videos encoded" in text and "2 unreadable" in text
    assert "0.mp4: cannot be decoded" in text and "2.gif: is too short" in text and "skip_unreadable" in text
    report = build(backbone, manifest, skip_unreadable=True)
    assert [path.name for path, _ in report.failed] == ["0.mp4", "2.gif"] and report.encoded == 0
    with pytest.raises(PrflError, match="2 videos are unreadable"):
        load(backbone, manifest)
    data = load(backbone, manifest, skip_unreadable=True)
    assert len(data) == 3 and [path.name for path, _ in data.skipped] == ["0.mp4", "2.gif"]
    write_video(manifest.parent / "0.mp4", clip(0), 8)  # mended: its key is new
    with pytest.raises(PrflError, match="not in the cache"):
        load(backbone, manifest, skip_unreadable=True)
    assert build(backbone, manifest, skip_unreadable=True).encoded == 1
    assert len(load(backbone, manifest, skip_unreadable=True)) == 4


def test_two_unreadable_files_with_the_same_bytes_are_both_listed(counted, manifest):
    backbone, _ = counted
    for name in ("0.mp4", "1.webm"):
        (manifest.parent / name).write_bytes(b"the same")
    report = build(backbone, manifest, skip_unreadable=True)
    assert sorted(path.name for path, _ in report.failed) == ["0.mp4", "1.webm"]
    assert (report.encoded, report.reused) == (2, 1), "two of the other three are one video"


REFUSED = "cannot be read: Permission denied (let this user read it (chmod, chown), or name another file)"


def test_a_file_that_may_not_be_read_is_listed_too(counted, manifest, monkeypatch):
    backbone, _ = counted
    real = decoding.picture_hash

    def refusing(path):
        if path.name == "0.mp4":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(decoding, "picture_hash", refusing)
    report = build(backbone, manifest, skip_unreadable=True)
    assert [(path.name, reason) for path, reason in report.failed] == [("0.mp4", REFUSED)]
    assert report.encoded == 3 and len(load(backbone, manifest, skip_unreadable=True)) == 4


def test_a_size_that_the_model_cannot_take_is_refused_first(counted, manifest):
    backbone, calls = counted
    with pytest.raises(PrflError, match="frames"):
        build(backbone, manifest, frames=6)
    assert calls == []


def test_latents_that_are_not_finite_are_never_stored(tiny_backbone, manifest, monkeypatch):
    encode = tiny_backbone.encode
    monkeypatch.setattr(tiny_backbone, "encode", lambda pixels: encode(pixels) * float("nan"))
    with pytest.raises(PrflError, match="not finite"):
        build(tiny_backbone, manifest)
    assert not list((manifest.parent.parent / "cache").rglob("*.safetensors"))


def test_lines_off_a_terminal(tiny_backbone, manifest, capsys):
    build(tiny_backbone, manifest, progress=True)
    printed = capsys.readouterr().out
    assert "caching videos: 4 of 4" in printed and "caching prompts: 3 of 3" in printed and "\r" not in printed


def test_entries_say_what_they_are(tiny_backbone, manifest):
    build(tiny_backbone, manifest)
    cache = LatentCache.for_backbone(tiny_backbone, manifest.parent.parent / "cache", VideoSize(**CLIP))
    with safe_open(cache.latents_file(manifest.parent / "0.mp4"), framework="pt") as entry:
        assert entry.metadata()["video"] == "0.mp4" and '"fps": 8.0' in entry.metadata()["clip"]
    with safe_open(cache.prompt_file("a red circle"), framework="pt") as entry:
        assert entry.metadata()["prompt"] == "a red circle"


def test_a_pair_manifest_loads_as_pairs(tiny_backbone, manifest):
    videos = [manifest.parent / name for name in ("0.mp4", "1.webm", "2.gif", "3.mp4", "5.gif")]
    write_video(videos[4], clip(7), 8)
    rows = [
        PreferencePair("a red circle", videos[0], videos[1], {"motion": "a"}, "train"),
        PreferencePair("a red circle", videos[2], videos[0], {"motion": "b", "text": "tie"}, "train"),
        PreferencePair("a blue square", videos[3], videos[4], {"text": "a"}, "test"),
    ]
    write_manifest(manifest, rows)
    assert build(tiny_backbone, manifest).encoded == 5
    single = {path: tiny_backbone.encode(read_video(path, VideoSize(**CLIP))[None])[0] for path in videos}
    data = load(tiny_backbone, manifest)
    assert isinstance(data, PairDataset) and len(data) == 3
    for side, chosen in ((data.a, (0, 2, 3)), (data.b, (1, 0, 4))):
        expected = torch.stack([single[videos[which]] for which in chosen])
        torch.testing.assert_close(data.latents[side], expected, atol=1e-5, rtol=0)
    assert data.prompts == ["a red circle", "a red circle", "a blue square"]
    assert len(data.condition(data.prompts, data.a.tolist())) == 3
    nan = float("nan")
    torch.testing.assert_close(data.preference["motion"], torch.tensor([1.0, 0.0, nan]), equal_nan=True)
    torch.testing.assert_close(data.preference["text"], torch.tensor([nan, 0.5, 1.0]), equal_nan=True)
    assert len(load(tiny_backbone, manifest, split="test")) == 1


def test_splits(tiny_backbone, manifest):
    build(tiny_backbone, manifest)
    assert load(tiny_backbone, manifest, split="train").prompts == ["a red circle"] * 3
    assert load(tiny_backbone, manifest, split="test").prompts == ["a blue square"] * 2
    with pytest.raises(PrflError, match="no row has split 'validation'"):
        load(tiny_backbone, manifest, split="validation")
