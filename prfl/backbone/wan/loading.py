"""Loading a Wan text-to-video pipeline from a local folder or the hub, by the same code."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from safetensors import SafetensorError
from transformers import AutoTokenizer, UMT5EncoderModel

from prfl.backbone.wan import vae as vae_codec
from prfl.backbone.wan.facts import read_facts
from prfl.backbone.wan.model import WanBackbone
from prfl.backbone.wan.text import WanText
from prfl.backbone.weights import check_finite
from prfl.utils.errors import PrflError

MIB = 2**20
NOT_FINITE = "download or save the model again, or load it in float32"
SUPPORTED = "supported are WanPipeline folders with one transformer: Wan 2.1 text to video"


@dataclass(frozen=True)
class Source:
    """A pipeline on disk or on the hub.  Whatever cannot be found or read becomes a PrflError that names the part."""

    name: str
    revision: str | None
    device: torch.device

    def missing(self, part: str, error: Exception) -> PrflError:
        reason = str(error).strip().split("\n")[0]
        fix = "give a diffusers pipeline folder or a hub id, whose weights are whole safetensors files"
        return PrflError(f"cannot load the {part}: {reason}", where=self.name, fix=fix)

    def config(self, kind: Any, subfolder: str | None = None) -> dict[str, Any]:
        try:
            return dict(kind.load_config(self.name, subfolder=subfolder, revision=self.revision))
        except (OSError, ValueError) as error:
            raise self.missing(subfolder or "model index", error) from error

    def load(self, kind: Any, subfolder: str, dtype: torch.dtype) -> Any:
        try:
            model, found = kind.from_pretrained(
                self.name,
                subfolder=subfolder,
                torch_dtype=dtype,
                use_safetensors=True,
                revision=self.revision,
                output_loading_info=True,
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise self.missing(subfolder, error) from error
        self.check_complete(subfolder, found["missing_keys"], found["unexpected_keys"])
        model = model.to(self.device)
        check_finite(dict(model.named_parameters()), f"{self.name}/{subfolder}", NOT_FINITE)
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

    def text_identity(self) -> str:
        """Tells one text encoder or tokenizer from another without loading it: a hash of every file's name, size, first
        and last MiB.  Of a model on the hub its id and revision say it, and this is empty."""
        digest = hashlib.sha256()
        parts = [Path(self.name, part) for part in ("text_encoder", "tokenizer")]
        files = [file for part in parts for file in sorted(part.glob("*")) if file.is_file()]
        for file in files:
            size = file.stat().st_size
            digest.update(f"{file.parent.name}/{file.name} {size}\n".encode())
            with file.open("rb") as opened:
                digest.update(opened.read(MIB))
                opened.seek(max(0, size - MIB))
                digest.update(opened.read(MIB))
        return digest.hexdigest()[:16] if files else ""

    def load_tokenizer(self) -> Any:
        try:
            return AutoTokenizer.from_pretrained(
                self.name, subfolder="tokenizer", revision=self.revision, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise self.missing("text encoder or tokenizer", error) from error

    def load_text(self, dtype: torch.dtype) -> UMT5EncoderModel:
        try:
            encoder, found = UMT5EncoderModel.from_pretrained(
                self.name,
                subfolder="text_encoder",
                dtype=dtype,
                use_safetensors=True,
                revision=self.revision,
                output_loading_info=True,
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise self.missing("text encoder or tokenizer", error) from error
        self.check_complete("text_encoder", found["missing_keys"])
        encoder = encoder.to(self.device)
        check_finite(dict(encoder.named_parameters()), f"{self.name}/text_encoder", NOT_FINITE)
        return encoder.requires_grad_(False).eval()


def check_pipeline(index: dict[str, Any], where: str) -> None:
    """model_index.json must be a one-transformer WanPipeline."""
    if index.get("_class_name") != "WanPipeline":
        raise PrflError(f"a {index.get('_class_name')} is not supported", where=where, fix=SUPPORTED)
    two = index.get("transformer_2") not in (None, [None, None]) or index.get("boundary_ratio") is not None
    if two or index.get("expand_timesteps"):
        kind = "two transformers" if two else "one timestep per token"
        raise PrflError(f"a Wan 2.2 pipeline ({kind}) is not supported yet", where=where, fix=SUPPORTED)


def check_vae(vae: AutoencoderKLWan, where: str) -> None:
    """The factors that the config states (WanPipeline goes by them) must be those of the layers."""
    config = vae.config
    stated = config.scale_factor_spatial, config.scale_factor_temporal
    real = 2 ** (len(config.dim_mult) - 1) * (config.patch_size or 1), 2 ** sum(config.temperal_downsample)
    if stated != real:
        raise PrflError(
            f"the VAE's config states factors of {stated} in space and time, its layers have {real}",
            where=f"{where}/vae/config.json",
            fix="correct scale_factor_spatial and scale_factor_temporal",
        )


def load_backbone(
    folder_or_hub: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    revision: str | None = None,
) -> WanBackbone:
    """A Wan text-to-video model in diffusers' pipeline format, from a folder or a hub id.

    Only safetensors are read and no remote code is run.  The text encoder is loaded at its first use; the VAE is kept
    in float32 when ``dtype`` is a half precision, as the model's authors advise.
    Raises PrflError when the folder or a part is missing and for models of another kind (image to video, Wan 2.2).
    """
    source = Source(str(folder_or_hub), revision, torch.device(device))
    schedule = flow_schedule(source)
    transformer = source.load(WanTransformer3DModel, "transformer", dtype)
    vae = source.load(AutoencoderKLWan, "vae", vae_dtype(dtype))
    if torch.device(device).type == "cpu":
        vae_codec.channels_last(vae)
    tokenizer = cache(source.load_tokenizer)  # it is needed without the text encoder too, and takes seconds
    return assemble(source, schedule, transformer, vae, lambda: (tokenizer(), source.load_text(dtype)), tokenizer)


def vae_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def flow_schedule(source: Source) -> tuple[float, float]:
    """(shift of the sigmas, timestep of sigma 1) of a supported pipeline."""
    check_pipeline(source.config(DiffusionPipeline), source.name)
    scheduler = source.config(FlowMatchEulerDiscreteScheduler, "scheduler")
    shift = scheduler.get("flow_shift", scheduler.get("shift"))
    if shift is None:
        raise PrflError("the scheduler has no flow shift: not a flow-matching model", where=source.name, fix=SUPPORTED)
    return float(shift), float(scheduler.get("num_train_timesteps", 1000))


def assemble(
    source: Source,
    schedule: tuple[float, float],
    transformer: WanTransformer3DModel,
    vae: AutoencoderKLWan,
    load_text: Callable[[], tuple[Any, UMT5EncoderModel]],
    load_tokenizer: Callable[[], Any] | None = None,
) -> WanBackbone:
    """Check that the parts are a text-to-video model and put them together."""
    if transformer.config.image_dim is not None or transformer.config.in_channels != transformer.config.out_channels:
        raise PrflError("an image-to-video transformer is not supported yet", where=source.name, fix=SUPPORTED)
    check_vae(vae, source.name)
    facts = read_facts(
        transformer,
        vae,
        model_id=Path(source.name).resolve().name if Path(source.name).is_dir() else source.name,
        revision=source.revision,
        text_identity=source.text_identity(),
        schedule=schedule,
    )
    return WanBackbone(transformer, vae, WanText(load_text, load_tokenizer), facts)
