"""The config's generator of labelled samples, as build makes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from prfl.backbone import Backbone
from prfl.config import load_config
from prfl.config.schema import Config
from prfl.data.manifest import LabelledVideo, read_manifest, write_manifest
from prfl.estimate.missing_inputs import missing_inputs
from prfl.factory import clips as clips_factory
from prfl.factory.backbone import build_backbone
from prfl.factory.clips import build_manifest
from prfl.factory.evaluation import sampling_settings
from prfl.factory.policy import finished_run_config, load_policy, save_policy
from prfl.rollout.sampling import sample
from prfl.utils.errors import PrflError
from tests.objective.parts import stir
from tests.tiny import save_tiny_pipeline

REWARD = Path(__file__).parents[2] / "configs/tiny/reward.yaml"


def test_samples_of_several_guidance_scales_are_one_manifest(
    tmp_path: Path, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    generator = {"name": "shapes_samples", "per_prompt": 2, "steps": 1, "guidance": [1.0, 2.0]}
    raw = yaml.safe_load(REWARD.read_text())
    Path("reward.yaml").write_text(yaml.safe_dump({**raw, "data": {**raw["data"], "generator": generator}}))
    drawn = []

    def few(folder: Path, known: dict, counts: dict, draw: Callable, *rest: object) -> Path:
        draw(["a red circle"], [0])
        (folder / "videos").mkdir(parents=True)
        (folder / "videos/0.mp4").touch()
        write_manifest(folder / "manifest.jsonl", [LabelledVideo(folder / "videos/0.mp4", "a red circle", {}, "train")])
        return folder / "manifest.jsonl"

    monkeypatch.setattr(clips_factory.shapes, "labelled", few)
    monkeypatch.setattr(clips_factory, "decode_all", lambda *_: torch.zeros(1))
    monkeypatch.setattr(
        clips_factory, "sample", lambda *given, **_: drawn.append(given[3].guidance_scale) or torch.zeros(1)
    )
    path = build_manifest(load_config("reward.yaml"), tiny_backbone, iter)
    folders = {row.video.parents[1].name for row in read_manifest(path) if isinstance(row, LabelledVideo)}
    assert drawn == [1.0, 2.0] and len(folders) == 2
    assert {name.partition("guidance")[2].partition("-")[0] for name in folders} == {"1", "2"}


@pytest.fixture
def policy_run(tmp_path: Path, tiny_pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Config]:
    """Writes runs/policy, whose trained adapter depends on a number; returns its config."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red circle moves left\n")
    backbone = {"model": str(tiny_pipeline_folder), "device": "cpu", "adapter": {"rank": 2, "alpha": 4}}
    size = {"cache": "cache", "frames": 5, "height": 16, "width": 16, "fps": 8, "prompts": {"train": "prompts.txt"}}
    raw = {
        "version": 1, "seed": 0, "run": "elsewhere", "backbone": backbone, "data": {**size, "manifest": "absent"},
        "rollout": {"steps": 2}, "objective": {"name": "sft"}, "evaluation": {"every": 0},
        "training": {"steps": 1, "batch": 1, "learning_rate": 1e-4},
    }  # fmt: skip
    Path("runs/policy").mkdir(parents=True)
    Path("runs/policy/config.yaml").write_text(yaml.safe_dump(raw))
    head = {"space": "latent", "head": {"dimensions": ["a"], "blocks": [0]}}
    generator = {"name": "shapes_samples", "per_prompt": 2, "steps": 2}
    reward = {**raw, "backbone": {**backbone, "adapter": None}, "data": {**size, "generator": generator}}
    reward |= {"run": "runs/reward", "reward": head, "objective": {"name": "preference", "loss": "bce"}}
    Path("reward.yaml").write_text(yaml.safe_dump(reward))

    def write(seed: int) -> Config:
        config = finished_run_config(Path("runs/policy"))
        model = build_backbone(config)
        stir(model, "policy", seed)
        save_policy(config.run, model, config)
        return config

    return write


def draws(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.Tensor]]:
    """(folder, latents) of each set that is drawn from now on."""
    drawn: list[tuple[str, torch.Tensor]] = []
    prompt = "a red circle moves left"

    def few(folder: Path, known: dict, counts: dict, draw: Callable, *rest: object) -> Path:
        drawn.append((folder.name, draw([prompt], [0])))
        (folder / "videos").mkdir(parents=True, exist_ok=True)
        (folder / "videos/0.mp4").touch()
        write_manifest(folder / "manifest.jsonl", [LabelledVideo(folder / "videos/0.mp4", prompt, {}, "train")])
        return folder / "manifest.jsonl"

    monkeypatch.setattr(clips_factory.shapes, "labelled", few)
    monkeypatch.setattr(clips_factory, "decode_all", lambda model, latents, batch: latents)
    return drawn


def test_base_and_policy_draw_one_training_set(
    policy_run: Callable[[int], Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = policy_run(1)
    drawn = draws(monkeypatch)
    both = load_config("reward.yaml", ["data.generator.policies=[null, runs/policy]"])
    model = build_backbone(both)
    before = {name: value.clone() for name, value in model.transformer.state_dict().items()}
    rows = read_manifest(build_manifest(both, model, iter))
    assert len(rows) == 2 and len({row.video.parents[1] for row in rows}) == 2  # type: ignore[union-attr]
    after = model.transformer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    # The same noise; the policy's are those that its own config draws.
    own = build_backbone(trained)
    load_policy(trained, own)
    settings = replace(sampling_settings(both), steps=2)
    given = ["a red circle moves left"], [0], settings
    expected = [sample(own, *given, adapter=adapter) for adapter in (None, "policy")]
    (base, ours), (policy, theirs) = drawn
    assert torch.equal(ours, expected[0]) and torch.equal(theirs, expected[1]) and not torch.equal(ours, theirs)

    # The base's set is that of a config without policies; a policy that was trained again draws another one.
    build_manifest(load_config("reward.yaml"), model, iter)
    policy_run(2)
    again = read_manifest(build_manifest(both, model, iter))
    assert [name for name, _ in drawn[2:4]] == [base, base] and drawn[4][0] not in (base, policy)
    assert {row.video for row in again} != {row.video for row in rows}  # type: ignore[union-attr]
    assert not torch.equal(drawn[4][1], theirs)


def test_policies_that_cannot_draw(
    policy_run: Callable[[int], Config], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = load_config("reward.yaml", ["data.generator.policies=[null, runs/policy]"])
    absent = load_config("reward.yaml", ["data.generator.policies=[runs/absent]"])
    (line,) = missing_inputs(absent)
    assert line.startswith("data.generator.policies: there is no finished run in runs/absent")
    assert not missing_inputs(absent, filled=[Path("runs/absent")])
    model = build_backbone(config)
    draws(monkeypatch)
    with pytest.raises(PrflError, match="there is no config.yaml in it"):
        build_manifest(absent, model, iter)
    with pytest.raises(PrflError, match="there is no trained policy"):
        build_manifest(config, model, iter)
    policy_run(1)
    save_tiny_pipeline(tmp_path / "other", seed=7)
    path = Path("runs/policy/config.yaml")
    path.write_text(path.read_text().replace(config.backbone.model, str(tmp_path / "other")))
    with pytest.raises(PrflError, match=r"^data\.generator\.policies: .* was trained from another model"):
        build_manifest(config, model, iter)
    with pytest.raises(PrflError, match="null is named twice"):
        load_config("reward.yaml", ["data.generator.policies=[null, null]"])
