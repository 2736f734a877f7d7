"""``evaluation``: what is watched during a run, and at its end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field

from prfl.config.section import SEEDS, Fault, Section, Source, place, unread
from prfl.config.sections.experts import FirstFrame, GuidanceScale, first_frame_faults
from prfl.config.sections.public_rewards import CallableConfig, CriticConfig
from prfl.utils.metrics_file import HELD_OUT, measure_name

if TYPE_CHECKING:
    from prfl.config.schema import Config

FEWEST_PROMPTS = 4  # a confidence interval over fewer prompts says nothing about other prompts


def held_out_name(name: str) -> str:
    """Return a measure's name as metrics.jsonl writes it; older configs leave out ``validation/``."""
    return HELD_OUT + measure_name(name)


class JudgeConfig(CriticConfig):
    key = "evaluation.held_out_critic"


class JudgeCallableConfig(CallableConfig):
    key = "evaluation.held_out_callable"
    differentiable: bool = Field(default=False, description="A judge needs no gradient.")

    def faults(self) -> Iterator[Fault]:
        yield from super().faults()
        yield from unread(self, self.key, ["differentiable"], "a judge")


class EvaluationConfig(Section):
    every: int = Field(ge=0, description="Steps between two rounds of validation; 0 is never.")
    prompts_per_round: int = Field(
        default=8, ge=1, description="Validation prompts of a round, the first ones of the list."
    )
    samples_per_prompt: int = Field(
        default=2, ge=1, description="Samples of each prompt in a round; diversity needs at least two."
    )
    held_out_reward: str | None = place(
        default=None,
        description="A second trained reward, which only measures the samples and is never trained on: a folder or a "
        "hub id.",
    )
    held_out_critic: JudgeConfig | None = Field(
        default=None,
        description="Instead of held_out_reward: a vision-language model that measures the samples by its answers.",
    )
    held_out_callable: JudgeCallableConfig | None = Field(
        default=None,
        description="Instead of held_out_reward: a function of your own that measures the samples; it needs no "
        "gradient.",
    )
    stop_on_hacking: bool = Field(
        default=False,
        description="End the run, instead of only warning, when the trained reward rises while other measures fall.",
    )
    keep_best: Annotated[str, AfterValidator(held_out_name)] | None = Field(
        default=None,
        description="A measure of the rounds, such as validation/judge/all or validation/held_out/total. "
        "The policy of the round where it is highest is the run's result (of equal ones the "
        "earliest). null keeps the policy of the last step.",
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        description="Early stopping: end the run after this many rounds in which keep_best did not improve; "
        "null is never.",
    )
    final_samples: int = Field(
        default=0, ge=0, description="Number of samples of test prompts that are drawn after the last step; 0 is none."
    )
    judge: Literal["shapes"] | None = Field(
        default=None, description="An exact judge of the samples, on which nothing is trained."
    )
    steps: int | None = Field(
        default=None, ge=1, description="Sampling steps of the evaluation's videos; null is rollout.steps."
    )
    guidance_scale: GuidanceScale = Field(
        default=1.0, description="Guidance scale of the samples. With two experts: {high: 4.0, low: 3.0}."
    )
    guidance_first_frame: FirstFrame = Field(
        default=None, description="Guidance scale of the samples' first frame, like rollout.guidance.first_frame."
    )
    batch: int = Field(default=32, ge=1, description="Samples drawn at once: more is faster and takes more memory.")
    seed: int = Field(default=0, ge=0, lt=SEEDS, description="Seed of the samples: the same noise in every round.")

    def files(self) -> list[Source]:
        if section := self.held_out_critic or self.held_out_callable:
            return section.files()
        return [Source("evaluation.held_out_reward", self.held_out_reward, "reward")] if self.held_out_reward else []

    @property
    def watching(self) -> str:
        """The yaml path of the held-out reward, critic or function; "" if there is none."""
        names = self.watchers
        return f"evaluation.{names[0]}" if names else ""

    @property
    def watchers(self) -> list[str]:
        """The keys that are set of held_out_reward, held_out_critic and held_out_callable; only one may be."""
        return [name for name in ("held_out_reward", "held_out_critic", "held_out_callable") if getattr(self, name)]

    def conflicts(self, config: Config) -> Iterator[Fault]:
        where = "evaluation.guidance_first_frame"
        yield from first_frame_faults(where, self.guidance_first_frame, self.guidance_scale)
        if config.trains_reward:
            # Other keys of samples stay allowed: `prfl sample --per-prompt` reads them to draw videos for labelling.
            reader = f"objective {config.objective.name} measures no videos and"
            yield from unread(self, "evaluation", ["samples_per_prompt", "final_samples", "judge"], reader)
        yield from self.watch_faults(config)
        if self.keep_best is None:
            yield from unread(self, "evaluation", ["patience"], "a run without evaluation.keep_best")
        else:
            yield from self.keep_best_faults(self.keep_best, config)

    def watch_faults(self, config: Config) -> Iterator[Fault]:
        """Yield the faults of what is measured on held-out prompts while a video model is trained."""
        objective = config.objective
        watching = self.watching
        if watching and not objective.trains_policy:
            yield watching, f"objective {objective.name} draws no videos; it does not read it"
        for name in self.watchers[1:]:
            yield f"evaluation.{name}", f"{watching} watches already; take one of the two"
        for section in (self.held_out_critic, self.held_out_callable):
            if section:
                yield from section.faults()
        if self.held_out_reward and config.reward and self.held_out_reward in config.reward.paths:
            yield "evaluation.held_out_reward", "this is the reward that is trained on; give another one"
        if watching and not self.every and not self.final_samples:
            yield watching, "nothing is measured; set evaluation.every or evaluation.final_samples"
        if self.stop_on_hacking and not objective.follows_reward:
            yield "evaluation.stop_on_hacking", f"objective {objective.name} follows no reward; it does not read it"
        elif self.stop_on_hacking and (not self.every or self.prompts_per_round < FEWEST_PROMPTS):
            few = f"needs evaluation.every, and evaluation.prompts_per_round of {FEWEST_PROMPTS} or more to tell"
            yield "evaluation.stop_on_hacking", few

    def keep_best_faults(self, keep_best: str, config: Config) -> Iterator[Fault]:
        """Yield the faults of ``keep_best``, the measure that chooses the best round."""
        sources = {  # group of measures: the key that turns it on, and that key's value
            "judge": ("evaluation.judge", self.judge),
            "held_out": (self.watching or "evaluation.held_out_reward", self.watching),
        }
        group, slash, measure = measure_name(keep_best).partition("/")
        if not config.objective.trains_policy:
            yield "evaluation.keep_best", f"objective {config.objective.name} draws no videos; it does not read it"
        elif group not in sources or not slash or not measure:
            such = "validation/judge/all, of evaluation.judge, or validation/held_out/total, of "
            such += "evaluation.held_out_reward"
            what = f"'{keep_best}' is no measure that nothing is trained on; such are {such}"
            yield "evaluation.keep_best", what
        elif not sources[group][1]:
            yield "evaluation.keep_best", f"no round records it; set {sources[group][0]}"
        elif not self.every:
            yield "evaluation.keep_best", "there are no rounds; set evaluation.every"
