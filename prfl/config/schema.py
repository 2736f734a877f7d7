"""What a config may say: one frozen class per yaml section.  Unknown keys are errors; required keys have no default.

A choice that brings its own keys (the generator, the reward's space, the objective) is a union told apart by one key,
so a key of another choice is as unknown as a misspelt one.  What keys must agree on is in rules.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from prfl.config.data_schema import MAY_CHANGE, SEEDS, DataConfig, FolderOrFile, Section, place
from prfl.config.objective_schema import (
    AlignPropConfig,
    CheaperConfig,
    DenseProcessConfig,
    DraftLvConfig,
    DrTuneConfig,
    FullChainConfig,
    InstructVideoConfig,
    LeapAlignConfig,
    PrflConfig,
    ReflConfig,
    VaderConfig,
)


class AdapterConfig(Section):
    rank: int = Field(
        ge=1, description="Rank of the low-rank update: its size and memory grow with it; 16 to 64 is usual."
    )
    alpha: float = Field(gt=0, description="The update is scaled by alpha / rank; alpha = rank leaves it as it is.")
    targets: list[str] = Field(
        default=["to_q", "to_k", "to_v", "to_out.0"],
        min_length=1,
        description="Ends of the names of the linear layers that get an update.",
    )
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Dropout on the low-rank branch in training: one mask a sample and step, for its whole chain.",
    )


class PolicyAdapterConfig(AdapterConfig):
    blocks: Literal["all", "last_half"] | list[int] = Field(
        default="all",
        description="Blocks that get an update: all, last_half, or a list of them (the first is 0).  Where one step of "
        "the chain is trained, the backward pass ends at the first of them: the last half costs less time and memory.",
    )


Kernels = Literal["auto", "torch", "triton"]


class KernelsConfig(Section):
    lora_linear: Kernels = Field(default="auto", description="Linear layers with an adapter.")
    qk_norm_rope: Kernels = Field(default="auto", description="Norm and rotation of queries and keys.")
    gated_residual_norm: Kernels = Field(default="auto", description="Gate, sum, norm and modulation of a block.")


class BackboneConfig(Section):
    model: str = place(description="A diffusers folder, a hub id, 'shapes' (inside the package) or 'shapes-untrained'.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub model; null is its newest.")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Type of the frozen weights: bfloat16 halves their memory; adapters and heads stay float32.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where the run computes; auto takes a GPU where there is one."
    )
    checkpointing: Literal["none", "attention", "full", "auto"] = Field(
        default="none",
        description="Recompute blocks in the backward pass: all of them (full), or all but their attention's output; "
        "auto keeps as many attention outputs and whole blocks as the GPU has room for.",
        json_schema_extra=MAY_CHANGE,
    )
    offload: bool = Field(
        default=False,
        description="Keep what checkpointed blocks save, and the rollout's latents, in host memory.",
        json_schema_extra=MAY_CHANGE,
    )
    kernels: Kernels | KernelsConfig = Field(
        default="auto",
        description="Which kernels run, for all operations or for each; PRFL_KERNELS decides where this says auto.",
    )
    attention: Literal["auto", "sdpa", "cudnn", "flash", "flash_3", "flash_4", "xformers", "triton"] = Field(
        default="auto",
        description="Which attention runs; PRFL_ATTENTION decides where this says auto, and then torch by itself.",
    )
    compile: bool = Field(
        default=False, description="torch.compile the blocks: faster after a first step of half a minute or more."
    )
    train: Literal["lora", "full"] = Field(
        default="lora",
        description="Train an adapter, or all weights: in float32, beside a frozen copy where a reward reads the base.",
    )
    adapter: PolicyAdapterConfig | None = Field(default=None, description="The adapter that train: lora trains.")


class LatentHeadConfig(Section):
    dimensions: list[str] = Field(min_length=1, description="Names of the labels that the head scores.")
    blocks: list[int] = Field(min_length=1, description="Read the hidden states after these blocks (the first is 0).")
    pooling: Literal["query", "mean"] = Field(
        default="query",
        description="How tokens are gathered: query attends with learned queries, mean is the baseline.",
    )
    inner: int = Field(default=128, ge=1, description="Channels that the tokens are projected to; heads divides it.")
    queries: int = Field(
        default=1, ge=1, description="Number of learned queries that attend over all tokens; one is usually enough."
    )
    heads: int = Field(default=4, ge=1, description="Attention heads of the pooling; they divide inner.")
    hidden: int = Field(default=256, ge=1, description="Width of the MLP that makes scores of what was gathered.")
    film: bool = Field(default=True, description="Scale and shift the pooled features by a function of sigma.")
    adapter: AdapterConfig | None = Field(default=None, description="The head's own adapter; null is frozen blocks.")


class PixelHeadConfig(Section):
    dimensions: list[str] = Field(min_length=1, description="Names of the labels that the network scores.")
    size: int = Field(default=32, ge=8, description="Frames are resized to this height and width.")
    hidden: int = Field(default=32, ge=4, multiple_of=4, description="Channels after the first layer.")
    inner: int = Field(default=96, ge=4, multiple_of=4, description="Channels of a frame's description.")


TRAINED_REWARD = "A trained reward: a folder that objective preference wrote, a hub id, or 'shapes' (inside)."


class RewardBase(Section):
    """What both spaces have in common."""

    space: str = Field(description="What is scored.")
    weights: dict[str, float] | None = Field(
        default=None, min_length=1, description="Weight of each dimension; one that is not named does not count."
    )
    aggregate: Literal["sum", "logsigmoid"] = Field(
        default="sum", description="Weighted sum of the scores, or of the log-probabilities of good labels."
    )
    shape: Literal["linear", "hinge"] = Field(
        default="hinge",
        description="Loss of the video model: linear is -r; hinge is relu(target - r), 0 at the target and above.",
    )
    target: float = Field(default=2.0, description="The score r at which the hinge stops pulling.")
    scale: float = Field(
        default=0.1,
        gt=0,
        description="Factor of the reward's loss; AdamW undoes it, except beside distance_weight.",
    )
    batch: int | None = Field(
        default=None,
        ge=1,
        description="Samples scored at once, to save memory: the same gradient; null is all.",
        json_schema_extra=MAY_CHANGE,
    )


class LatentRewardConfig(RewardBase):
    space: Literal["latent"] = Field(description="Scores noisy latents: no VAE in the loop.")
    path: str | Annotated[list[str], Field(min_length=2)] | None = place(
        default=None, description=f"{TRAINED_REWARD} A list of them is followed as one: their mean."
    )
    uncertainty_weight: float = Field(
        default=0.0, ge=0, description="Of several rewards: subtract this times the deviation between their scores."
    )
    head: LatentHeadConfig | None = Field(default=None, description="A new head, where objective.name is preference.")


class AestheticConfig(Section):
    mlp: FolderOrFile = place(description="LAION's MLP for ViT-L/14: its .pth (only tensors are read) or safetensors.")
    clip: str = place(default="openai/clip-vit-large-patch14", description="CLIP ViT-L/14: a folder or a hub id.")
    revision: str | None = Field(default=None, description="Revision of a hub CLIP; null is its newest.")


class PixelRewardConfig(RewardBase):
    space: Literal["pixel"] = Field(description="Scores decoded pixels.")
    path: str | None = place(default=None, description=TRAINED_REWARD)
    aesthetic: AestheticConfig | None = Field(
        default=None, description="LAION's aesthetic score, in place of path: mean over frames, about 1 to 10."
    )
    head: PixelHeadConfig | None = Field(default=None, description="A new one, where objective.name is preference.")


RewardConfig = LatentRewardConfig | PixelRewardConfig


def listed(path: str | list[str] | None) -> list[str]:
    """``reward.path`` as a list, whichever way it was given."""
    return [path] if isinstance(path, str) else list(path or [])


class GuidanceConfig(Section):
    scale: float = Field(
        default=1.0,
        ge=1,
        description="Guidance scale in training; 1 is without, anything else doubles the network calls.",
    )
    gradient: Literal["none", "cond", "both"] = Field(
        default="none", description="none: no guidance. cond: gradient through the conditional branch. both: both."
    )


class RolloutConfig(Section):
    solver: Literal["euler", "unipc", "flow_sde"] = Field(
        default="euler",
        description="euler, Wan's own unipc, or the stochastic flow_sde for training, with videos then drawn by euler.",
    )
    eta: float = Field(default=0.7, gt=0, le=1, description="Noise of flow_sde: 0.7 is Flow-GRPO's, near 0 is euler.")
    steps: int = Field(
        ge=1, description="Steps of the chain from noise to video: training rolls it out, so its cost is in proportion."
    )
    shift: float | None = Field(default=None, gt=0, description="Shift of the sigmas; null is the backbone's own.")
    guidance: GuidanceConfig = Field(default=GuidanceConfig(), description="Classifier-free guidance in training.")
    stride: int = Field(
        default=1,
        ge=1,
        description="Steps that the rollout leaps over at a time on its way to the trained ones, which stay fine.",
    )
    gradients_per_rollout: int = Field(
        default=1,
        ge=1,
        description="Optimizer steps that take their gradients from one rollout's latents, each at steps of its own.",
    )
    drift_limit: float | None = Field(
        default=0.1,
        gt=0,
        description="For gradients_per_rollout: how far the trained steps may drift from the rollout's own, as a share "
        "of their length, before a new rollout is made; null is any distance.",
    )
    cheaper: CheaperConfig = Field(default=CheaperConfig(), description="What its steps without gradient may save.")
    step_weight: Literal["native", "unit"] = Field(
        default="native", description="unit scales step i's gradient by mean|B| / |B[i]|; native leaves it."
    )


class SftConfig(Section):
    name: Literal["sft"] = Field(description="Flow matching on the cached clips.")
    prompt_dropout: float = Field(default=0.1, ge=0, le=1, description="Share of clips trained without their prompt.")


class PreferenceConfig(Section):
    name: Literal["preference"] = Field(description="Train a reward on labels or preferences.")
    loss: Literal["bce", "bradley_terry", "rao_kupper", "thurstone"] = Field(
        description="bce reads labels, the others pairs; rao_kupper knows ties, thurstone trusts noisy latents less."
    )
    eta: float = Field(
        default=5.0, gt=1, description="How likely ties are, for rao_kupper: larger expects more of them."
    )
    sigma_sampling: Literal["uniform", "shifted", "mixture"] = Field(
        default="uniform", description="Noise levels: even over 0 to 1, as the sampler's shift spreads them, half each."
    )
    frames: int | None = Field(default=None, ge=1, description="Frames of each clip that a pixel reward sees a step.")
    keep_decoded: bool = Field(default=False, description="Keep a pixel reward's decoded clips in host memory.")


ObjectiveConfig = (
    SftConfig
    | PreferenceConfig
    | PrflConfig
    | VaderConfig
    | FullChainConfig
    | AlignPropConfig
    | DraftLvConfig
    | ReflConfig
    | DrTuneConfig
    | LeapAlignConfig
    | InstructVideoConfig
    | DenseProcessConfig
)


class TrainingConfig(Section):
    steps: int = Field(
        ge=1,
        description="Optimizer steps of the whole run; a longer run goes on from a finished one.",
        json_schema_extra=MAY_CHANGE,
    )
    batch: int = Field(ge=1, description="Samples per optimizer step, over all processes.")
    accumulation: int = Field(default=1, ge=1, description="Parts that a batch is split into; must divide it.")
    learning_rate: float = Field(
        gt=0, description="Peak learning rate of AdamW; a reward is easily hacked, so start small (5e-6 for Wan)."
    )
    warmup: int = Field(default=0, ge=0, description="Steps in which the learning rate rises from 0 in a line.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="The learning rate after the warm-up: constant, or down to 0 at the last step."
    )
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay of AdamW; 0 is off.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.99), description="Decay of AdamW's averages of the gradient and of its square."
    )
    max_grad_norm: float | None = Field(default=1.0, gt=0, description="Clip the gradient's norm here; null is never.")
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Decay of a moving average of the weights, which samples are then drawn with; null is off.",
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
        description="Seconds that a process waits for the others before it takes them for dead.",
        json_schema_extra=MAY_CHANGE,
    )
    trackers: list[Literal["tensorboard"]] = Field(
        default=["tensorboard"], description="Trackers beside metrics.jsonl.", json_schema_extra=MAY_CHANGE
    )


class EvaluationConfig(Section):
    every: int = Field(ge=0, description="Steps between rounds on validation prompts; 0 is never.")
    prompts_per_round: int = Field(
        default=8, ge=1, description="Validation prompts of a round, the first ones of the list."
    )
    samples_per_prompt: int = Field(
        default=2, ge=1, description="Samples of each prompt of a round; their diversity is measured from two on."
    )
    held_out_reward: str | None = Field(
        default=None, description="A trained reward, folder or hub id, that is watched and never trained on."
    )
    stop_on_hacking: bool = Field(
        default=False,
        description="End the run, and not only warn, when the trained reward rises while the other measures fall.",
    )
    keep_best: str | None = Field(
        default=None,
        description="A measure of the rounds (judge/all, held_out/total): the policy of its best round is the run's "
        "result, of equal ones the earliest; null keeps the last step's.",
    )
    patience: int | None = Field(
        default=None, ge=1, description="End the run after so many rounds without a better keep_best; null is never."
    )
    final_samples: int = Field(default=0, ge=0, description="Samples of test prompts after the last step; 0 is none.")
    judge: Literal["shapes"] | None = Field(default=None, description="An exact judge that nothing is trained on.")
    steps: int | None = Field(
        default=None, ge=1, description="Sampling steps of the videos that are looked at; null is rollout.steps."
    )
    guidance_scale: float = Field(default=1.0, ge=1, description="Guidance scale of the samples.")
    batch: int = Field(default=32, ge=1, description="Samples drawn at once: more is faster and takes more memory.")
    seed: int = Field(default=0, ge=0, lt=SEEDS, description="Seed of the samples: the same noise in every round.")


class Config(Section):
    """One stage: what ``prfl train`` runs."""

    version: Literal[1] = Field(description="Version of this format.")
    run: FolderOrFile = Field(description="Run folder: everything that the run writes.", json_schema_extra=MAY_CHANGE)
    seed: int = Field(
        ge=0,
        lt=SEEDS,
        description="Seed of every random draw of the training: the same seed and config give the same run.",
    )
    backbone: BackboneConfig = Field(description="The video model, and which of its weights are trained.")
    data: DataConfig = Field(description="Clips, prompts, their size and their cache.")
    reward: RewardConfig | None = Field(
        default=None, discriminator="space", description="What is maximised, or trained; none for sft."
    )
    rollout: RolloutConfig = Field(description="The sampling chain that training rolls out.")
    objective: ObjectiveConfig = Field(
        discriminator="name", description="The method: which steps of the chain get gradient, and from what."
    )
    training: TrainingConfig = Field(description="The optimizer and its loop: how long, how much at once, how fast.")
    evaluation: EvaluationConfig = Field(
        description="What is watched during the run, and at its end.", json_schema_extra=MAY_CHANGE
    )


class StagesConfig(Section):
    """Several configs run one after another."""

    version: Literal[1] = Field(description="Version of this format.")
    stages: list[str] = Field(min_length=1, description="Config files, found from this file's folder, in order.")


def json_schema() -> dict[str, Any]:
    """JSON schema of a config file: one stage, or a list of stages."""
    schema = TypeAdapter(Config | StagesConfig).json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A config of prfl", **schema}
