"""What the keys of a config must agree on, beyond the type of each: every rule gives the yaml path that it blames."""

from __future__ import annotations

import math
from collections.abc import Iterator

from prfl.config.data_schema import ClipsConfig, SamplesConfig, Section, is_hub_id
from prfl.config.objective_schema import (
    AlignPropConfig,
    CheaperConfig,
    DenseProcessConfig,
    DraftLvConfig,
    DrTuneConfig,
    FromDataConfig,
    FullChainConfig,
    InstructVideoConfig,
    LeapAlignConfig,
    PrflConfig,
    ReflConfig,
    SteeringConfig,
    VaderConfig,
    inner_node,
)
from prfl.config.schema import (
    Config,
    LatentHeadConfig,
    LatentRewardConfig,
    PixelRewardConfig,
    PreferenceConfig,
    SftConfig,
    listed,
)

FEWEST_PROMPTS = 4  # an interval over fewer prompts says nothing of the others


def conflicts(config: Config) -> Iterator[tuple[str, str]]:
    """(yaml path, what is wrong there) of every broken rule."""
    if not is_hub_id(config.backbone.model):
        yield from _unread(config.backbone, "backbone", ["revision"], "a model in a folder")
    yield from _data(config)
    yield from _chain(config)
    yield from _watch(config)
    yield from _keep_best(config)
    if config.backbone.offload and config.backbone.checkpointing == "none":
        yield "backbone.offload", "it moves what checkpointed blocks keep; set backbone.checkpointing or remove it"
    if config.backbone.offload and config.backbone.checkpointing == "auto":
        yield (
            "backbone.offload",
            "checkpointing: auto fills the GPU with what it moves away; take full, or remove it",
        )
    if isinstance(config.objective, PreferenceConfig):
        yield from _preference(config, config.objective)
    else:
        yield from _policy(config)
    if isinstance(config.objective, SteeringConfig):
        yield from _steering(config, config.objective)
    if config.training.batch % config.training.accumulation:
        yield "training.accumulation", f"{config.training.accumulation} does not divide training.batch"


def _unread(section: Section, path: str, keys: list[str], reader: str) -> Iterator[tuple[str, str]]:
    """Keys that were changed, and that nobody reads: a person who sets one believes that it does something."""
    for key in keys:
        if getattr(section, key) != type(section).model_fields[key].default:
            yield f"{path}.{key}", f"{reader} does not read it; remove it"


def _data(config: Config) -> Iterator[tuple[str, str]]:
    data, objective = config.data, config.objective
    if data.manifest and data.generator:
        yield "data.generator", "data.manifest is given too; keep one of them"
    from_data = isinstance(objective, InstructVideoConfig) or _from_data(objective)
    reads_clips = from_data or not isinstance(objective, SteeringConfig) or objective.sft is not None
    if reads_clips and not (data.manifest or data.generator):
        yield "data.manifest", "the objective trains on clips; give data.manifest or data.generator"
    if not reads_clips and (data.manifest or data.generator):
        yield "data", "clips are given that nobody reads; remove them or add objective.sft"
    if not (data.manifest or data.generator):
        yield from _unread(data, "data", ["skip_unreadable", "encode_batch"], "a config without clips")
    if isinstance(data.generator, SamplesConfig):
        by = data.generator.policies
        for policy in [policy for number, policy in enumerate(by) if policy in by[:number]]:
            yield "data.generator.policies", f"{policy or 'null'} is named twice; its samples would be the same"
    if config.evaluation.every and not data.prompts.validation:
        yield "data.prompts.validation", "evaluation.every needs validation prompts"
    if config.evaluation.final_samples and not data.prompts.test:
        yield "data.prompts.test", "evaluation.final_samples needs test prompts"


def _from_data(objective: Section) -> bool:
    return isinstance(objective, FromDataConfig) and objective.from_data > 0


