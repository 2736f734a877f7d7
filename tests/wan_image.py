"""A random tiny Wan 2.1 image-to-video pipeline in the real diffusers folder format, with pictures to begin from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from prfl.backbone import Ask
from prfl.utils.pictures import write_picture
from prfl.utils.video_size import VideoSize
from tests.tiny import CHANNELS, text_and_vae, tiny_transformer

SHAPE = (CHANNELS, 3, 4, 4)  # 9 frames of 16 x 16
CLIP = VideoSize(9, 16, 16, 8)
WIDTH = 24  # of the image's tokens


def save_tiny_wan_image(folder: Path, seed: int = 0, index: dict | None = None, **transformer_changes) -> Path:
    """index: further settings of the pipeline."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=8, patch_size=4
    )
    changes = {"in_channels": 2 * CHANNELS + 4, "image_dim": WIDTH, "added_kv_proj_dim": 24, **transformer_changes}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        WanImageToVideoPipeline(
            **text_and_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            image_processor=CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
            image_encoder=CLIPVisionModel(vision).eval(),
            transformer=tiny_transformer(**changes),
            **(index or {}),
        ).save_pretrained(folder)
    return folder


def save_tiny_pinned_frame(folder: Path, seed: int = 0, pipeline: type = WanImageToVideoPipeline, **changes) -> Path:
    """In the layout of Wan 2.2 TI2V-5B, which expands timesteps to the tokens.  pipeline: what its folder names."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline(
            **text_and_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
            transformer=tiny_transformer(**changes),
            expand_timesteps=True,
        ).save_pretrained(folder)
    return folder


def first_frames(folder: Path, prompts: Sequence[str], clip: VideoSize = CLIP) -> list[Ask]:
    """An ask of each prompt, with a random picture of its own, of the clip's size."""
    folder.mkdir(exist_ok=True, parents=True)
    asks = []
    for number, prompt in enumerate(prompts):
        path = folder / f"first-{number}.png"
        if not path.exists():
            levels = torch.randint(
                0, 256, (3, clip.height, clip.width), generator=torch.Generator().manual_seed(number)
            )
            write_picture(path, levels / 127.5 - 1)
        asks.append(Ask(prompt, path, clip))
    return asks
