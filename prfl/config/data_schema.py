"""The ``data`` section of a config, and what all sections share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def at_home(path: Path) -> Path:
    """``~`` and ``~name`` at its beginning replaced by that home folder."""
    try:
        return path.expanduser()
    except RuntimeError as error:  # ~ without HOME, a user that is not there
        raise ValueError(f"there is no home folder for {path.parts[0]}; write the whole path") from error


FolderOrFile = Annotated[Path, AfterValidator(at_home)]
# Keys marked with this may differ between a run and its resumption; they are left out of the config hash.
MAY_CHANGE: dict[str, Any] = {"may_change": True}
SEEDS = 2**63  # torch takes no larger seed


# Keys that name a place: what lies there decides a run's numbers, and is hashed (build/identity.py).  It may be moved.
BY_CONTENT: dict[str, Any] = {"by_content": True}


def place(**facts: Any) -> Any:
    """The ``Field`` of a key that names a place."""
    return Field(json_schema_extra=BY_CONTENT, **facts)


def is_hub_id(name: object) -> bool:
    """``owner/name``, and no folder here."""
    text = str(name)
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and not Path(text).exists()


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class SamplesConfig(Section):
    name: Literal["shapes_samples"] = Field(description="The backbone's own samples, labelled by the shapes oracle.")
    per_prompt: int = Field(ge=2, description="Samples of each training prompt; pairs are made within a prompt.")
    held_out_per_prompt: int = Field(default=24, ge=2, description="Samples of each validation prompt.")
    other_captions: int = Field(
        default=0, ge=0, description="Judge each training sample for this many other training captions as well, that "
        "differ from its own in one attribute: labels that cost no sample and teach a head to read the prompt.",
    )  # fmt: skip
    steps: int = Field(ge=1, description="Sampling steps of each clip that is drawn.")
    guidance: list[Annotated[float, Field(ge=1)]] = Field(
        default=[1.0], min_length=1, description="Guidance scales; so many samples are drawn at each. 1 is without."
    )
    policies: list[FolderOrFile | None] = place(
        default=[None],
        min_length=1,
        description="Who draws so many samples each: null is the backbone as it is, a finished run its policy.",
    )
    batch: int = Field(default=64, ge=1, description="Samples drawn at once: more is faster and takes more memory.")
    seed: int = Field(default=0, ge=0, lt=SEEDS, description="Seed of the samples.")


class MixtureConfig(Section):
    name: Literal["shapes_mixture"] = Field(description="Rendered clips with the pretraining set's share of flaws.")
    count: int = Field(ge=1, description="Number of clips that are rendered.")
    wrong: float = Field(default=0.2, ge=0, le=1, description="Share of clips with one wrong attribute.")
    unsteady: float = Field(default=0.3, ge=0, le=1, description="Share of clips with a wobble, a flicker or a jump.")
    seed: int = Field(default=0, ge=0, lt=SEEDS, description="Seed of the clips.")


class CuratedConfig(Section):
    name: Literal["shapes_curated"] = Field(description="Rendered clips without a flaw.")
    count: int = Field(ge=1, description="Number of clips that are rendered.")
    seed: int = Field(default=0, ge=0, lt=SEEDS, description="Seed of the clips.")


class ClipsConfig(Section):
    name: Literal["video_clips"] = Field(
        description="Clips cut from your videos: SFT trains on them, a reward on each against degradations of it."
    )
    videos: FolderOrFile = place(
        description="A video, or a folder of videos and of folders of them. Hidden files, files of other suffixes and "
        "what prfl wrote are left out, and said."
    )
    kinds: list[Literal["blur", "noise", "contrast", "jitter", "shuffle", "freeze"]] = Field(
        default=["blur", "noise", "contrast", "jitter", "shuffle", "freeze"],
        min_length=1,
        description="Degradations. The first three are worse in dimension look, the others in dimension motion.",
    )
    crops: int = Field(default=1, ge=1, description="Clips from each stretch: the whole picture, then parts of it.")
    held_out: float = Field(default=0.2, gt=0, lt=1, description="Share of the stretches for validation prompts.")
    formats: list[Literal["mp4", "webm", "gif"]] = Field(
        default=["mp4"], min_length=1, description="Formats of the files; clips take turns."
    )
    seed: int = Field(default=0, ge=0, lt=SEEDS, description="Seed of the crops and degradations.")


class PromptsConfig(Section):
    train: str = place(description="Prompt file (one a line, or JSONL), or 'shapes'. What is trained on.")
    validation: str | None = place(default=None, description="Prompts watched during a run, or 'shapes'.")
    test: str | None = place(default=None, description="Prompts used once, at the end, or 'shapes'.")


class DataConfig(Section):
    manifest: FolderOrFile | None = place(
        default=None,
        description="JSON lines: a labelled video, or a pair of videos of one prompt with a preference, in each.",
    )
    generator: SamplesConfig | MixtureConfig | CuratedConfig | ClipsConfig | None = Field(
        default=None, discriminator="name", description="Make the clips instead of reading a manifest."
    )
    prompts: PromptsConfig = Field(
        description="The three sets of prompts; no prompt may be in two of them. A file that is named for several "
        "is split among them, in parts of 80, 10 and 10 %, by a hash of each prompt."
    )
    cache: FolderOrFile = place(description="Folder of cached latents, prompt embeddings and generated clips.")
    frames: int = Field(
        ge=1, description="Frames of a clip: 1 and a multiple of the VAE's temporal factor, as 81 for Wan."
    )
    height: int = Field(
        ge=8, description="Height in pixels, a multiple of what the model's patches cover (16 for Wan)."
    )
    width: int = Field(ge=8, description="Width in pixels, a multiple of what the model's patches cover (16 for Wan).")
    fps: float = Field(gt=0, description="Frames per second at which clips are read and samples written.")
    skip_unreadable: bool = Field(
        default=False, description="Go on without videos that cannot be read, instead of stopping with a list of them."
    )
    follow_links: bool = Field(
        default=False,
        description="Read videos through links that lead out of the folder of data.manifest or data.generator.videos, "
        "as into a snapshot's blobs or to another disk. Such links are refused else.",
        json_schema_extra=MAY_CHANGE,
    )
    encode_batch: int = Field(
        default=16,
        ge=1,
        description="Clips that the VAE encodes at once for the cache; 1 for large videos, or memory runs out.",
        json_schema_extra=MAY_CHANGE,
    )
