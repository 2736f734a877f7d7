"""Rewards of a config: new, trained, or public."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from prfl.backbone import Backbone
from prfl.config.schema import Config
from prfl.config.sections import public_rewards as public
from prfl.config.sections.reward import LatentRewardConfig, PixelRewardConfig
from prfl.factory import provenance
from prfl.factory.by_name import build_by_name
from prfl.factory.critic import load_critic, untrained_critic
from prfl.factory.data import video_size
from prfl.reward import hpsv3, image_reward, mps, own_function, pixel, text_match, videoalign, watched
from prfl.reward.aesthetic import AestheticReward, load_aesthetic
from prfl.reward.checkpoint import CONFIG, WEIGHTS, check_clip, find_reward, kind_of, rewrite_config
from prfl.reward.checkpoint_schema import BenchmarkScores, RewardCard, StoredPixel
from prfl.reward.ensemble import RewardEnsemble
from prfl.reward.head import RewardHead
from prfl.reward.latent import LatentReward, RewardAdapter
from prfl.reward.model_card import reward_card
from prfl.reward.pixel import PixelNetwork, PixelReward
from prfl.reward.public import PublicReward
from prfl.reward.scores import total
from prfl.reward.several import LatentBeside, SeveralRewards
from prfl.toy import clips as shapes
from prfl.utils.console import warn
from prfl.utils.errors import PrflError, error_location
from prfl.utils.files import atomic_write

TrainableReward = LatentReward | PixelReward
Reward = TrainableReward | RewardEnsemble | PublicReward | LatentBeside


class PublicKind(NamedTuple):
    """load: takes the keys of the section by name, and ``device``, ``data`` (that section), ``video`` (its size).
    untrained: one of its sizes, to be counted; it takes keys of the section, and ``video``, too."""

    load: Callable[..., PublicReward]
    untrained: Callable[..., PublicReward]


PUBLIC_REWARDS: dict[type[public.PublicRewardConfig], PublicKind] = {
    public.AestheticConfig: PublicKind(load_aesthetic, AestheticReward.untrained),
    public.ClipConfig: PublicKind(
        text_match.load_clip, partial(text_match.untrained, "clip", text_match.VIT_L_14_TEXT)
    ),
    public.PickScoreConfig: PublicKind(text_match.load_pickscore, partial(text_match.untrained, "pickscore")),
    public.HpsConfig: PublicKind(text_match.load_hps, partial(text_match.untrained, "hps")),
    public.ImageRewardConfig: PublicKind(image_reward.load_image_reward, image_reward.untrained),
    public.MpsConfig: PublicKind(mps.load_mps, mps.untrained),
    public.Hpsv3Config: PublicKind(hpsv3.load_hpsv3, hpsv3.untrained),
    public.VideoAlignConfig: PublicKind(videoalign.load_videoalign, videoalign.untrained),
    public.ObjectConfig: PublicKind(watched.load_object, watched.untrained_object),
    public.ActionConfig: PublicKind(watched.load_action, watched.untrained_action),
    public.CriticConfig: PublicKind(load_critic, untrained_critic),
    public.CoherenceConfig: PublicKind(watched.load_coherence, watched.untrained_coherence),
    public.CallableConfig: PublicKind(own_function.load_own, own_function.Unread),
}
"""How each public reward is loaded and counted, by its section."""


def build_new_reward(config: Config, model: Backbone) -> TrainableReward:
    """An untrained reward, as ``reward.head`` describes it."""
    torch.manual_seed(config.seed)
    return NEW_REWARDS[type(config.reward)](config, model)


def new_latent_reward(config: Config, model: Backbone) -> LatentReward:
    assert isinstance(config.reward, LatentRewardConfig) and config.reward.head is not None
    head = config.reward.head
    network = RewardHead(
        model.facts.width_after(head.blocks), head.dimensions, blocks=len(head.blocks), pooling=head.pooling,
        inner=head.inner, n_queries=head.queries, heads=head.heads, hidden=head.hidden, film=head.film,
    )  # fmt: skip
    adapter, lora = None, head.adapter
    if lora is not None:
        adapter = RewardAdapter(lora.rank, lora.alpha, tuple(lora.targets), dropout=lora.dropout, seed=config.seed)
    with error_location("reward.head.adapter.targets"):
        return LatentReward(network, model, head.blocks, adapter=adapter)


def new_pixel_reward(config: Config, model: Backbone) -> PixelReward:
    assert isinstance(config.reward, PixelRewardConfig) and config.reward.head is not None
    network = build_by_name(PixelNetwork, config.reward.head, text_width=model.facts.text_width)
    return PixelReward(network.to(model.facts.device))


NEW_REWARDS: dict[type, Callable[[Config, Backbone], TrainableReward]] = {
    LatentRewardConfig: new_latent_reward,
    PixelRewardConfig: new_pixel_reward,
}


def check_followed_reward(config: Config) -> None:
    """Refuse a trained reward by its config.json, before clips go through the VAE, as it is refused when it is loaded.

    Raises PrflError for one of another space or other videos, and for a weight on a dimension that it does not have.
    """
    section = config.reward
    if not config.follows_reward or section is None or section.public:
        return
    for number, path in enumerate(section.paths):
        with _member(number) if len(section.paths) > 1 else nullcontext():
            saved = find_reward(reward_path(path)).config
        _check_member(config, "pixel" if isinstance(saved, StoredPixel) else "latent", saved.card, path)
        if not (isinstance(section, PixelRewardConfig) and section.latent):  # which has dimensions of its own
            total(dict.fromkeys(saved.dimensions(), torch.zeros(1)), section.weights)


def _check_member(config: Config, space: str, card: RewardCard, path: str) -> None:
    assert config.reward is not None
    if space != config.reward.space:
        several = len(config.reward.paths) > 1
        what = f"the reward at {path} is a {space} one"
        fix = f"space: {space}" if not several else f"name {config.reward.space} rewards only"
        raise PrflError(what, where="reward.path" if several else "reward.space", fix=fix)
    check_clip(card, video_size(config.data), path)


def load_followed_reward(config: Config, model: Backbone) -> Reward:
    """The reward at ``reward.path``, or the public ones that are named in its place; frozen.

    With ``reward.latent`` a latent one beside it.
    """
    assert config.reward is not None
    reward = load_public_rewards(config, model) if config.reward.public else load_trained_rewards(config, model)
    if isinstance(config.reward, PixelRewardConfig) and config.reward.latent is not None:
        reward = LatentBeside(load_latent_beside(config.reward.latent, config, model), reward)  # type: ignore[arg-type]
    # A weight on a dimension that it does not have is known now, and not in the first step.
    total(dict.fromkeys(reward.dimensions, torch.zeros(1)), config.reward.weights)
    return reward


def load_trained_rewards(config: Config, model: Backbone) -> Reward:
    """The reward at ``reward.path``, or several as one."""
    assert config.reward is not None
    paths = config.reward.paths
    members = []
    for number, path in enumerate(paths):
        several = len(paths) > 1
        with _member(number) if several else nullcontext():
            member = load_reward(path, model, adapter_name=f"reward-{number}" if several else None)
        _check_member(config, member.space, member.card, path)
        members.append(member)
    if isinstance(config.reward, LatentRewardConfig) and len(members) > 1:
        latent = [member for member in members if isinstance(member, LatentReward)]
        return RewardEnsemble(latent, config.reward.uncertainty_weight)
    return members[0]


def load_latent_beside(path: str, config: Config, model: Backbone) -> LatentReward:
    """The latent reward that is followed beside one on pixels."""
    reward = load_reward(path, model, adapter_name="reward-latent")
    if not isinstance(reward, LatentReward):
        raise PrflError(f"the reward at {path} is a pixel one", where="reward.latent", fix="name it as reward.path")
    check_clip(reward.card, video_size(config.data), path)
    return reward


def load_public_rewards(config: Config, model: Backbone) -> PublicReward:
    """The public rewards of a config, as one where there are several.  A licence that has conditions is printed."""
    assert config.reward is not None
    members: list[PublicReward] = []
    for section in config.reward.public:
        if conditions := section.conditions():
            warn(f"the licence of the weights of {section.key}: {conditions}")
        members.append(build_public_reward(section, config, model))
    return together(members, config)


def build_public_reward(section: public.PublicRewardConfig, config: Config, model: Backbone) -> PublicReward:
    """One public reward, of clips of the run's size and of its prompts."""
    context = {"device": model.facts.device, "data": config.data, "video": video_size(config.data)}
    return build_by_name(PUBLIC_REWARDS[type(section)].load, section, **context)


