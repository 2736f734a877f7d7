"""What reads files and arguments, fed with broken ones: each is read, or refused by a PrflError; nothing else.

A valid input is broken in a way that is drawn with a fixed seed: bytes are changed, cut out, doubled or moved, and
what breaks parsers is put in.  What fails here fails again: the input's number is in the message.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save

from prfl import cli
from prfl.config import load_config
from prfl.data.manifest import read_manifest
from prfl.data.prompts import read_prompts
from prfl.data.video import read_video, write_video
from prfl.evaluation.policy_eval import write_results
from prfl.evaluation.report import write_report
from prfl.labels.table import import_table
from prfl.reward.pixel import PixelNetwork, PixelReward
from prfl.runs.score import load_latents
from prfl.training.run_folder import drop_metrics_after
from prfl.utils.errors import PrflError
from prfl.utils.video_size import VideoSize
from tests.evaluation.test_policy_eval import outcome

STRANGE = (
    b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\\ud800", b"nan", b"NaN", b"1e999", b"-1", b"0", b"9" * 26, b"null", b"true",
    b"[]", b"{}", b'""', b'"', b"'", b",", b":", b"\n", b"\r", b"\n\n", b"\t", b"- ", b"&a", b"*a", b"!!python/x",
    b"[" * 3000, b"{" * 3000, b"${stages.", b"%", b"#", b"=", b"~", b"\xe2\x80\xae", b"\x1b[2J", b"a" * 5000, b"../",
    b"/dev/zero",
)  # fmt: skip


def broken(content: bytes, dice: random.Random) -> bytes:
    """One to three changes of it."""
    data = bytearray(content)
    for _ in range(dice.randint(1, 3)):
        start = dice.randrange(len(data) + 1)
        end = min(len(data), start + dice.choice((0, 1, 4, 30)))
        kind = dice.randrange(6)
        if kind < 3:
            data[start:end] = dice.choice(STRANGE)
        elif kind == 3:
            del data[start : dice.choice((end, len(data)))]
        elif kind == 4:
            data[start:start] = data[start:end] * 2
        elif data:
            data[start % len(data)] = dice.randrange(256)
    return bytes(data)


def other_values(tree: dict, dice: random.Random) -> dict:
    """One to three values of a tree of JSON become others, or go."""
    tree = json.loads(json.dumps(tree))
    for _ in range(dice.randint(1, 3)):
        here = tree
        while True:
            key = dice.choice(list(here)) if isinstance(here, dict) else dice.randrange(len(here))
            if isinstance(here[key], dict | list) and here[key] and dice.random() < 0.8:
                here = here[key]
                continue
            if dice.random() < 0.2:
                del here[key]
            else:
                here[key] = dice.choice(
                    (None, -1, 0, 2**70, 1e-300, float("nan"), float("inf"), "x", "", [], {}, [1], True)
                )
            break
        if not tree:
            break
    return tree


def refused(count: int, read: Callable[[random.Random], object]) -> int:
    """How many of ``count`` inputs are refused.  Every one has dice of its own."""
    wrong, number_refused = [], 0
    for number in range(count):
        try:
            read(random.Random(number))
        except PrflError:
            number_refused += 1
        except Exception as error:
            wrong.append(f"input {number}: {type(error).__name__}: {str(error)[:200]}")
    assert not wrong, "\n".join(wrong)
    return number_refused


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


CONFIG = """\
version: 1
run: runs/x
seed: 0
backbone: {model: absent, adapter: {rank: 2, alpha: 2}}
data: {prompts: {train: absent}, cache: cache, frames: 9, height: 16, width: 16, fps: 8}
reward: {space: latent, path: absent, weights: {motion: 1.0}}
rollout: {steps: 5, shift: 3.0}
objective: {name: prfl}
training: {steps: 1, batch: 1, learning_rate: 1.0e-4}
evaluation: {every: 0}
"""


def test_configs(folder: Path) -> None:
    path = folder / "x.yaml"

    def read(dice: random.Random) -> None:
        if dice.random() < 0.5:
            path.write_bytes(broken(CONFIG.encode(), dice))
        else:
            path.write_text(yaml.safe_dump(other_values(yaml.safe_load(CONFIG), dice)))
        load_config(path)

    assert 30 < refused(60, read) < 60


def test_overrides(folder: Path) -> None:
    path = folder / "x.yaml"
    path.write_text(CONFIG)
    given = ("training.steps=10", "reward.weights={motion: 1.0}", "backbone.adapter.targets=[to_q, to_v]", "run=runs/y")

    def read(dice: random.Random) -> None:
        text = broken(dice.choice(given).encode(), dice)
        load_config(path, [text.decode("utf-8", "surrogateescape")])

    assert 10 < refused(30, read) < 30


def test_manifests_and_prompts(folder: Path) -> None:
    write_video(folder / "a.mp4", torch.zeros(3, 5, 16, 16), 8)
    (folder / "b.mp4").write_bytes((folder / "a.mp4").read_bytes())
    rows = [{"video": f"{name}.mp4", "prompt": "a dog runs", "label": {"motion": 0.5}} for name in "ab"]
    pair = {"prompt": "a dog", "a": "a.mp4", "b": "b.mp4", "preference": {"motion": "a"}, "split": "train"}
    manifests = ["".join(json.dumps(row) + "\n" for row in rows), json.dumps(pair) + "\n"]
    prompts = {"p.txt": "a dog runs\na cat\nein Hähnchen\n", "p.jsonl": '{"prompt": "a dog"}\n{"prompt": "a cat"}\n'}

    def read(dice: random.Random) -> None:
        (folder / "m.jsonl").write_bytes(broken(dice.choice(manifests).encode(), dice))
        read_manifest(folder / "m.jsonl")

    def read_list(dice: random.Random) -> None:
        name = dice.choice(list(prompts))
        (folder / name).write_bytes(broken(prompts[name].encode(), dice))
        read_prompts(folder / name)

    assert 15 < refused(40, read) < 40
    assert 5 < refused(30, read_list) < 30


def test_label_tables(folder: Path) -> None:
    for name in "ab":
        write_video(folder / f"{name}.mp4", torch.zeros(3, 5, 16, 16), 8)
    tables = (
        "video,prompt,split,motion,text\na.mp4,a dog,train,1,0.5\nb.mp4,a cat,train,0,1\n",
        'prompt,a,b,motion\n"a dog, running",a.mp4,b.mp4,a\n',
    )

    def read(dice: random.Random) -> None:
        (folder / "x.csv").write_bytes(broken(dice.choice(tables).encode(), dice))
        import_table(folder / "x.csv", folder / "out.jsonl")

    assert 10 < refused(30, read) < 30


def test_saved_rewards(folder: Path) -> None:
    saved = folder / "reward"
    PixelReward(PixelNetwork(16, ["light", "calm"], hidden=8, inner=8)).save_pretrained(saved)
    config, weights = (saved / "config.json").read_bytes(), (saved / "reward.safetensors").read_bytes()

    def read(dice: random.Random) -> None:
        text = (
            broken(config, dice) if dice.random() < 0.3 else json.dumps(other_values(json.loads(config), dice)).encode()
        )
        (saved / "config.json").write_bytes(text)
        (saved / "reward.safetensors").write_bytes(broken(weights, dice) if dice.random() < 0.1 else weights)
        PixelReward.from_pretrained(saved)

    assert 15 < refused(40, read)


def test_safetensors_of_latents(folder: Path) -> None:
    content = save({"latents": torch.zeros(4, 2, 4, 4)})

    def read(dice: random.Random) -> None:
        (folder / "x.safetensors").write_bytes(broken(content[: dice.choice((8, 90, len(content)))], dice))
        load_latents(folder / "x.safetensors")

    assert 10 < refused(25, read)


def test_videos(folder: Path) -> None:
    write_video(folder / "a.mp4", torch.rand(3, 9, 32, 32) * 2 - 1, 8)
    content = (folder / "a.mp4").read_bytes()

    def read(dice: random.Random) -> None:
        at = dice.choice((0, len(content) // 2, len(content) - 700))  # the head, the pictures, the index
        (folder / "b.mp4").write_bytes(content[:at] + broken(content[at : at + 600], dice) + content[at + 600 :])
        read_video(folder / "b.mp4", VideoSize(5, 16, 16, 8.0))

    refused(15, read)


def test_what_a_run_leaves(folder: Path) -> None:
    """A report of it is made all the same, and says what it leaves out."""
    run = folder / "run"
    path = write_results(run / "samples/final", [outcome("base"), outcome("policy", 0.3)], fps=8.0)
    results = json.loads(path.read_text())
    results["rows"], results["videos"] = results["rows"][:4], results["videos"][:1]
    metrics = "".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in range(1, 5))

    def read(dice: random.Random) -> None:
        if dice.random() < 0.3:
            path.write_bytes(broken(json.dumps(results).encode(), dice))
        else:
            path.write_text(json.dumps(other_values(results, dice)))
        (run / "metrics.jsonl").write_bytes(broken(metrics.encode(), dice) if dice.random() < 0.3 else b"")
        assert "</html>" in write_report(run).read_text()

    assert refused(15, read) == 0


def test_metrics_of_a_run_that_goes_on(folder: Path) -> None:
    metrics = "".join(json.dumps({"step": step, "loss": 1 / step, "seconds/step": 1}) + "\n" for step in range(1, 5))

    def read(dice: random.Random) -> None:
        (folder / "metrics.jsonl").write_bytes(broken(metrics.encode(), dice))
        drop_metrics_after(folder / "metrics.jsonl", 3)

    refused(20, read)


WORDS = (
    "train", "eval", "score", "sample", "export", "labels", "import", "doctor", "schema", "cache", "absent.yaml",
    "x.csv", "--resume", "--dry-run", "--head", "--frames", "--fps", "--sigmas", "--out", "--prompt", "--scale",
    "--per-prompt", "--run", "--manifest", "--merged", "--dimensions", "-3", "0", "nan", "1:0", "0:inf", "x=", "=",
    "a=b=c", "", "\0", "~nobody/x", "\ud800", "training.steps=1", "run=~nobody/x", "a" * 300,
)  # fmt: skip


def test_arguments(folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prfl.runs.machine.check_machine", list)
    monkeypatch.setattr("prfl.runs.doctor.check_machine", list)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def read(dice: random.Random) -> None:
        words = [dice.choice(WORDS[:10]), *dice.choices(WORDS, k=dice.randint(0, 4))]
        try:
            assert cli.main(words) in (0, 2), words
        except SystemExit as left:
            assert left.code in (0, 2), words
        except Exception as error:
            raise RuntimeError(f"{words}: {type(error).__name__}: {error}") from error

    refused(40, read)
    assert "Traceback" not in capsys.readouterr().err
