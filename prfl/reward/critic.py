"""A frozen vision-language model as a critic: it is asked about a video, and the gradient of its answers is followed.

    score of a question = log-odds of the answer that is wanted
        yes or no:    l(yes) - l(no), each the logsumexp over the word's spellings; ``no`` changes the sign
        a text:       log p - log(1 - p), p the exponential of the mean log-probability of its tokens, teacher forced

so that ``aggregate: logsigmoid`` is exactly the sum of log p(yes | yes or no), or of the texts' mean log-probabilities.
After Diffusion-DRF (arXiv 2601.04153): no labels, no reward is trained.  Its first version asks for yes or no, its
second for free answers; the equations here are this package's own reading.
Qwen3-VL and Qwen2.5-VL as transformers has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    AutoConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from prfl.backbone.condition import Condition
from prfl.reward.look import computed_again, evenly_spaced
from prfl.reward.public import FrozenReward, load_error, load_network
from prfl.reward.questions import EVERY, FITS, Question, Questions, read_questions
from prfl.reward.qwen_look import QwenLook
from prfl.reward.scores import Scores
from prfl.reward.tokens import load_tokenizer
from prfl.utils.errors import PrflError
from prfl.utils.video_size import VideoSize

EXAMPLE = "Qwen/Qwen3-VL-4B-Instruct"
FAMILIES = {"qwen3_vl": Qwen3VLForConditionalGeneration, "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration}
SPELLINGS = {answer: (answer, answer.title(), answer.upper()) for answer in ("yes", "no")}
SURE = 1e-6  # the least doubt in a free answer: beyond it there is nothing to gain, and log(1 - p) is lost in rounding


class Asked(NamedTuple):
    """One question of one video: the tokens before the answer, those of a free answer, and how it is scored."""

    video: int
    question: Question
    tokens: list[int]
    answer: list[int]


@dataclass
class Chat:
    """Turns questions about a video into the tokens that a Qwen-VL reads; special tokens are known by their numbers."""

    tokenizer: Any
    config: Any  # of the model

    def __post_init__(self) -> None:
        if not self.tokenizer.chat_template:
            fix = f"give a folder or hub id whose tokenizer has a chat template, as {EXAMPLE}"
            raise PrflError("the tokenizer has no chat template", where="reward.critic.model", fix=fix)
        self.start, self.video, self.end = (
            self.config.vision_start_token_id, self.config.video_token_id, self.config.vision_end_token_id
        )  # fmt: skip
        self.words = {answer: self._spellings(answer) for answer in SPELLINGS}
        self.around = lru_cache(maxsize=4096)(self._around)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _spellings(self, answer: str) -> list[int]:
        """List the single tokens that say yes, or no."""
        unknown = self.tokenizer.unk_token_id
        encoded = [self.encode(space + word) for word in SPELLINGS[answer] for space in ("", " ")]
        tokens = sorted({ids[0] for ids in encoded if len(ids) == 1 and ids[0] != unknown})
        if not tokens:
            fix = f"take a model whose tokenizer has the word, as {EXAMPLE}, or ask for free answers only"
            raise PrflError(f"no single token of the model says '{answer}'", where="reward.critic.model", fix=fix)
        return tokens

    def _around(self, ask: str) -> tuple[list[int], list[int]]:
        """Return the tokens before and behind the video in a chat with this one question."""
        content = [{"type": "video", "video": ""}, {"type": "text", "text": ask}]
        messages = [{"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        mark = "".join(self.tokenizer.convert_ids_to_tokens([self.start, self.video, self.end]))
        before, there, behind = text.partition(mark)
        if not there:
            what = f"the chat template writes no {mark} where a video is"
            raise PrflError(what, where="reward.critic.model", fix=f"take a model whose template does, as {EXAMPLE}")
        return self.encode(before), self.encode(behind)

    def pictures(self, each: int, seconds: Sequence[float]) -> list[int]:
        """Return a video's tokens: ``each`` for a group of frames, whose times Qwen3-VL reads in words."""
        if self.config.model_type != "qwen3_vl":
            return [self.start, *[self.video] * (each * len(seconds)), self.end]
        groups = [
            [*self.encode(f"<{time:.1f} seconds>"), self.start, *[self.video] * each, self.end] for time in seconds
        ]
        return sum(groups, [])


