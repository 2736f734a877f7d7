"""Dry runs of the large models' configs as they ship, without their weights, from a bare clone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from prfl import cli
from prfl.backbone import Backbone, LoraSpec
from prfl.backbone.adapters import lora_shapes
from prfl.backbone.network import predictors
from prfl.backbone.pipeline import PipelineBackbone
from prfl.config import load_stages
from prfl.config.schema import Config
from prfl.estimate.fitting import Prediction
from prfl.estimate.missing_inputs import missing_inputs
from prfl.estimate.nfe import count_nfe
from prfl.estimate.variants import with_keys
from prfl.factory.backbone import build_architecture
from tests.slow import slow_unless

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def bare_clone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only the configs: no runs, no data, no hub."""
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.slow
def test_prfl_on_14b_at_720p(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["train", "configs/wan2.1-14b/prfl.yaml", "--dry-run", "-v", "--gpu", "80"]) == 0
    shown = capsys.readouterr().out
    assert "learning_rate: 5.0e-06" in shown and "max_grad_norm: 1.0" in shown, "the resolved config"
    assert re.search("as it is .*83.8. GiB.* does not fit", shown)
    assert re.search(r"1\. backbone.offload=true .*52.0. GiB.* fits", shown) and "\n│ 2. " not in shown
    assert "hours, one A100 to H100" in shown
    assert "75,600" in shown and "14,288,491,584 in 40 blocks" in shown and "104,857,600" in shown
    assert "8,000" in shown, "1,000 steps of 8 gradient forwards"
    assert "26.67 GiB" in shown, "14.3 billion weights, nearly all in bfloat16"
    assert "reward.path: there is no folder runs/wan2.1-14b-reward/reward" in shown
    assert "the first 8 of 40 blocks" in shown
    assert not Path("runs").exists(), "a dry run writes nothing"


