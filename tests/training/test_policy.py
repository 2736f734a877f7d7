"""The real trainer over the real objectives: PRFL with its SFT regulariser on a tiny Wan, resumed bit for bit."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from prfl.backbone import load_backbone
from prfl.config.schema import TrainingConfig
from prfl.flow import chain_sigmas
from prfl.objective.prfl import Prfl
from prfl.objective.sft import Sft
from prfl.solvers import euler, flow_sde
from prfl.training import Regulariser, RunFolder, make_accelerator, read_metrics, train
from tests.objective.parts import latent_objective, with_policy
from tests.objective.test_sft import dataset

CHAINS = {"euler": euler(chain_sigmas(3, 3.0)), "flow_sde": flow_sde(chain_sigmas(3, 3.0), eta=0.7)}


def go(pipeline, folder, steps, chain):
    """A fresh process, as far as one process can be one: everything is loaded and built anew."""
    backbone = with_policy(load_backbone(pipeline))
    objective = latent_objective(backbone, Prfl(CHAINS[chain], seed=0), distance_weight=0.1)
    regulariser = Regulariser(Sft(backbone, dataset(backbone), seed=0))
    settings = TrainingConfig(steps=steps, batch=2, accumulation=2, learning_rate=1e-2, ema_decay=0.9, trackers=[])
    run = RunFolder(folder)
    accelerator = make_accelerator(run, "cpu", [])
    return train(objective, settings, run, regulariser=regulariser, accelerator=accelerator)


@pytest.mark.parametrize("chain", CHAINS)
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
