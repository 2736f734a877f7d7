"""A latent reward inside diffusers' own sampling loop: samples that it judges worse are not finished.

reward = prfl.load_reward("folder-or-hub", pipe)
pipe([prompt] * 8, callback_on_step_end=reward.keep_best(1, at=0.5))     # one video, for the price of about four
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import PipelineCallback
from torch import Tensor

from prfl.backbone.families import FAMILIES
from prfl.reward.scores import Shape, total
from prfl.utils.errors import PrflError
from prfl.utils.schedule import node_at

if TYPE_CHECKING:
    from prfl.reward.latent import LatentReward


class KeepBest(PipelineCallback):
    """``callback_on_step_end`` of a diffusers pipeline: the best ``count`` samples of each prompt go on from a step.

    at: that step, as a share of all steps.  weights, aggregate: how scores become one, as of ``scores.total``.
    Afterwards ``kept`` has the rows that went on, in the batch's order, and ``scores`` all rows' scores.
    Raises PrflError for a family whose latents in the loop are not the backbone's, for a scheduler whose sigmas are not
    a flow's, and for a share that is not between 0 and 1.
    """

    tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]  # noqa: RUF012 # the base class's form

    def __init__(
        self, reward: LatentReward, count: int, at: float, weights: Mapping[str, float] | None, aggregate: Shape
    ) -> None:
        super().__init__()
        if not 0 < at < 1 or count < 1:
            what = f"{count} samples cannot be chosen at {at:g} of the steps"
            raise PrflError(what, where="keep_best", fix="keep 1 or more, at a share of the steps between 0 and 1")
        family = reward.backbone.facts.family
        condition_in_loop = FAMILIES[family].condition_in_loop
        if condition_in_loop is None:
            what = f"the latents of a {FAMILIES[family].pipeline} in its own loop are none that the reward reads"
            raise PrflError(what, where="keep_best", fix="prfl sample CONFIG --best-of 8 does the same for this family")
        self.condition = condition_in_loop
        self.reward, self.count, self.at, self.weights, self.aggregate = reward, count, at, weights, aggregate
        self.kept: list[int] = []
        self.scores: list[float] = []

    def callback_fn(
        self, pipeline: DiffusionPipeline, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        if step_index + 1 != min(node_at(self.at, pipeline.num_timesteps), pipeline.num_timesteps - 1):
            return callback_kwargs
        latents, embeds = callback_kwargs["latents"], callback_kwargs["prompt_embeds"]
        sigma = float(pipeline.scheduler.sigmas[step_index + 1])
        if not 0 <= sigma <= 1:
            what = f"its scheduler's sigma here is {sigma:g}, and a flow's are from 0 to 1"
            fix = "FlowMatchEulerDiscreteScheduler, or UniPC with use_flow_sigmas=True"
            raise PrflError(what, where=type(pipeline.scheduler).__name__, fix=fix)

        self.scores = self.score(latents, sigma, embeds)
        groups = same_rows(embeds)
        self.kept = []
        for group in dict.fromkeys(groups):
            rows = [row for row, of_row in enumerate(groups) if of_row == group]
            self.kept += sorted(sorted(rows, key=lambda row: -self.scores[row])[: self.count])

        count = len(latents)
        shorten_state(pipeline.scheduler, count, self.kept)
        return {name: cut(tensor, count, self.kept) for name, tensor in callback_kwargs.items()}

    @torch.no_grad()
    def score(self, latents: Tensor, sigma: float, embeds: Tensor) -> list[float]:
        read = self.reward if self.aggregate == "sum" else self.reward.logits
        return total(read(latents.float(), sigma, self.condition(embeds)), self.weights, self.aggregate).tolist()


def same_rows(embeds: Tensor) -> list[int]:
    """The first row that each row is equal to: those of one prompt have one number."""
    numbers: list[int] = []
    for row in embeds:
        earlier = [other for other in dict.fromkeys(numbers) if torch.equal(embeds[other], row)]
        numbers.append(earlier[0] if earlier else len(numbers))
    return numbers


def shorten_state(scheduler: Any, count: int, rows: Sequence[int]) -> None:
    """What a multistep scheduler remembers of the samples: of those that go on."""
    for name, value in vars(scheduler).items():
        if isinstance(value, Tensor) and value.ndim > 2:
            setattr(scheduler, name, cut(value, count, rows))
        elif isinstance(value, list) and any(isinstance(item, Tensor) and item.ndim > 2 for item in value):
            setattr(scheduler, name, [cut(item, count, rows) if isinstance(item, Tensor) else item for item in value])


def cut(value: Any, count: int, rows: Sequence[int]) -> Any:
    """These rows of a tensor of all samples; anything else as it is."""
    return value[list(rows)] if isinstance(value, Tensor) and len(value) == count else value
