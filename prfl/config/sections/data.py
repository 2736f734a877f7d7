"""``data``: clips, prompts, their size and their cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from prfl.config.section import MAY_CHANGE, SEEDS, WRITTEN, Fault, FolderOrFile, Section, Source, one_of, place, unread
from prfl.utils.text import closest
from prfl.utils.video_size import VideoSize

if TYPE_CHECKING:
    from prfl.config.schema import Config


class GeneratorBase(Section):
    """What all generators of clips have in common.

    A subclass that defines ``name`` as a Literal can be chosen in a config; there is no other list of generators.
    """

    name: str = Field(description="The generator.")
    makes_pairs: ClassVar[bool] = False  # whether it makes pairs with a preference instead of labelled clips
    brings_prompts: ClassVar[bool] = False  # whether prompts may be texts beside its videos


class SamplesConfig(GeneratorBase):
    name: Literal["shapes_samples"] = Field(description="The backbone's own samples, labelled by the shapes oracle.")
    per_prompt: int = Field(ge=2, description="Samples of each training prompt; pairs are made within a prompt.")
    held_out_per_prompt: int = Field(default=24, ge=2, description="Samples of each validation prompt.")
    other_captions: int = Field(
        default=0,
        ge=0,
        description="Also label each training sample for this many other captions, which differ from its own in one "
        "attribute. These labels cost no samples, and teach a head to read the prompt.",
    )
    steps: int = Field(ge=1, description="Sampling steps of each clip that is drawn.")
    guidance: list[Annotated[float, Field(ge=1)]] = Field(
        default=[1.0],
        min_length=1,
        description="Guidance scales; the samples are drawn once at each of them. 1 is no guidance.",
    )
    policies: list[FolderOrFile | None] = place(
        default=[None],
        min_length=1,
        description="Models that draw the samples, the same number each: null is the base model, and the "
        "folder of a finished run is the policy of that run.",
    )
    batch: int = Field(default=64, ge=1, description="Samples drawn at once: more is faster and takes more memory.")
    seed: int = Field(default=0, ge=0, lt=SEEDS, description="Seed of the samples.")

    def files(self) -> list[Source]:
        return [Source("data.generator.policies", str(run), "run") for run in self.policies if run is not None]

    def conflicts(self, config: Config) -> Iterator[Fault]:
        for number, policy in enumerate(self.policies):
            if policy in self.policies[:number]:
                what = f"{policy or 'null'} is named twice; its samples would be the same"
                yield "data.generator.policies", what


class MixtureConfig(GeneratorBase):
    name: Literal["shapes_mixture"] = Field(
        description="Rendered clips, some of them with flaws, as in the pretraining set."
    )
    count: int = Field(ge=1, description="Number of clips that are rendered.")
    wrong: float = Field(default=0.2, ge=0, le=1, description="Share of clips with one wrong attribute.")
    unsteady: float = Field(default=0.3, ge=0, le=1, description="Share of clips with a wobble, a flicker or a jump.")
    seed: int = Field(default=0, ge=0, lt=SEEDS, description="Seed of the clips.")


class CuratedConfig(GeneratorBase):
    name: Literal["shapes_curated"] = Field(description="Rendered clips without a flaw.")
    count: int = Field(ge=1, description="Number of clips that are rendered.")
    seed: int = Field(default=0, ge=0, lt=SEEDS, description="Seed of the clips.")


class ClipsConfig(GeneratorBase):
    name: Literal["video_clips"] = Field(
        description="Clips cut from your videos. SFT trains on them; a reward learns to prefer each clip to "
        "degraded copies of it."
    )
    videos: FolderOrFile = place(
        description="A video, or a folder of videos at any depth. Hidden files, files with other suffixes "
        "and files that prfl wrote are left out, and the log says so. Without data.prompts, the "
        "prompt of a.mp4 is the text in a.txt beside it."
    )
    kinds: list[Literal["blur", "noise", "contrast", "jitter", "shuffle", "freeze"]] = Field(
        default=["blur", "noise", "contrast", "jitter", "shuffle", "freeze"],
        min_length=1,
        description="Degradations. blur, noise and contrast are worse in the dimension look; jitter, "
        "shuffle and freeze in the dimension motion.",
    )
    crops: int = Field(
        default=1,
        ge=1,
        description="Clips from each stretch of a video: the first is the whole picture, further ones are crops of it.",
    )
    held_out: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="Share held out for validation: of the stretches, or of the prompts if these are the "
        "texts beside the videos.",
    )
    formats: list[Literal["mp4", "webm", "gif"]] = Field(
        default=["mp4"], min_length=1, description="Formats of the clips' files; several are used in turn."
    )
    seed: int = Field(default=0, ge=0, lt=SEEDS, description="Seed of the crops and degradations.")
    makes_pairs = True
    brings_prompts = True

    def files(self) -> list[Source]:
        return [Source("data.generator.videos", str(self.videos), "videos")]


class PromptsConfig(Section):
    train: str | None = place(
        default=None, description="Prompts to train on: a file (one prompt a line, or JSONL), or 'shapes'."
    )
    validation: str | None = place(default=None, description="Prompts that are measured during a run, or 'shapes'.")
    test: str | None = place(default=None, description="Prompts used once, at the end, or 'shapes'.")
    first_frames: bool = Field(
        default=False,
        description="For an image-to-video model: give each prompt that comes from a clip the clip's first "
        "frame (for a pair, that of video a).",
    )


LENGTHS: dict[str, dict[str, float]] = {
    "2s-16fps": {"frames": 33, "fps": 16},
    "3s-16fps": {"frames": 49, "fps": 16},
    "5s-16fps": {"frames": 81, "fps": 16},
    "2s-8fps": {"frames": 17, "fps": 8},
    "4s-8fps": {"frames": 33, "fps": 8},
    "6s-8fps": {"frames": 49, "fps": 8},
}
"""Names of usual lengths and frame rates, for data.buckets.  Wan and CogVideoX take these numbers of frames."""


class BucketConfig(Section):
    frames: int = Field(ge=1, description="Frames of a clip of this size, as data.frames.")
    height: int | None = Field(default=None, ge=8, description="Height in pixels; null is data.height.")
    width: int | None = Field(default=None, ge=8, description="Width in pixels; null is data.width.")
    fps: float | None = Field(default=None, gt=0, description="Frames per second of this size; null is data.fps.")

    @model_validator(mode="before")
    @classmethod
    def named(cls, value: Any) -> Any:
        """Replace a name of LENGTHS by its frames and fps; other values stay.  Raises ValueError for other names."""
        if not isinstance(value, str):
            return value
        if value not in LENGTHS:
            hint = f"; did you mean '{close}'?" if (close := closest(value, list(LENGTHS))) else ""
            raise ValueError(f"should be one of {', '.join(LENGTHS)}, or {{frames: ..., fps: ...}}{hint}")
        return LENGTHS[value]


if TYPE_CHECKING:
    GeneratorConfig = GeneratorBase
else:
    GeneratorConfig = one_of(GeneratorBase, "name")


class DataConfig(Section):
    manifest: FolderOrFile | None = place(
        default=None,
        description="JSON lines. Each line is a labelled video, or a pair of videos of one prompt with a preference.",
    )
    root: FolderOrFile | None = place(
        default=None,
        description="Folder that the paths in data.manifest are relative to; null is the manifest's folder.",
    )
    folder: FolderOrFile | None = place(
        default=None,
        description="Videos with their prompts beside them, a.mp4 and a.txt (or a.caption, or a.json with a caption), "
        "in place of a manifest. Videos in its folders train, validation and test have that split.",
    )
    held_out: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Share of data.folder's prompts for validation, if it has no folder named validation.",
    )
    generator: GeneratorConfig | None = Field(
        default=None, discriminator="name", description="Make the clips instead of reading a manifest."
    )
    prompts: PromptsConfig = Field(
        default=PromptsConfig(),
        description="The three sets of prompts; no prompt may be in two of them. If one file is named for "
        "several sets, its prompts are divided among them (80, 10 and 10 %) by a hash of each "
        "prompt. A set that is not named takes the prompts of that split of data.manifest or "
        "data.folder.",
    )
    cache: FolderOrFile = Field(
        description="Folder of cached latents, prompt embeddings and generated clips.", json_schema_extra=WRITTEN
    )
    frames: int = Field(
        ge=1, description="Frames of a clip: 1 plus a multiple of the VAE's temporal factor, such as 81 for Wan."
    )
    height: int = Field(
        ge=8, description="Height in pixels, a multiple of the pixels that a patch covers (16 for Wan)."
    )
    width: int = Field(ge=8, description="Width in pixels, a multiple of the pixels that a patch covers (16 for Wan).")
    fps: float = Field(gt=0, description="Frames per second at which clips are read and samples written.")
    buckets: list[BucketConfig] = Field(
        default=[],
        description="Further sizes of clips, none larger than frames x height x width. A video is read at a size that "
        "it is long and fast enough for, the nearest to its shape. A batch has clips of one size. Samples are drawn at "
        f"the first size. A name stands for frames and fps at the first height and width: {', '.join(LENGTHS)}.",
        json_schema_extra=lambda schema: schema.update(items={"anyOf": [schema["items"], {"enum": [*LENGTHS]}]}),
    )
    skip_unreadable: bool = Field(
        default=False, description="Go on without videos that cannot be read, instead of stopping with a list of them."
    )
    follow_links: bool = Field(
        default=False,
        description="Also read videos through links that lead out of the folder of data.manifest, "
        "data.folder or data.generator.videos, for example to another disk or into the hub's "
        "cache. Otherwise such links are refused.",
        json_schema_extra=MAY_CHANGE,
    )
    encode_batch: int = Field(
        default=16,
        ge=1,
        description="Clips that the VAE encodes at once for the cache. Take 1 for large videos, or memory runs out.",
        json_schema_extra=MAY_CHANGE,
    )

    @property
    def has_clips(self) -> bool:
        return bool(self.manifest or self.folder or self.generator)

    @property
    def brings_prompts(self) -> bool:
        """Whether prompts can be taken from the clips: from a manifest's rows, or from the texts beside videos."""
        return bool(self.manifest or self.folder or (self.generator and self.generator.brings_prompts))

    @property
    def clips_key(self) -> str:
        """The key that names the clips; ``data.manifest`` if none is set."""
        return next((f"data.{key}" for key in ("generator", "folder") if getattr(self, key)), "data.manifest")

    @property
    def videos_root(self) -> Path | None:
        """The folder that the paths of the manifest are relative to; None is the manifest's folder.

        The manifest is the one that the config names, or the one that prfl writes for data.folder.
        """
        return self.folder or self.root

    @property
    def sizes(self) -> tuple[VideoSize, ...]:
        """The sizes of clips: the first, which drawn videos have too, and those of the buckets."""
        first = VideoSize(self.frames, self.height, self.width, self.fps)
        further = (
            VideoSize(each.frames, each.height or self.height, each.width or self.width, each.fps or self.fps)
            for each in self.buckets
        )
        return (first, *further)

    @property
    def makes_pairs(self) -> bool:
        """Whether the clips are pairs for certain; a manifest may hold pairs too, which only reading it tells."""
        return self.generator is not None and self.generator.makes_pairs

    def files(self) -> list[Source]:
        if self.generator:
            return self.generator.files()
        remedy = "write one (JSON lines: see docs/data.md), or name another"
        sources = [Source("data.manifest", str(self.manifest), "manifest", remedy=remedy)] if self.manifest else []
        folders = {"data.root": self.root, "data.folder": self.folder}
        return sources + [Source(key, str(path), "videos") for key, path in folders.items() if path]

    def conflicts(self, config: Config) -> Iterator[Fault]:
        sources = [key for key in ("manifest", "folder", "generator") if getattr(self, key)]
        if len(sources) > 1:
            yield f"data.{sources[-1]}", f"data.{sources[0]} is given too; keep one of them"
        if config.objective.reads_clips and not sources:
            yield "data.manifest", "the objective trains on clips; give data.manifest, data.folder or data.generator"
        if self.folder and config.trains_reward:
            what = (
                f"videos with texts have no labels; have people compare them (prfl labels page {self.folder}) and give"
            )
            damage = "data.generator={name: video_clips, videos: ...}"
            yield "data.folder", f"{what} data.manifest, or let the reward learn to see damage: {damage}"
        if not config.reads_clips:
            if sources and not (self.brings_prompts and not self.prompts.train):
                yield "data", "clips are given that nobody reads; remove them or add objective.sft"
            yield from unread(self, "data", ["encode_batch"], "a config without clips")
        if not sources:
            yield from unread(self, "data", ["skip_unreadable"], "a config without clips")
        if not self.manifest:
            yield from unread(self, "data", ["root"], "a config without data.manifest")
        if not self.folder:
            yield from unread(self, "data", ["held_out"], "a config without data.folder")
        if self.generator:
            yield from self.generator.conflicts(config)
        if self.buckets:
            yield from self.bucket_faults(config)
        if not self.brings_prompts:
            yield from self.prompt_faults(config)
        if self.prompts.first_frames and (reason := self.no_prompt_of_clips(config)):
            yield "data.prompts.first_frames", f"{reason}; remove it"

    def no_prompt_of_clips(self, config: Config) -> str:
        """Say why no prompt with a first frame is taken from the clips; "" if at least one set is."""
        if config.trains_reward:
            return f"objective {config.objective.name} draws no videos, and each clip has its own first frame"
        if not self.brings_prompts:
            return "there are no clips that bring prompts (data.manifest, data.folder)"
        prompts = self.prompts
        return "all prompts are of files" if prompts.train and prompts.validation and prompts.test else ""

    def bucket_faults(self, config: Config) -> Iterator[Fault]:
        """Yield the faults of clips of several sizes."""
        if not config.reads_clips:
            yield "data.buckets", "a config that trains on no clips does not read it; remove it"
        if self.generator:
            yield "data.buckets", f"the generator {self.generator.name} makes clips of one size; remove it"
        if config.reward_gradient and config.reward_gradient.starts_from_data:
            yield "data.buckets", f"objective {config.objective.name} starts chains from clips of one size; remove it"
        first, *further = self.sizes
        for number, size in enumerate(further):
            if size.frames * size.height * size.width > first.frames * first.height * first.width:
                what = "it is larger than data.frames x height x width, for which memory is predicted; put it there"
                yield f"data.buckets[{number}]", what
            if size in self.sizes[: number + 1]:
                yield f"data.buckets[{number}]", "this size is named twice"

    def prompt_faults(self, config: Config) -> Iterator[Fault]:
        """Yield the faults of prompts, for a config whose clips bring none.

        What is missing in a manifest or a folder is reported when it is read.
        """
        if not self.prompts.train:
            yield "data.prompts.train", "missing; give a file of prompts, or data.manifest or data.folder that has them"
        if config.evaluation.every and not self.prompts.validation:
            yield "data.prompts.validation", "evaluation.every needs validation prompts"
        if config.evaluation.final_samples and not self.prompts.test:
            yield "data.prompts.test", "evaluation.final_samples needs test prompts"
