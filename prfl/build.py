"""Config to objects: the one place where a string picks a class.  What is done with them is in commands.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from prfl import processes
from prfl.backbone import Condition, WanBackbone, load_architecture, load_backbone
from prfl.config.schema import (
    BackboneConfig,
    ClipsConfig,
    Config,
    CuratedConfig,
    DataConfig,
    EvaluationConfig,
    LatentRewardConfig,
    MixtureConfig,
    PixelRewardConfig,
    PreferenceConfig,
    PrflConfig,
    PromptsConfig,
    SamplesConfig,
    SftConfig,
    SftRegulariserConfig,
    SteeringConfig,
    VaderConfig,
)
from prfl.data import clips as cutting
from prfl.data.cache import build_cache
from prfl.data.dataset import LatentDataset, PairDataset, load_dataset
from prfl.data.files import content_hash
from prfl.data.manifest import read_manifest
from prfl.data.prompts import read_prompts
from prfl.data.shapes import samples as shapes
from prfl.data.shapes import world
from prfl.data.shapes.untrained import RECIPES, untrained_folder
from prfl.errors import PrflError, located
from prfl.evaluation.judge import Judge
from prfl.evaluation.reward_eval import Scorer as LatentsScorer
from prfl.evaluation.reward_eval import pixel_scorer
from prfl.evaluation.sampling import SamplingSettings, decode_all, sample
from prfl.flow import chain_sigmas
from prfl.objective import Objective
from prfl.objective.pathwise import Guidance, Method, Pathwise
from prfl.objective.preference import PixelPreference, Preference
from prfl.objective.prfl import Prfl
from prfl.objective.scorer import LatentScorer, PixelScorer, RewardLoss
from prfl.objective.sft import Sft
from prfl.objective.vader import Vader
from prfl.reward import pixel
from prfl.reward.aesthetic import AestheticReward, load_aesthetic
from prfl.reward.files import check_clip, kind_of, saved_reward
from prfl.reward.head import RewardHead
from prfl.reward.latent import LatentReward, RewardAdapter
from prfl.reward.pixel import PixelNetwork, PixelReward
from prfl.reward.scores import Scores, total
from prfl.solvers import Coefficients, euler
from prfl.training import Regulariser
from prfl_kernels import choose_backend

POLICY = "policy"  # the name of the adapter that is aligned
TrainableReward = LatentReward | PixelReward
Reward = TrainableReward | AestheticReward
Dataset = LatentDataset | PairDataset


def device(config: BackboneConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise PrflError("no GPU is usable here", where="backbone.device", fix="device: auto or cpu")
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def backbone(config: Config) -> WanBackbone:
    """The frozen model, with the policy's adapter (not active) or, for full fine-tuning, with trainable weights."""
    own = config.backbone
    try:
        choose_backend("modulated_layer_norm", own.kernels)
    except ValueError as error:
        raise PrflError(str(error), where="backbone.kernels", fix="kernels: auto") from error
    place: str | Path = own.model
    if own.model == "shapes":
        place = shapes.model_folder()
    elif own.model in RECIPES:
        with processes.main_first():
            place = untrained_folder(config.data.cache / own.model, RECIPES[own.model])
    model = prepared(config, load_backbone(place, getattr(torch, own.dtype), device(own), own.revision))
    if own.compile:
        for transformer in (model.transformer, *model.copies.values()):
            transformer.compile_repeated_blocks()
    return model


def architecture(config: Config) -> WanBackbone:
    """``backbone(config)`` on the ``meta`` device: no weights and no memory."""
    own = config.backbone
    place = shapes.model_folder() if own.model in ("shapes", *RECIPES) else own.model
    model = load_architecture(place, getattr(torch, own.dtype), own.revision)
    with torch.device("meta"):
        return prepared(config, model)


def prepared(config: Config, model: WanBackbone) -> WanBackbone:
    own = config.backbone
    model.checkpointing = own.checkpointing
    if own.adapter:
        lora = own.adapter
        with located("backbone.adapter.targets"):
            model.add_adapter(
                POLICY, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, dropout=lora.dropout, seed=config.seed
            )
    if own.train == "full" and policy_adapter(config):
        model.add_copy(POLICY)
    elif own.train == "full":
        model.train_all()
    return model


def policy_adapter(config: Config) -> str | None:
    """The adapter that is trained, or the copy of all weights: a reward reads the frozen base beside it.

    None where all weights are trained in place, because nothing needs the base: full fine-tuning by SFT.
    """
    in_place = config.backbone.train == "full" and not isinstance(config.objective, SteeringConfig)
    return None if in_place else POLICY


