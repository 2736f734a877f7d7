"""``prfl labels serve``: what it gives and to whom, and that an answer is on the disk before it counts as saved."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest
import torch

from prfl.data.manifest import PreferencePair, read_manifest
from prfl.evaluation.media import browser_mp4
from prfl.labels.asking import asked_of
from prfl.labels.collect import Collection
from prfl.labels.serve import LabelServer, addresses, names_a_machine
from prfl.utils.errors import PrflError

QUESTIONS = {"motion": "Which moves better?", "text": ""}


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    content = browser_mp4(torch.zeros(3, 2, 16, 16), 8.0)
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.mp4").write_bytes(content)
    (tmp_path / "secret.txt").write_text("of the folder, and on no page")
    return tmp_path


@pytest.fixture
def server(clips: Path) -> Iterator[LabelServer]:
    with LabelServer(asked_of(clips, QUESTIONS, prompt="a dog"), "127.0.0.1", 0) as running:
        threading.Thread(target=running.serve_forever, args=[0.01], daemon=True).start()
        yield running
        running.shutdown()


def ask(server: LabelServer, method: str, path: str, body: object = None, **headers: str) -> HTTPResponse:
    """Send one request; the answer's text is ``.text``."""
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    reply = connection.getresponse()
    reply.text = reply.read().decode(errors="replace")  # type: ignore[attr-defined]
    connection.close()
    return reply


def answer(server: LabelServer, rater: str, number: int, preference: dict[str, str], **more: Any) -> HTTPResponse:
    pair = server.asked.pairs[number].row
    headers = {"Content-Type": "application/json", "Origin": f"http://127.0.0.1:{server.server_port}"}
    return ask(server, "POST", "/answers", {**pair, "preference": preference, "rater": rater, **more}, **headers)


def test_it_gives_the_page_and_its_videos_and_nothing_else(server: LabelServer, clips: Path) -> None:
    page = ask(server, "GET", "/")
    assert page.status == 200 and '"server": true' in page.text and "default-src 'none'" in page.headers.as_string()
    content = (clips / "a.mp4").read_bytes()
    video = ask(server, "GET", "/videos/0.mp4")
    assert (video.status, video.headers["Content-Length"]) == (200, str(len(content)))
    for header, status, extent in (
        ("bytes=0-9", 206, f"bytes 0-9/{len(content)}"),
        ("bytes=100-", 206, f"bytes 100-{len(content) - 1}/{len(content)}"),
        (f"bytes={len(content)}-", 416, None),
    ):
        part = ask(server, "GET", "/videos/0.mp4", Range=header)
        assert (part.status, part.headers["Content-Range"]) == (status, extent)
    for path in ("/secret.txt", "/a.mp4", "/videos/9.mp4", "/videos/../secret.txt", "/../secret.txt", "//etc/passwd"):
        assert ask(server, "GET", path).status == 404, path
    assert ask(server, "GET", "/answers?rater=").status == 400


def test_answers_are_a_manifest_at_once(server: LabelServer, clips: Path) -> None:
    assert answer(server, "Ann", 0, {"motion": "a", "text": "tie"}, both_bad=["text"]).status == 204
    assert answer(server, "Bo/../x", 0, {"motion": "b"}).status == 204
    assert answer(server, "ann", 1, {"text": "b"}).status == 204, "the same person"
    ann, bo = sorted(clips.glob("preferences-*.jsonl"))
    rows = read_manifest(ann)
    assert [row.preference for row in rows if isinstance(row, PreferencePair)] == [
        {"motion": "a", "text": "tie"},
        {"text": "b"},
    ]
    assert bo.name.startswith("preferences-bo-x-") and json.loads(bo.read_text())["rater"] == "Bo/../x"

    # One answer is given anew, and one taken back; whoever begins again finds the rest.
    assert answer(server, "Ann", 0, {"motion": "b"}).status == 204
    assert answer(server, "Ann", 1, {}).status == 204
    back = json.loads(ask(server, "GET", "/answers?rater=Ann").text)
    assert [row["preference"] for row in back] == [{"motion": "b"}]
    again = Collection(clips, server.asked.pairs, list(QUESTIONS))
    assert again.of("ANN") == back


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"a": "x.mp4"}, "this pair is not asked"),
        ({"preference": {"colour": "a"}}, "'colour' is not asked"),
        ({"preference": {"motion": "left"}}, "'preference.motion'"),
        ({"rater": " "}, "'rater'"),
        ({"rater": "x" * 61}, "'rater'"),
        ({"more": 1}, "unknown key 'more'"),
    ],
)
def test_what_is_no_answer_is_refused(server: LabelServer, clips: Path, fields: dict, message: str) -> None:
    reply = answer(server, **{"rater": "ann", "number": 0, "preference": {"motion": "a"}, **fields})
    assert reply.status == 400 and message in reply.text
    assert not list(clips.glob("preferences-*"))


