"""What all sections of a config share: strictness, places, conflicts, what must be there before a run."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from prfl.config.schema import Config

Fault = tuple[str, str]  # (yaml path, what is wrong there)


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
Share = Annotated[float, Field(ge=0, le=1)]

# Keys that name a place: what lies there decides a run's numbers, and is hashed (factory/resume_identity.py).  It may
# be moved.  What is read is looked for in the config's folder too (places.py), what is written is not.
READ: dict[str, Any] = {"by_content": True, "read": True}
WRITTEN: dict[str, Any] = {"by_content": True}


def place(**facts: Any) -> Any:
    """The ``Field`` of a key that names what is read."""
    return Field(json_schema_extra=READ, **facts)


def is_hub_id(name: object) -> bool:
    """``owner/name``, and no folder here."""
    text = str(name)
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and not Path(text).exists()


@dataclass(frozen=True)
class Source:
    """What a run reads from a place that its config names.

    key: the yaml path that names it.  target: a file, a folder or a hub id.
    kind: ``model`` (a diffusers or transformers folder, or a hub id), ``folder`` (of a model, never a hub id),
    ``reward`` (a saved reward), ``run`` (a finished run), ``manifest``, ``videos``, ``file``.
    revision, weights: of a model on the hub; one of these files tells that it was downloaded.
    remedy: how to get what is not there.
    """

    key: str
    target: str
    kind: Literal["model", "folder", "reward", "run", "manifest", "videos", "file"]
    revision: str | None = None
    weights: tuple[str, ...] = ()
    remedy: str = ""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())
    instead: ClassVar[Mapping[str, str]] = {}
    """Of keys that people expect here and that there are not: what to write."""

    def conflicts(self, config: Config) -> Iterator[Fault]:
        """Every rule that the section's keys break, among each other or with the rest of the config."""
        yield from ()

    def files(self) -> list[Source]:
        """What must be there before a run, or is downloaded."""
        return []


def unread(section: Section, path: str, keys: list[str], reader: str) -> Iterator[Fault]:
    """Keys that were changed, and that nobody reads: a person who sets one believes that it does something."""
    for key in keys:
        if getattr(section, key) != type(section).model_fields[key].default:
            yield f"{path}.{key}", f"{reader} does not read it; remove it"


def kinds(base: type[Section], tag: str) -> list[type[Section]]:
    """The sections below ``base`` that yaml can choose by the key ``tag``, in the order of their definitions."""
    chosen: list[type[Section]] = []
    for section in base.__subclasses__():
        if typing.get_origin(section.model_fields[tag].annotation) is Literal:
            chosen.append(section)
        chosen += kinds(section, tag)
    return chosen


def one_of(base: type[Section], tag: str) -> Any:
    """The union of ``kinds``: a section is in it because it is defined."""
    return Union[tuple(kinds(base, tag))]  # noqa: UP007
