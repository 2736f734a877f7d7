"""The base class of all config sections, and the kinds of their keys.  A section refuses unknown keys, reports broken
rules, and lists the files that a run needs."""

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
    """Replace ``~`` or ``~name`` at the start of a path by that home folder.  Raises ValueError if there is none."""
    try:
        return path.expanduser()
    except RuntimeError as error:  # ~ without HOME, a user that is not there
        raise ValueError(f"there is no home folder for {path.parts[0]}; write the whole path") from error


FolderOrFile = Annotated[Path, AfterValidator(at_home)]
# Keys marked with this may differ when a run is resumed; they are left out of the config hash.
MAY_CHANGE: dict[str, Any] = {"may_change": True}
SEEDS = 2**63  # torch takes no larger seed
Share = Annotated[float, Field(ge=0, le=1)]

# Keys that name a path: a run is identified by a hash of the contents there (factory/resume_identity.py), not by the
# path, so files may be moved.  Paths to read are also looked up in the config's folder (places.py), paths to write not.
READ: dict[str, Any] = {"by_content": True, "read": True}
WRITTEN: dict[str, Any] = {"by_content": True}


def place(**facts: Any) -> Any:
    """Return the ``Field`` of a key that names something to read.  facts: the other arguments of ``Field``."""
    return Field(json_schema_extra=READ, **facts)


def is_hub_id(name: object) -> bool:
    """Whether a name has the form ``owner/name`` and is not a path that exists here."""
    text = str(name)
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and not Path(text).exists()


@dataclass(frozen=True)
class Source:
    """One thing that a run reads: a file, a folder or a model of the hub.

    key: the yaml path that names it.  target: a file, a folder or a hub id.
    kind: ``model`` (a diffusers or transformers folder, or a hub id), ``folder`` (of a model, never a hub id),
    ``reward`` (a saved reward), ``run`` (a finished run), ``manifest``, ``videos``, ``file``.
    revision: of a model on the hub; None is the newest.
    weights: file names of a model on the hub; if one of them is in the hub's cache, the model was downloaded.
    remedy: how to get the target if it does not exist; a file, a folder and a manifest need one.
    """

    key: str
    target: str
    kind: Literal["model", "folder", "reward", "run", "manifest", "videos", "file"]
    revision: str | None = None
    weights: tuple[str, ...] = ()
    remedy: str = ""


class Section(BaseModel):
    """The base class of all sections: frozen, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())
    instead: ClassVar[Mapping[str, str]] = {}
    """What to write instead of keys that people expect here but that do not exist, by key."""

    def conflicts(self, config: Config) -> Iterator[Fault]:
        """Yield a fault for every rule that the section's keys break, by themselves or with the rest of the config."""
        yield from ()

    def files(self) -> list[Source]:
        """List what the section names to read: it must exist before a run, or be downloaded."""
        return []


def unread(section: Section, path: str, keys: list[str], reader: str) -> Iterator[Fault]:
    """Yield a fault for each key that differs from its default and has no effect with the other keys.

    A person who sets such a key believes that it does something.  reader: what does not read it, for the message.
    """
    for key in keys:
        if getattr(section, key) != type(section).model_fields[key].default:
            yield f"{path}.{key}", f"{reader} does not read it; remove it"


def kinds(base: type[Section], tag: str) -> list[type[Section]]:
    """List the subclasses of ``base`` that a config can choose by the key ``tag``, in the order of definition."""
    chosen: list[type[Section]] = []
    for section in base.__subclasses__():
        if typing.get_origin(section.model_fields[tag].annotation) is Literal:
            chosen.append(section)
        chosen += kinds(section, tag)
    return chosen


def one_of(base: type[Section], tag: str) -> Any:
    """Return the union of ``kinds``: every defined subclass with a value of ``tag`` is a member."""
    return Union[tuple(kinds(base, tag))]  # noqa: UP007
