"""``prfl export``: the folder that others load, its model card, and the upload (the network is replaced, no more)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import WanTransformer3DModel
from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from prfl import cli
from prfl.backbone import Backbone
from prfl.config import load_config
from prfl.config.section import kinds
from prfl.config.sections.objective import ObjectiveBase
from prfl.evaluation.metrics import Interval
from prfl.evaluation.reward_eval import Level, Row, save_rows
from prfl.export.run import export_run, run_config
from prfl.factory.backbone import POLICY, build_backbone
from prfl.factory.policy import load_policy
from prfl.factory.reward import reward_hash
from prfl.reward import LatentReward, RewardCard, RewardHead
from prfl.utils import rng

ACCURACY = {"motion": {"0-0.2": 0.8125, "0.9-1": 0.5}}


@pytest.fixture
def uploaded(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What would have gone to the hub: the repository, and the text of each file."""
    sent: list[dict] = []

    def create(self: HfApi, repo_id: str, **options: object) -> SimpleNamespace:
        sent.append({"repo": repo_id, **options})
        return SimpleNamespace(repo_id=repo_id)

    def upload(self: HfApi, *, repo_id: str, folder_path: Path, **options: object) -> CommitInfo:
        files = {path.name: path.read_bytes() for path in sorted(Path(folder_path).iterdir()) if path.is_file()}
        sent.append({"repo": repo_id, "files": files})
        address = f"https://huggingface.co/{repo_id}/commit/0"
        return CommitInfo(commit_url=address, commit_message="", commit_description="", oid="0")

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    return sent


def save_reward(backbone: Backbone, folder: Path) -> LatentReward:
    reward = LatentReward(RewardHead(backbone.facts.widths[0], ["motion"], inner=8, hidden=8), backbone, [1])
    reward.card = RewardCard(labels={"motion": "moves"}, frames=(5, 5), fps=(8.0, 8.0), accuracy=ACCURACY)
    reward.save_pretrained(folder)
    return reward


def test_merged_weights_are_the_trained_model(tiny_run: Callable[..., Path]) -> None:
    run = tiny_run(targets=["to_q", "ffn.net.2", "proj_out"])
    merged = WanTransformer3DModel.from_pretrained(export_run(run, merged=True) / "transformer")
    config = run_config(run)
    model = build_backbone(config)
    load_policy(config, model)
    latents = rng.normal((4, 2, 4, 4), 0, "test", 0, [0])
    condition = model.condition(["a red circle"])
    with torch.no_grad(), model.adapter(POLICY):
        trained = model.velocity(latents, torch.tensor(0.5), condition)
    base = model.transformer
    model.computing["transformer"] = merged.to(model.facts.device)
    for block, old in zip(merged.blocks, base.blocks, strict=True):
        block.attn2.set_processor(old.attn2.processor)
    with torch.no_grad():
        torch.testing.assert_close(model.velocity(latents, torch.tensor(0.5), condition), trained)
    assert not any("lora" in name for name in merged.state_dict())


def test_a_policy_of_an_older_prfl_is_of_the_one_family_and_network_that_there_was(
    tiny_run: Callable[..., Path],
) -> None:
    run = tiny_run()
    policy = run / "policy.safetensors"
    with safe_open(policy, "pt") as file:
        stamp = json.loads(file.metadata()["prfl"])
    assert (stamp.pop("family"), stamp.pop("networks")) == ("wan", ["transformer"])
    save_file(load_file(policy), policy, metadata={"prfl": json.dumps(stamp)})
    config = run_config(run)
    load_policy(config, build_backbone(config))
    out = export_run(run)
    assert "WanPipeline.from_pretrained" in (out / "README.md").read_text()
    assert "diffusion_model.blocks.0.self_attn.q.alpha" in load_file(out / "tiny-run.safetensors")


def test_the_card_has_the_figures_of_the_run(
    tiny_run: Callable[..., Path], uploaded: list[dict], capsys: pytest.CaptureFixture
) -> None:
    run = tiny_run()
    save_reward(build_backbone(run_config(run)), run.parents[1] / "reward")
    interval = {"value": 0.25, "low": 0.125, "high": 0.5}
    settings = {"frames": 5, "width": 16, "height": 16, "steps": 2, "guidance_scale": 1.0, "seed": 3}
    policy_summary = {"judge/all": {**interval, "value": 0.75}}
    results = {
        "outcomes": {
            "base": {"settings": settings, "summary": {"judge/all": interval}, "difference": {}},
            "policy": {"settings": settings, "summary": policy_summary, "difference": {"judge/all": interval}},
        },
        "prompts": 2,
        "samples": 4,
    }
    (run / "samples/final").mkdir(parents=True)
    (run / "samples/final/results.json").write_text(json.dumps(results))
    assert cli.main(["export", str(run), "--push", "me/tiny", "--private"]) == 0, capsys.readouterr().err
    assert "https://huggingface.co/me/tiny/commit/0" in capsys.readouterr().out
    assert uploaded[0] == {"repo": "me/tiny", "private": True, "exist_ok": True}
    assert set(uploaded[1]["files"]) == {"README.md", "tiny-run.safetensors"}
    card = ModelCard(uploaded[1]["files"]["README.md"].decode())
    assert card.data.library_name == "diffusers" and "lora" in card.data.tags
    assert card.data.base_model is None and str(run.parents[1]) not in card.text, "no folder of this machine"
    row = "| judge/all | 0.250 [0.125, 0.500] | 0.750 [0.125, 0.500] | 0.250 [0.125, 0.500] |"
    assert row in card.text, card.text
    assert 'load_lora_weights("me/tiny", weight_name="tiny-run.safetensors")' in card.text
    assert "| 0-0.2 | 0.812 |" in card.text, "and how well the reward ranks"
    assert "rank 4, alpha 2" in card.text
    assert "`tiny-run.safetensors`: their metadata" in card.text and "Not protected: a stranger's weights" in card.text


