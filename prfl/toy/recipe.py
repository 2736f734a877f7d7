"""The parts of the shapes world's model, as one diffusers pipeline folder.

VAE, text encoder and tokenizer are trained here; the transformer has random weights.

``prfl train configs/tiny/pretrain.yaml`` makes the folder (where it is not there yet) and trains the transformer.
A second recipe, of another seed and width throughout, gives the generator whose samples are out of domain for a reward.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from prfl.backbone.wan import vae as vae_codec
from prfl.toy import oracle, renderer


@dataclass(frozen=True)
class Recipe:
    """The seed and widths of a model.

    vae_width, vae_channels: of the VAE.  heads: of the transformer, HEAD_DIM wide each.
    """

    seed: int
    vae_width: int
    vae_channels: int
    heads: int


RECIPES = {"shapes-untrained": Recipe(0, 12, 8, 4), "shapes-second-untrained": Recipe(1, 10, 6, 3)}
VAE_PHASES = (  # frames, batch, steps, learning rate, noise on the latents at the end of the phase
    (1, 16, 900, 2.0e-3, 0.0),
    (9, 4, 800, 1.5e-3, 0.3),
    (17, 4, 300, 7.0e-4, 0.3),
)
HEAD_DIM, LAYERS = 32, 6
SHIFT = 3.0


# ---------------------------------------------------------------------------------------------------------- the VAE


def new_vae(recipe: Recipe) -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=recipe.vae_width,
        z_dim=recipe.vae_channels,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * recipe.vae_channels,
        latents_std=[1.0] * recipe.vae_channels,
        scale_factor_spatial=4,
        scale_factor_temporal=4,
    )


def cosine(step: int, steps: int, warmup: int = 50) -> float:
    """Return the learning-rate factor: linear warm-up, then a half cosine down to 2 %."""
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def vae_loss(vae: AutoencoderKLWan, pixels: Tensor, noise: float) -> Tensor:
    """Compute the foreground-weighted squared error around the clamp, and a weak pull of latents towards unit size.

    From the start an L1 term, a sampled posterior or noise on the latents each make it settle on 'all background'
    with a loss that looks fine, so single frames are learned by squared error alone.  Clips add L1, for sharp edges,
    and noise in units of the latents' own deviation: what the picture is must then stand out in the latents, so that
    a transformer's small errors do not turn one shape into another.
    """
    mean = vae.encode(pixels).latent_dist.mode()
    noisy = mean + noise * mean.detach().std((0, 2, 3, 4), keepdim=True) * torch.randn_like(mean)
    return reconstruction_error(vae_codec.decode_raw(vae, noisy), pixels) + 1e-4 * (mean**2).mean()


def train_vae(folder: Path, recipe: Recipe) -> None:
    """Train the VAE on single frames first, then on clips: trained on video at once it settles on 'all background'."""
    torch.manual_seed(recipe.seed)
    vae = vae_codec.channels_last(new_vae(recipe))
    captions = [a.caption for a in renderer.all_attributes()]
    index, noise = 0, 0.0

    for frames, batch, steps, learning_rate, noise_at_end in VAE_PHASES:
        optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step, n=steps: cosine(step, n))
        noise_before = noise

        for step in range(steps):
            index += 1
            noise = noise_before + (noise_at_end - noise_before) * (step + 1) / steps

            # A clip of so many frames, from anywhere in each video.
            scenes = renderer.sample_scenes(recipe.seed + 1000, index, batch, captions, unsteady=0.5)
            first = random.Random(index).randrange(renderer.FRAMES - frames + 1)
            pixels = renderer.render(scenes)[:, :, first : first + frames]
            loss = vae_loss(vae, pixels.contiguous(memory_format=torch.channels_last_3d), noise)

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

    # Latents are normalised by what the trained VAE gives.
    raw = torch.cat([encode_raw(vae, recipe.seed + 2000, i, captions) for i in range(16)])
    vae.register_to_config(
        latents_mean=raw.mean((0, 2, 3, 4)).tolist(), latents_std=raw.std((0, 2, 3, 4)).clamp(min=1e-3).tolist()
    )
    say(f"vae round trip, 512 fresh clips: {round_trip(vae, 512)}")
    vae.save_pretrained(folder)


def reconstruction_error(decoded: Tensor, pixels: Tensor) -> Tensor:
    """Average the squared error, and for clips a little L1 for sharp edges; the foreground counts five times."""
    difference = decoded - pixels
    weight = 1 + 4 * (pixels.abs().amax(1, keepdim=True) > 0.05).to(pixels.dtype)
    error = difference**2 if pixels.shape[2] == 1 else difference**2 + 0.1 * difference.abs()
    return (error * weight).sum() / (weight.sum() * 3)


@torch.no_grad()
def encode_raw(vae: AutoencoderKLWan, seed: int, index: int, captions: list[str]) -> Tensor:
    return vae.encode(
        renderer.render(renderer.sample_scenes(seed, index, 32, captions, unsteady=0.3))
    ).latent_dist.mode()


@torch.no_grad()
def round_trip(vae: AutoencoderKLWan, count: int) -> dict[str, float]:
    """Measure the oracle's shares on flawless fresh clips after encoding and decoding."""
    captions = [a.caption for a in renderer.all_attributes()]
    scenes: list[renderer.Scene] = []
    decoded = []
    for index in range(count // 32):
        batch = renderer.sample_scenes(77, index, 32, captions)
        decoded.append(vae_codec.decode(vae, vae_codec.encode(vae, renderer.render(batch))))
        scenes += batch
    return shares(oracle.judge(torch.cat(decoded), [scene.captioned.caption for scene in scenes]))


def shares(right: dict[str, Tensor]) -> dict[str, float]:
    return {name: round(value.float().mean().item(), 3) for name, value in right.items()}


# ----------------------------------------------------------------------------------------------------- text encoder


def new_tokenizer() -> PreTrainedTokenizerFast:
    words = sorted({word for a in renderer.all_attributes() for word in a.caption.split()})
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def train_text_encoder(folder: Path, tokenizer_folder: Path, recipe: Recipe) -> None:
    """Train two UMT5 layers to tell the four attributes of a caption from its mean embedding."""
    torch.manual_seed(recipe.seed)
    tokenizer = new_tokenizer()
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip

    # (caption, attribute) -> the number of the attribute's value
    every = renderer.all_attributes()
    tokens = tokenizer([attributes.caption for attributes in every], padding=True, return_tensors="pt")
    classes = []
    for attributes in every:
        classes.append([values.index(getattr(attributes, name)) for name, values in renderer.ATTRIBUTES.items()])
    targets = torch.tensor(classes)

    heads = torch.nn.ModuleList([torch.nn.Linear(64, len(values)) for values in renderer.ATTRIBUTES.values()])
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr=2e-3)
    for step in range(200):
        pooled = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state.mean(1)
        losses = [F.cross_entropy(head(pooled), targets[:, i]) for i, head in enumerate(heads)]
        torch.stack(losses).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            say(f"text step {step}: {[round(loss.item(), 4) for loss in losses]}")

    tokenizer.save_pretrained(tokenizer_folder)
    encoder.save_pretrained(folder)


# ------------------------------------------------------------------------------------------------------ transformer


def new_transformer(recipe: Recipe) -> WanTransformer3DModel:
    torch.manual_seed(recipe.seed)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=recipe.heads, attention_head_dim=HEAD_DIM,
        in_channels=recipe.vae_channels, out_channels=recipe.vae_channels, text_dim=64, freq_dim=64,
        ffn_dim=4 * recipe.heads * HEAD_DIM, num_layers=LAYERS, rope_max_seq_len=64,
    )  # fmt: skip


def untrained_folder(folder: Path, recipe: Recipe) -> Path:
    """Make the pipeline folder; parts that are there already are kept, so a stopped run goes on with its part."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "vae").exists():
        train_vae(folder / "vae", recipe)
    if not (folder / "text_encoder").exists():
        train_text_encoder(folder / "text_encoder", folder / "tokenizer", recipe)
    if not (folder / "model_index.json").exists():
        WanPipeline(
            tokenizer=PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
            text_encoder=UMT5EncoderModel.from_pretrained(folder / "text_encoder", use_safetensors=True),
            vae=AutoencoderKLWan.from_pretrained(folder / "vae", use_safetensors=True),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
            transformer=new_transformer(recipe),
        ).save_pretrained(folder)
    return folder


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
