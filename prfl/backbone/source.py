"""Parts of a model in diffusers' pipeline format, from a local folder or the hub, with weights or without them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessorPil

from prfl.backbone.single_file import load_single_file
from prfl.backbone.weights import cast, check_finite, without_weights
from prfl.config.section import is_hub_id
from prfl.utils.console import silent_libraries
from prfl.utils.errors import PrflError
from prfl.utils.hub import causes, hub_error
from prfl.utils.reading import absent

MIB = 2**20
NOT_FINITE = "download or save the model again, or load it in float32"


@dataclass(frozen=True)
class Source:
    """A pipeline on disk or on the hub.  Whatever cannot be found or read becomes a PrflError that names the part.

    device: on ``meta`` its models have shapes and dtypes alone: nothing but their configs is read.  pipeline: the class
    that it is loaded as; None is its own.  files: checkpoints in one file each, in place of the weights of these
    folders.  finish: what is done with each of diffusers' models, by its folder, once it is loaded.  waiting: folders
    whose models stay on the host.
    """

    name: str
    revision: str | None
    device: torch.device
    pipeline: str | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    finish: Callable[[str, nn.Module], None] | None = None
    waiting: Collection[str] = ()

    @property
    def model_id(self) -> str:
        return Path(self.name).resolve().name if Path(self.name).is_dir() else self.name

    @property
    def index(self) -> dict[str, Any]:
        """The content of model_index.json, with the class that it is loaded as."""
        index = self.config(DiffusionPipeline)
        return index if self.pipeline is None else {**index, "_class_name": self.pipeline}

    def missing(self, part: str, error: Exception) -> PrflError:
        """Make the error of a part that cannot be loaded, as "transformer" or "model index"."""
        folder = Path(self.name)
        fix = "give a diffusers pipeline folder or a hub id, whose weights are whole safetensors files"
        if not folder.is_dir():
            if is_hub_id(self.name):
                return hub_error(self.name, error, "pipeline in diffusers' format")
            return absent(folder, fix, "folder")
        if not (folder / "model_index.json").is_file():
            return PrflError("holds no model_index.json: it is no diffusers pipeline", where=self.name, fix=fix)

        # The libraries' own words, but for those that speak of their insides.
        reason = str(error).strip().split("\n")[0]
        if "custom code" in reason:
            reason = "it brings code of its own, which prfl never runs"
        elif "no file named" in reason:
            reason = f"there are no weights as safetensors in {folder / part}"
        for cause in causes(error):
            if isinstance(cause, SafetensorError):
                reason = f"a file of its weights is damaged: {cause}"
        return PrflError(f"cannot load the {part}: {reason}", where=self.name, fix=fix)

    @silent_libraries()
    def config(self, kind: Any, subfolder: str | None = None) -> dict[str, Any]:
        try:
            return dict(kind.load_config(self.name, subfolder=subfolder, revision=self.revision))
        except (OSError, ValueError) as error:
            raise self.missing(subfolder or "model index", error) from error

    @silent_libraries()
    def load(self, kind: Any, subfolder: str, dtype: torch.dtype) -> Any:
        """A diffusers model in this dtype, complete and finite; on ``meta`` without weights."""
        if self.device.type == "meta":
            config = self.config(kind, subfolder)
            with without_weights():
                model = kind.from_config(config)
            return cast(model, dtype).to("meta")  # a parameter may be made on a device of its own
        model = (
            self.from_file(kind, subfolder, dtype) if subfolder in self.files else self.saved(kind, subfolder, dtype)
        )
        model = model.to("cpu" if subfolder in self.waiting else self.device)
        where = self.files.get(subfolder, f"{self.name}/{subfolder}")
        check_finite(dict(model.named_parameters()), str(where), NOT_FINITE)
        if self.finish:
            self.finish(subfolder, model)
        return model

    def from_file(self, kind: Any, subfolder: str, dtype: torch.dtype) -> nn.Module:
        """A diffusers model with the weights of a checkpoint in one file."""
        return cast(load_single_file(kind, self.config(kind, subfolder), self.files[subfolder]), dtype)

    def saved(self, kind: Any, subfolder: str, dtype: torch.dtype) -> Any:
        """A diffusers model with the pipeline's own weights, complete."""
        try:
            model, report = kind.from_pretrained(
                self.name,
                subfolder=subfolder,
                torch_dtype=dtype,
                use_safetensors=True,
                revision=self.revision,
                output_loading_info=True,
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise self.missing(subfolder, error) from error
        self.check_complete(subfolder, report["missing_keys"], report["unexpected_keys"])
        return model

    def check_complete(self, part: str, missing: Iterable[str], strangers: Iterable[str] = ()) -> None:
        """The libraries give weights that a file lacks random values, and leave out those that a config does not know,
        with no more than a warning."""
        for names, what in (
            (sorted(missing), "the file lacks"),
            (sorted(strangers), "the config knows nothing of"),
        ):
            if names:
                raise PrflError(
                    f"the {part}'s weights and its config do not fit: {what} {names[0]} and {len(names) - 1} more",
                    where=f"{self.name}/{part}",
                    fix="download or save the model again, whole",
                )

    def text_identity(self, *others: str) -> str:
        """Tells one text encoder or tokenizer from another without loading it: a hash of every file's name, size, first
        and last MiB.  Of a model on the hub its id and revision say it, and this is empty.

        others: further parts that conditions are made by, as an encoder of images."""
        digest = hashlib.sha256()
        parts = [Path(self.name, part) for part in ("text_encoder", "tokenizer", *others)]
        files = [file for part in parts for file in sorted(part.glob("*")) if file.is_file()]
        for file in files:
            size = file.stat().st_size
            digest.update(f"{file.parent.name}/{file.name} {size}\n".encode())
            with file.open("rb") as opened:
                digest.update(opened.read(MIB))
                opened.seek(max(0, size - MIB))
                digest.update(opened.read(MIB))
        return digest.hexdigest()[:16] if files else ""

    @silent_libraries()
    def load_tokenizer(self) -> Any:
        try:
            return AutoTokenizer.from_pretrained(
                self.name, subfolder="tokenizer", revision=self.revision, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise self.missing("text encoder or tokenizer", error) from error

    def load_text(self, kind: Any, dtype: torch.dtype) -> nn.Module:
        """The text encoder, of this transformers class, frozen; on ``meta`` without weights."""
        return self.load_encoder(kind, "text_encoder", dtype, "text encoder or tokenizer")

    @silent_libraries()
    def load_encoder(self, kind: Any, subfolder: str, dtype: torch.dtype, called: str) -> nn.Module:
        """An encoder of conditions, of this transformers class, frozen; on ``meta`` without weights.

        called: its name in the error where it cannot be loaded.
        """
        if self.device.type == "meta":
            with without_weights():
                encoder = kind(self.encoder_config(subfolder))
            return encoder.to(dtype).requires_grad_(False).eval()
        try:
            encoder, report = kind.from_pretrained(
                self.name,
                subfolder=subfolder,
                dtype=dtype,
                use_safetensors=True,
                revision=self.revision,
                output_loading_info=True,
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise self.missing(called, error) from error
        self.check_complete(subfolder, report["missing_keys"])
        encoder = encoder.to(self.device)
        check_finite(dict(encoder.named_parameters()), f"{self.name}/{subfolder}", NOT_FINITE)
        return encoder.requires_grad_(False).eval()

    def encoder_config(self, subfolder: str) -> Any:
        """The transformers config of an encoder."""
        try:
            return AutoConfig.from_pretrained(self.name, subfolder=subfolder, revision=self.revision)
        except (OSError, ValueError) as error:
            raise self.missing(subfolder.replace("_", " "), error) from error

    def image_loader(
        self, kind: Any, dtype: torch.dtype, processor: str = "image_processor"
    ) -> Callable[[], tuple[Any, nn.Module]]:
        """What loads the processor of pictures and their encoder, of this transformers class, when first needed.

        processor: the folder that it is in.
        """
        if self.device.type == "meta":
            return lambda: (None, self.load_encoder(kind, "image_encoder", dtype, "image encoder"))
        return lambda: (
            self.load_image_processor(processor),
            self.load_encoder(kind, "image_encoder", dtype, "image encoder"),
        )

    @silent_libraries()
    def load_image_processor(self, folder: str) -> Any:
        try:
            return CLIPImageProcessorPil.from_pretrained(self.name, subfolder=folder, revision=self.revision)
        except (OSError, ValueError) as error:
            raise self.missing("image processor", error) from error

    def text_loaders(
        self, kind: Any, dtype: torch.dtype
    ) -> tuple[Callable[[], tuple[Any, nn.Module]], Callable[[], Any] | None]:
        """What loads tokenizer and text encoder, and the tokenizer alone, when they are first needed.

        The tokenizer is needed without the encoder too, and takes seconds; on ``meta`` there is none.
        """
        if self.device.type == "meta":
            return lambda: (None, self.load_text(kind, dtype)), None
        tokenizer = cache(self.load_tokenizer)
        return lambda: (tokenizer(), self.load_text(kind, dtype)), tokenizer


def vae_dtype(dtype: torch.dtype) -> torch.dtype:
    """The VAE stays in float32 beside a network in a half precision, as the models' authors advise."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