def untrained_public_rewards(config: Config) -> PublicReward:
    """Make the rewards of ``load_public_rewards`` in published sizes with random weights, to count on ``meta``."""
    assert config.reward is not None
    size = video_size(config.data)
    members = [
        build_by_name(PUBLIC_REWARDS[type(section)].untrained, section, video=size) for section in config.reward.public
    ]
    return together(members, config)


def together(members: list[PublicReward], config: Config) -> PublicReward:
    """The public rewards of a config as one."""
    settings = config.reward
    assert isinstance(settings, PixelRewardConfig)
    return members[0] if len(members) == 1 else SeveralRewards(members, settings.weights, settings.balance)


def followed_weights(config: Config, reward: Reward) -> dict[str, float]:
    """The dimensions that have a weight, with it."""
    assert config.reward is not None
    weights = config.reward.weights or dict.fromkeys(reward.dimensions, 1.0)
    return {name: weight for name, weight in weights.items() if weight}


@contextmanager
def _member(number: int) -> Iterator[None]:
    """Around loading one of several rewards: a fault names the yaml path too."""
    try:
        yield
    except PrflError as error:
        what = f"{error.where}: {error.what}"
        raise PrflError(what, where=f"reward.path[{number}]", fix=error.fix) from error


def reward_path(path: str | Path) -> str | Path:
    """A folder or a hub id; 'shapes' is the reward inside the package."""
    return shapes.reward_folder() if str(path) == "shapes" else path


