"""What made a result is in it, stays with it and decides where it is used; what is moved is still what it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from prfl import cli
from prfl.backbone import load_backbone
from prfl.backbone.fingerprint import SAMPLED, fingerprint
from prfl.backbone.weights import is_finite
from prfl.data.dataset import load_dataset
from prfl.utils.video_size import VideoSize
from tests.faults.planting import Bench
from tests.faults.project import CLIP
from tests.faults.provenance_faults import ONE, POLICY, TWO, as_of_old
from tests.tiny import tiny_transformer

RUN = Path("runs/sft")


def stamp(path: Path) -> dict:
    with safe_open(path, framework="pt") as opened:
        return json.loads(opened.metadata()["prfl"])


def aside() -> list[str]:
    return sorted(path.name for path in RUN.glob("earlier-*"))


def test_a_policy_carries_what_made_it(bench: Bench) -> None:
    state = json.loads((TWO / "state.json").read_text())
    own = stamp(POLICY)
    assert (own["step"], own["end"], own["run"]) == (2, 2, state["config_hash"])
    assert (own["rank"], own["alpha"]) == (2, 2.0) and own["model"] == bench.model.name
    assert str(bench.folder) not in json.dumps([own, state["identity"]]), "no place is part of what it is"
    assert str(bench.model) not in json.dumps([own, state["identity"]])
    assert cli.main(["export", str(RUN)]) == 0
    there = stamp(RUN / "export/sft.safetensors")
    assert {key: there[key] for key in own if key != "weights"} == {k: v for k, v in own.items() if k != "weights"}


def made_old(bench: Bench) -> None:
    """The last checkpoint as an older version left it, whose clips are told by the cache's entries."""
    clips = load_dataset(load_backbone(bench.model), "manifest.jsonl", "cache", VideoSize(**CLIP))
    as_of_old(TWO, clips.former_fingerprint)


