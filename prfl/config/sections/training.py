"""``training``: the optimizer and its loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from prfl.config.section import MAY_CHANGE, Fault, Section
from prfl.config.sections.experts import Rate, RateOfEach

if TYPE_CHECKING:
    from prfl.config.schema import Config


Tracker = Literal[
    "tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "aim", "clearml", "dvclive", "swanlab"
]  # fmt: skip


class TrainingConfig(Section):
    steps: int = Field(
        ge=1,
        description="Optimizer steps of the whole run. Raise it to continue a finished run.",
        json_schema_extra=MAY_CHANGE,
    )
    batch: int = Field(ge=1, description="Samples per optimizer step, over all processes.")
    accumulation: int = Field(
        default=1,
        ge=1,
        description="Number of parts that a batch is split into, to save memory (gradient accumulation); must divide "
        "batch.",
    )
    learning_rate: Rate = Field(
        description="Peak learning rate of AdamW. A reward is easily hacked, so start small (5e-6 for Wan). "
        "With two experts: {high: 2e-6, low: 5e-6}."
    )
    warmup: int = Field(default=0, ge=0, description="Steps in which the learning rate rises linearly from 0.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        description="Learning rate after the warm-up: constant, or falling to 0 at the last step (linear, cosine).",
    )
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay of AdamW; 0 is off.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.99), description="AdamW's decay rates of the averages of the gradient and of its square."
    )
    max_grad_norm: float | None = Field(
        default=1.0,
        gt=0,
        description="Largest gradient norm; a larger gradient is scaled down to it. null never clips.",
    )
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Decay of the weights' exponential moving average (EMA); samples are drawn with the "
        "average. null is off.",
    )
    save_every: int = Field(
        default=100,
        ge=1,
        description="Steps between checkpoints, from which a stopped run goes on.",
        json_schema_extra=MAY_CHANGE,
    )
    keep: int = Field(
        default=2,
        ge=1,
        description="Newest checkpoints that are kept; older ones are deleted.",
        json_schema_extra=MAY_CHANGE,
    )
    log_every: int = Field(
        default=1,
        ge=1,
        description="Steps between lines of the log on the terminal; metrics.jsonl has every step.",
        json_schema_extra=MAY_CHANGE,
    )
    timeout: float = Field(
        default=1800.0,
        gt=0,
        description="Seconds that a process waits for the others before it gives up.",
        json_schema_extra=MAY_CHANGE,
    )
    trackers: list[Tracker] = Field(
        default=["tensorboard"],
        description="Trackers beside metrics.jsonl, one or several of accelerate's. Each needs its own "
        "package. Videos of samples go to tensorboard, wandb, mlflow and trackio.",
        json_schema_extra=MAY_CHANGE,
    )

    @property
    def rates(self) -> dict[str, float]:
        """Peak learning rate of each group of parameters: ``{"": rate}``, or the rates of two experts by name."""
        rate = self.learning_rate
        return {"high": rate.high, "low": rate.low} if isinstance(rate, RateOfEach) else {"": rate}

    def conflicts(self, config: Config) -> Iterator[Fault]:
        if self.batch % self.accumulation:
            yield "training.accumulation", f"{self.accumulation} does not divide training.batch"
