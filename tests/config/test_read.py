"""No key of a config is read by nobody: a person who sets one believes that it does something."""

from __future__ import annotations

import json
import os
import shutil
import sys
import typing
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from prfl import cli
from prfl.config import load_config
from prfl.config.messages import models_in
from prfl.config.schema import Config
from prfl.config.section import Section, kinds
from prfl.config.sections.steering import SteeringBase
from prfl.factory import clips as clips_factory
from prfl.factory.backbone import build_backbone
from prfl.factory.clips import build_manifest
from prfl.factory.objective import build_regulariser, build_reward_gradient
from prfl.factory.prompts import load_prompts
from prfl.factory.reward import load_followed_reward
from prfl.factory.steering import build_steering
from tests.faults.project import make_project
from tests.models import copies_in_place_of_loading
from tests.reward.test_aesthetic import tiny_clip, tiny_mlp
from tests.reward.tiny_rewards import save_tiny_rewards
from tests.wan_experts import save_tiny_experts

NOBODY = {"conflicts", "unread", "identity", "load_config", "config_from", "validate", "model_dump"}  # of prfl/config
ONE_CHOICE = {("Config", "version")}  # a single value is allowed: nothing to read


def sections(model: type[Section]) -> set[type[Section]]:
    return {model}.union(*(sections(inner) for f in model.model_fields.values() for inner in models_in(f.annotation)))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """(section, key) of every key that code outside prfl/config takes from a config."""
    seen: set[tuple[str, str]] = set()
    get = Section.__getattribute__
    inside = f"prfl{os.sep}config{os.sep}"

    def recording(self: Section, name: str) -> object:
        reader = sys._getframe(1)
        # A section may answer for its keys (``reward.paths``): then the reader is who asks it; its rules are nobody.
        while inside in reader.f_code.co_filename and reader.f_code.co_name not in NOBODY and reader.f_back:
            reader = reader.f_back
        if name in type(self).model_fields and inside not in reader.f_code.co_filename:
            seen.add((type(self).__name__, name))
        return get(self, name)

    monkeypatch.setattr(Section, "__getattribute__", recording)
    return seen