def _watch(config: Config) -> Iterator[tuple[str, str]]:
    """What is watched on held-out prompts while a video model is trained."""
    own, name = config.evaluation, config.objective.name
    if own.held_out_reward and isinstance(config.objective, PreferenceConfig):
        yield "evaluation.held_out_reward", f"objective {name} draws no videos; it does not read it"
    if own.held_out_reward and config.reward and own.held_out_reward in listed(config.reward.path):
        yield "evaluation.held_out_reward", "this is the reward that is trained on; give another one"
    if own.held_out_reward and not own.every and not own.final_samples:
        yield "evaluation.held_out_reward", "nothing is measured; set evaluation.every or evaluation.final_samples"
    if own.stop_on_hacking and not isinstance(config.objective, SteeringConfig):
        yield "evaluation.stop_on_hacking", f"objective {name} follows no reward; it does not read it"
    elif own.stop_on_hacking and (not own.every or own.prompts_per_round < FEWEST_PROMPTS):
        few = f"needs evaluation.every, and evaluation.prompts_per_round of {FEWEST_PROMPTS} or more to tell"
        yield "evaluation.stop_on_hacking", few


def _keep_best(config: Config) -> Iterator[tuple[str, str]]:
    own, key = config.evaluation, config.evaluation.keep_best
    if key is None:
        yield from _unread(own, "evaluation", ["patience"], "a run without evaluation.keep_best")
        return
    readers = {"judge": own.judge, "held_out": own.held_out_reward}
    group, slash, measure = key.partition("/")
    if isinstance(config.objective, PreferenceConfig):
        yield "evaluation.keep_best", f"objective {config.objective.name} draws no videos; it does not read it"
    elif group not in readers or not slash or not measure:
        kinds = "judge/all, of evaluation.judge, or held_out/total, of evaluation.held_out_reward"
        yield "evaluation.keep_best", f"'{key}' is no measure that nothing is trained on; such are {kinds}"
    elif not readers[group]:
        key = {"judge": "evaluation.judge", "held_out": "evaluation.held_out_reward"}[group]
        yield "evaluation.keep_best", f"no round records it; set {key}"
    elif not own.every:
        yield "evaluation.keep_best", "there are no rounds; set evaluation.every"


def _chain(config: Config) -> Iterator[tuple[str, str]]:
    rollout, guidance = config.rollout, config.rollout.guidance
    if (guidance.gradient == "none") != (guidance.scale == 1):
        yield "rollout.guidance", "gradient: none goes with scale: 1; a larger scale needs gradient: cond or both"
    if rollout.solver != "flow_sde":
        yield from _unread(rollout, "rollout", ["eta"], f"solver {rollout.solver}")
    if not isinstance(config.objective, SteeringConfig):
        if rollout.solver == "flow_sde":
            yield "rollout.solver", f"objective {config.objective.name} rolls no chain out; take euler or unipc"
        yield from _unread(
            rollout, "rollout",
            ["guidance", "step_weight", "stride", "gradients_per_rollout", "drift_limit", "cheaper"],
            f"objective {config.objective.name}",
        )  # fmt: skip
        return
    if rollout.stride > 1:
        yield from _stride(config, config.objective)
    if rollout.cheaper != CheaperConfig():
        yield from _cheaper(config, config.objective)
    if rollout.gradients_per_rollout > 1:
        yield from _reuse(config, config.objective)
    else:
        yield from _unread(rollout, "rollout", ["drift_limit"], "gradients_per_rollout: 1")


def _stride(config: Config, objective: SteeringConfig) -> Iterator[tuple[str, str]]:
    """A coarse rollout."""
    if config.rollout.solver != "euler":
        yield "rollout.stride", f"{config.rollout.solver} takes no leaps; it is for solver: euler"
    all_trained = isinstance(objective, VaderConfig) and objective.last_steps == config.rollout.steps
    if all_trained or isinstance(objective, FullChainConfig):
        yield "rollout.stride", f"objective {objective.name} trains every step; there is none to leap over"
    if isinstance(objective, PrflConfig) and objective.from_data == 1:
        yield "rollout.stride", "objective.from_data: 1 needs no rollout"
    if isinstance(objective, LeapAlignConfig) and objective.similarity_floor is not None:
        what = (
            "a leap that the rollout itself takes misses its end by nothing, so objective.similarity_floor would weigh "
        )
        yield "rollout.stride", what + "samples by the drawn steps; take stride: 1, or similarity_floor: null"


def _cheaper(config: Config, objective: SteeringConfig) -> Iterator[tuple[str, str]]:
    """A rollout whose steps without gradient cost less."""
    steps, last = config.rollout.steps, getattr(objective, "last_steps", 0)
    rolled = steps - inner_node(objective.start, steps) if isinstance(objective, InstructVideoConfig) else steps
    all_trained = isinstance(objective, FullChainConfig) or steps == 1 or last == rolled
    if all_trained:
        yield "rollout.cheaper", f"objective {objective.name} trains every step; those stay exact"
    if isinstance(objective, PrflConfig) and objective.from_data == 1:
        yield "rollout.cheaper", "objective.from_data: 1 needs no rollout"


