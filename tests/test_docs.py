"""The pages: links lead somewhere, tables fit, generated pages are as their sources say, the README is short."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from prfl.cli import parser
from prfl.config.page import configuration_page
from prfl.config.schema import Config
from prfl.config.section import kinds
from prfl.config.sections.objective import ObjectiveBase

REPOSITORY = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(REPOSITORY)): path.read_text(encoding="utf-8")
    for folder in (".", "docs", "bench", "kernels")
    for path in sorted((REPOSITORY / folder).glob("*.md"))
}
PARSER = MarkdownIt("commonmark").enable("table")
WIDTH, WORDS = 100, 1200
FENCE = re.compile(r"^(```+)(?P<kind>\w*)\n(?P<text>.*?)^\1$", re.MULTILINE | re.DOTALL)


def links(text: str) -> Iterator[str]:
    """Yield the target of every link and picture."""
    for token in PARSER.parse(text):
        for inner in token.children or []:
            target = inner.attrGet("href") or inner.attrGet("src")
            if target:
                yield str(target)


def anchors(text: str) -> set[str]:
    """Return the anchor of every heading, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in links(PAGES[page]):
        if re.match("[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (REPOSITORY / page).parent / file if file else REPOSITORY / page
        assert there.exists(), f"{target}: there is no such file"
        if anchor:
            assert anchor in anchors(there.read_text(encoding="utf-8")), f"{target}: there is no such heading"


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith("kernels/")])
def test_tables_fit(page: str) -> None:
    """A line's width is that of its text: of a link it is what one reads.  The kernels' pages name tests by path."""
    for line in FENCE.sub("", PAGES[page]).splitlines():
        if line.startswith("|"):
            shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line).replace("`", "").replace("**", "")
            assert len(shown) <= WIDTH, shown


def test_the_configuration_page_is_the_schemas() -> None:
    """To mend it: prfl schema docs/configuration.md"""
    assert PAGES["docs/configuration.md"] == configuration_page()


def test_every_method_is_explained() -> None:
    for section in kinds(ObjectiveBase, "name"):
        (name,) = section.model_fields["name"].annotation.__args__
        if section.model_fields.keys() >= {"distance_weight"}:
            assert f"`{name}`" in PAGES["docs/methods.md"], name
    assert Config.model_fields["objective"].discriminator == "name"


def test_every_page_is_on_the_site_and_in_the_readme() -> None:
    site = (REPOSITORY / "docs/mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        assert page in site, page
        assert page == "README.md" or f"]({page})" in PAGES["README.md"], page


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].split()) <= WORDS


def test_the_readmes_python_runs_as_it_is(capsys: pytest.CaptureFixture) -> None:
    (code,) = [match["text"] for match in FENCE.finditer(PAGES["README.md"]) if match["kind"] == "python"]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    exec(compile(code, "README.md", "exec"), {})
    score, gradient = map(float, capsys.readouterr().out.split())
    assert abs(score) < 100 and gradient > 0


def commands() -> list[tuple[str, str]]:
    """Every ``prfl`` command of the pages' blocks, and of the table of commands."""
    blocks = [(page, match["text"]) for page, text in PAGES.items() for match in FENCE.finditer(text)]
    lines = [(page, line) for page, text in blocks for line in text.replace("&& ", "\n").splitlines()]
    plain = [(page, line.removeprefix("$ ").split("#")[0].strip()) for page, line in lines]
    return [(page, line) for page, line in plain if re.match(r"prfl [a-z]+(?!\S)", line) and "CONFIG" not in line]


@pytest.mark.parametrize(("page", "command"), sorted(set(commands())))
def test_commands_can_be_given(page: str, command: str) -> None:
    """They are of a command that there is, with its own options, and name configs that ship."""
    words = shlex.split(command)[1:]
    _, rest = parser().parse_known_args(words)
    assert all("=" in word for word in rest), rest
    for word in words:
        if word.startswith("configs/"):
            assert (REPOSITORY / word).exists(), word


def test_every_word_of_the_glossary_is_used() -> None:
    """A word that no other page has is not to be explained."""
    terms = re.findall(r"\*\*([^*]+)\*\*", PAGES["docs/glossary.md"])
    others = " ".join(text.lower() for page, text in PAGES.items() if page != "docs/glossary.md")
    assert len(terms) > 50
    assert [term for term in terms if term.lower().split(" (")[0].rstrip("s") not in others] == []


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="mkdocs-material: pip install -e '.[dev]' brings it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "docs/mkdocs.yml", "-d", str(tmp_path)]
    build = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    front = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "prfl train" in front and (tmp_path / "docs/glossary/index.html").exists()
