"""Makes the model of the shapes world: VAE, text encoder and tokenizer, transformer, as one diffusers pipeline folder.

``python -m prfl.data.shapes.pretrain configs/tiny/pretrain.yaml`` runs the three parts in order; a part whose folder
is already there is skipped, so a stopped run goes on with the part that it was in.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import yaml
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.training_utils import EMAModel
from pydantic import BaseModel, ConfigDict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from prfl.backbone import load_backbone
from prfl.backbone import vae as vae_codec
from prfl.data.shapes import oracle, world
from prfl.flow import add_noise, shift_sigmas, velocity_target


class PretrainConfig(BaseModel):
    """What ``configs/tiny/pretrain.yaml`` may say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    output: Path
    seed: int = 0
    captions: Literal["train", "all"] = "train"  # which captions the transformer sees
    vae_base_dim: int = 12
    vae_channels: int = 12
    vae_phases: list[tuple[int, int, int, float]]  # (frames, batch, steps, learning rate)
    width_heads: int = 4  # attention heads of 32 channels each
    layers: int = 6
    clips: int = 8192  # size of the pretraining set
    wrong: float = 0.2  # share of clips whose caption has one wrong attribute
    unsteady: float = 0.3  # share of clips with wobble, flicker or a jump
    prompt_dropout: float = 0.1
    batch: int = 64
    steps: int = 4000
    learning_rate: float = 1e-3
    shift: float = 3.0


# ---------------------------------------------------------------------------------------------------------- the VAE


def new_vae(config: PretrainConfig) -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=config.vae_base_dim,
        z_dim=config.vae_channels,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * config.vae_channels,
        latents_std=[1.0] * config.vae_channels,
        scale_factor_spatial=4,
        scale_factor_temporal=4,
    )


def cosine(step: int, steps: int, warmup: int = 50) -> float:
    """Learning-rate factor: linear warm-up, then a half cosine down to 2 %."""
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def vae_loss(vae: AutoencoderKLWan, pixels: Tensor) -> Tensor:
    """Foreground-weighted squared error around the clamp, and a weak pull of the latents towards unit size.

    From the start an L1 term, a sampled posterior or noise on the latents each make it settle on 'all background'
    with a loss that looks fine, so single frames are learned by squared error alone; clips add L1, for sharp edges.
    """
    mean = vae.encode(pixels).latent_dist.mode()
    difference = vae_codec.decode_raw(vae, mean) - pixels
    weight = 1 + 4 * (pixels.abs().amax(1, keepdim=True) > 0.05).to(pixels.dtype)
    error = difference**2 if pixels.shape[2] == 1 else difference**2 + 0.1 * difference.abs()
    return (error * weight).sum() / (weight.sum() * 3) + 1e-4 * (mean**2).mean()


def train_vae(config: PretrainConfig, folder: Path) -> None:
    """Single frames first, then clips: trained on video at once it settles on 'all background'."""
    torch.manual_seed(config.seed)
    vae = new_vae(config)
    for module in vae.modules():  # 1.4 times faster on a CPU than the default layout
        if isinstance(module, torch.nn.Conv3d):
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last_3d)
    captions = [a.caption for a in world.all_attributes()]
    index = 0
    for frames, batch, steps, learning_rate in config.vae_phases:
        optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step, n=steps: cosine(step, n))
        for step in range(steps):
            index += 1
            scenes = world.sample_scenes(config.seed + 1000, index, batch, captions, unsteady=0.5)
            first = random.Random(index).randrange(world.FRAMES - frames + 1)
            pixels = world.render(scenes)[:, :, first : first + frames]
            loss = vae_loss(vae, pixels.contiguous(memory_format=torch.channels_last_3d))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % 50 == 0 or step == steps - 1:
                say(f"vae {frames} frames step {step}: loss {loss:.4f}")
            if step % 300 == 299 or step == steps - 1:
                say(f"vae round trip: {round_trip(vae, 64)}")
                vae.save_pretrained(folder.with_name("vae-unfinished"))
    raw = torch.cat([encode_raw(vae, config.seed + 2000, i, captions) for i in range(16)])
    vae.register_to_config(
        latents_mean=raw.mean((0, 2, 3, 4)).tolist(), latents_std=raw.std((0, 2, 3, 4)).clamp(min=1e-3).tolist()
    )
    say(f"vae round trip, 512 fresh clips: {round_trip(vae, 512)}")
    vae.save_pretrained(folder)


@torch.no_grad()
def encode_raw(vae: AutoencoderKLWan, seed: int, index: int, captions: list[str]) -> Tensor:
    return vae.encode(world.render(world.sample_scenes(seed, index, 32, captions, unsteady=0.3))).latent_dist.mode()


