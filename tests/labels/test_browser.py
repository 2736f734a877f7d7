"""The labelling page in a real browser: mouse and keys, several people, a server that goes away, and a phone."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from prfl.data.manifest import read_manifest
from prfl.evaluation.media import browser_mp4
from prfl.labels.asking import asked_of
from prfl.labels.page import write_page

pytestmark = pytest.mark.slow
DESK, PHONE = {"width": 1400, "height": 900}, {"width": 390, "height": 844}
QUESTIONS = {"motion": "Which moves more naturally?", "text": "Which shows what was asked for?"}
GRACE = 400  # ms, longer than the time in which a click is the second one of a double click
SAVED = "#state:text-is('Every answer is saved')"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser of this machine, or the one that playwright brought."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[browser]'")
    with playwright.sync_playwright() as driver:
        path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        try:
            browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no chromium starts here (apt install chromium): {str(error)[:200]}")
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Opens a page in a browser of its own; at the end no script of it may have failed."""
    contexts, errors = [], []

    def opened(address: str, size: dict[str, int] = DESK, **options: Any) -> Any:
        contexts.append(chromium.new_context(viewport=size, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(100_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert errors == []


@pytest.fixture(scope="module")
def content() -> bytes:
    return browser_mp4(torch.linspace(-1, 1, 12)[:, None, None].expand(3, 12, 54, 96), 6.0)


@pytest.fixture
def clips(tmp_path: Path, content: bytes) -> Path:
    for prompt in range(5):
        for number in range(3):
            (tmp_path / f"{prompt}-{number}.mp4").write_bytes(content)
            (tmp_path / f"{prompt}-{number}.txt").write_text(f"a dog runs, take {prompt}")
    return tmp_path


@pytest.fixture
def address(clips: Path) -> str:
    asked = asked_of(clips, QUESTIONS)
    return write_page(clips / "label.html", asked.pairs, asked.questions).as_uri()


def begin(page: Any, name: str = "") -> None:
    page.fill("#name", name)
    page.click("#person button")
    page.wait_for_selector("#work:not([hidden])")


def choose(page: Any, dimension: str, choice: str) -> None:
    page.wait_for_timeout(GRACE)
    page.click(f"[data-dimension={dimension}] [data-choice={choice}]")


def chosen(page: Any) -> list[str]:
    buttons = page.query_selector_all(".question [aria-pressed=true]")
    return [button.get_attribute("data-choice") for button in buttons]


def at(page: Any) -> str:
    """Tell how many pairs are answered, and which one is shown."""
    return page.inner_text("#count")


def test_any_order_of_answers_leads_on(open_page: Callable, address: str) -> None:
    page = open_page(address)
    begin(page)
    choose(page, "text", "b")
    assert at(page).startswith("0 of 15") and chosen(page) == ["b"]
    page.wait_for_timeout(GRACE)
    page.evaluate(
        "document.querySelectorAll('[data-dimension=motion] [data-choice=a]').forEach((it) => {"
        "it.click(), it.click() })"
    )
    assert at(page) == "1 of 15 pairs answered; this is pair 2."
    assert chosen(page) == [], "the second click of a double click is no answer to the next pair"

    # Back, and an answer changed: the pair stays, and Next leads on.
    page.click("#back")
    assert chosen(page) == ["a", "b"]
    choose(page, "motion", "bad")
    assert "this is pair 1." in at(page) and chosen(page) == ["bad", "b"]
    page.click("#next")
    assert "this is pair 2." in at(page)


def test_keys_alone_are_enough(open_page: Callable, address: str) -> None:
    page = open_page(address)
    page.keyboard.press("Enter")  # no name
    page.wait_for_selector("#work:not([hidden])")
    for key in ("ArrowLeft", "3"):
        page.keyboard.press(key)
    assert "1 of 15" in at(page) and "pair 2" in at(page)
    page.keyboard.press("x")
    page.keyboard.press("Control+z")
    assert chosen(page) == []
    page.keyboard.press("Control+z")
    assert "0 of 15" in at(page) and "pair 1" in at(page) and chosen(page) == ["a"], (
        "the last answer of the pair before"
    )
    page.keyboard.press("b")
    page.keyboard.press("n")
    page.keyboard.press("Backspace")
    page.keyboard.press("Backspace")
    assert chosen(page) == ["a", "b"]
    page.keyboard.press("t")
    assert chosen(page) == ["tie", "b"]

    # At the end of all pairs, one key too many changes nothing.
    page.keyboard.press("Enter")
    for _ in range(28):
        page.keyboard.press("b")
    assert "15 of 15" in at(page) and page.is_visible("#finished")
    page.keyboard.press("a")
    assert chosen(page) == ["b", "b"]


def test_the_videos_obey(open_page: Callable, address: str) -> None:
    page = open_page(address)
    begin(page)
    page.wait_for_function("[...document.querySelectorAll('video')].every((video) => video.readyState >= 2)")

    def videos(what: str) -> list[Any]:
        page.wait_for_timeout(150)
        return page.evaluate(f"[...document.querySelectorAll('video')].map((video) => video.{what})")

    page.keyboard.press("Space")
    assert videos("paused") == [True, True]
    page.keyboard.press("r")
    page.keyboard.press("Space")
    page.evaluate("document.querySelectorAll('video').forEach((video) => (video.currentTime = 0))")
    for key, frame in ((".", 1), (".", 2), (",", 1), (",", 0), (",", 0)):
        page.keyboard.press(key)
        assert videos("currentTime * 6") == pytest.approx([frame + 0.5] * 2, abs=0.01)
    page.keyboard.press("v")
    page.keyboard.press("v")
    assert videos("playbackRate") == [0.25, 0.25]
    page.keyboard.press("a")
    page.keyboard.press("a")
    assert videos("playbackRate") == [0.25, 0.25], "of the next pair too"
    page.evaluate("at.value = 500; at.dispatchEvent(new Event('input'))")
    assert videos("currentTime") == pytest.approx([1, 1], abs=0.01) and videos("paused") == [True, True]


def test_a_half_finished_page_saves_a_held_out_pair(open_page: Callable, address: str, clips: Path) -> None:
    page = open_page(address)
    begin(page, "Ann")
    for _ in range(4):
        page.keyboard.press("a")
        page.keyboard.press("x")
    assert "not in a file yet" in page.inner_text("#state")
    page.reload()
    page.wait_for_selector("#work:not([hidden])")
    assert "4 of 15" in at(page) and "not in a file yet" in page.inner_text("#state")
    with page.expect_download() as download:
        page.keyboard.press("Control+s")
    assert page.inner_text("#state") == "Saved: preferences-ann.jsonl"
    assert page.evaluate("state.getBoundingClientRect().bottom < innerHeight"), "seen at once"
    download.value.save_as(clips / download.value.suggested_filename)
    rows = read_manifest(clips / "preferences-ann.jsonl")
    assert len(rows) == 4 and {row.split for row in rows} == {"train", "validation"}

    # Another person at the same machine begins with no answers; the first one's are still there.
    page.click("#change")
    begin(page, "Bo")
    assert "0 of 15" in at(page) and "Bo" in page.inner_text("#who")
    page.keyboard.press("b")
    page.click("#change")
    begin(page, "Ann")
    assert "4 of 15" in at(page) and page.inner_text("#state") == "Saved in a file"


@contextmanager
def served(clips: Path, port: int = 0) -> Iterator[str]:
    """The command in a process of its own, which is killed at the end: nothing is tidied up."""
    asked = [word for name, question in QUESTIONS.items() for word in ("--dimensions", f"{name}={question}")]
    command = [sys.executable, "-m", "prfl.cli", "labels", "serve", str(clips), "--port", str(port), *asked]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            lines = iter(process.stdout.readline, "")
            yield next(line.split()[-1] for line in lines if line.startswith("open in a browser"))
        finally:
            process.kill()


def test_two_people_and_a_server_that_is_killed(open_page: Callable, clips: Path) -> None:
    with served(clips) as address:
        ann = open_page(address)
        bo = open_page(address, PHONE, has_touch=True)
        for page, name in ((ann, "Ann"), (bo, "Bo")):
            begin(page, name)
            page.keyboard.press("a")
            page.wait_for_selector(SAVED)
        bo.keyboard.press("b")
        bo.wait_for_selector(SAVED)
        assert ann.evaluate("a.videoWidth > 0 && a.seekable.length > 0 && a.error === null")
    counts = [len(read_manifest(file)) for file in sorted(clips.glob("preferences-*.jsonl"))]
    assert counts == [1, 1], "what the page called saved is on the disk"

    # Nobody listens: the page says so, keeps the answer, and sends it when somebody does.
    ann.keyboard.press("t")
    ann.wait_for_selector("#state:has-text('1 pair not saved: the server does not answer')")
    with served(clips, int(address.rstrip("/").rpartition(":")[2])):
        ann.wait_for_selector(SAVED)
        rows = read_manifest(next(clips.glob("preferences-ann-*.jsonl")))
        assert [row.preference for row in rows] == [{"motion": "a", "text": "tie"}]  # type: ignore[union-attr]
        later = open_page(address, PHONE)
        begin(later, "ann")
        assert "1 of 15" in at(later), "another device goes on"


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("colours", ["light", "dark"])
def test_axe_finds_nothing(open_page: Callable, address: str, size: dict[str, int], colours: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install -e '.[browser]'").Axe()
    page = open_page(address, size, color_scheme=colours)
    for state in ("who answers", "a pair", "an answered pair"):
        violations = axe.run(page).response["violations"]
        assert [(each["id"], each["nodes"][0]["target"]) for each in violations] == [], state
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        if state == "who answers":
            begin(page, "Ann")
        page.keyboard.press("a")
        page.keyboard.press("v")