@pytest.mark.slow
@pytest.mark.usefixtures("blank_pictures")
def test_every_key_is_read_by_somebody(
    tmp_path: Path, tiny_pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch, read: set[tuple[str, str]]
) -> None:
    monkeypatch.chdir(tmp_path)
    copies_in_place_of_loading(tiny_pipeline_folder, monkeypatch)
    make_project(tiny_pipeline_folder)
    watched = {"every": 1, "prompts_per_round": 1, "samples_per_prompt": 1}

    def write(name: str, source: str, **changes: dict) -> str:
        config = yaml.safe_load(Path(source).read_text())
        for key, value in changes.items():
            config[key] = {**config[key], **value}
        Path(f"{name}.yaml").write_text(yaml.safe_dump({**config, "run": f"runs/{name}"}))
        return f"{name}.yaml"

    for name in ("second", "held-out"):
        shutil.copytree("heads/latent", f"heads/{name}")
    several = {"path": ["heads/latent", "heads/second"]}
    kept = {**watched, "held_out_reward": "heads/held-out", "keep_best": "validation/held_out/total"}
    adapter = {"adapter": {"rank": 1, "alpha": 1}}
    head = {"dimensions": ["light"], "blocks": [0], "inner": 8}
    tiny_clip().save_pretrained("clip")
    torch.save(tiny_mlp().state_dict(), "mlp.pth")
    aesthetic = {"clip": "clip", "mlp": "mlp.pth"}
    public, alone = save_tiny_rewards(Path("public")), {"path": None, "weights": None}
    judge = {"held_out_callable": public["callable"]}
    prompts = [line for file in Path().glob("*.txt") for line in file.read_text().splitlines()]
    questions = {"questions": [{"dimension": "look", "ask": "is it red?", "answer": "yes"}]}
    Path("questions.jsonl").write_text("".join(json.dumps({"prompt": each, **questions}) + "\n" for each in prompts))

    def critic(frames: int) -> dict[str, object]:
        return {"model": "shapes", "questions": "questions.jsonl", "frames": frames, "dtype": "float32"}

    watching = {"held_out_critic": critic(2)}
    factors = {"lora_A": torch.ones(2, 24), "lora_B": torch.ones(24, 2)}
    save_file({f"blocks.0.attn1.to_q.{name}.weight": tensor for name, tensor in factors.items()}, "high.safetensors")
    runs = [
        write("latent", "reward.yaml", reward={"head": {**head, **adapter}}),
        write(
            "pixel",
            "reward.yaml",
            reward={"space": "pixel", "head": {"dimensions": ["light"]}},
            backbone={"kernels": {"lora_linear": "torch"}},
        ),
        write(
            "steered",
            "prfl.yaml",
            objective={"sft": {}},
            data={"manifest": "manifest.jsonl"},
            evaluation={**watched, "final_samples": 1},
            rollout={"gradients_per_rollout": 2},
        ),
        write("kept", "prfl.yaml", reward=several, evaluation=kept),
        write("decoded", "vader.yaml", rollout={"solver": "flow_sde"}, evaluation={**watched, **judge}),
        write("supervised", "sft.yaml", data={"buckets": [{"frames": 1, "height": 16, "width": 16}]}),
        write(
            "experts",
            "sft.yaml",
            backbone={
                "model": str(save_tiny_experts(Path("tiny-a14b"))),
                "experts": {"train": ["high", "low"]},
                "base_lora": {"high": "high.safetensors"},
            },
            training={"learning_rate": {"high": 1e-3, "low": 2e-3}},
            evaluation={**watched, "guidance_scale": {"high": 4.0, "low": 3.0}},
        ),
        write("seen", "vader.yaml", reward={**alone, "aesthetic": aesthetic, **public, "balance": "gradient_norm"}),
        write("asked", "vader.yaml", reward={**alone, "critic": critic(4)}, evaluation={**watched, **watching}),
        write("beside", "vader.yaml", reward={**alone, "clip": public["clip"], "latent": "heads/latent"}),
    ]
    # Pixel rewards, so that the keys of frames are read too.
    methods = [
        {"name": "prfl", "handoff": "clean"}, {"name": "refl"}, {"name": "full_chain"}, {"name": "alignprop"},
        {"name": "draft_lv"}, {"name": "drtune"}, {"name": "leapalign"}, {"name": "instructvideo"},
        {"name": "dense_process", "handoff": "clean"},
    ]  # fmt: skip
    for method in methods:
        data = {"manifest": "manifest.jsonl"} if method["name"] == "instructvideo" else {}
        name = write(method["name"], "vader.yaml", data=data)
        Path(name).write_text(yaml.safe_dump({**yaml.safe_load(Path(name).read_text()), "objective": method}))
    runs.append("instructvideo.yaml")
    for run in runs:
        assert cli.main(["train", run, "training.steps=1"]) == 0
    load_prompts(load_config("sft.yaml", ["data.prompts.train=null"]).data)  # of the clips
    model = build_backbone(load_config("sft.yaml"))
    for config in [load_config(f"{method['name']}.yaml") for method in methods]:
        build_reward_gradient(config, model, load_followed_reward(config, model), None)
        build_regulariser(config, model, None)
    monkeypatch.setattr(clips_factory.shapes, "labelled", lambda *_, **__: Path("made"))
    monkeypatch.setattr(clips_factory, "sample", lambda *_, **__: torch.zeros(1))
    monkeypatch.setattr("prfl.data.clips.write_clips", lambda *_, **__: (Path("made"), Path("made")))
    for generator in (
        "shapes_mixture, count: 1",
        "shapes_curated, count: 1",
        "shapes_samples, per_prompt: 2, steps: 1",
        "video_clips, videos: clips",
    ):
        data = {"manifest": None, "generator": yaml.safe_load(f"{{name: {generator}}}")}
        prompts = {"prompts": {"train": "shapes"}, "frames": 17, "height": 32, "width": 32}
        build_manifest(load_config(write("made", "sft.yaml", data={**data, **prompts})), model, iter)
    for video in Path("clips").glob("*.mp4"):
        video.with_suffix(".txt").write_text("a red circle")
    build_manifest(load_config(write("made", "sft.yaml", data={"manifest": None, "folder": "clips"})), model, iter)
    for kind in kinds(SteeringBase, "name"):
        (name,) = typing.get_args(kind.model_fields["name"].annotation)
        noisy = ", solver: ancestral" if "solver" in kind.model_fields else ""
        steered = load_config("prfl.yaml", [f"steering={{name: {name}, rewards: [{{path: heads/latent}}]{noisy}}}"])
        build_steering(steered, model)
    keys = {(model.__name__, key) for model in sections(Config) for key in model.model_fields}
    tags = {(section, key) for section, key in keys if key in ("name", "space")}
    bases = {(section, key) for section, key in keys if section in ("RewardBase", "RewardGradientConfig")}
    unread = keys - read - ONE_CHOICE - tags - bases
    assert not unread, f"keys that nobody reads: {sorted(unread)}"
