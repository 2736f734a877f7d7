"""The critic on tiny random Qwen3-VL and Qwen2.5-VL: against their stock forward pass, and finite differences."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prfl.backbone.condition import Ask, Condition
from prfl.config import load_config
from prfl.estimate.work import Counted
from prfl.factory.reward import build_public_reward
from prfl.reward.critic import CriticReward, load_critic
from prfl.reward.critic_sizes import CountedCritic
from prfl.reward.questions import FITS, Question, Questions, read_questions, write_questions
from prfl.utils.errors import PrflError
from tests.critic import FAMILIES, QUESTIONS, tiny_vlm, tiny_words

VADER = Path(__file__).parents[2] / "configs/tiny/vader.yaml"
PROMPTS = ("a red circle moves left", "a blue square")


def condition(*prompts: str) -> Condition:
    return Condition({}, tuple(Ask(prompt) for prompt in prompts))


def clip(count: int = 2, frames: int = 5) -> Tensor:
    """Pixels away from both clamps, of sizes that no patch divides."""
    return torch.rand(count, 3, frames, 13, 19, generator=torch.Generator().manual_seed(1)).double() * 0.6 - 0.3


@pytest.fixture(scope="module", params=FAMILIES)
def critic(request: pytest.FixtureRequest) -> CriticReward:
    words = tiny_words()
    network = tiny_vlm(request.param, words).double()
    return CriticReward(network, words, QUESTIONS, frames=4, seconds=2.0)


def stock(critic: CriticReward, pixels: Tensor, question: Question, seconds: list[float]) -> Tensor:
    """One video and one question through the model's own forward pass, vision tower and all; the log of p."""
    values, grid = critic.look.seen(pixels)
    tokens = int(grid[0].prod()) // critic.look.merge**2
    ((item,),) = critic.tokens_of([[question]], tokens, seconds)
    ids = torch.tensor([[*item.tokens, *item.answer]])
    times = {}
    if critic.network.config.model_type == "qwen2_5_vl":
        times = {"second_per_grid_ts": torch.tensor([2 * (seconds[-1] - seconds[0]) / 3])}
    critic.network.model.rope_deltas = None
    logits = critic.network(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values_videos=values, video_grid_thw=grid,
        mm_token_type_ids=(ids == critic.chat.video) * 2, use_cache=False, **times,
    ).logits[0]  # fmt: skip
    if item.answer:
        return logits[len(item.tokens) - 1 : -1].log_softmax(-1)[range(len(item.answer)), item.answer].mean()
    yes, no = (logits[-1, critic.chat.words[word]].logsumexp(0) for word in ("yes", "no"))
    return F.logsigmoid(yes - no if question.answer == "yes" else no - yes)


def test_all_questions_on_one_vision_pass_are_those_of_stock_passes_one_by_one(critic: CriticReward) -> None:
    """Scores, and gradients of the log-probabilities, of two prompts with different questions of different lengths."""
    pixels = clip().requires_grad_()
    chosen = [0, 1, 3, 4]
    assert critic.chosen(5) == chosen
    passes = []
    hook = critic.network.model.visual.register_forward_hook(lambda *_: passes.append(1))
    scores = critic(pixels, condition(*PROMPTS))
    (gradient,) = torch.autograd.grad(sum(F.logsigmoid(values).sum() for values in scores.values()), pixels)
    hook.remove()
    assert len(passes) == 1, "the tower is run once, forward and backward"

    other = clip().requires_grad_()
    total, asked = torch.zeros(()).double(), 0
    for video, prompt in enumerate(PROMPTS):
        for question in QUESTIONS.of(prompt):
            log_p = stock(critic, other[video : video + 1, :, chosen], question, [0.5 * frame for frame in chosen])
            torch.testing.assert_close(F.logsigmoid(scores[question.dimension][video]), log_p, rtol=1e-5, atol=1e-7)
            total, asked = total + log_p, asked + 1

    # What is not asked of a video has score 0 and no gradient.
    zeros = [(name, video) for name, values in scores.items() for video in range(2) if values[video] == 0]
    assert zeros == [("colour", 1), ("speed", 1), ("look", 0)] and asked == 7
    (expected,) = torch.autograd.grad(total, other)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7 * float(expected.abs().max()))
    assert (gradient.abs().amax((0, 1, 3, 4)) > 0).tolist() == [frame in chosen for frame in range(5)]


def test_finite_differences(critic: CriticReward) -> None:
    pixels = clip().requires_grad_()
    direction = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(2)).double()

    step = 1e-3  # the models' own norms are in float32: a smaller one would measure their rounding
    scores = critic(pixels, condition(*PROMPTS))
    with torch.no_grad():
        up, down = (critic(pixels + sign * step * direction, condition(*PROMPTS)) for sign in (1, -1))
    for name, values in scores.items():
        (gradient,) = torch.autograd.grad(values.sum(), pixels, retain_graph=True)
        difference = (up[name] - down[name]).sum() / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(float(difference), rel=3e-3), name


