"""Makes what the shapes world's transformer is trained from: VAE, text encoder and tokenizer, all trained here, and a
transformer with random weights, as one diffusers pipeline folder.

``prfl train configs/tiny/pretrain.yaml`` makes the folder (where it is not there yet) and trains the transformer.
"""

from __future__ import annotations

import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from prfl.backbone import vae as vae_codec
from prfl.data.shapes import oracle, world

SEED = 0
VAE_BASE_DIM, VAE_CHANNELS = 12, 12
VAE_PHASES = (  # frames, batch, steps, learning rate
    (1, 16, 900, 2.0e-3),
    (9, 4, 900, 1.5e-3),
    (17, 4, 150, 5.0e-4),
)
DECODER_PHASE = (17, 4, 300, 5.0e-4)  # the same, for the decoder alone
LATENT_NOISE = 0.15  # of the normalised latents, in the decoder's own phase
HEADS, HEAD_DIM, LAYERS = 4, 32, 6
SHIFT = 3.0


# ---------------------------------------------------------------------------------------------------------- the VAE


def new_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=VAE_BASE_DIM,
        z_dim=VAE_CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * VAE_CHANNELS,
        latents_std=[1.0] * VAE_CHANNELS,
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
    return reconstruction_error(vae_codec.decode_raw(vae, mean), pixels) + 1e-4 * (mean**2).mean()


def train_vae(folder: Path) -> None:
    """Single frames first, then clips: trained on video at once it settles on 'all background'."""
    torch.manual_seed(SEED)
    vae = vae_codec.channels_last(new_vae())
    captions = [a.caption for a in world.all_attributes()]
    index = 0
    for frames, batch, steps, learning_rate in VAE_PHASES:
        optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step, n=steps: cosine(step, n))
        for step in range(steps):
            index += 1
            scenes = world.sample_scenes(SEED + 1000, index, batch, captions, unsteady=0.5)
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
    raw = torch.cat([encode_raw(vae, SEED + 2000, i, captions) for i in range(16)])
    vae.register_to_config(
        latents_mean=raw.mean((0, 2, 3, 4)).tolist(), latents_std=raw.std((0, 2, 3, 4)).clamp(min=1e-3).tolist()
    )
    harden_decoder(vae, captions)
    say(f"vae round trip, 512 fresh clips: {round_trip(vae, 512)}")
    vae.save_pretrained(folder)


def harden_decoder(vae: AutoencoderKLWan, captions: list[str]) -> None:
    """Teach the decoder to draw cleanly from latents that are a little off, as a transformer's samples are."""
    frames, batch, steps, learning_rate = DECODER_PHASE
    decoder = [*vae.post_quant_conv.parameters(), *vae.decoder.parameters()]
    optimizer = torch.optim.AdamW(decoder, lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, steps))
    torch.manual_seed(SEED)
    for step in range(steps):
        pixels = world.render(world.sample_scenes(SEED + 4000, step, batch, captions, unsteady=0.5))
        with torch.no_grad():
            latents = vae_codec.encode(vae, pixels)
        decoded = vae_codec.decode(vae, latents + LATENT_NOISE * torch.randn_like(latents))
        loss = reconstruction_error(decoded, pixels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            say(f"decoder step {step}: loss {loss:.4f}")


def reconstruction_error(decoded: Tensor, pixels: Tensor) -> Tensor:
    """Squared error, and for clips a little L1 for sharp edges; the foreground counts five times."""
    difference = decoded - pixels
    weight = 1 + 4 * (pixels.abs().amax(1, keepdim=True) > 0.05).to(pixels.dtype)
    error = difference**2 if pixels.shape[2] == 1 else difference**2 + 0.1 * difference.abs()
    return (error * weight).sum() / (weight.sum() * 3)


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


def train_text_encoder(folder: Path, tokenizer_folder: Path) -> None:
    """Two UMT5 layers, taught to tell the four attributes of a caption from its mean embedding."""
    torch.manual_seed(SEED)
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


def new_transformer() -> WanTransformer3DModel:
    torch.manual_seed(SEED)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=VAE_CHANNELS,
        out_channels=VAE_CHANNELS, text_dim=64, freq_dim=64, ffn_dim=4 * HEADS * HEAD_DIM, num_layers=LAYERS,
        rope_max_seq_len=64,
    )  # fmt: skip


def untrained_folder(folder: Path) -> Path:
    """The pipeline folder; parts that are there already are kept, so a stopped run goes on with the part it was in."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "vae").exists():
        train_vae(folder / "vae")
    if not (folder / "text_encoder").exists():
        train_text_encoder(folder / "text_encoder", folder / "tokenizer")
    if not (folder / "model_index.json").exists():
        WanPipeline(
            tokenizer=PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
            text_encoder=UMT5EncoderModel.from_pretrained(folder / "text_encoder"),
            vae=AutoencoderKLWan.from_pretrained(folder / "vae"),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
            transformer=new_transformer(),
        ).save_pretrained(folder)
    return folder


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
