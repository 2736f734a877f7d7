"""Published rewards, trained by others: each is a key of ``reward`` that replaces ``reward.path``; several may be
combined."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from prfl.config.own_code import full_name, source_of
from prfl.config.section import Fault, FolderOrFile, Section, Source, is_hub_id, place, unread

if TYPE_CHECKING:
    from prfl.config.schema import Config

AESTHETIC_MLP = "download sac+logos+ava1-l14-linearMSE.pth of LAION's improved-aesthetic-predictor, and name it here"
CONVERT = "convert what its authors publish, once: prfl convert"
QUESTIONS = "write them, or have them written: prfl questions CONFIG"
WEIGHTS = "model.safetensors", "model.safetensors.index.json"
NOT_STATED = "none is stated with them; ask their authors"


class PublicRewardConfig(Section):
    """What all published rewards have in common."""

    key: ClassVar[str]  # its yaml path
    licence: ClassVar[str] = ""  # conditions of the licence of its weights; "" if there are none
    gives_logits: ClassVar[bool] = False  # whether the sigmoid of a score is a probability
    whole_videos: ClassVar[bool] = False  # whether it needs all frames of a video
    # Why the default reward.target does not suit its scores, for the message.
    hinge: ClassVar[str] = "that is for a trained reward's scores; say where this one is to stop, or take shape: linear"

    def title(self) -> str:
        """The line about this reward in the model card of a policy that was trained with it."""
        raise NotImplementedError

    def conditions(self) -> str:
        """The conditions of the licence of its weights; "" if there are none."""
        return self.licence

    def faults(self) -> Iterator[Fault]:
        """Yield a fault for every rule that its keys break by themselves; ``conflicts`` adds the other sections."""
        source = next((getattr(self, key) for key in ("model", "clip", "tokenizer") if hasattr(self, key)), "")
        if getattr(self, "revision", None) and not is_hub_id(source):
            yield from unread(self, self.key, ["revision"], "a model in a folder")

    def conflicts(self, config: Config) -> Iterator[Fault]:
        reward = config.reward
        assert reward is not None
        yield from self.faults()
        objective = config.reward_gradient
        if self.whole_videos and objective and objective.frames != "all":
            yield "objective.frames", f"{self.key} reads whole videos; set it to all"
        if reward.aggregate == "logsigmoid" and not self.gives_logits:
            yield "reward.aggregate", f"the score of {self.key} is no logit of a label; use sum"
        if reward.shape == "hinge" and reward.target == type(reward).model_fields["target"].default:
            yield "reward.target", self.hinge


class AestheticConfig(PublicRewardConfig):
    key = "reward.aesthetic"
    hinge = "nearly every picture scores above it, so there is nothing to pull; VADER's is 10"
    mlp: FolderOrFile = place(description="LAION's MLP for ViT-L/14: its .pth (only tensors are read) or safetensors.")
    clip: str = place(default="openai/clip-vit-large-patch14", description="CLIP ViT-L/14: a folder or a hub id.")
    revision: str | None = Field(default=None, description="Revision of a hub CLIP; null is its newest.")

    def title(self) -> str:
        return f"LAION's aesthetic score on CLIP ({self.clip})"

    def files(self) -> list[Source]:
        return [
            Source(f"{self.key}.clip", self.clip, "model", self.revision, WEIGHTS),
            Source(f"{self.key}.mlp", str(self.mlp), "file", remedy=AESTHETIC_MLP),
        ]


class ModelRewardConfig(PublicRewardConfig):
    """A reward that is one model of the transformers library."""

    model: str = place(description="A folder or a hub id.")
    revision: str | None = Field(default=None, description="Revision of a hub model; null is its newest.")

    def files(self) -> list[Source]:
        return [Source(f"{self.key}.model", self.model, "model", self.revision, WEIGHTS)]


class ClipConfig(ModelRewardConfig):
    key = "reward.clip"
    model: str = place(default="openai/clip-vit-large-patch14", description="A CLIP: a folder or a hub id.")

    def title(self) -> str:
        return f"100 times the cosine of picture and prompt, by CLIP ({self.model})"


class PickScoreConfig(ModelRewardConfig):
    key = "reward.pickscore"
    licence = NOT_STATED
    model: str = place(default="yuvalkirstain/PickScore_v1", description="PickScore: a folder or a hub id.")

    def title(self) -> str:
        return f"PickScore ({self.model})"


class FileRewardConfig(PublicRewardConfig):
    """A reward that consists of a file of weights and a tokenizer.  remedy: how to get the file."""

    remedy: ClassVar[str]
    weights: FolderOrFile
    tokenizer: str
    revision: str | None = Field(default=None, description="Revision of a hub tokenizer; null is its newest.")

    def files(self) -> list[Source]:
        return [
            Source(f"{self.key}.weights", str(self.weights), "file", remedy=self.remedy),
            Source(f"{self.key}.tokenizer", self.tokenizer, "model", self.revision, ("tokenizer.json",)),
        ]


class HpsConfig(FileRewardConfig):
    key = "reward.hps"
    remedy = "download HPS_v2.1_compressed.pt of xswu/HPSv2, and name it here"
    weights: FolderOrFile = place(description="HPS_v2.1_compressed.pt (only tensors are read), or safetensors.")
    tokenizer: str = place(
        default="openai/clip-vit-large-patch14", description="A CLIP's tokenizer: a folder or a hub id."
    )

    def title(self) -> str:
        return "HPS v2"


class ImageRewardConfig(FileRewardConfig):
    key = "reward.imagereward"
    remedy = "download ImageReward.pt of THUDM/ImageReward, and name it here"
    weights: FolderOrFile = place(description="ImageReward.pt (only tensors are read), or safetensors.")
    tokenizer: str = place(
        default="google-bert/bert-base-uncased", description="BERT's tokenizer: a folder or a hub id."
    )

    def title(self) -> str:
        return "ImageReward"


class MpsConfig(FileRewardConfig):
    key = "reward.mps"
    licence = NOT_STATED
    remedy = "download MPS's safetensors of ModelScope's DiffSynth-Studio/QualityMetric_reward_pretrained, and name it"
    weights: FolderOrFile = place(description="MPS's tensors as safetensors; its own .pth is a pickled module.")
    tokenizer: str = place(
        default="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", description="A CLIP's tokenizer: a folder or a hub id."
    )
    aspect: Literal["overall", "aesthetics", "quality", "semantic"] = Field(
        default="overall", description="The aspect that pictures are compared by."
    )

    def title(self) -> str:
        return f"MPS ({self.aspect})"


class ObjectConfig(ModelRewardConfig):
    key = "reward.object"
    model: str = place(default="hustvl/yolos-base", description="A YOLOS: a folder or a hub id.")
    present: list[str] = Field(default=[], description="Objects that should be visible, as the model names them.")
    absent: list[str] = Field(default=[], description="Objects that should not be visible, as the model names them.")

    def title(self) -> str:
        return f"objects by YOLOS: {', '.join([*self.present, *(f'no {label}' for label in self.absent)])}"

    def conflicts(self, config: Config) -> Iterator[Fault]:
        yield from super().conflicts(config)
        if not [*self.present, *self.absent]:
            yield "reward.object.present", "name an object that is to be seen, or one in reward.object.absent"


class ActionConfig(ModelRewardConfig):
    key = "reward.action"
    whole_videos = True
    licence = "CC-BY-NC-4.0: not for commercial use"
    model: str = place(
        default="MCG-NJU/videomae-base-finetuned-kinetics", description="A VideoMAE: a folder or a hub id."
    )
    label: str = Field(description="The action, as the model names it.")

    def title(self) -> str:
        return f"the action '{self.label}' by VideoMAE ({self.model})"


class CoherenceConfig(ModelRewardConfig):
    key = "reward.coherence"
    whole_videos = True
    model: str = place(default="facebook/vjepa2-vitl-fpc64-256", description="A V-JEPA 2: a folder or a hub id.")
    frames: int = Field(default=16, ge=4, description="Frames that it reads, evenly spaced; a multiple of 4.")

    def title(self) -> str:
        return f"how well the second half follows from the first, by V-JEPA 2 ({self.model})"


class VideoAlignConfig(PublicRewardConfig):
    key = "reward.videoalign"
    whole_videos = True
    model: FolderOrFile = place(description="The folder that `prfl convert videoalign` wrote.")
    frames: int | None = Field(
        default=None,
        ge=2,
        multiple_of=2,
        description="Frames that it reads, evenly spaced; null is two for each second.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="Type of its weights.")

    def title(self) -> str:
        return "VideoAlign: visual quality, motion quality, text alignment"

    def files(self) -> list[Source]:
        return [Source(f"{self.key}.model", str(self.model), "folder", remedy=f"{CONVERT} videoalign --help")]


class Hpsv3Config(PublicRewardConfig):
    key = "reward.hpsv3"
    model: FolderOrFile = place(description="The folder that `prfl convert hpsv3` wrote.")
    dtype: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="Type of its weights.")

    def title(self) -> str:
        return "HPSv3"

    def files(self) -> list[Source]:
        return [Source(f"{self.key}.model", str(self.model), "folder", remedy=f"{CONVERT} hpsv3 --help")]


class CriticConfig(ModelRewardConfig):
    key = "reward.critic"
    gives_logits = True
    model: str = place(
        default="Qwen/Qwen3-VL-4B-Instruct",
        description="A Qwen3-VL or Qwen2.5-VL: a folder, a hub id, or 'shapes' (inside the package).",
    )
    questions: str | None = place(
        default=None,
        description="A file of questions for the prompts, as JSON lines (prfl questions writes it). "
        "'shapes' and 'shapes-answers' are the questions about moving shapes inside the "
        "package, with yes-or-no and with free answers. null asks whether the video fits its "
        "prompt.",
    )
    frames: int = Field(default=8, ge=1, description="Frames that it sees, evenly spaced among the decoded ones.")
    most_pixels: int = Field(
        default=200_704, ge=1024, description="Most pixels of a frame; larger frames are scaled down."
    )
    dtype: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="Type of its weights.")

    def conditions(self) -> str:
        return "Qwen Research License: not for commercial use" if "Qwen2.5-VL-3B" in self.model else ""

    def title(self) -> str:
        return f"the answers of a vision-language model ({self.model}) to {self.questions or 'one question a prompt'}"

    def files(self) -> list[Source]:
        sources = super().files()
        if self.questions is not None and not self.questions.startswith("shapes"):
            sources.append(Source(f"{self.key}.questions", self.questions, "file", remedy=QUESTIONS))
        return sources


class CallableConfig(PublicRewardConfig):
    key = "reward.callable"
    function: str = Field(description="module:function of pixels and prompts, or an entry point of prfl.rewards.")
    options: dict[str, Any] = Field(default={}, description="Keyword arguments of the function.")
    differentiable: bool = Field(
        default=True,
        description="Whether the function has a gradient. Without one it can only steer, with methods that "
        "need no gradient, and judge.",
    )

    def title(self) -> str:
        return f"the function {self.function}"

    def files(self) -> list[Source]:
        """The file of the function: its hash is part of a run's identity."""
        try:
            source = source_of(self.function)
        except LookupError:
            source = None
        name = str(source) if source else f"{self.function.partition(':')[0]}.py"
        remedy = "put the module into the current folder, or install it"
        return [Source(f"{self.key}.function", name, "file", remedy=remedy)]

    def conflicts(self, config: Config) -> Iterator[Fault]:
        yield from super().conflicts(config)
        steering = config.steering
        if not self.differentiable and (steering is None or steering.follows_gradient):
            name = f"steering.{steering.name}" if steering else f"objective {config.objective.name}"
            what = f"{name} follows the gradient of its reward, and this one is said to have none"
            yield "reward.callable.differentiable", f"{what}; it can watch, as evaluation.held_out_callable"

    def faults(self) -> Iterator[Fault]:
        try:
            if not full_name(self.function).partition(":")[2]:
                yield f"{self.key}.function", "give module:function"
        except LookupError as error:
            yield f"{self.key}.function", f"{error}; give module:function"
