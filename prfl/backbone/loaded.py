"""The parts of a diffusers pipeline that is loaded already, where a family asks a folder or the hub for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from prfl.backbone.source import Source
from prfl.utils.errors import PrflError


@dataclass(frozen=True)
class LoadedPipeline(Source):
    """Its networks are the pipeline's own, not copies, on its device and in its dtype."""

    pipe: DiffusionPipeline = field(kw_only=True)

    @staticmethod
    def of(pipe: DiffusionPipeline) -> LoadedPipeline:
        name = str(pipe.config.get("_name_or_path") or type(pipe).__name__)
        return LoadedPipeline(name, None, pipe.device, pipe=pipe)

    @property
    def index(self) -> dict[str, Any]:
        optional = {name: None for name in ("transformer", "transformer_2") if getattr(self.pipe, name, None) is None}
        return {**self.pipe.config, **optional, "_class_name": type(self.pipe).__name__}

    def config(self, kind: Any, subfolder: str | None = None) -> dict[str, Any]:
        return dict(self.part(subfolder or "").config)

    def load(self, kind: Any, subfolder: str, dtype: torch.dtype) -> Any:
        """The pipeline's network.  Raises PrflError where it has none, or moves it between devices while it runs."""
        network = self.part(subfolder)
        if hasattr(network, "_hf_hook"):
            what = f"the pipeline moves its {subfolder} between devices while it runs"
            fix = "pipe.remove_all_hooks() and pipe.to('cuda'), in place of enable_model_cpu_offload or device_map"
            raise PrflError(what, where=self.name, fix=fix)
        return network

    def part(self, name: str) -> Any:
        if (part := getattr(self.pipe, name, None)) is None:
            raise PrflError(f"the pipeline has no {name}", where=self.name, fix=f"load the pipeline with its {name}")
        return part

    def encoder(self, name: str) -> nn.Module:
        """An encoder of conditions, frozen, and without dropout whatever mode the pipeline has left it in."""
        return self.part(name).requires_grad_(False).eval()

    def encoder_config(self, subfolder: str) -> Any:
        return self.part(subfolder).config

    def image_loader(
        self, kind: Any, dtype: torch.dtype, processor: str = "image_processor"
    ) -> Callable[[], tuple[Any, nn.Module]]:
        return lambda: (self.part(processor), self.encoder("image_encoder"))

    def text_loaders(
        self, kind: Any, dtype: torch.dtype
    ) -> tuple[Callable[[], tuple[Any, nn.Module]], Callable[[], Any] | None]:
        return lambda: (self.part("tokenizer"), self.encoder("text_encoder")), partial(self.part, "tokenizer")
