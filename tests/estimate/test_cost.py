"""Hours: the work of the run's own shapes is what bench/step_counts.py counted, and adds up over the evaluations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from prfl.config import load_config
from prfl.config.schema import Config
from prfl.estimate import nfe, tables
from prfl.estimate.cost import DECODED, Cost, count_cost, total_work
from prfl.estimate.live_tensors import LiveBytes, fused_on_meta
from prfl.estimate.memory import predict_memory
from prfl.estimate.parts import Shapes
from prfl.estimate.phases import decoding, network_call
from prfl.estimate.work import CARD_SIZES, CONVOLUTION, H200, PRODUCT, REST, Card, Counted, Work
from prfl.factory.backbone import build_architecture
from tests.models import copied_architecture
from tests.slow import slow_unless

REPOSITORY = Path(__file__).parents[2]
STEP = json.loads((REPOSITORY / "bench/results/step.json").read_text())["calls"]


def costs_of(config: Config) -> dict[str, Cost]:
    model = copied_architecture(config)
    return {cost.count.name: cost for cost in count_cost(config, model, predict_memory(config, model).phases)}


def gflop(work: Work | None, kind: str = PRODUCT) -> float:
    assert work is not None
    return work.amounts.get((kind, "GFLOP"), 0.0)


@pytest.mark.parametrize("call", slow_unless("gradient".__eq__, ["rollout", "gradient"]))
def test_a_call_is_the_one_of_the_committed_counts(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    size = ["data.height=480", "data.width=832", "backbone.kernels=torch", "backbone.device=cuda"]
    config = load_config("configs/wan2.1-14b/prfl.yaml", size)
    model = build_architecture(config)
    for parameter in model.parameters("policy").values():
        parameter.grad = torch.zeros_like(parameter)
    with fused_on_meta("cuda"):
        part = network_call(config, model, Shapes(model, config), 1, gradient=call == "gradient")
    committed = STEP[f"14B 480p, {call}, torch"]
    for kind, amounts in committed.items():
        assert gflop(part.work, kind) == pytest.approx(amounts["GFLOP"], rel=1e-3), kind
        assert part.work.amounts[kind, "GB"] == pytest.approx(amounts["GB"], rel=1e-2), kind
    seconds = sum(amounts["ms at the roofline"] for amounts in committed.values()) / 1e3
    assert H200.seconds(part.work) == pytest.approx(seconds, rel=1e-2)


def test_what_operations_count() -> None:
    with LiveBytes():  # which remembers, for itself, that a product was run on tensors of these sizes
        torch.empty(3, 5, device="meta") @ torch.empty(5, 7, device="meta")
    with Counted() as counted:
        a, b = torch.empty(3, 5, device="meta"), torch.empty(5, 7, device="meta")
        F.conv3d(torch.empty(1, 2, 4, 4, 4, device="meta"), torch.empty(6, 2, 1, 1, 1, device="meta"))
        (a @ b).add_(1)
    work = counted.work
    assert gflop(work) == pytest.approx(2 * 3 * 5 * 7 / 1e9)
    assert work.amounts[PRODUCT, "GB"] == pytest.approx(4 * (15 + 35 + 21) / 1e9)
    assert gflop(work, CONVOLUTION) == pytest.approx(2 * 2 * 6 * 64 / 1e9)
    assert work.amounts[REST, "launches"] == 1
    twice = work + work
    assert twice.amounts == (work * 2).amounts and Work().amounts == {}


def test_seconds_are_the_larger_of_arithmetic_and_traffic() -> None:
    half = Card("half", tensor=H200.tensor / 2, single=H200.single, bandwidth=H200.bandwidth)
    heavy, wide = (
        Work({(PRODUCT, "GFLOP"): flops, (PRODUCT, "GB"): size}) for flops, size in ((680e3, 1.0), (1.0, 4200))
    )
    assert H200.seconds(heavy) == pytest.approx(1) and half.seconds(heavy) == pytest.approx(2)
    assert H200.seconds(wide) == pytest.approx(1) and half.seconds(wide) == pytest.approx(1)
    assert H200.seconds(heavy + wide) == pytest.approx(1, rel=0.01)
    assert H200.seconds(heavy, in_float32=True) == pytest.approx(680 / 67)
    for size in CARD_SIZES.values():
        low, high = size.hours(heavy + wide)
        assert low < high and size.gib < size.gigabytes


def test_the_evaluations_of_a_run_and_their_work(make: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "validation.txt").write_text("a square\n")
    evaluated = "evaluation={every: 5, prompts_per_round: 1, samples_per_prompt: 2, batch: 1}"
    costs = costs_of(make(evaluated, f"data.prompts.validation={tmp_path}/validation.txt"))
    forward = gflop(costs[nfe.ROLLOUT].work) / costs[nfe.ROLLOUT].count.total
    assert forward > 0
    for name in (nfe.DISTANCE, nfe.SAMPLING):
        assert gflop(costs[name].work) == pytest.approx(forward * costs[name].count.total)
    gradient = gflop(costs[nfe.GRADIENT].work) / costs[nfe.GRADIENT].count.total
    assert 2 * forward < gradient < 4 * forward
    assert gflop(costs[DECODED].work, CONVOLUTION) > 0 and costs[DECODED].count.total == 4
    assert gflop(costs[nfe.REWARD].work) > 0
    assert gflop(total_work(list(costs.values()))) == pytest.approx(sum(gflop(cost.work) for cost in costs.values()))


def test_checkpointed_blocks_are_counted_once(make: Callable[..., Config]) -> None:
    plain, checkpointed = costs_of(make()), costs_of(make("backbone.checkpointing=full"))
    assert checkpointed[nfe.RECOMPUTED].work is None
    again = gflop(checkpointed[nfe.GRADIENT].work) - gflop(plain[nfe.GRADIENT].work)
    forwards = gflop(plain[nfe.ROLLOUT].work) * plain[nfe.GRADIENT].count.total / plain[nfe.ROLLOUT].count.total
    assert 0.8 * forwards < again < 1.01 * forwards


@pytest.mark.parametrize("gradient", ["both", "cond"])
def test_both_branches_of_guidance(make: Callable[..., Config], gradient: str) -> None:
    plain = costs_of(make())
    guided = costs_of(make(f"rollout.guidance={{scale: 3.0, gradient: {gradient}}}"))
    assert guided[nfe.ROLLOUT].count.total == 2 * plain[nfe.ROLLOUT].count.total
    assert gflop(guided[nfe.ROLLOUT].work) == pytest.approx(2 * gflop(plain[nfe.ROLLOUT].work), rel=1e-3)
    factor = 2 if gradient == "both" else 1
    assert gflop(guided[nfe.GRADIENT].work) == pytest.approx(factor * gflop(plain[nfe.GRADIENT].work), rel=1e-3)


def test_training_without_a_rollout(make: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text("")
    head = ["reward={space: latent, head: {dimensions: [a], blocks: [1]}}", "backbone.adapter=null"]
    clips = f"data.manifest={tmp_path}/m.jsonl"
    trained = costs_of(make(*head, clips, "objective={name: preference, loss: bce}"))
    assert list(trained) == [nfe.REWARD] and gflop(trained[nfe.REWARD].work) > 0


def test_a_long_video_is_decoded_as_a_straight_line(
    make: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make("data.frames=37")
    model = build_architecture(config)
    shapes = Shapes(model, config)
    short = decoding(model, shapes, 2, "decode", 0)
    monkeypatch.setattr("prfl.estimate.phases.FEW_FRAMES", 99)
    whole = decoding(model, shapes, 2, "decode", 0)
    assert short.bytes == pytest.approx(whole.bytes, rel=0.02)
    assert gflop(short.work, CONVOLUTION) == pytest.approx(gflop(whole.work, CONVOLUTION), rel=1e-6)


def test_hours_in_words() -> None:
    assert tables.hours_text((0.123, 9.96)) == "0.12 to 10" and tables.hours_text((12.4, 1234.5)) == "12 to 1,234"
    assert tables.smallest_card(30 * 2**30).gigabytes == 48 and tables.smallest_card(10**15).gigabytes == 141
