"""The diffs of docs/extending.md fit the tree as it is, and each of them is short."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SkyReelsV2Pipeline, SkyReelsV2Transformer3DModel

from prfl.backbone import LoraSpec, load_backbone
from prfl.backbone.families import FAMILIES
from prfl.rollout.guidance import guided_network
from prfl.rollout.solvers import euler
from prfl.rollout.trajectory import rollout
from tests.tiny import CHANNELS, TEXT_WIDTH, tiny_text_encoder, tiny_tokenizer, tiny_vae

REPOSITORY = Path(__file__).parents[1]
DIFFS = re.findall(
    r"^## ([^\n]+)\n.*?^```diff\n(.*?)^```$", (REPOSITORY / "docs/extending.md").read_text(), re.M | re.S
)
MOST = 80  # changed lines: less than a page


@pytest.mark.parametrize(("title", "diff"), DIFFS, ids=[title for title, _ in DIFFS])
def test_a_diff_applies_and_is_short(title: str, diff: str) -> None:
    applied = subprocess.run(
        ["git", "apply", "--check", "-"], input=diff, cwd=REPOSITORY, text=True, capture_output=True
    )
    assert applied.returncode == 0, applied.stderr
    assert len(re.findall(r"^[+-](?![+-])", diff, re.M)) < MOST


def test_there_is_one_for_each_kind() -> None:
    assert {"A solver", "A method", "A reward", "A family of video models"} <= {title for title, _ in DIFFS}


def added_file(diff: str) -> dict[str, Any]:
    """What the file that a diff adds defines."""
    (text,) = re.findall(r"^\+\+\+ .*\n@@ -0,0 .*\n((?:\+.*\n)+)", diff, re.M)
    defined: dict[str, Any] = {"__name__": "added"}
    exec(re.sub(r"^\+", "", text, flags=re.M), defined)
    return defined


@pytest.fixture
def skyreels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny random pipeline of the family that the docs add, which is in the table."""
    monkeypatch.setitem(FAMILIES, "skyreels", added_file(dict(DIFFS)["A family of video models"])["SKYREELS"])
    torch.manual_seed(0)
    shapes = dict(num_attention_heads=2, attention_head_dim=12, in_channels=CHANNELS, out_channels=CHANNELS)
    transformer = SkyReelsV2Transformer3DModel(
        **shapes, text_dim=TEXT_WIDTH, freq_dim=16, ffn_dim=48, num_layers=2, rope_max_seq_len=32
    )
    SkyReelsV2Pipeline(
        tokenizer=tiny_tokenizer(), text_encoder=tiny_text_encoder(), vae=tiny_vae(), transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(tmp_path)  # fmt: skip
    return tmp_path


def test_the_family_works(skyreels: Path) -> None:
    """Its chain is diffusers' own, and a checkpointed gradient of an adapter is the whole one."""
    model, pipe = load_backbone(skyreels), SkyReelsV2Pipeline.from_pretrained(skyreels)
    pipe.set_progress_bar_config(disable=True)
    start = torch.randn(1, *(shape := model.latent_shape(5, 16, 16)))
    scheduler = pipe.scheduler
    how = dict(height=16, width=16, num_frames=5, num_inference_steps=3, guidance_scale=3.0, output_type="latent")
    theirs = pipe("a red circle", **how, latents=start.clone()).frames
    condition, empty = model.condition(["a red circle"]), model.condition([""])
    network = guided_network(model.velocity, condition, empty, scale=3.0, gradient="both")
    ours = rollout(network, start, euler(scheduler.sigmas)).at(3)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()

    model.add_adapter("policy", LoraSpec(2, 2, ["to_q"]))
    gradients = []
    for mode in ("none", "full"):
        model.running.checkpointing = mode
        with model.adapter("policy"):
            (state,) = model.features(start, torch.tensor(0.5), condition, [0])
            whole = model.velocity(start, torch.tensor(0.5), condition)
            leaves = list(model.parameters("policy").values())
            gradients.append(torch.autograd.grad(state.sin().sum() + whole.sin().sum(), leaves))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True)) and shape == (CHANNELS, 2, 4, 4)
    assert any(gradient.any() for gradient in gradients[0])