def _reuse(config: Config, objective: SteeringConfig) -> Iterator[tuple[str, str]]:
    """A rollout that serves several optimizer steps."""
    key, adapter = "rollout.gradients_per_rollout", config.backbone.adapter
    if not isinstance(objective, PrflConfig | ReflConfig | DenseProcessConfig):
        yield key, f"objective {objective.name} needs its own rollout each time; it is for prfl, refl and dense_process"
    if _from_data(objective):
        yield key, "objective.from_data: chains from clips need no rollout; take one of the two"
    if isinstance(objective, DenseProcessConfig) and objective.beta:
        yield key, "objective.beta: a gradient along the chain needs latents of the present policy; take beta: 0"
    if config.rollout.solver == "unipc":
        yield key, "unipc's steps contain outputs of the policy that made the rollout; take euler or flow_sde"
    if adapter and adapter.dropout:
        yield key, "backbone.adapter.dropout would pass for drift; set it to 0"


def _preference(config: Config, objective: PreferenceConfig) -> Iterator[tuple[str, str]]:
    """A reward is trained; the video model stays as it is."""
    if config.reward is None or config.reward.head is None or config.reward.path:
        yield "reward", "objective preference trains a new reward: give reward.head and no reward.path"
        return
    # How a score becomes the loss of the video model.
    yield from _unread(
        config.reward, "reward", ["weights", "aggregate", "shape", "target", "scale", "batch"], "objective preference"
    )
    # The other keys of samples are read by `prfl sample --per-prompt`, which draws videos to be labelled.
    samples = ["samples_per_prompt", "final_samples", "judge"]
    yield from _unread(config.evaluation, "evaluation", samples, "objective preference measures no videos and")
    if isinstance(config.reward, PixelRewardConfig):
        yield from _unread(config.reward, "reward", ["aesthetic"], "objective preference")
    if isinstance(config.reward, LatentRewardConfig):
        yield from _unread(objective, "objective", ["frames", "keep_decoded"], "a latent reward")
        yield from _unread(config.reward, "reward", ["uncertainty_weight"], "objective preference")
        yield from _latent_head(config.reward.head)
    else:
        yield from _unread(objective, "objective", ["sigma_sampling"], "a pixel reward")
    if objective.loss == "bce" and isinstance(config.data.generator, ClipsConfig):
        yield "objective.loss", "the generator video_clips makes pairs, and bce needs labels; take bradley_terry"
    if objective.loss != "rao_kupper":
        yield from _unread(objective, "objective", ["eta"], f"loss {objective.loss}")
    if config.backbone.adapter:
        yield "backbone.adapter", "objective preference trains the reward only; its own adapter is reward.head.adapter"
    if config.backbone.train == "full":
        yield "backbone.train", "objective preference trains the reward only; leave it at lora"


def _latent_head(head: LatentHeadConfig | None) -> Iterator[tuple[str, str]]:
    if head is not None and head.inner % head.heads:
        yield "reward.head.heads", f"{head.heads} does not divide inner {head.inner}"
    if head is not None and head.pooling == "mean":
        yield from _unread(head, "reward.head", ["queries", "heads"], "pooling mean")


def _policy(config: Config) -> Iterator[tuple[str, str]]:
    """The video model is trained."""
    if config.backbone.train == "lora" and config.backbone.adapter is None:
        yield "backbone.adapter", "missing; train: lora needs it, for example adapter: {rank: 16, alpha: 16}"
    if config.backbone.train == "full" and config.backbone.adapter:
        yield "backbone.adapter", "train: full does not read it"
    if isinstance(config.objective, SftConfig) and config.reward:
        yield "reward", "objective sft does not read it"


def _aesthetic(reward: PixelRewardConfig) -> Iterator[tuple[str, str]]:
    yield from _unread(reward, "reward", ["path"], "reward.aesthetic")
    assert reward.aesthetic is not None
    if not is_hub_id(reward.aesthetic.clip):
        yield from _unread(reward.aesthetic, "reward.aesthetic", ["revision"], "a CLIP in a folder")
    if reward.aggregate == "logsigmoid":
        yield "reward.aggregate", "the aesthetic score is no logit of a label; use sum"
    if reward.shape == "hinge" and reward.target == type(reward).model_fields["target"].default:
        yield "reward.target", "nearly every picture scores above it, so there is nothing to pull; VADER's is 10"


