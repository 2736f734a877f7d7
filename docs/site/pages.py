"""Puts the repository's pages, and the files that they link to, on the site at the paths that they have here."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).parents[2]
PAGES = ("README.md", "docs/*.md", "bench/*.md", "kernels/*.md")
LINKED = ("docs/pictures/*", "bench/results/*.json", "bench/results/*.png", "bench/*.py", "configs/**/*.yaml")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for pattern in (*PAGES, *LINKED):
        for path in sorted(REPOSITORY.glob(pattern)):
            address = path.relative_to(REPOSITORY).as_posix()
            files.append(File.generated(config, address, abs_src_path=str(path)))
    return files
