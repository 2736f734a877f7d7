"""The models that steps are measured on: each by configs that users have, built as their runs are.

``tiny`` is the shapes world inside the package, trained.  The others have Wan's layout and random weights, drawn where
they are used and never written, and random text embeddings; PRFL_BENCH_MODEL, a diffusers pipeline's folder, puts real
ones in the place of a Wan world's.  Rewards are the trained one inside the package, for ``tiny``, or else new.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import BatchEncoding, UMT5Config, UMT5EncoderModel

from bench.harness.facts import REPOSITORY
from bench.harness.problem import Needs
from prfl.backbone import Backbone
from prfl.backbone.families import architecture_folder
from prfl.backbone.source import Source, vae_dtype
from prfl.backbone.wan import vae as vae_codec
from prfl.backbone.wan.loading import assemble, flow_schedule
from prfl.backbone.weights import cast
from prfl.config import load_config
from prfl.config.schema import Config
from prfl.factory.backbone import POLICY, build_backbone, choose_device, model_source, prepare_backbone
from prfl.factory.reward import Reward, build_new_reward, load_followed_reward

MODEL = "PRFL_BENCH_MODEL"
TRAINED = "shapes"  # backbone.model, and reward.path, of what is inside the package
PROMPTS = f"data.prompts.train={json.dumps(str(REPOSITORY / 'configs/prompts/videos.txt'))}"
SMALL = f"backbone.model={json.dumps(str(REPOSITORY / 'bench/worlds/small'))}"
PLAIN = ("rollout.stride=1", "rollout.gradients_per_rollout=1", "evaluation.every=0", "training.accumulation=1")
P480 = ("data.height=480", "data.width=832")


@dataclass(frozen=True)
class World:
    """policy, latent, pixel: configs of a policy's run and of its rewards' training, with overrides.

    gib: of a GPU's memory for a step with a latent reward.
    """

    policy: Sequence[str]
    latent: Sequence[str]
    pixel: Sequence[str]
    needs: Needs = Needs()


def _wan(folder: str, gib: float, *overrides: str) -> World:
    policy, reward = f"{folder}/prfl.yaml", f"{folder}/reward.yaml"
    pixel = "reward={space: pixel, head: {dimensions: [quality]}}"
    return World(
        (policy, *PLAIN, PROMPTS, "training.batch=1", *overrides), (reward, PROMPTS), (reward, PROMPTS, pixel),
        Needs(gpu=True, gib=gib),
    )  # fmt: skip


_SMALL_REWARD = "configs/wan2.1-1.3b/reward.yaml", PROMPTS, "backbone.dtype=float32", "backbone.device=auto"
WORLDS = {
    "tiny": World(
        ("configs/tiny/prfl.yaml", *PLAIN, "reward.path=shapes", "objective={name: prfl}", "data.generator=null",
         "backbone.checkpointing=full",
         "training.batch=1"),
        ("configs/tiny/reward.yaml",), ("configs/tiny/pixel_reward.yaml",),
    ),
    "small": World(
        ("configs/wan2.1-1.3b/prfl.yaml", *PLAIN, PROMPTS, SMALL, "backbone.dtype=float32", "backbone.device=auto",
         "training.batch=1", "data.height=96", "data.width=96"),
        (*_SMALL_REWARD, "reward.head.blocks=[2]"),
        (*_SMALL_REWARD, "reward={space: pixel, head: {dimensions: [quality]}}"),
    ),
    "wan-1.3b": _wan("configs/wan2.1-1.3b", 16.0, *P480),
    "wan-14b": _wan("configs/wan2.1-14b", 60.0, *P480, "rollout.shift=3.0"),
}  # fmt: skip


def config(world: str, overrides: Sequence[str] = ()) -> Config:
    """Load the config of PRFL in this world, as its users have it but for clips, rounds and reuse, with overrides.

    A pixel reward: ``reward={space: pixel, path: new}``, and an objective that may read one.
    """
    file, *policy_overrides = WORLDS[world].policy
    if world.startswith("wan") and (folder := os.environ.get(MODEL)):
        policy_overrides.append(f"backbone.model={json.dumps(folder)}")
    return load_config(REPOSITORY / file, [*policy_overrides, *overrides])


def backbone(config: Config) -> Backbone:
    """Build the frozen model of a config and, on it, the policy's adapter, moved as if it had been trained a little."""
    model = build_backbone(config) if has_weights(config) else _random(config)
    generator = torch.Generator().manual_seed(config.seed)
    for parameter in model.parameters(POLICY).values():
        drawn = torch.randn(parameter.shape, generator=generator) * 0.02
        parameter.data += drawn.to(parameter)
    return model


