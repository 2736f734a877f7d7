"""The labelling page for browsers of several people, on one machine or a local network; their answers come back.

Nothing is given but the page, the videos that it shows and the rater's answers.  Whoever is not on this machine needs
the address's token.  Two attacks come through a browser of somebody who may enter: a page of another site that sends
answers (its ``Origin`` is another), and a name of another site that leads to this machine (its ``Host`` is a name).
"""

from __future__ import annotations

import ipaddress
import json
import re
import secrets
import socket
import sys
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import parse_qs

from prfl.labels.asking import Asked
from prfl.labels.collect import Collection
from prfl.labels.page import page_text, playable_videos
from prfl.utils.console import console
from prfl.utils.errors import PrflError

if TYPE_CHECKING:
    from prfl.rollout.sampling import Progress  # which loads the video models' library

LARGEST = 2**16  # bytes of an answer
TYPES = {".webm": "video/webm"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "media-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",  # the address holds the token
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class LabelServer(ThreadingHTTPServer):
    """Serves ``asked`` at ``address``; its pages lie below ``root``, which is "/" or "/TOKEN/"."""

    daemon_threads = True

    def __init__(self, asked: Asked, host: str, port: int, progress: Progress = iter) -> None:
        self.asked = asked
        self.collection = Collection(asked.folder, asked.pairs, list(asked.questions))
        self.told: set[str] = set()
        self.root = "/" if _is_loopback(host) else f"/{secrets.token_urlsafe(16)}/"
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            what = f"cannot listen at {host}, port {port}: {getattr(error, 'strerror', None) or error}"
            fix = "--port 0 takes any port that is free; --host an address of this machine, 0.0.0.0 for all of them"
            raise PrflError(what, where="--port", fix=fix) from error

        # The page names a video by its number: no name of a file comes in by an address.
        self.videos: dict[str, Path] = {}
        shown: dict[str, Mapping[str, Any]] = {}
        try:
            for name, (file, fps) in playable_videos(asked.folder, asked.pairs, progress).items():
                source = f"videos/{len(shown)}{file.suffix}"
                self.videos[source], shown[name] = file, {"src": source, "fps": fps}
        except PrflError:
            self.server_close()
            raise
        self.page = page_text(asked.folder, asked.pairs, asked.questions, shown, server=True).encode()

    def tell(self, rater: str, count: int) -> None:
        """Say once that somebody has begun, and that they have answered all."""
        total = len(self.asked.pairs)
        text = f"{rater} has answered {'all' if count == total else count} of {total} pairs"
        if count in (1, total) and text not in self.told:
            self.told.add(text)
            console.say(text)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):  # a browser that left
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    server: LabelServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "prfl", ""
    timeout = 60

    def do_GET(self) -> None:
        path, query = self._asked_for()
        if path == "":
            self._send(self.server.page, "text/html; charset=utf-8")
        elif path == "answers":
            self._answers(query)
        elif path in self.server.videos:
            self._video(self.server.videos[path])
        elif path is not None:
            self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here")

    def do_POST(self) -> None:
        path, _ = self._asked_for()
        if path is None:
            return
        length = self.headers.get("Content-Length", "")
        if self.headers.get("Origin") not in (f"http://{self.headers['Host']}", f"https://{self.headers['Host']}"):
            self._refuse(HTTPStatus.FORBIDDEN, "answers come from this page alone")
        elif self.headers.get_content_type() != "application/json" or path != "answers":
            self._refuse(HTTPStatus.BAD_REQUEST, "nothing takes this")
        elif not length.isdecimal() or int(length) > LARGEST:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "this is no answer")
        else:
            self._take(self.rfile.read(int(length)))

    def _asked_for(self) -> tuple[str | None, str]:
        """Return the path below the root, and the query; None for the path where it is refused, and that is said."""
        path, _, query = self.path.partition("?")
        root = self.server.root
        if not names_a_machine(self.headers.get("Host", "")):
            self._refuse(HTTPStatus.FORBIDDEN, "this name is not of this machine: open the address that prfl printed")
        elif not secrets.compare_digest(path[: len(root)].encode(), root.encode()):
            self._refuse(HTTPStatus.NOT_FOUND, "there is nothing here: open the whole address that prfl printed")
        else:
            return path[len(root) :], query
        return None, ""

    def _answers(self, query: str) -> None:
        try:
            rows = self.server.collection.of(parse_qs(query).get("rater", [""])[0])
        except PrflError as error:
            return self._refuse(HTTPStatus.BAD_REQUEST, error.what)
        self._send(json.dumps(rows).encode(), "application/json")

    def _take(self, body: bytes) -> None:
        """Answer only when the file is written: what the page shows as saved is saved."""
        try:
            rater, count = self.server.collection.put(json.loads(body))
        except PrflError as error:
            return self._refuse(HTTPStatus.BAD_REQUEST, error.what)
        except (ValueError, RecursionError):
            return self._refuse(HTTPStatus.BAD_REQUEST, "this is not JSON")
        self.server.tell(rater, count)
        self._send(b"", "text/plain", HTTPStatus.NO_CONTENT)

    def _video(self, file: Path) -> None:
        """Send a video, or the part that is asked for: without parts a browser cannot go back in it."""
        try:
            opened, size = file.open("rb"), file.stat().st_size
        except OSError:
            return self._refuse(HTTPStatus.NOT_FOUND, "this video is not there any more")
        kind = TYPES.get(file.suffix.lower(), "video/mp4")
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        with opened:
            if part is None:
                return self._send_file(opened, 0, size, kind, HTTPStatus.OK, {"Accept-Ranges": "bytes"})
            first, last = int(part[1]), min(int(part[2] or size - 1), size - 1)
            if first > last:
                return self._refuse(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, f"it has {size} bytes")
            extent = {"Content-Range": f"bytes {first}-{last}/{size}"}
            self._send_file(opened, first, last + 1 - first, kind, HTTPStatus.PARTIAL_CONTENT, extent)

    def _send(self, content: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send_file(BytesIO(content), 0, len(content), kind, status, {})

    def _send_file(
        self, file: BinaryIO, first: int, length: int, kind: str, status: HTTPStatus, headers: Mapping[str, str]
    ) -> None:
        self.send_response(status)
        size = {} if status == HTTPStatus.NO_CONTENT else {"Content-Type": kind, "Content-Length": str(length)}
        ends = {"Connection": "close"} if self.close_connection else {}
        for name, value in {**HEADERS, **size, **headers, **ends}.items():
            self.send_header(name, value)
        self.end_headers()
        file.seek(first)
        while length > 0 and (chunk := file.read(min(length, 2**16))):
            self.wfile.write(chunk)
            length -= len(chunk)

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        self.close_connection = True  # there may be a body that was not read
        self._send(reason.encode(), "text/plain; charset=utf-8", status)

    def log_message(self, *_: Any) -> None:
        """A line for every part of every video would tell nobody anything."""


def names_a_machine(host: str) -> bool:
    """Tell whether a Host header is an address, or a name of this machine: no other site can lead such a one here."""
    name = re.sub(r":\d*$", "", host).strip("[]").lower()
    mine = socket.gethostname().lower()
    try:
        return name in ("localhost", mine, f"{mine}.local") or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def addresses(server: LabelServer) -> list[str]:
    """List the addresses at which people open the page."""
    host, port = server.server_address[:2]
    host = host.decode() if isinstance(host, bytes | bytearray) else str(host)
    hosts = [host]
    if ipaddress.ip_address(host).is_unspecified:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("10.255.255.255", 1))  # sends nothing; it chooses the address that others see
                hosts = [probe.getsockname()[0]]
            except OSError:
                hosts = ["127.0.0.1"]
    return [f"http://{f'[{name}]' if ':' in name else name}:{port}{server.root}" for name in hosts]


def serve(asked: Asked, host: str, port: int, progress: Progress = iter) -> None:
    """Serve until Ctrl-C; then say what is there.  Raises PrflError where a video or the port is not to be had."""
    with LabelServer(asked, host, port, progress) as server:
        console.say(f"open in a browser: {', '.join(addresses(server))}")
        if server.root != "/":
            console.say("everybody on the network who has this whole address can answer and see the videos")
        console.say(f"answers are written to {asked.folder} as they come; Ctrl-C ends")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass
    counts = server.collection.counts()
    for file, count in counts.items():
        console.say(f"{file}: {count} pairs")
    if counts:
        console.say(f"one manifest of all: prfl labels merge {asked.folder / 'preferences-*.jsonl'}")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError as error:
        fix = "127.0.0.1 for this machine alone, 0.0.0.0 for all of its network"
        raise PrflError(f"'{host}' is no address", where="--host", fix=fix) from error
