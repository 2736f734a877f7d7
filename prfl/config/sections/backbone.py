"""``backbone``: the video model, and which of its weights are trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from prfl.config.section import MAY_CHANGE, Fault, FolderOrFile, Section, Source, is_hub_id, place, unread
from prfl.config.sections.experts import ExpertsConfig, LoraOfEach, loras_of

if TYPE_CHECKING:
    from prfl.config.schema import Config


class AdapterConfig(Section):
    rank: int = Field(
        ge=1, description="Rank of the low-rank update: its size and memory grow with it; 16 to 64 is usual."
    )
    alpha: float = Field(gt=0, description="The update is scaled by alpha / rank; alpha = rank leaves it as it is.")
    targets: list[str] = Field(
        default=["to_q", "to_k", "to_v", "to_out.0"],
        min_length=1,
        description="Ends of the names of the linear layers that get an update.",
    )
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Dropout on the low-rank branch in training. Each sample has one mask in a step, the "
        "same for its whole chain.",
    )


class PolicyAdapterConfig(AdapterConfig):
    init: FolderOrFile | LoraOfEach | None = place(
        default=None,
        description="A LoRA to start from: a safetensors file with the names of diffusers, ComfyUI, kohya "
        "or musubi, and exactly the adapter's layers and rank. null starts as the base. With "
        "two experts: {high: FILE, low: FILE}.",
    )
    blocks: Literal["all", "last_half"] | list[int] = Field(
        default="all",
        description="Blocks that get an update: all, last_half, or a list (the first block is 0). If one "
        "step of the chain is trained, the backward pass ends at the first of these blocks, so "
        "last_half costs less time and memory.",
    )


Kernels = Literal["auto", "torch", "triton"]


class KernelsConfig(Section):
    lora_linear: Kernels = Field(default="auto", description="Linear layers with an adapter.")
    qk_norm_rope: Kernels = Field(default="auto", description="Norm and rotation of queries and keys.")
    gated_residual_norm: Kernels = Field(default="auto", description="Gate, sum, norm and modulation of a block.")


class WeightsConfig(Section):
    transformer: FolderOrFile | None = place(default=None, description="Weights of a diffusion transformer.")
    transformer_2: FolderOrFile | None = place(
        default=None,
        description="Weights of the second transformer, if the model has two: the low-noise expert of Wan 2.2 A14B.",
    )
    unet: FolderOrFile | None = place(default=None, description="Weights of a UNet.")
    vae: FolderOrFile | None = place(default=None, description="Weights of the VAE.")

    def named(self) -> dict[str, Path]:
        """The files that are set, by the network whose weights they replace."""
        files = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: file for name, file in files.items() if file is not None}


class FirstFrameConfig(Section):
    motion_bucket_id: float = Field(
        default=127.0, ge=0, description="Amount of motion: more at larger values. The default is the pipeline's."
    )
    noise_aug_strength: float = Field(
        default=0.02, ge=0, description="Scale of the noise added to the picture. The default is the pipeline's."
    )


class BackboneConfig(Section):
    model: str = place(
        description="A diffusers folder or a hub id. 'shapes' is the small model inside the package, and "
        "'shapes-untrained' the same model before its training."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub model; null is its newest.")
    pipeline: str | None = Field(
        default=None,
        description="The diffusers pipeline to load the model as, if its weights serve several: with "
        "WanImageToVideoPipeline, Wan 2.2 TI2V-5B draws from first frames. null is the one that "
        "the model's folder names.",
    )
    weights: WeightsConfig = Field(
        default=WeightsConfig(),
        description="Checkpoints in one safetensors file, as ComfyUI and the models' authors publish them. "
        "Each replaces the weights of one network; configs and all other parts are those of "
        "backbone.model.",
    )
    base_lora: FolderOrFile | LoraOfEach | None = place(
        default=None,
        description="A LoRA that is merged into the base's weights when they are loaded, and stays frozen. "
        "The base is then the model with this LoRA, for the reward too. Its names may be those "
        "of diffusers, ComfyUI, kohya or musubi. With two experts: {high: FILE, low: FILE}.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Type of the frozen weights: bfloat16 halves their memory; adapters and heads stay float32.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where the run computes; auto takes a GPU if there is one."
    )
    checkpointing: Literal["none", "attention", "full", "auto"] = Field(
        default="none",
        description="Recompute blocks in the backward pass: whole blocks (full), or everything but the "
        "attention's output (attention). auto keeps as many attention outputs and whole blocks "
        "as the GPU has room for.",
        json_schema_extra=MAY_CHANGE,
    )
    offload: bool = Field(
        default=False,
        description="Keep what checkpointed blocks save, and the rollout's latents, in host memory.",
        json_schema_extra=MAY_CHANGE,
    )
    kernels: Kernels | KernelsConfig = Field(
        default="auto",
        description="Which kernels run: one choice for all operations, or one for each. With auto, the "
        "environment variable PRFL_KERNELS decides if it is set.",
    )
    attention: Literal["auto", "sdpa", "cudnn", "flash", "flash_3", "flash_4", "xformers", "triton"] = Field(
        default="auto",
        description="Which attention runs. With auto, the environment variable PRFL_ATTENTION decides if it "
        "is set; else torch chooses.",
    )
    compile: bool = Field(
        default=False,
        description="Use torch.compile on the blocks: the first step takes half a minute or more, and later "
        "steps are faster.",
    )
    train: Literal["lora", "full"] = Field(
        default="lora",
        description="Train an adapter (lora), or all weights (full). full trains in float32, and keeps a "
        "frozen copy of the weights if a reward reads the base.",
    )
    adapter: PolicyAdapterConfig | None = Field(
        default=None, description="The LoRA adapter that is trained with train: lora."
    )
    first_frame: FirstFrameConfig = Field(
        default=FirstFrameConfig(),
        description="For SVD only: inputs of its network besides the first frame and data.fps.",
    )
    experts: ExpertsConfig | None = Field(
        default=None,
        description="For a model of two networks, such as Wan 2.2 A14B; null trains both, and keeps both on the GPU.",
    )

    @property
    def loras(self) -> dict[str, Path | LoraOfEach | None]:
        """The LoRA files by the yaml path of their key; None where the key is not set."""
        return {
            "backbone.base_lora": self.base_lora,
            "backbone.adapter.init": self.adapter.init if self.adapter else None,
        }

    def files(self) -> list[Source]:
        weights = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"
        downloaded = tuple(f"transformer/{name}" for name in weights)
        model = Source("backbone.model", self.model, "model", self.revision, downloaded)
        remedy = "name a checkpoint as safetensors, or leave it out"
        files = {f"backbone.weights.{name}": file for name, file in self.weights.named().items()}
        sources = [Source(key, str(file), "file", remedy=remedy) for key, file in files.items()]
        remedy = "name a LoRA as safetensors, or leave it out"
        for key, lora in self.loras.items():
            files = {f"{key}.{expert}".removesuffix("."): file for expert, file in loras_of(lora).items()}
            sources += [Source(name, str(file), "file", remedy=remedy) for name, file in files.items()]
        return [model, *sources]

    def conflicts(self, config: Config) -> Iterator[Fault]:
        for key, lora in self.loras.items():
            if isinstance(lora, LoraOfEach) and not loras_of(lora):
                yield key, "it names no file; give high, low or both, or remove it"
        if not is_hub_id(self.model):
            yield from unread(self, "backbone", ["revision"], "a model in a folder")
        if self.offload and self.checkpointing == "none":
            yield "backbone.offload", "it moves what checkpointed blocks keep; set backbone.checkpointing or remove it"
        if self.offload and self.checkpointing == "auto":
            what = "checkpointing: auto fills the GPU with what it moves away; take full, or remove it"
            yield "backbone.offload", what
        if config.trains_reward:
            reason = f"objective {config.objective.name} trains the reward only"
            if self.adapter:
                yield "backbone.adapter", f"{reason}; its own adapter is reward.head.adapter"
            if self.train == "full":
                yield "backbone.train", f"{reason}; leave it at lora"
        elif self.train == "lora" and self.adapter is None:
            yield "backbone.adapter", "missing; train: lora needs it, for example adapter: {rank: 16, alpha: 16}"
        elif self.train == "full" and self.adapter:
            yield "backbone.adapter", "train: full does not read it"