def reward(world: str, config: Config, model: Backbone) -> Reward:
    """Build the reward that the config asks for, frozen: the trained one where it is named, or a new one."""
    assert config.reward is not None
    if config.reward.paths == [TRAINED]:
        return load_followed_reward(config, model)
    latent = config.reward.space == "latent"
    file, *overrides = WORLDS[world].latent if latent else WORLDS[world].pixel
    return build_new_reward(load_config(REPOSITORY / file, overrides), model).freeze()


def weights(config: Config) -> str:
    """Say which weights are random, for the results."""
    assert config.reward is not None
    kind = "random" if config.reward.paths != [TRAINED] else "trained"
    model = "trained" if has_weights(config) else "random"
    return model if model == kind else f"{model}, of the {config.reward.space} reward {kind}"


def has_weights(config: Config) -> bool:
    return config.backbone.model == TRAINED or MODEL in os.environ and config.backbone.model == os.environ[MODEL]


# ------------------------------------------------------------------------------------------------------ random weights


def _random(config: Config) -> Backbone:
    """Build the architecture of ``backbone.model`` with random weights, made in their own dtype on their device."""
    source = _source(config)
    network, vae = transformer(config), decoder(config)
    if source.device.type == "cpu":
        vae_codec.channels_last(vae)
    text = partial(random_text, network.config.text_dim, source.device)
    return prepare_backbone(config, assemble(source, flow_schedule(source), network, vae, text))


def _source(config: Config) -> Source:
    return Source(architecture_folder(str(model_source(config))), None, choose_device(config.backbone))


def transformer(config: Config) -> WanTransformer3DModel:
    """Build diffusers' own model with the weights that ``backbone`` has: no adapter, no kernels."""
    return _part(config, WanTransformer3DModel, "transformer", getattr(torch, config.backbone.dtype))


def decoder(config: Config) -> AutoencoderKLWan:
    """Build diffusers' own VAE with the weights that ``backbone`` has."""
    dtype = vae_dtype(getattr(torch, config.backbone.dtype))
    return _part(config, AutoencoderKLWan, "vae", dtype).requires_grad_(False)


def _part(config: Config, kind: Any, folder: str, dtype: torch.dtype) -> Any:
    source = _source(config)
    if has_weights(config):
        return source.load(kind, folder, dtype)
    torch.manual_seed(0)
    with source.device, default_dtype(dtype):  # 14 billion weights in float32 first would take 56 GB
        return cast(kind.from_config(source.config(kind, folder)), dtype)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make floating tensors of this type for a while, where none is named."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def random_text(width: int, device: torch.device) -> tuple[Any, UMT5EncoderModel]:
    """Make a tokenizer of bytes, and one random layer of the encoder's kind: embeddings have their real shape."""
    torch.manual_seed(1)
    layers = UMT5Config(vocab_size=256, d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1, dropout_rate=0.0)
    return byte_tokens, UMT5EncoderModel(layers).to(device).requires_grad_(False).eval()


def byte_tokens(prompts: Sequence[str], max_length: int, **_: Any) -> BatchEncoding:
    tokens = [torch.tensor([*prompt.encode(), 0][:max_length]) for prompt in prompts]
    lengths = torch.tensor([len(each) for each in tokens])
    ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    return BatchEncoding({"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()})