def reward_hash(reward: Reward) -> str:
    """Tells the weights of one trained reward from another's; empty for one that is made of others."""
    if not isinstance(reward, TrainableReward):
        return ""
    return provenance.tensors_hash({name: tensor.detach().cpu() for name, tensor in reward.state().items()})


def save_reward_stamp(folder: Path, model: Backbone, moment: provenance.Moment) -> None:
    """Write which training made a saved reward, in a third file beside the reward's weights and config."""
    stamp = provenance.base_of(model) | asdict(moment)
    provenance.write_beside(folder, stamp, [folder / WEIGHTS, folder / CONFIG])


def add_to_card(path: str | Path, name: str, scores: BenchmarkScores) -> None:
    """Write a benchmark's result into the card of a saved reward: its config.json, its README.md and its stamp.

    A reward of the hub, or the one inside the package, keeps the card that it has, and that is said.
    """
    folder = Path(path)
    if not folder.is_dir() or folder.resolve() == shapes.reward_folder().resolve():
        warn(f"the card of {path} is not ours to write: the result is in the table alone")
        return
    saved = find_reward(folder)
    if saved.edited:
        return
    stamp = provenance.read_stamp(folder)
    card = asdict(saved.config.card)
    card["benchmarks"] = {**card["benchmarks"], name: asdict(scores)}
    config = {**saved.config.model_dump(mode="json"), "card": card}
    rewrite_config(folder, config)
    with atomic_write(folder / "README.md") as temporary:
        reward_card(config).save(temporary)
    if stamp:
        provenance.write_beside(folder, stamp, [folder / WEIGHTS, folder / CONFIG])


def load_reward(path: str | Path, model: Backbone, adapter_name: str | None = None) -> TrainableReward:
    """A saved reward of whichever kind.  adapter_name: for its own adapter, where several share the backbone."""
    path = reward_path(path)
    if stamp := provenance.read_stamp(Path(path)) if Path(path).is_dir() else None:
        provenance.check_last(Path(path), stamp, Path(path).parent)
        if kind_of(path) != pixel.KIND:
            provenance.check_base(Path(path), stamp, provenance.base_of(model))
    if kind_of(path) == pixel.KIND:
        return PixelReward.from_pretrained(path, device=model.facts.device)
    return LatentReward.from_pretrained(path, backbone=model, adapter_name=adapter_name)
