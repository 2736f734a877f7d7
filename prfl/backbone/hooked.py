"""What families share whose network runs as diffusers has it: features by hooks, checkpoints around its blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from prfl.backbone.adapters import block_names
from prfl.backbone.base import Facts
from prfl.backbone.blocks import checkpoint_blocks, first_tensor, hidden_states
from prfl.backbone.condition import Condition
from prfl.backbone.network import with_lists
from prfl.backbone.pipeline import PipelineBackbone
from prfl.backbone.pipeline_text import PipelineText


class HookedBackbone(PipelineBackbone):
    """One network, of which a family gives ``velocity``; see blocks.py."""

    def __init__(self, networks: Mapping[str, nn.Module], vae: nn.Module, text: PipelineText, facts: Facts) -> None:
        super().__init__(networks, vae, text, facts)
        for network, lists in with_lists(self):
            blocks = [network.get_submodule(name) for name in block_names(network, lists)]
            checkpoint_blocks(blocks, self.running)

    def features(
        self,
        latents: Float[Tensor, "b c t h w"],
        sigma: Float[Tensor, "*sigma"],
        condition: Condition,
        blocks: Sequence[int],
    ) -> list[Float[Tensor, "b tokens width"]]:
        """Hidden states after each of ``blocks`` (0 = the first), in that order; later blocks are never run."""
        lists = self.facts.blocks[self.at]
        modules = [self.network.get_submodule(name) for name in block_names(self.network, lists)]
        with self.running.reading_features():
            tokens = partial(self.video_tokens, len(latents))
            return hidden_states(lambda: self.velocity(latents, sigma, condition), modules, blocks, tokens)

    def video_tokens(self, batch: int, output: Any) -> Tensor:
        """The video's tokens (batch, tokens, width) in what a block returns."""
        return first_tensor(output)
