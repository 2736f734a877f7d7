"""Upload of an exported folder by huggingface_hub's own mixin; who uploads is whoever ran ``hf auth login``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelHubMixin
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from prfl.utils.errors import PrflError


class Exported(ModelHubMixin, library_name="prfl"):
    """What ``prfl export`` wrote, model card and all; ``push_to_hub("owner/name")`` is the mixin's.

    written: files, and folders that it wrote as a whole.
    """

    def __init__(self, written: Sequence[Path]) -> None:
        self.written = written

    def _save_pretrained(self, save_directory: Path) -> None:
        for path in self.written:
            target = save_directory / path.name
            if path.is_dir():
                shutil.copytree(path, target, copy_function=_link)
            else:
                _link(str(path), str(target))


def _link(source: str, target: str) -> None:
    """Link a file, or copy it where the upload's folder is on another disk: merged weights are many gigabytes."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def push(folder: Path, written: Sequence[Path], repo: str, *, private: bool = False) -> str:
    """Upload what was written to the folder, and nothing else that lies there; returns the commit's address.

    The repository ``owner/name`` is made where there is none.

    Raises PrflError when the hub refuses, cannot be reached, or the name is none.
    """
    try:
        return str(Exported(written).push_to_hub(repo, private=private, commit_message="Upload with prfl export"))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise PrflError(
            f"cannot be uploaded ({type(error).__name__}): {reason}",
            where=f"--push {repo}",
            fix=f"log in with `hf auth login` and a token that may write; what was exported is whole in {folder}",
        ) from error