def prompts(config: PromptsConfig) -> dict[str, list[str]]:
    """``train``, and ``validation`` and ``test`` where they are given; no prompt is in two of them."""
    named = {"train": config.train, "validation": config.validation, "test": config.test}
    splits = {
        name: world.split_prompts()[name] if source == "shapes" else read_prompts(source)
        for name, source in named.items()
        if source is not None
    }
    owner: dict[str, str] = {}
    for name, some in splits.items():
        for prompt in some:
            if owner.setdefault(prompt, name) != name:
                raise PrflError(
                    f"the prompt {prompt[:80]!r} is in {owner[prompt]} too",
                    where=f"data.prompts.{name}",
                    fix="give each prompt to one set",
                )
    return splits


def contents(config: Config, model: WanBackbone, clips: Dataset | None) -> dict[str, Any]:
    """What lies behind the paths and names of a config, for a checkpoint's identity: a run that is resumed after its
    reward was trained again, say, would be another run under the same config."""
    made_by = model.describe()
    facts = {f"backbone.model ({part})": made_by[f"{part}_fingerprint"] for part in ("transformer", "vae")}
    some = "\n".join(prompts(config.data.prompts)["train"])
    facts["data.prompts.train (content)"] = hashlib.sha256(some.encode()).hexdigest()[:16]
    if clips is not None:
        facts["data (clips and labels)"] = clips.fingerprint
    if config.reward is not None and config.reward.path is not None:
        saved = saved_reward(reward_place(config.reward.path))
        facts |= {f"reward.path ({name})": value for name, value in saved.items()}
    if isinstance(config.reward, PixelRewardConfig) and config.reward.aesthetic:
        facts["reward.aesthetic.mlp (content)"] = content_hash(config.reward.aesthetic.mlp)[:16]
    return facts


def judge(config: EvaluationConfig) -> Judge | None:
    return shapes.judge if config.judge == "shapes" else None


def shift(config: Config, model: WanBackbone) -> float:
    """Shift of the sigmas: the config's, or else the backbone's own."""
    return model.default_shift if config.rollout.shift is None else config.rollout.shift


def chain(config: Config, model: WanBackbone) -> Coefficients:
    return euler(chain_sigmas(config.rollout.steps, shift(config, model)))


def sampling(config: Config) -> SamplingSettings:
    """How videos are drawn for evaluation."""
    own = config.evaluation
    return SamplingSettings(
        frames=config.data.frames,
        height=config.data.height,
        width=config.data.width,
        steps=own.steps or config.rollout.steps,
        shift=config.rollout.shift,
        guidance_scale=own.guidance_scale,
        batch=own.batch,
        seed=own.seed,
    )


# ------------------------------------------------------------------------------------------------------------ data


def manifest(config: Config, model: WanBackbone, progress: Callable) -> Path:
    """The manifest that the config names, or the one that its generator writes (once)."""
    data, generator = config.data, config.data.generator
    if data.manifest is not None:
        return data.manifest
    assert generator is not None, "the config's rules ask for a manifest or a generator"
    known = prompts(data.prompts)
    if isinstance(generator, SamplesConfig):
        settings = SamplingSettings(
            frames=data.frames, height=data.height, width=data.width, steps=generator.steps,
            shift=config.rollout.shift, guidance_scale=generator.guidance, batch=generator.batch, seed=generator.seed,
        )  # fmt: skip

        def draw(some: list[str], indices: list[int]) -> torch.Tensor:
            return decode_all(model, sample(model, some, indices, settings), generator.batch)

        made_by = model.describe()  # another transformer or another VAE makes other videos
        name = f"samples-{made_by['transformer_fingerprint']}-{made_by['vae_fingerprint']}-{_key(generator)}"
        counts = {"train": generator.per_prompt, "validation": generator.held_out_per_prompt}
        return shapes.labelled(
            data.cache / name, known, counts, draw, generator.other_captions, generator.batch, progress
        )
    if isinstance(generator, ClipsConfig):
        return video_clips(config, generator, known, progress)
    wrong, unsteady = (generator.wrong, generator.unsteady) if isinstance(generator, MixtureConfig) else (0.0, 0.0)
    folder = data.cache / f"{generator.name}-{_key(generator)}"
    return shapes.mixture(folder, known["train"], generator.count, generator.seed, wrong, unsteady)


def video_clips(config: Config, own: ClipsConfig, known: dict[str, list[str]], progress: Callable) -> Path:
    """The pairs of clips and their degradations where a reward is trained, or else the clips alone."""
    settings = cutting.ClipSettings(
        **clip(config.data), kinds=tuple(own.kinds), crops=own.crops, held_out=own.held_out,
        formats=tuple(own.formats), seed=own.seed,
    )  # fmt: skip
    # Other videos, settings or prompts make other clips: the folder's name is a hash of them all.
    videos = [content_hash(video) for video in cutting.find_videos(own.videos)]
    parts = json.dumps([videos, asdict(settings), known.get("train"), known.get("validation")])
    folder = config.data.cache / f"{own.name}-{hashlib.sha256(parts.encode()).hexdigest()[:16]}"
    pairs, alone = cutting.write_clips(
        folder, own.videos, known, settings, skip_unreadable=config.data.skip_unreadable, progress=progress
    )
    return pairs if isinstance(config.objective, PreferenceConfig) else alone


