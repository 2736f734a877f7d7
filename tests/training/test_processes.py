"""Two processes on the CPU (gloo) do what one does: reward training, PRFL with its regulariser, full fine-tuning."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prfl.objective.base import Mean
from prfl.training.distributed import make_accelerator
from prfl.training.metrics import average_metrics
from prfl.training.run_folder import RunFolder, read_metrics
from prfl.utils import processes
from prfl.utils.errors import PrflError
from tests import pictures
from tests.few_levels import measure_few
from tests.training import two_processes

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ended:
    """The project folder; what each process found out, its exit code, and what it wrote to its console."""

    folder: Path
    facts: list[dict]
    codes: list[int]
    output: list[str]

    def metrics(self, run: str) -> list[dict]:
        return read_metrics(self.folder / "runs" / run / "metrics.jsonl")

    def weights(self, run: str, step: int, file: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "runs" / run / "checkpoints" / f"step-{step:06d}" / f"{file}.safetensors")


def start(folder: Path, port: int) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.Popen(
        [sys.executable, "-m", "tests.training.two_processes", str(folder), str(port)],
        env=environment, cwd=ROOT, start_new_session=True,
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline_folder: Path) -> Ended:
    """One process here, then two; at the end of theirs the second one kills itself."""
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pictures.leave_out(patch)
        measure_few(patch)
        two_processes.write_project(tiny_pipeline_folder)
        for name in two_processes.STAGES:
            assert not two_processes.train(name, f"one-{name}")
        assert not two_processes.train("prfl", "mixed-one-two", "training.steps=2", *two_processes.UNWATCHED)
        two_processes.draw("one-prfl")
        both = start(folder, free_port())
        try:
            both.wait(timeout=1200)
        finally:
            if both.poll() is None:
                os.killpg(both.pid, signal.SIGKILL)
        output = [path.read_text() for path in sorted(folder.glob("output-*.txt"))]
        facts = [json.loads(path.read_text()) for path in sorted(folder.glob("facts-*.json"))]
        assert len(facts) == 2, "\n".join(output)
        assert not two_processes.train("prfl", "mixed-two-one", *two_processes.UNWATCHED)
    return Ended(folder, facts, json.loads((folder / "codes.json").read_text()), output)


def same_but_time(one: dict, two: dict) -> None:
    spent = ("seconds/", "regulariser/seconds/", "peak_gib")
    one, two = ({k: v for k, v in record.items() if not k.startswith(spent)} for record in (one, two))
    assert one.keys() == two.keys() and one.pop("phase") == two.pop("phase")
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("stage", two_processes.STAGES)
def test_metrics_are_those_of_one_process(ended, stage):
    """A batch of 3 on two processes is uneven, and the reward's labels are not all there."""
    one, two = ended.metrics(f"one-{stage}"), ended.metrics(f"two-{stage}")
    assert [record["step"] for record in one] == [record["step"] for record in two]
    for first, second in zip(one, two, strict=True):
        same_but_time(first, second)
    steps = [record for record in two if "seconds/step" in record]
    assert {"gradient_norm", "seconds/processes", "peak_gib"} <= steps[0].keys()
    assert "seconds/processes" not in next(record for record in one if "seconds/step" in record)
    if stage == "prfl":
        assert steps[0]["reward_std"] > 0 and {"sampled_step", "distance", "regulariser/loss"} <= steps[0].keys()
        assert any("validation/motion" in r and "validation/diversity" in r for r in two)


@pytest.mark.slow
@pytest.mark.parametrize("stage", two_processes.STAGES)
def test_gradients_and_weights_are_those_of_one_process(ended, stage):
    """AdamW's first average holds the gradients.  It divides by their size, so where one is nearly zero its rounding
    shows in the weight: in few places."""
    step = two_processes.STAGES[stage]
    one, two = (ended.weights(f"{run}-{stage}", step, "optimizer") for run in ("one", "two"))
    names = [name for name in one if name.endswith("/exp_avg")]
    assert names and one.keys() == two.keys()
    size = max(float(one[name].abs().max()) for name in names)
    assert max(float((one[name] - two[name]).abs().max()) for name in names) < 1e-4 * size
    for file in ("weights", "ema"):
        one, two = (ended.weights(f"{run}-{stage}", step, file) for run in ("one", "two"))
        apart = torch.cat([(one[name] - two[name]).abs().flatten() for name in one])
        assert float((apart > 1e-6).double().mean()) < 0.01 and float(apart.max()) <= 2e-3 * step


@pytest.mark.slow
@pytest.mark.parametrize("order", ["one-two", "two-one"])
def test_a_run_goes_on_with_another_number_of_processes(ended, order):
    straight, mixed = ended.metrics("one-prfl"), ended.metrics(f"mixed-{order}")
    straight, mixed = ([r for r in records if "seconds/step" in r] for records in (straight, mixed))
    assert [(r["step"], r["rollout_age"]) for r in mixed] == [(1, 0), (2, 1), (3, 2), (4, 0)]
    assert [("seconds/processes" in r) for r in mixed] == [order == "two-one"] * 2 + [order == "one-two"] * 2
    for first, second in zip(straight, mixed, strict=True):
        same_but_time(first, second)