class CriticReward(FrozenReward):
    """``reward(pixels, condition)`` gives {dimension: (b,)}, log-odds, differentiable in the pixels.

    The vision tower is run once for all questions, forward and backward.  Each question's pass through the language
    model frees its activations and is computed again in the backward pass, so that memory does not grow with the
    number of questions: one graph of the language model, and the tower's.
    A video of which a dimension's question is not asked has score 0 there, and no gradient.

    frames: how many the model sees, evenly spaced.  seconds: from the first to the last frame of a whole clip.
    """

    def __init__(
        self, network: Any, tokenizer: Any, questions: Questions, *, frames: int = 8, most_pixels: int = 200_704,
        seconds: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(questions.dimensions, network)
        self.network, self.questions, self.frames, self.seconds = network, questions, frames, seconds
        self.chat = Chat(tokenizer, network.config)
        self.look = QwenLook.of(network.config, most_pixels)

    def __call__(self, pixels: Float[Tensor, "b 3 f h w"], condition: Condition, times: Tensor | None = None) -> Scores:
        """Score videos.  times: of the frames in the clip, from 0 to 1; None is evenly from first to last."""
        chosen = self.chosen(pixels.shape[2])
        times = torch.linspace(0, 1, pixels.shape[2]) if times is None else times.cpu()
        values, grid = self.look.seen(pixels[:, :, chosen])
        seconds = [float(times[frame]) * self.seconds for frame in chosen]
        features = self.watched(values, grid)
        questions = [self.questions.of(ask.prompt) for ask in condition.asks]
        asked = self.tokens_of(questions, features[0].shape[1], seconds)

        answered: dict[tuple[str, int], Tensor] = {}
        for group in grouped(asked):
            read = partial(self.log_odds, group=group, grid=grid, seconds=seconds)
            odds = computed_again(read, *features)
            names = [(item.question.dimension, item.video) for item in group]
            answered |= dict(zip(names, odds.unbind(), strict=True))
        unasked = next(iter(answered.values())).new_zeros(())
        videos = range(len(pixels))
        return {
            name: torch.stack([answered.get((name, video), unasked) for video in videos]) for name in self.dimensions
        }

    def chosen(self, count: int) -> list[int]:
        """Return which of so many frames the model sees."""
        wanted = min(self.frames, count)
        return evenly_spaced(count, wanted) if wanted > 1 else [count // 2]

    def watched(self, values: Float[Tensor, "n d"], grid: Int[Tensor, "b 3"]) -> list[Float[Tensor, "b tokens w"]]:
        """Run the vision tower: its tokens for the language model, and those that Qwen3-VL adds to its first layers."""
        output = self.network.model.get_video_features(values.to(self.network.dtype), grid, return_dict=True)
        deeper = getattr(output, "deepstack_features", None) or ()
        return [torch.stack(tuple(videos)) for videos in (output.pooler_output, *deeper)]

    def tokens_of(
        self, asked: Sequence[Sequence[Question]], tokens: int, seconds: Sequence[float]
    ) -> list[list[Asked]]:
        """Write each video's questions as tokens.  tokens: of a whole video.  seconds: the time of each frame."""
        step = self.look.step
        filled = [*seconds, *[seconds[-1]] * (-len(seconds) % step)]
        times = [(filled[first] + filled[first + step - 1]) / 2 for first in range(0, len(filled), step)]
        pictures = self.chat.pictures(tokens // len(times), times)

        rows = []
        for video, questions in enumerate(asked):
            row = []
            for question in questions:
                before, behind = self.chat.around(question.ask)
                answer = [] if question.yes_or_no else self.chat.encode(question.answer)
                row.append(Asked(video, question, [*before, *pictures, *behind], answer))
            rows.append(row)
        return rows

    def log_odds(
        self, *features: Float[Tensor, "b tokens w"], group: Sequence[Asked], grid: Int[Tensor, "b 3"],
        seconds: Sequence[float],
    ) -> Float[Tensor, " n"]:  # fmt: skip
        """Ask one question of each of some videos, all of one length.  features: of the vision tower, of all videos."""
        device = features[0].device
        rows = torch.tensor([item.video for item in group], device=device)
        ids = torch.tensor([[*item.tokens, *item.answer] for item in group], device=device)
        length = len(group[0].answer)
        logits = self.continued(ids, grid[rows], seconds, [values[rows] for values in features], keep=length + 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if not length:
            return self.yes_or_no(logits[:, -1], group)
        log_p = logits[:, :-1].log_softmax(-1).gather(2, ids[:, -length:, None]).mean((1, 2)).clamp(max=-SURE)
        return log_p - torch.log(-torch.expm1(log_p))

    def continued(
        self, ids: Int[Tensor, "n length"], grid: Int[Tensor, "n 3"], seconds: Sequence[float],
        features: Sequence[Float[Tensor, "n tokens w"]], keep: int = 0,
    ) -> Float[Tensor, "n kept words"]:  # fmt: skip
        """Run the language model; returns the logits of the last ``keep`` tokens' successors, 0 is of all.

        seconds: the time of each frame that was looked at.  features: what ``watched`` returned.
        """
        video = BaseModelOutputWithDeepstackFeatures(
            pooler_output=tuple(features[0]), deepstack_features=[tuple(values) for values in features[1:]]
        )
        types = (ids == self.chat.video) * 2
        return self.network(
            input_ids=ids,
            position_ids=self.positions(ids[:1], types[:1], grid[:1], seconds).expand(-1, len(ids), -1),
            mm_token_type_ids=types,
            mm_encoder_outputs={"video": video},
            use_cache=False,
            logits_to_keep=keep,
        ).logits

    def positions(
        self, ids: Int[Tensor, "1 length"], types: Int[Tensor, "1 length"], grid: Int[Tensor, "1 3"],
        seconds: Sequence[float],
    ) -> Int[Tensor, "3 1 length"]:  # fmt: skip
        """Return the places of tokens in time, height and width: the same for all videos of one size.

        Left to itself the model takes those of the sequence before (``rope_deltas``), or pictures for text.
        """
        times = {}
        if self.network.config.model_type == "qwen2_5_vl":  # it reads the time between two groups of frames
            gap = (seconds[-1] - seconds[0]) / max(len(seconds) - 1, 1) * self.look.step
            times = {"second_per_grid_ts": torch.tensor([gap], device=ids.device)}
        return self.network.model.get_rope_index(ids, mm_token_type_ids=types, video_grid_thw=grid, **times)[0]

    def yes_or_no(self, logits: Float[Tensor, "n words"], group: Sequence[Asked]) -> Float[Tensor, " n"]:
        """Return how much likelier the wanted one of yes and no is, in log-odds."""
        yes, no = (logits[:, words].logsumexp(1) for words in (self.chat.words["yes"], self.chat.words["no"]))
        signs = [1.0 if item.question.answer.casefold() == "yes" else -1.0 for item in group]
        return (yes - no) * torch.tensor(signs).to(logits)


def grouped(asked: Sequence[Sequence[Asked]]) -> list[list[Asked]]:
    """Take the questions of all videos together that are of one length: at most one of each video in a group.

    So no sequence is padded, and a group is no larger than the batch.
    """
    groups: dict[tuple[int, int, int], list[Asked]] = {}
    for row in asked:
        for number, item in enumerate(row):
            groups.setdefault((number, len(item.tokens), len(item.answer)), []).append(item)
    return list(groups.values())


def load_critic(
    model: str, questions: Questions | str | None = None, frames: int = 8, most_pixels: int = 200_704,
    dtype: Literal["float32", "bfloat16"] = "float32", revision: str | None = None,
    device: torch.device | str = "cpu", clip: VideoSize | None = None, prompts: Sequence[str] = (),
) -> CriticReward:  # fmt: skip
    """Load a Qwen3-VL or Qwen2.5-VL from a folder or hub id.

    questions: a file of them; None asks whether the video fits its prompt.  clip: of the videos, for their times.
    prompts: those that will be asked about.  Raises PrflError.
    """
    if isinstance(questions, str):
        questions = read_questions(questions)
    asked = questions or Questions({EVERY: [FITS]})
    asked.check(prompts)
    try:
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        fix = f"give the folder or hub id of a Qwen3-VL or Qwen2.5-VL, with its tokenizer: {EXAMPLE}"
        raise load_error(model, error, "critic", f"vision-language model, as {EXAMPLE}", fix) from error
    if config.model_type not in FAMILIES:
        fix = f"give one of {', '.join(FAMILIES)}, as {EXAMPLE}"
        raise PrflError(f"a {config.model_type} is no critic that is known", where=model, fix=fix)
    tokenizer = load_tokenizer(model, revision, EXAMPLE)
    network = load_network(FAMILIES[config.model_type], model, revision, EXAMPLE).to(getattr(torch, dtype))
    seconds = (clip.frames - 1) / clip.fps if clip else 1.0
    return CriticReward(
        network, tokenizer, asked, frames=frames, most_pixels=most_pixels, seconds=seconds
    ).to(device)  # fmt: skip