def _key(generator: SamplesConfig | MixtureConfig | CuratedConfig) -> str:
    values = generator.model_dump(exclude={"name", "batch"})
    return "-".join(f"{name}{value:g}" for name, value in values.items())


def clip(data: DataConfig) -> dict[str, Any]:
    return {"frames": data.frames, "height": data.height, "width": data.width, "fps": data.fps}


def fill_cache(config: Config, model: WanBackbone, progress: Callable) -> Path:
    """Encode what is not yet encoded; returns the manifest."""
    with processes.main_first():
        path = manifest(config, model, progress)
    encode(config, model, path)
    return path


def encode(config: Config, model: WanBackbone, path: Path) -> None:
    """The clips and prompts of a manifest, into the config's cache; several processes share them out."""
    own = config.data
    with located("data"):
        report = build_cache(
            model, path, own.cache, skip_unreadable=own.skip_unreadable, batch_size=own.encode_batch, **clip(own)
        )
    if processes.is_main():
        print(report, flush=True)


def dataset(config: Config, model: WanBackbone, path: Path, split: str) -> Dataset | None:
    """The cached clips of a split.  A manifest whose rows name no split is all training data."""
    has_splits = any(getattr(row, "split", None) for row in read_manifest(path))
    if not has_splits and split != "train":
        return None
    return load_dataset(
        model,
        path,
        config.data.cache,
        split=split if has_splits else None,
        skip_unreadable=config.data.skip_unreadable,
        **clip(config.data),
    )


# ---------------------------------------------------------------------------------------------------------- reward


def new_reward(config: Config, model: WanBackbone) -> TrainableReward:
    """An untrained reward, as ``reward.head`` describes it."""
    torch.manual_seed(config.seed)
    if isinstance(config.reward, LatentRewardConfig):
        head = config.reward.head
        assert head is not None
        own = head.adapter
        network = RewardHead(
            model.width, head.dimensions, blocks=len(head.blocks), pooling=head.pooling, inner=head.inner,
            n_queries=head.queries, heads=head.heads, hidden=head.hidden, film=head.film,
        )  # fmt: skip
        adapter = None
        if own is not None:
            adapter = RewardAdapter(own.rank, own.alpha, tuple(own.targets), dropout=own.dropout, seed=config.seed)
        with located("reward.head.adapter.targets"):
            return LatentReward(network, model, head.blocks, adapter=adapter)
    assert isinstance(config.reward, PixelRewardConfig) and config.reward.head is not None
    pixel_head = config.reward.head
    frames = PixelNetwork(
        model.text_width, pixel_head.dimensions, size=pixel_head.size, hidden=pixel_head.hidden, inner=pixel_head.inner
    )
    return PixelReward(frames.to(model.device))


def trained_reward(config: Config, model: WanBackbone) -> Reward:
    """The reward at ``reward.path``, or the aesthetic score; frozen."""
    if isinstance(config.reward, PixelRewardConfig) and config.reward.aesthetic:
        own = config.reward.aesthetic
        return load_aesthetic(own.clip, own.mlp, own.revision, model.device)
    assert config.reward is not None and config.reward.path is not None
    reward = load_reward(config.reward.path, model)
    if reward.space != config.reward.space:
        what = f"the reward at {config.reward.path} is a {reward.space} one"
        raise PrflError(what, where="reward.space", fix=f"space: {reward.space}")
    check_clip(reward.card, clip(config.data), str(config.reward.path))
    # A weight on a dimension that it does not have is known now, and not in the first step.
    total(dict.fromkeys(reward.dimensions, torch.zeros(1)), config.reward.weights)
    return reward


def reward_place(path: str | Path) -> str | Path:
    """A folder or a hub id; 'shapes' is the reward inside the package."""
    return shapes.reward_folder() if path == "shapes" else path


def load_reward(path: str | Path, model: WanBackbone, adapter_name: str | None = None) -> TrainableReward:
    """A saved reward of whichever kind.  adapter_name: for its own adapter, where several share the backbone."""
    path = reward_place(path)
    if kind_of(path) == pixel.KIND:
        return PixelReward.from_pretrained(path, device=model.device)
    return LatentReward.from_pretrained(path, backbone=model, adapter_name=adapter_name)