def _steering(config: Config, objective: SteeringConfig) -> Iterator[tuple[str, str]]:
    """The video model is trained towards a reward that exists."""
    reward = config.reward
    aesthetic = isinstance(reward, PixelRewardConfig) and reward.aesthetic
    if reward is None or reward.head or not (reward.path or aesthetic):
        yield "reward", f"objective {objective.name} follows a trained reward: give reward.path and no reward.head"
        return
    if isinstance(reward, PixelRewardConfig) and reward.aesthetic:
        yield from _aesthetic(reward)
    if reward.shape == "linear":
        yield from _unread(reward, "reward", ["target"], "shape linear")
    if isinstance(reward, LatentRewardConfig):
        some = listed(reward.path)
        if len(some) < 2:
            yield from _unread(reward, "reward", ["uncertainty_weight"], "one reward, with nobody to disagree with,")
        for path in sorted({path for path in some if some.count(path) > 1}):
            yield "reward.path", f"{path} is named twice; an ensemble needs rewards that differ"
    if reward.space == "latent" and objective.frames != "all":
        yield "objective.frames", "a latent reward scores all frames; frames is for pixel rewards"
    if isinstance(objective, PrflConfig | DenseProcessConfig) and reward.space == "pixel":
        if objective.handoff == "next":
            yield "objective.handoff", "a pixel reward cannot score a noisy latent; use handoff: clean"
    yield from _method(config, objective, config.rollout.steps)


def _method(config: Config, objective: SteeringConfig, steps: int) -> Iterator[tuple[str, str]]:
    """What the method's own keys ask of each other and of a chain of so many steps."""
    if isinstance(objective, PrflConfig | ReflConfig | DenseProcessConfig):
        low, high = objective.steps_range
        if not 0 <= low < high <= 1:
            yield "objective.steps_range", f"needs 0 <= low < high <= 1, got [{low:g}, {high:g}]"
    if _from_data(objective) and config.rollout.solver == "unipc":
        yield "rollout.solver", "objective.from_data starts inside the chain; unipc needs all before it"
    if isinstance(objective, AlignPropConfig | DraftLvConfig | LeapAlignConfig | InstructVideoConfig) and steps < 2:
        yield "rollout.steps", f"objective {objective.name} needs a chain of two steps or more"
    match objective:
        case VaderConfig() if objective.last_steps > steps:
            yield "objective.last_steps", f"the chain has only {steps} steps"
        case DrTuneConfig() if objective.trained_steps > steps:
            yield "objective.trained_steps", f"the chain has only {steps} steps"
        case AlignPropConfig(last_steps=(low, high)) if not low <= high <= steps:
            yield "objective.last_steps", f"needs low <= high <= {steps}, the chain's steps; got [{low}, {high}]"
        case PrflConfig() if objective.from_data and math.ceil(high * steps) < 2:
            yield "objective.from_data", "steps_range has no step behind the chain's first, where all is noise"
        case DenseProcessConfig():
            first = max(math.floor(low * steps), 1 if objective.from_data else 0)
            parts, which = math.ceil(high * steps) - first, " behind the first" if objective.from_data else ""
            if objective.rewards > parts:
                yield "objective.rewards", f"steps_range has only {parts} of the chain's {steps} steps{which}"
            if objective.credit == "step":
                yield from _unread(objective, "objective", ["beta"], "credit: step")
        case InstructVideoConfig():
            if config.rollout.solver == "unipc":
                yield "rollout.solver", f"objective {objective.name} starts inside the chain; unipc needs all before it"
            rest = steps - inner_node(objective.start, steps)
            if steps > 1 and objective.last_steps > rest:
                yield "objective.last_steps", f"objective.start leaves only {rest} of the chain's {steps} steps"
            if isinstance(config.reward, LatentRewardConfig):
                yield from _unread(objective, "objective", ["temporal_decay"], "a latent reward")
            elif objective.temporal_decay is not None and config.reward and config.reward.aggregate == "logsigmoid":
                yield "objective.temporal_decay", "a weighted logit is no logit of a label; use reward.aggregate: sum"