def test_the_card_has_words_for_every_method() -> None:
    for section in kinds(ObjectiveBase, "name"):
        assert section.title or not section.trains_policy, section


def test_a_reward_run_exports_its_reward(
    tiny_run: Callable[..., Path], uploaded: list[dict], capsys: pytest.CaptureFixture
) -> None:
    run = tiny_run()
    config = load_config(run / "config.yaml")
    raw = config.model_dump(mode="json")
    raw |= {"reward": {"space": "latent", "head": {"dimensions": ["motion"], "blocks": [1]}}}
    raw |= {"objective": {"name": "preference", "loss": "bce"}}
    raw["backbone"]["adapter"] = None
    raw["data"]["manifest"] = "manifest.jsonl"
    raw["evaluation"] = {"every": 0}
    (run / "config.yaml").write_text(json.dumps(raw))
    backbone = build_backbone(run_config(run))
    reward = save_reward(backbone, run / "reward")
    sure = Interval(0.75, 0.5, 1.0)
    rows = [Row(n, "motion", Level("bin", 0.0, 0.2), sure, None, None, sure, None, None, 9, 0) for n in ("reward", "b")]
    save_rows(run / "reward_eval.json", rows, rewards={"reward": reward_hash(reward), "b": "another's"})
    assert cli.main(["export", str(run), "--push", "me/head"]) == 0, capsys.readouterr().err
    card = uploaded[1]["files"]["README.md"].decode()
    assert "| motion | 0-0.2 | 0.750 [0.500, 1.000] | 0.750 [0.500, 1.000] | 9 |" in card
    assert "### b" not in card, "another head that was measured beside it"
    assert 'load_reward("me/head", backbone)' in card and "One unit of a score: a logit" in card
    again = LatentReward.from_pretrained(run / "export", backbone=backbone)
    assert all(torch.equal(again.state()[name], tensor) for name, tensor in reward.state().items())
    assert cli.main(["export", str(run), "--merged"]) == 2


def test_push_to_hub_of_a_reward_is_the_mixins(tiny_backbone: Backbone, tmp_path: Path, uploaded: list[dict]) -> None:
    reward = save_reward(tiny_backbone, tmp_path / "reward")
    (tmp_path / "reward/README.md").write_text("stale")
    reward.save_pretrained(tmp_path / "reward")
    assert "stale" not in (tmp_path / "reward/README.md").read_text()
    reward.push_to_hub("me/head", private=True)
    assert uploaded[0] == {"repo": "me/head", "private": True, "exist_ok": True}
    files = uploaded[1]["files"]
    assert set(files) == {"README.md", "config.json", "reward.safetensors"}
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "prfl" and "latent-reward" in card.data.tags
    assert "| 0-0.2 | 0.812 |\n| 0.9-1 | 0.500 |" in card.text and '"me/head"' in card.text
    for name, content in files.items():
        (tmp_path / "down").mkdir(exist_ok=True)
        (tmp_path / "down" / name).write_bytes(content)
    again = LatentReward.from_pretrained(tmp_path / "down", backbone=tiny_backbone)
    assert all(torch.equal(again.state()[name], tensor) for name, tensor in reward.state().items())


def test_what_cannot_be_exported(
    tiny_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["export", str(tmp_path)]) == 2
    assert "there is no config.yaml in it" in capsys.readouterr().err
    run = tiny_run()
    save_reward(build_backbone(run_config(run)), run.parents[1] / "reward")
    with monkeypatch.context() as patched:

        def refuse(self: HfApi, *args: object, **options: object) -> None:
            raise LocalTokenNotFoundError("Token is required")

        patched.setattr(HfApi, "create_repo", refuse)
        assert cli.main(["export", str(run), "--push", "me/tiny"]) == 2
    message = capsys.readouterr().err
    assert "Token is required" in message and "hf auth login" in message
    assert (run / "export/tiny-run.safetensors").is_file(), "what was exported stays"
    (run / "policy.safetensors").write_bytes((run / "policy.safetensors").read_bytes()[:-9])
    assert cli.main(["export", str(run)]) == 2
    assert "is damaged" in capsys.readouterr().err
    (run / "policy.safetensors").unlink()
    assert cli.main(["export", str(run)]) == 2
    assert "there is no trained policy" in capsys.readouterr().err