@torch.no_grad()
def round_trip(vae: AutoencoderKLWan, count: int) -> dict[str, float]:
    """Oracle shares on flawless fresh clips after encoding and decoding."""
    captions = [a.caption for a in world.all_attributes()]
    scenes = [s for i in range(count // 32) for s in world.sample_scenes(77, i, 32, captions)]
    decoded = torch.cat(
        [vae_codec.decode(vae, vae_codec.encode(vae, world.render(scenes[i : i + 32]))) for i in range(0, count, 32)]
    )
    return shares(oracle.judge(decoded, [s.said.caption for s in scenes]))


def shares(right: dict[str, Tensor]) -> dict[str, float]:
    return {name: round(value.float().mean().item(), 3) for name, value in right.items()}


# ----------------------------------------------------------------------------------------------------- text encoder


def new_tokenizer() -> PreTrainedTokenizerFast:
    words = sorted({word for a in world.all_attributes() for word in a.caption.split()})
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def train_text_encoder(config: PretrainConfig, folder: Path, tokenizer_folder: Path) -> None:
    """Two UMT5 layers, taught to tell the four attributes of a caption from its mean embedding."""
    torch.manual_seed(config.seed)
    tokenizer = new_tokenizer()
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    every = world.all_attributes()
    tokens = tokenizer([a.caption for a in every], padding=True, return_tensors="pt")
    names = list(world.ATTRIBUTES)
    classes = torch.tensor([[world.ATTRIBUTES[name].index(getattr(a, name)) for name in names] for a in every])
    heads = torch.nn.ModuleList([torch.nn.Linear(64, len(world.ATTRIBUTES[name])) for name in names])
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr=2e-3)
    for step in range(200):
        pooled = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state.mean(1)
        losses = [F.cross_entropy(head(pooled), classes[:, i]) for i, head in enumerate(heads)]
        torch.stack(losses).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            say(f"text step {step}: {[round(loss.item(), 4) for loss in losses]}")
    tokenizer.save_pretrained(tokenizer_folder)
    encoder.save_pretrained(folder)


# ------------------------------------------------------------------------------------------------------ transformer


def new_transformer(config: PretrainConfig) -> WanTransformer3DModel:
    width = config.width_heads * 32
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=config.width_heads, attention_head_dim=32,
        in_channels=config.vae_channels, out_channels=config.vae_channels, text_dim=64, freq_dim=64,
        ffn_dim=4 * width, num_layers=config.layers, rope_max_seq_len=64,
    )  # fmt: skip


def make_clips(config: PretrainConfig, vae: AutoencoderKLWan, path: Path) -> None:
    """Render and encode the pretraining set: normalised latents (clips, channels, 5, 8, 8) with their captions."""
    captions = [a.caption for a in world.all_attributes()]
    if config.captions == "train":
        captions = world.split_prompts()["train"]
    latents, said = [], []
    for index in range(config.clips // 64):
        scenes = world.sample_scenes(config.seed + 3000, index, 64, captions, config.wrong, config.unsteady)
        with torch.no_grad():
            latents.append(vae_codec.encode(vae, world.render(scenes)))
        said += [scene.said.caption for scene in scenes]
        if index % 16 == 15:
            say(f"encoded {len(said)} of {config.clips} clips")
    save_file({"latents": torch.cat(latents)}, path, metadata={"captions": json.dumps(said)})


def assemble(folder: Path, transformer: WanTransformer3DModel, shift: float) -> None:
    """Write model_index.json, scheduler and transformer beside the parts that are there."""
    pipeline = WanPipeline(
        tokenizer=PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(folder / "text_encoder"),
        vae=AutoencoderKLWan.from_pretrained(folder / "vae"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        transformer=transformer,
    )
    pipeline.save_pretrained(folder)


def train_transformer(config: PretrainConfig, folder: Path) -> None:
    """Flow matching on the flawed clips, with prompt dropout; what is saved is the moving average of the weights."""
    torch.manual_seed(config.seed)
    clips_path = folder.with_name("clips.safetensors")
    if not clips_path.exists():
        make_clips(config, AutoencoderKLWan.from_pretrained(folder / "vae"), clips_path)
    clips = load_file(clips_path)["latents"]
    with safe_open(clips_path, "pt") as file:
        said = json.loads(file.metadata()["captions"])
    assemble(folder, new_transformer(config), config.shift)
    backbone = load_backbone(folder)
    transformer = backbone.transformer.requires_grad_(True)
    captions = sorted(set(said))
    conditions = backbone.condition([*captions, ""])
    caption_index = torch.tensor([captions.index(caption) for caption in said])

    parameters = list(transformer.parameters())
    average = EMAModel(parameters, decay=0.999, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, config.steps, warmup=200))
    random_source = torch.Generator().manual_seed(config.seed)
    for step in range(config.steps):
        chosen = torch.randint(len(clips), (config.batch,), generator=random_source)
        dropped = torch.rand(config.batch, generator=random_source) < config.prompt_dropout
        condition = conditions[torch.where(dropped, len(captions), caption_index[chosen])]
        clean = clips[chosen]
        noise = torch.randn(clean.shape, generator=random_source)
        sigma = shift_sigmas(torch.rand(config.batch, generator=random_source), config.shift)
        velocity = backbone.velocity(add_noise(clean, noise, sigma), sigma, condition)
        loss = F.mse_loss(velocity, velocity_target(clean, noise))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        average.step(parameters)
        if step % 100 == 99:
            say(f"transformer step {step + 1} of {config.steps}: loss {loss:.4f}")
        if step % 500 == 499 or step == config.steps - 1:
            average.store(parameters)
            average.copy_to(parameters)
            transformer.save_pretrained(folder.with_name("transformer-unfinished"))
            average.restore(parameters)
    average.copy_to(parameters)
    transformer.save_pretrained(folder / "transformer")
    folder.with_name("finished").write_text(f"{config.steps} steps\n")


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def main(path: str) -> None:
    config = PretrainConfig(**yaml.safe_load(Path(path).read_text()))
    folder = config.output
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "vae").exists():
        train_vae(config, folder / "vae")
    if not (folder / "text_encoder").exists():
        train_text_encoder(config, folder / "text_encoder", folder / "tokenizer")
    if not folder.with_name("finished").exists():
        train_transformer(config, folder)


if __name__ == "__main__":
    main(sys.argv[1])