def watched_rewards(config: Config, model: WanBackbone, trained: Reward | None) -> dict[str, LatentsScorer]:
    """The ``reward`` that is trained on, and the ``held_out`` one: what is watched on held-out prompts."""
    scorers: dict[str, LatentsScorer] = {}
    if trained is not None and config.reward is not None:
        scorers["reward"] = with_total(trained, model, config.reward.weights, config.reward.aggregate)
    if config.evaluation.held_out_reward:
        held_out = load_reward(config.evaluation.held_out_reward, model, adapter_name="held-out")
        scorers["held_out"] = with_total(held_out, model, None, "sum")
    return scorers


def with_total(
    reward: Reward, model: WanBackbone, weights: dict[str, float] | None, aggregate: Literal["sum", "logsigmoid"]
) -> LatentsScorer:
    """A reward's logits, and their ``total`` as an objective with these weights takes it."""
    read = latents_scorer(reward, model)

    def score(latents: torch.Tensor, sigma: torch.Tensor, condition: Condition) -> Scores:
        logits = read(latents, sigma, condition)
        scores = reward.normalisation.apply(logits) if aggregate == "sum" else logits
        return logits | {"total": total(scores, weights, aggregate)}

    return score


def latents_scorer(reward: Reward, model: WanBackbone) -> LatentsScorer:
    """Logits of a reward at noisy latents, for evaluation."""
    return reward.logits if isinstance(reward, LatentReward) else pixel_scorer(model, reward)


# ------------------------------------------------------------------------------------------------------- objective


def preference(config: Config, model: WanBackbone, reward: TrainableReward, clips: Dataset) -> Objective:
    own = config.objective
    assert isinstance(own, PreferenceConfig)
    if isinstance(reward, LatentReward):
        return Preference(
            reward,
            clips,
            config.seed,
            loss=own.loss,
            sigma_sampling=own.sigma_sampling,
            shift=shift(config, model),
            eta=own.eta,
        )
    kept = own.keep_decoded
    return PixelPreference(
        reward, clips, model, config.seed, loss=own.loss, frames=own.frames, eta=own.eta, keep_decoded=kept
    )


def sft(config: Config, model: WanBackbone, clips: Dataset) -> Sft:
    """SFT as the objective itself, or as the regulariser of another."""
    own = config.objective
    settings = own if isinstance(own, SftConfig) else own.sft if isinstance(own, SteeringConfig) else None
    assert settings is not None, "the config's rules ask for objective.sft"
    if isinstance(clips, PairDataset):
        raise PrflError("SFT trains on videos, not on pairs", where="data.manifest", fix="give a manifest of videos")
    return Sft(
        model,
        clips,
        config.seed,
        adapter=policy_adapter(config),
        prompt_dropout=settings.prompt_dropout,
        shift=shift(config, model),
        scale=settings.weight if isinstance(settings, SftRegulariserConfig) else 1.0,
    )


def method(config: Config, coefficients: Coefficients) -> Method:
    own, weight = config.objective, config.rollout.step_weight
    if isinstance(own, PrflConfig):
        return Prfl(coefficients, config.seed, handoff=own.handoff, step_weight=weight, steps_range=own.steps_range)
    assert isinstance(own, VaderConfig)
    return Vader(coefficients, last_steps=own.last_steps, step_weight=weight)


def steering(config: Config, model: WanBackbone, reward: Reward) -> Pathwise:
    """A reward-gradient objective: (method, reward), whatever the two are."""
    own, scores, guidance = config.objective, config.reward, config.rollout.guidance
    assert isinstance(own, SteeringConfig) and scores is not None
    if isinstance(reward, LatentReward):
        scorer: LatentScorer | PixelScorer = LatentScorer(reward, scores.aggregate)
    else:
        frames = own.frames if isinstance(own, VaderConfig) else "all"
        scorer = PixelScorer(reward, model, config.seed, frames, scores.aggregate)
    with located("data"):
        latent_shape = model.latent_shape(config.data.frames, config.data.height, config.data.width)
    return Pathwise(
        model,
        method(config, chain(config, model)),
        scorer,
        RewardLoss(
            scores.weights or dict.fromkeys(reward.dimensions, 1.0),
            aggregate=scores.aggregate,
            shape=scores.shape,
            target=scores.target,
            scale=scores.scale,
        ),
        prompts(config.data.prompts)["train"],
        latent_shape,
        config.seed,
        adapter=POLICY,
        guidance=Guidance(guidance.scale, guidance.gradient),
        distance_weight=own.distance_weight,
    )


def regulariser(config: Config, model: WanBackbone, clips: Dataset | None) -> Regulariser | None:
    own = config.objective
    if isinstance(own, SteeringConfig) and own.sft is not None:
        assert clips is not None
        return Regulariser(sft(config, model, clips), every=own.sft.every)
    return None
