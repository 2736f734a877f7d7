"""The commands on a model of two experts: a head on the low-noise one, whose gradient the exact chain takes on to the
high-noise one, with guidance and a learning rate of each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import WanImageToVideoPipeline, WanPipeline
from safetensors.torch import load_file

from prfl import cli
from tests.few_levels import measure_few
from tests.models import copies_in_place_of_loading
from tests.runs.story_inputs import PROMPTS, assert_went_on, write_inputs
from tests.wan_experts import save_tiny_experts, save_tiny_image_experts

SCALES = {"high": 4.0, "low": 3.0}
GUIDED = {"guidance": {"scale": SCALES, "gradient": "cond"}, "step_weight": "unit"}


SAVERS = {"text": save_tiny_experts, "image": save_tiny_image_experts}
PIPELINES = {"text": WanPipeline, "image": WanImageToVideoPipeline}
BELOW = {"text": "0.875", "image": "0.9"}


@pytest.fixture(params=SAVERS)
def kind(request: pytest.FixtureRequest) -> str:
    """What the videos are made from."""
    return request.param


@pytest.fixture
def project(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blank_pictures: None) -> Path:
    """Prompts, labelled clips, a head and two policies that follow it: by the whole chain, and by clean predictions."""
    monkeypatch.chdir(tmp_path)
    measure_few(monkeypatch)
    copies_in_place_of_loading(SAVERS[kind](tmp_path / "tiny"), monkeypatch)
    model = {"model": str(tmp_path / "tiny")}
    write_inputs(frames=9, from_image=kind == "image")

    policy = {**model, "adapter": {"rank": 2, "alpha": 2}, "checkpointing": "full"}
    head = {"dimensions": ["light"], "blocks": [1], "inner": 8, "hidden": 8, "adapter": {"rank": 2, "alpha": 2}}
    follows = {"space": "latent", "path": "${stages.reward.run}/reward", "weights": {"light": 1.0}, "shape": "linear"}
    stages = {
        "reward": (model, {"space": "latent", "head": head}, {"name": "preference", "loss": "bce"}, {}, 1e-3),
        "chain": (policy, follows, {"name": "full_chain"}, GUIDED, {"high": 1e-3, "low": 2e-3}),
        "clean": (policy, follows, {"name": "prfl", "handoff": "clean", "sft": {"every": 1}}, {}, 1e-3),
    }
    for name, (backbone, reward, objective, rollout, rate) in stages.items():
        config = {
            "version": 1, "seed": 0, "run": f"runs/{name}", "backbone": backbone, "reward": reward,
            "objective": objective, "rollout": {"steps": 4, **rollout},
            "data": {
                "cache": "cache", "frames": 9, "height": 16, "width": 16, "fps": 8, "manifest": "manifest.jsonl",
                "prompts": {split: f"{split}.jsonl" for split in PROMPTS},
            },
            "training": {"steps": 4, "batch": 2, "learning_rate": rate, "save_every": 1, "trackers": []},
            "evaluation": {"every": 0},
        }  # fmt: skip
        if name == "chain":
            del config["data"]["manifest"]
            config["training"]["steps"] = 2
            config["evaluation"] |= {"final_samples": 1, "guidance_scale": dict(SCALES)}
        Path(f"{name}.yaml").write_text(yaml.safe_dump(config))
    Path("story.yaml").write_text(yaml.safe_dump({"version": 1, "stages": [f"{name}.yaml" for name in stages]}))
    return tmp_path


def run(*words: str) -> None:
    assert cli.main([*words]) == 0


@pytest.mark.slow
def test_from_labels_to_policies_of_both_experts(kind: str, project: Path, capsys: pytest.CaptureFixture) -> None:
    run("train", "story.yaml")
    reward = load_file("runs/reward/reward/reward.safetensors")
    of_adapter = {name.partition(".blocks")[0] for name in reward if name.startswith("adapter.")}
    assert of_adapter == {"adapter.transformer_2"}, "the head's own adapter is on the expert that it reads"
    card = Path("runs/reward/reward/README.md").read_text()
    assert f"at noise levels below {BELOW[kind]}, where the model's low-noise expert predicts, which it reads" in card
    assert "0.85-0.875" in card if kind == "text" else "0.85-0.9" in card
    assert "0.9-" not in card
    for name in ("chain", "clean"):
        saved = load_file(f"runs/{name}/policy.safetensors")
        moved = {key.startswith("transformer_2.") for key, value in saved.items() if "lora_B" in key and value.any()}
        assert moved == {True, False}, "a reward that the low-noise expert reads has trained both"

    # It goes on bit for bit.
    policy, path = load_file("runs/chain/policy.safetensors"), "reward.path=runs/reward/reward"
    shutil.copytree("runs/chain", "runs/broken", ignore=shutil.ignore_patterns("step-000002", "policy.safetensors"))
    run("train", "chain.yaml", path, "run=runs/broken", "evaluation.final_samples=0")
    assert_went_on("runs/chain", "runs/broken")
    resumed = load_file("runs/broken/policy.safetensors")
    assert resumed.keys() == policy.keys() and all(torch.equal(resumed[name], policy[name]) for name in policy)
    lines = [json.loads(line) for line in Path("runs/chain/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "gradient_norm" in line]
    assert {line["learning_rate/high"] for line in steps} == {1e-3}
    assert {line["learning_rate/low"] for line in steps} == {2e-3}

    # Two files, which diffusers loads as the card says.
    run("export", "runs/chain", "--merged")
    out = Path("runs/chain/export")
    text = (out / "README.md").read_text()
    assert "guidance scale 4 (high), 3 (low)" in text and "0.001 (high), 0.002 (low)" in text
    lines_of_card = [line for line in text.splitlines() if line.startswith("pipeline.load_lora_weights")]
    assert len(lines_of_card) == 2 and "load_into_transformer_2=True" in lines_of_card[1]
    assert sorted(path.name for path in out.glob("*.safetensors")) == [
        "chain_high_noise.safetensors", "chain_low_noise.safetensors",
    ]  # fmt: skip
    pipeline = PIPELINES[kind].from_pretrained("tiny", text_encoder=None)
    exec(
        "\n".join(
            line.replace('"export"', f'"{out}"').replace('"runs/chain/export"', f'"{out}"') for line in lines_of_card
        )
    )
    channels = pipeline.transformer.config.in_channels
    x, time, words = torch.randn(1, channels, 3, 4, 4), torch.tensor([500.0]), torch.randn(1, 512, 16)
    for name in ("transformer", "transformer_2"):
        merged = type(pipeline.transformer).from_pretrained(out / name)
        base = type(pipeline.transformer).from_pretrained(f"tiny/{name}")
        loaded, whole, plain = (
            network(x, time, words, return_dict=False)[0] for network in (getattr(pipeline, name), merged, base)
        )
        torch.testing.assert_close(loaded, whole, rtol=1e-4, atol=1e-5)
        assert (loaded - plain).abs().max() > 1e-4, "the adapter does something"
    pair = f"{{high: {out}/chain_high_noise.safetensors, low: {out}/chain_low_noise.safetensors}}"
    capsys.readouterr()
    run("train", "chain.yaml", path, "run=runs/again", "training.steps=1", f"backbone.adapter.init={pair}")
    started = capsys.readouterr().out.replace("\n", "")
    assert all(f"the adapter of the {name} starts from" in started for name in ("transformer", "transformer_2"))
    above = ["run=runs/above", f"backbone.base_lora={pair}"]
    assert cli.main(["train", "chain.yaml", path, *above]) == 2, "the head read the model without it"
    assert "it was trained from another model" in capsys.readouterr().err
    run("train", "chain.yaml", path, "--dry-run")
    assert "parameters of the transformer" in capsys.readouterr().out
    run("eval", "reward.yaml")
