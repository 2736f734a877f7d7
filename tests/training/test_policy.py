"""The real trainer over the real objectives: PRFL with its SFT regulariser on a tiny Wan, resumed bit for bit."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

from prfl.config.sections.training import TrainingConfig
from prfl.objective.methods.dense_process import DenseProcess
from prfl.objective.methods.prfl import Prfl
from prfl.objective.reused_rollout import ReusedRollout
from prfl.objective.sft import Sft
from prfl.rollout.flow import chain_sigmas
from prfl.rollout.solvers import euler, flow_sde
from prfl.training.distributed import make_accelerator
from prfl.training.loop import fit
from prfl.training.regulariser import Regulariser
from prfl.training.run_folder import RunFolder, read_metrics
from tests.models import copied_from
from tests.objective.parts import latent_objective, with_policy
from tests.objective.test_sft import dataset
from tests.slow import slow_unless

CHAINS = {"euler": euler(chain_sigmas(3, 3.0)), "flow_sde": flow_sde(chain_sigmas(3, 3.0), eta=0.7)}


def go(pipeline, folder, steps, chain):
    """A fresh process, as far as one process can be one: everything is built anew, on a copy of the model."""
    backbone = with_policy(copied_from(pipeline))
    objective = latent_objective(backbone, Prfl(CHAINS[chain], seed=0), distance_weight=0.1)
    regulariser = Regulariser(Sft(backbone, dataset(backbone), seed=0))
    settings = TrainingConfig(steps=steps, batch=2, accumulation=2, learning_rate=1e-2, ema_decay=0.9, trackers=[])
    run = RunFolder(folder)
    accelerator = make_accelerator(run, "cpu", [])
    return fit(objective, settings, run, regulariser=regulariser, accelerator=accelerator)


@pytest.mark.parametrize("chain", slow_unless("flow_sde".__eq__, CHAINS))
def test_two_and_two_steps_equal_four_bit_for_bit(tiny_pipeline_folder, tmp_path, chain):
    go(tiny_pipeline_folder, tmp_path / "straight", 4, chain)
    go(tiny_pipeline_folder, tmp_path / "broken", 2, chain)
    result = go(tiny_pipeline_folder, tmp_path / "broken", 4, chain)
    assert result.step == 4
    for name in ("weights", "ema", "optimizer"):
        one, two = (
            load_file(tmp_path / run / f"checkpoints/step-000004/{name}.safetensors") for run in ("straight", "broken")
        )
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    straight, broken = (read_metrics(tmp_path / run / "metrics.jsonl") for run in ("straight", "broken"))
    for one, two in zip(straight, broken, strict=True):
        one, two = ({k: v for k, v in r.items() if "seconds" not in k and k != "peak_gib"} for r in (one, two))
        assert one == two
    assert {"reward", "regulariser/loss", "distance", "node", "seconds/rollout", "seconds/backward"} <= straight[
        0
    ].keys()
    assert "lora_A" in next(iter(load_file(tmp_path / "straight/checkpoints/step-000004/weights.safetensors")))


REUSED = {  # method, limit of the drift, finished steps at the break, the step that made the rollout then, stale then
    "prfl": (Prfl(CHAINS["euler"], seed=0), None, 5, 4, False),
    "prfl, stochastic": (Prfl(CHAINS["flow_sde"], seed=0), None, 6, 4, False),
    "prfl, clean, with a limit": (Prfl(CHAINS["euler"], seed=0, handoff="clean"), 0.03, 5, 3, False),
    "prfl, clean, above the limit": (Prfl(CHAINS["euler"], seed=0, handoff="clean"), 0.03, 6, 3, True),
    "dense_process": (DenseProcess(CHAINS["euler"], seed=0, rewards=2), None, 5, 4, False),
}


def reusing(pipeline, folder, method, limit, save_every=10):
    """Ten steps in which rollouts are used four times; the last checkpoint's tensors and the metrics."""
    backbone = with_policy(copied_from(pipeline))
    objective = latent_objective(backbone, method, rollouts=ReusedRollout(4, 2, limit))
    regulariser = Regulariser(Sft(backbone, dataset(backbone), seed=0), every=3)
    settings = TrainingConfig(
        steps=10, batch=2, accumulation=2, learning_rate=1e-2, trackers=[], save_every=save_every, keep=9
    )
    run = RunFolder(folder)
    fit(objective, settings, run, regulariser=regulariser, accelerator=make_accelerator(run, "cpu", []))
    return tensors_of(folder, 10), read_metrics(run.metrics)


def tensors_of(folder, step):
    names = ("weights", "optimizer", "objective")
    return [load_file(folder / f"checkpoints/step-{step:06d}/{name}.safetensors") for name in names]


@pytest.fixture(scope="module")
def straight(tiny_pipeline_folder, tmp_path_factory):
    """Of a method and a limit: the folder of a run that was never broken off, its tensors and metrics; trained once."""

    @cache
    def run(method, limit):
        folder = tmp_path_factory.mktemp("reusing") / "straight"
        return folder, *reusing(tiny_pipeline_folder, folder, method, limit, save_every=1)

    return run


@pytest.mark.parametrize("name", slow_unless("prfl, clean, above the limit".__eq__, REUSED))
def test_a_run_that_is_resumed_while_a_rollout_is_reused(tiny_pipeline_folder, tmp_path, straight, name):
    """Broken off after a checkpoint it equals ten bit for bit: rollouts for 4 steps are made in steps 0, 4 and 8, or
    earlier."""
    method, limit, at, made, stale = REUSED[name]
    whole, files, metrics = straight(method, limit)
    broken = tmp_path / "broken"
    kept = shutil.ignore_patterns(*(f"step-{step:06d}" for step in range(at + 1, 11)))
    shutil.copytree(whole, broken, ignore=kept)
    (_, _, carried) = tensors_of(broken, at)
    assert (int(carried["rolled_at"]), bool(carried["stale"])) == (made, stale)
    resumed, resumed_metrics = reusing(tiny_pipeline_folder, broken, method, limit)
    for one, two in zip(files, resumed, strict=True):
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    for one, two in zip(metrics, resumed_metrics, strict=True):
        one, two = ({k: v for k, v in r.items() if "seconds" not in k and k != "peak_gib"} for r in (one, two))
        assert one == two
    ages = [int(record["rollout_age"]) for record in metrics]
    assert ages == ([0, 1, 2, 0, 1, 2, 0, 1, 2, 0] if limit else [0, 1, 2, 3, 0, 1, 2, 3, 0, 1])


@pytest.mark.slow
def test_the_comparison_of_resumed_rollouts_can_fail(tiny_pipeline_folder, tmp_path, straight, monkeypatch):
    """Were the rollout made again with the present weights, the resumed run would be another one."""
    straight(*REUSED["prfl"][:2])
    monkeypatch.setattr("prfl.objective.reused_rollout.holding", lambda *_: nullcontext())
    with pytest.raises(AssertionError):
        test_a_run_that_is_resumed_while_a_rollout_is_reused(tiny_pipeline_folder, tmp_path, straight, "prfl")