@pytest.mark.slow
def test_cache_and_samples_are_shared_out(ended):
    one, two = ended.facts
    clips = 3 * sum(len(two_processes.PROMPTS[split]) for split in ("train", "validation"))
    assert one["reward"]["encoded"] + two["reward"]["encoded"] == clips
    assert min(one["reward"]["encoded"], two["reward"]["encoded"]) >= clips // 2
    # A reward's stage has those of the clips and the empty one; a policy's, those that its steps meet; each once.
    held = {name: len(some) for name, some in two_processes.PROMPTS.items()}
    assert one["reward"]["prompts"] + two["reward"]["prompts"] == 1 + held["train"] + held["validation"]
    assert one["full"]["prompts"] + two["full"]["prompts"] == 1 + held["train"]
    assert min(each[stage]["prompts"] for each in (one, two) for stage in ("reward", "full")) >= 2
    # Two rounds of 3 prompts with 2 samples; at the end 1 sample of base and policy.
    assert one["prfl"].get("sampled", 0) + two["prfl"]["sampled"] == 2 * 6 + 2
    assert one["prfl"]["sampled"] >= 4 and two["prfl"]["sampled"] >= 4


@pytest.mark.slow
def test_drawn_and_steered_videos_are_shared_out(ended):
    one, two = (facts["drawn"] for facts in ended.facts)
    assert one["steered"] + two["steered"] == one["sampled"] // 2 + two["sampled"] // 2 == 3
    assert min(one["steered"], two["steered"]) == 1
    steered = [
        json.loads(next((ended.folder / f"runs/{run}-prfl/samples").glob("steered-*/results.json")).read_text())
        for run in ("one", "two")
    ]
    for first, second in zip(*(each["videos"] for each in steered), strict=True):
        (kept,), (same,) = first["kept"], second["kept"]
        assert (first["prompt"], kept["origin"], first["calls"]) == (second["prompt"], same["origin"], second["calls"])
        ((node, score),), ((same_node, same_score),) = kept["trace"], same["trace"]
        assert node == same_node and score == pytest.approx(same_score, rel=1e-4)


@pytest.mark.slow
def test_results_are_those_of_one_process(ended):
    one, two = (
        json.loads((ended.folder / f"runs/{run}-reward/reward_eval.json").read_text()) for run in ("one", "two")
    )
    for first, second in zip(one["rows"], two["rows"], strict=True):
        assert first["accuracy"] == pytest.approx(second["accuracy"])
    files = [
        # Folders of steered videos are named by the weights, which differ in their last bits.
        sorted(re.sub("best_of-[0-9a-f]+", "best_of", str(p.relative_to(run))) for p in run.rglob("*") if p.is_file())
        for run in (ended.folder / "runs/one-prfl", ended.folder / "runs/two-prfl")
    ]
    assert files[0] == files[1] and "samples/final/results.json" in files[0]


@pytest.mark.slow
def test_only_the_main_process_speaks(ended):
    assert "prfl: runs/two-prfl" in ended.output[0] and "sampled_step" in ended.output[0]
    assert ended.output[1] == ""


@pytest.mark.slow
def test_processes_with_other_weights_are_stopped(ended):
    for facts in ended.facts:
        assert "the processes do not train the same weights" in facts["other weights"]


@pytest.mark.slow
def test_a_killed_process_ends_the_run_with_a_message(ended):
    assert ended.codes == [0, -9]  # the child reports the command's exit code 2 by its message
    message = ended.facts[0]["killed"]
    assert "process 0 of 2 lost another one" in message and "goes on from its last checkpoint" in message
    assert [r["step"] for r in ended.metrics("killed") if "loss" in r] == [1]
    assert (ended.folder / "runs/killed/checkpoints/step-000001/state.json").exists()


# ------------------------------------------------------------------------------------------------ one process is enough


def test_metrics_of_parts_are_those_of_the_whole():
    parts = [
        {"reward": 2.0, "reward_std": 1.0, "accuracy": Mean(1.0, 1), "seconds/reward": 1.0, "latents/max": 3.0},
        {"reward": 5.0, "reward_std": 0.0, "accuracy": Mean(0.0, 3), "seconds/reward": 2.0, "latents/max": 1.0},
    ]
    found = average_metrics(parts, [2, 1])  # rewards 1, 3 and 5
    assert found["reward"] == 3.0 and found["reward_std"] == pytest.approx((8 / 3) ** 0.5)
    assert found["accuracy"] == 0.25 and found["seconds/reward"] == 3.0 and found["latents/max"] == 3.0
    again = pickle.loads(pickle.dumps(Mean(0.5, 7)))
    assert (again, again.count) == (0.5, 7)


def test_other_errors_are_not_taken_for_a_lost_process(monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(RuntimeError, match="shape"), processes.peer_errors():
        raise RuntimeError("shape mismatch")
    with pytest.raises(PrflError, match="lost another one: .*closed by peer"), processes.peer_errors():
        raise RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer")


def test_processes_that_accelerate_would_not_join_are_refused(tmp_path, monkeypatch):
    make_accelerator(RunFolder(tmp_path), "cpu", [])  # accelerate's first in a process would wait for the other one
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PrflError, match="2 processes were started, and accelerate makes 1"):
        make_accelerator(RunFolder(tmp_path), "cpu", [])