def test_the_two_tables_that_one_wants(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    short = ["data.frames=5", "data.height=64", "data.width=64"]
    (stage,) = load_stages("configs/wan2.1-1.3b/prfl.yaml", short)
    prediction = Prediction.of(stage.config)
    monkeypatch.setattr(Prediction, "of", lambda config: prediction)  # both times
    quiet = ["train", "configs/wan2.1-1.3b/prfl.yaml", "--dry-run", *short]
    assert cli.main([*quiet, "-q"]) == 0
    shown = capsys.readouterr().out
    assert re.findall("┏", shown) == ["┏"] * 2 and "peak: all" in shown and "the whole run" in shown
    assert "hours, one RTX 3090 to RTX 4090" in shown, "the smallest that has room"
    assert "learning_rate" not in shown and "not here yet" not in shown
    assert cli.main(quiet) == 0
    more = capsys.readouterr().out
    assert "the run" in more and "not here yet" in more and "learning_rate" not in more


@pytest.mark.parametrize("option", ["--gpu=48", "--quiet", "--verbose"])
def test_what_only_a_dry_run_has(option: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["train", "configs/wan2.1-1.3b/prfl.yaml", option]) == 2
    assert option.split("=")[0] in capsys.readouterr().err


WITHOUT = {
    "reward": "data.manifest: there is no file",
    "vader": "reward.aesthetic.mlp: there is no file",
    "instructvideo": "data.manifest: there is no file",
    **{f"vader-{name}": f"reward.{name}.weights: there is no file" for name in ("hps", "imagereward", "mps")},
    "diffusion_drf": "reward.critic.questions: there is no file",
    "videoalign": "reward.videoalign.model: there is no folder",
    **{f"vader-{name}": f"reward.{name}.model: there is no folder" for name in ("videoalign", "hpsv3")},
    **{f"vader-{name}": f"reward.{name}.model" for name in ("clip", "pickscore", "object", "action", "coherence")},
}


WEIGHTS = {
    "wan2.1-1.3b": "1,418,996,800 in 30",
    "wan2.1-14b": "14,288,491,584 in 40",
    "wan2.1-i2v-14b": "16,394,878,784 in 40",
    "wan2.2-ti2v-5b": "4,999,787,712 in 30",
    "wan2.2-a14b": "28,576,983,168 in 40",
    "wan2.2-i2v-a14b": "28,577,802,368 in 40",
    "cogvideox-2b": "1,693,783,872 in 30",
    "modelscope-1.7b": "1,411,233,860 in 9",
    "svd-xt": "1,524,623,082 in 9",
}


@pytest.mark.parametrize(
    ("model", "config"),
    slow_unless(
        lambda case: False,
        [
            ("wan2.1-14b", "reward"),
            ("wan2.1-1.3b", "prfl"),
            ("cogvideox-2b", "vader"),
            ("modelscope-1.7b", "prfl"),
            ("svd-xt", "prfl"),
        ],
    ),
)
def test_dry_runs_on_short_clips(model: str, config: str, capsys: pytest.CaptureFixture) -> None:
    weights, frames = WEIGHTS[model], 9 if model == "cogvideox-2b" else 5
    absent = WITHOUT.get(config, "reward.path: there is no folder")
    short = [f"data.frames={frames}", "data.height=64", "data.width=64"]
    assert cli.main(["train", f"configs/{model}/{config}.yaml", "--dry-run", *short]) == 0
    shown = capsys.readouterr().out
    assert f"{weights} blocks" in shown and absent in shown


LIKE_ANOTHER = ("svd-xt", "wan2.1-14b", "wan2.2-i2v-a14b")  # what of them is not, other tests have


def check_adapter(model: Backbone, name: str, spec: LoraSpec) -> None:
    for key, network in predictors(model).items():
        if key in (spec.networks or model.facts.blocks):
            assert lora_shapes(network, spec, model.facts.blocks[key])


@pytest.fixture(scope="module")
def built() -> Callable[[Config], Backbone]:
    """Return the model of a config: one for all with the same ``backbone``, since counting changes nothing of it.

    Its adapter is checked against the layers and not made: that takes half of the time, and nothing here runs it.
    """
    models: dict[tuple[str, bool], Backbone] = {}

    def build(config: Config) -> Backbone:
        key = config.backbone.model_dump_json(), config.follows_reward
        if key not in models:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(PipelineBackbone, "add_adapter", check_adapter)
                models[key] = build_architecture(config)
        return models[key]

    return build


@pytest.mark.parametrize(
    "file",
    slow_unless(
        lambda file: file.stem in ("reward", "prfl", "vader") and file.parent.name not in LIKE_ANOTHER,
        sorted(file for model in WEIGHTS for file in REPOSITORY.glob(f"configs/{model}/*.yaml")),
    ),
    ids=lambda file: f"{file}"[-30:],
)
def test_the_work_and_the_inputs_of_all_are_known(file: Path, built: Callable[[Config], Backbone]) -> None:
    """What a dry run does of a config but for its memory, which takes seconds and is the same code for each."""
    (stage,) = load_stages(f"configs/{file.parent.name}/{file.name}")
    lacking = missing_inputs(stage.config)
    assert any(WITHOUT.get(file.stem, "reward.path: there is no folder") in line for line in lacking)
    short = with_keys(stage.config, {"training.steps": 20})
    assert all(work.total > 0 for work in count_nfe(short, built(short)))


def test_a_broken_manifest_is_found(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "manifest.jsonl").write_text('{"video": \n')
    broken = f"data.manifest={tmp_path}/manifest.jsonl"
    assert cli.main(["train", "configs/wan2.1-1.3b/reward.yaml", "--dry-run", broken]) == 2
    assert "manifest.jsonl:1" in capsys.readouterr().err


def test_a_later_stage_may_read_what_an_earlier_one_makes() -> None:
    watcher, policy = load_stages("configs/tiny.yaml")
    there = Path(policy.config.evaluation.held_out_reward or "").is_dir()
    assert not missing_inputs(policy.config, filled=[watcher.config.run])
    assert there or "evaluation.held_out_reward" in missing_inputs(policy.config)[0]


def test_what_is_wrong_is_said_before_anything_is_built(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["train", "configs/wan2.1-14b/reward.yaml", "--dry-run", "data.prompts.train=absent.txt"]) == 2
    assert "absent.txt" in capsys.readouterr().err
    assert cli.main(["train", "configs/wan2.1-14b/reward.yaml", "--dry-run", "data.height=719"]) == 2
    assert "a height of 719 is not a multiple of 16" in capsys.readouterr().err