@pytest.mark.parametrize("old", [False, True])
def test_what_was_moved_is_resumed(bench: Bench, old: bool) -> None:
    """Model (renamed too), cache, clips and prompts are elsewhere; the content is what it was."""
    name = "model-of-another-name"
    if old:
        made_old(bench)
        name = bench.model.name  # which the cache's entries depend on
    config = yaml.safe_load(Path("sft.yaml").read_text())
    Path("elsewhere").mkdir()
    for place in ("clips", "manifest.jsonl", "cache", "train.txt", "validation.txt", "test.txt"):
        shutil.move(place, f"elsewhere/{place}")
    config["backbone"]["model"] = str(shutil.copytree(bench.model, Path("elsewhere", name)))
    config["data"] |= {"cache": "elsewhere/cache", "manifest": "elsewhere/manifest.jsonl"}
    config["data"]["prompts"] = {name: f"elsewhere/{name}.txt" for name in ("train", "validation", "test")}
    config["training"]["steps"] = 3
    Path("moved.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["train", "moved.yaml"]) == 0, bench.capsys.readouterr().err
    assert stamp(POLICY)["step"] == 3 and len(aside()) == 1


def test_a_finished_run_that_is_started_again_keeps_its_results(bench: Bench) -> None:
    before = POLICY.read_bytes()
    assert cli.main(["train", "sft.yaml"]) == 0
    assert POLICY.read_bytes() == before and not aside()
    made_old(bench)  # and by this version, where an older one finished it
    state = json.loads((TWO / "state.json").read_text())
    (TWO / "state.json").write_text(json.dumps(state | {"config_hash": "of an older identity"}))
    assert cli.main(["train", "sft.yaml"]) == 0 and cli.main(["export", str(RUN)]) == 0
    assert stamp(POLICY)["run"] == "of an older identity" and not aside()


def test_all_of_an_earlier_run_is_put_aside_when_another_begins(bench: Bench) -> None:
    page = RUN / "samples/label-0/label.html"
    page.parent.mkdir(parents=True)
    page.write_text("somebody's work")
    old = {name: (RUN / name).read_bytes() for name in ("policy.safetensors", "metrics.jsonl", "config.yaml")}
    shutil.rmtree(RUN / "checkpoints")
    bench.capsys.readouterr()
    assert cli.main(["train", "sft.yaml", "seed=5", "training.steps=1"]) == 0
    (name,) = aside()
    assert name.startswith("earlier-000002-") and f"put aside: runs/sft/{name}" in bench.capsys.readouterr().out
    assert {key: (RUN / name / key).read_bytes() for key in old} == old
    assert page.is_file() and stamp(POLICY)["step"] == 1
    assert cli.main(["sample", "sft.yaml", f"run={RUN / name}"]) == 0, "and is a run's folder still"


def test_a_new_start_puts_aside_what_lies_there(bench: Bench) -> None:
    """--resume none, of a finished run and of one that was stopped; both are runs' folders still."""
    old = (TWO / "weights.safetensors").read_bytes()
    assert cli.main(["train", "sft.yaml", "--resume", "none"]) == 0
    (name,) = aside()
    assert name.startswith("earlier-000002-") and f"put aside: runs/sft/{name}" in bench.capsys.readouterr().out
    assert (RUN / name / "checkpoints/step-000002/weights.safetensors").read_bytes() == old
    assert (TWO / "weights.safetensors").read_bytes() == old, "the same run again, from its start"

    POLICY.unlink()  # as a run that was stopped after its checkpoint
    assert cli.main(["train", "sft.yaml", "--resume", "none", "training.steps=1"]) == 0
    assert "earlier-000002-unknown" in aside() and [path.name for path in TWO.parent.iterdir()] == ["step-000001"]
    assert cli.main(["train", "sft.yaml", f"run={RUN}/earlier-000002-unknown"]) == 0, "and goes on"


def test_a_damaged_checkpoint_of_right_size_is_put_aside_too(bench: Bench) -> None:
    whole = (TWO / "weights.safetensors").read_bytes()
    (TWO / "weights.safetensors").write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    assert cli.main(["train", "sft.yaml"]) == 0
    assert (TWO / "weights.safetensors").read_bytes() == whole, "the step is trained again from the one before"
    assert (TWO.parent / "damaged-step-000002").is_dir() and ONE.is_dir()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would have gone to the hub, as text."""
    files: list[str] = []

    def push(self: object, repo: str, **_: object) -> str:
        target = Path("uploaded")
        target.mkdir()
        self._save_pretrained(target)  # type: ignore[attr-defined]
        files.extend(str(path.relative_to(target)) for path in sorted(target.rglob("*")) if path.is_file())
        return repo

    monkeypatch.setattr("prfl.export.hub.Exported.push_to_hub", push)
    return files


def test_only_what_this_export_wrote_is_uploaded(bench: Bench, sent: list[str]) -> None:
    assert cli.main(["export", str(RUN), "--merged", "--name", "old"]) == 0
    bench.capsys.readouterr()
    assert cli.main(["export", str(RUN), "--push", "me/tiny"]) == 0
    assert sent == ["README.md", "sft.safetensors"]
    assert "not of this export: old.safetensors, transformer" in bench.capsys.readouterr().out
    assert (RUN / "export/old.safetensors").is_file(), "what is there stays"
    config = json.loads((RUN / "export/transformer/config.json").read_text())
    assert "_name_or_path" not in config and config["_class_name"] == "WanTransformer3DModel"
    out = bench.folder / "out"
    assert cli.main(["export", str(RUN), "--merged", "--out", str(out)]) == 0
    texts = "".join(path.read_text() for path in out.rglob("*") if path.suffix in (".json", ".md"))
    assert str(bench.folder) not in texts and str(bench.model) not in texts


def test_another_base_of_the_same_shapes_has_another_fingerprint() -> None:
    """Fine-tuned by little, in one layer of one block: no step of a training leaves the fingerprint as it was."""
    torch.manual_seed(0)
    base = tiny_transformer()
    before = fingerprint(base, most=SAMPLED)
    assert before == fingerprint(base.to(torch.bfloat16), most=SAMPLED)
    base = base.float()
    with torch.no_grad():
        weight = base.blocks[1].attn1.to_k.weight
        weight += 1e-3 * weight.abs().mean() * torch.randn_like(weight)
    assert fingerprint(base, most=SAMPLED) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_finite_is_told(dtype: torch.dtype) -> None:
    tensor = torch.linspace(-1, 1, 7).to(dtype)
    assert is_finite(tensor) and is_finite(tensor[:0]) and is_finite(torch.tensor([1, 2]))
    for value in (float("nan"), float("inf"), float("-inf")):
        for place in (0, 3, 6):
            bad = tensor.clone()
            bad[place] = value
            assert not is_finite(bad)


def test_full_weights_carry_what_made_them(bench: Bench, make_tiny_pipeline: Callable[..., Path]) -> None:
    full = ["run=runs/full", "backbone.train=full", "backbone.adapter=null", "training.learning_rate=1e-5"]
    assert cli.main(["train", "sft.yaml", *full, "training.steps=1"]) == 0
    folder = Path("runs/full/transformer")
    own = json.loads((folder / "prfl.json").read_text())
    assert own["step"] == 1 and set(own["files"]) == {path.name for path in folder.iterdir()} - {"prfl.json"}
    assert "_name_or_path" not in json.loads((folder / "config.json").read_text())
    assert cli.main(["sample", "sft.yaml", *full]) == 0
    assert cli.main(["export", "runs/full"]) == 0
    there = json.loads(Path("runs/full/export/transformer/prfl.json").read_text())
    assert there == own
    assert load_file(folder / "diffusion_pytorch_model.safetensors").keys()