def test_who_may_not_answer(server: LabelServer, clips: Path) -> None:
    """Another site's page in a rater's browser; another site's name that leads here; a form; a flood."""
    here = f"127.0.0.1:{server.server_port}"
    sent = {**server.asked.pairs[0].row, "preference": {"motion": "a"}, "rater": "ann"}
    right = {"Content-Type": "application/json", "Origin": f"http://{here}", "Host": here}
    for changes, status in (
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),
        ({"Content-Type": "text/plain"}, 400),
        ({"Content-Length": "99999999"}, 413),
        ({}, 204),
    ):
        assert ask(server, "POST", "/answers", sent, **{**right, **changes}).status == status, changes
    assert len(list(clips.glob("preferences-*"))) == 1, "the last one's"
    assert ask(server, "GET", "/", Host="evil.example").status == 403


def test_the_network_needs_the_token(clips: Path) -> None:
    with LabelServer(asked_of(clips, QUESTIONS, prompt="a dog"), "0.0.0.0", 0) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        (address,) = addresses(server)
        token = address.split("/")[3]
        assert len(token) >= 20 and address.endswith("/")
        for path, status in (("/", 404), ("/answers?rater=x", 404), (f"/{token[:-1]}x/", 404), (f"/{token}/", 200)):
            assert ask(server, "GET", path).status == status, path
        server.shutdown()


def test_an_answer_that_is_not_written_is_not_saved(
    server: LabelServer, clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert answer(server, "ann", 0, {"motion": "a"}).status == 204

    def full(path: Path) -> None:
        raise PrflError("cannot be written: No space left on device", where=str(path), fix="free some space")

    with monkeypatch.context() as patch:
        patch.setattr("prfl.labels.collect.atomic_write", full)
        reply = answer(server, "ann", 1, {"motion": "a"})
    assert reply.status == 400 and "No space left" in reply.text
    assert len(json.loads(ask(server, "GET", "/answers?rater=ann").text)) == 1
    assert answer(server, "ann", 1, {"motion": "a"}).status == 204, "and tried again"
    assert server.collection.counts() == {server.collection.file("ann"): 2}


def test_many_answers_at_once_are_all_kept(server: LabelServer) -> None:
    jobs = [(rater, number) for rater in ("ann", "bo") for number in range(3)] * 3
    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(lambda job: answer(server, *job, {"motion": "tie"}).status, jobs))
    assert set(replies) == {204}
    assert sorted(server.collection.counts().values()) == [3, 3]
    assert all(len(read_manifest(file)) == 3 for file in server.collection.counts())


def test_names_and_addresses(clips: Path) -> None:
    mine = ("127.0.0.1:80", "192.168.0.7:8765", "[::1]:80", "localhost:1", "LOCALHOST")
    assert all(map(names_a_machine, mine))
    assert not any(map(names_a_machine, ("", "evil.example", "127.0.0.1.evil.example:80", "[::1", "a b")))
    asked = asked_of(clips, {}, prompt="a dog")
    with pytest.raises(PrflError, match="'dog' is no address"):
        LabelServer(asked, "dog", 0)
    with LabelServer(asked, "localhost", 0) as server, pytest.raises(PrflError, match="cannot listen"):
        assert server.root == "/"
        LabelServer(asked, "127.0.0.1", server.server_port)
