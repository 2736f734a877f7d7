"""Every Triton kernel as it is launched for Wan's shapes: what is compiled ahead, and tabled."""

from __future__ import annotations

from typing import NamedTuple

from prfl_kernels.ahead import SHARED_LIMIT, Build


class Shape(NamedTuple):
    name: str
    tokens: int  # of 81 frames
    width: int
    heads: int
    hidden: int  # of the feed-forward network


SHAPES = (
    Shape("1.3B 480p", 32760, 1536, 12, 8960),
    Shape("14B 480p", 32760, 5120, 40, 13824),
    Shape("14B 720p", 75600, 5120, 40, 13824),
)
RANKS = (16, 64, 128)


def every_build(capability: int) -> list[Build]:
    """List every kernel as it is launched on a GPU of this capability (80 is 8.0).

    Imports triton, and the operations' sources, which take their shapes from here.
    """
    from prfl_kernels import attention_builds, gated_residual_norm_triton, lora_linear_triton, qk_norm_rope_triton

    return [
        *attention_builds.builds(capability // 10),
        *gated_residual_norm_triton.builds(),
        *lora_linear_triton.builds(SHARED_LIMIT[capability]),
        *qk_norm_rope_triton.builds(),
    ]