@contextmanager
def kept_bytes() -> Iterator[list[int]]:
    """Bytes that autograd keeps, each storage once."""
    kept: list[Tensor] = []  # they stay alive, so that no storage takes the place of another
    total = [0]

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    total[0] = sum(storages.values())


def test_memory_is_flat_in_the_number_of_questions() -> None:
    words = tiny_words()
    network = tiny_vlm("qwen3_vl", words)
    sizes = []
    for count in (1, 8):
        asked = [Question(f"{number}", "is its colour red?", "yes") for number in range(count)]
        critic = CriticReward(network, words, Questions({"*": asked}), frames=4)
        with kept_bytes() as kept:
            scores = critic(clip().float().requires_grad_(), condition("a", "b"))
        assert len(scores) == count
        sizes.append(kept[0])
    assert sizes[0] == sizes[1] > 0


def test_a_prompt_without_questions_is_an_error_before_anything_runs() -> None:
    questions = Questions({"a": [Question("colour", "is its colour red?", "yes")]})
    with pytest.raises(PrflError, match="(?s)nothing is asked of the prompt 'b'.*prfl questions"):
        questions.of("b")
    with pytest.raises(PrflError, match="(?s)2 rows are wrong.*'b'.*'c'"):
        questions.check(["a", "b", "c"])
    assert Questions({"*": [FITS]}).of("a dog")[0].ask == 'Does the video show this: "a dog"? Answer with yes or no.'


def test_files_of_questions(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    write_questions(file, QUESTIONS)
    again = read_questions(file)
    assert again.by_prompt == QUESTIONS.by_prompt and again.dimensions == QUESTIONS.dimensions
    # A prompt's own question of a dimension goes before the one that is asked of all.
    assert [question.dimension for question in again.of("a blue square")] == ["shape", "look", "steady"]

    row = {"prompt": "a", "questions": [{"dimension": "x", "ask": "?", "answer": "yes"}] * 2}
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(PrflError, match="jsonl:1.*two questions are of the dimension 'x'"):
        read_questions(file)
    file.write_text((json.dumps(row | {"questions": row["questions"][:1]}) + "\n") * 2)
    with pytest.raises(PrflError, match="jsonl:2.*stands twice"):
        read_questions(file)


def test_loads_a_saved_model_and_refuses_others(tmp_path: Path) -> None:
    words = tiny_words()
    network = tiny_vlm("qwen2_5_vl", words)
    network.save_pretrained(tmp_path / "vlm")
    words.save_pretrained(tmp_path / "vlm")
    loaded = load_critic(str(tmp_path / "vlm"), QUESTIONS, frames=4, dtype="bfloat16")
    pixels = clip().float()
    before = CriticReward(network, words, QUESTIONS, frames=4)(pixels, condition(*PROMPTS))
    after = loaded(pixels, condition(*PROMPTS))
    for name, values in before.items():
        torch.testing.assert_close(after[name], values, rtol=0.1, atol=0.1)
        assert after[name].dtype == torch.float32

    with pytest.raises(PrflError, match="nothing is asked"):
        load_critic(str(tmp_path / "vlm"), Questions({"a": [FITS]}), prompts=["b"])
    (tmp_path / "vlm/config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(PrflError, match="a bert is no critic"):
        load_critic(str(tmp_path / "vlm"))


def test_a_config_loads_its_critic_and_asks_of_the_runs_own_prompts(tmp_path: Path) -> None:
    words = tiny_words()
    tiny_vlm("qwen3_vl", words).save_pretrained(tmp_path / "vlm")
    words.save_pretrained(tmp_path / "vlm")
    config = load_config(
        VADER,
        [
            "data.generator=null", "objective={name: vader}", "reward={space: pixel, shape: linear, aggregate: "
            f"logsigmoid, critic: {{model: {tmp_path / 'vlm'}, questions: shapes, dtype: float32}}}}",
        ],
    )  # fmt: skip
    critic = build_public_reward(config.reward.public[0], config, SimpleNamespace(facts=SimpleNamespace(device="cpu")))
    assert critic.dimensions == ("shape", "colour", "direction", "speed", "steadiness")
    assert (
        critic.seconds == 2.0 and critic.questions.of("a red circle moves left slowly")[1].ask == "is its colour red?"
    )


def test_a_dry_run_counts_as_many_passes_of_the_language_model_as_there_are_questions() -> None:
    words = tiny_words()
    for family in FAMILIES:
        network = tiny_vlm(family, words).to("meta")
        few, many = (
            CountedCritic(network, Questions({"*": [Question(f"{n}", "?", "yes") for n in range(count)]}), 4, 10**6)
            for count in (1, 3)
        )
        work = []
        for critic in (few, many):
            pixels = torch.empty(1, 3, 5, 16, 24, device="meta", requires_grad=True)
            with Counted() as counted:
                total = torch.stack(list(critic(pixels, condition("a")).values())).sum()
                torch.autograd.grad(total, pixels)
            work.append(counted)
        flops = [sum(count for (_, unit), count in each.amounts.items() if unit == "GFLOP") for each in work]
        assert flops[1] > 1.5 * flops[0]
        assert work[1].peak < 1.2 * work[0].peak, "one question's activations at a time"
