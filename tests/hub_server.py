"""A small Hugging Face Hub on this machine: what ``huggingface_hub`` asks for, and its faults.

It serves folders as repositories, large files the way the Hub does: by a redirect to another
origin. Not here: Xet, tokens, more than one revision, pages of a file list.
"""

import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = ".safetensors"  # kept in LFS


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    start: int  # of the Range header; 0 without one


@dataclass
class Faults:
    """What is wrong with the server; a test sets it, at any time."""

    refuse: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)  # by repository
    status: int | None = None  # to every request
    silent: bool = False  # takes requests and never answers
    stop_at: int | None = None  # no byte of a large file arrives from here on, as the connection
    # ... "close"s, "reset"s or "hang"s; at the end it heals
    breaks: Iterator[str] = field(default_factory=lambda: repeat("close"))
    sizes: dict[str, int] = field(default_factory=dict)  # by name: added to what it tells of a file


class HubServer:
    """Serve ``folders`` on 127.0.0.1 by repository id, ``datasets/Org/Name`` for a data set.

    A context manager.
    """

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders
        self.faults = Faults()
        self.requests: list[Request] = []
        self.stopping = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self  # type: ignore[attr-defined]
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "HubServer":
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the port: who asks now finds nobody there."""
        if not self.stopping.is_set():
            self.stopping.set()
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    def commit(self, repo: str) -> str:
        """Return the only commit of a repository, branch ``main``."""
        return hashlib.sha1(repo.encode()).hexdigest()

    def gets(self, text: str) -> list[Request]:
        """Return the GET requests so far whose path contains ``text``."""
        return [r for r in list(self.requests) if r.method == "GET" and text in r.path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        return None

    @property
    def hub(self) -> HubServer:
        return self.server.hub  # type: ignore[attr-defined]

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        self.start = int(start[1]) if start else 0
        self.hub.requests.append(Request(self.command, path, self.start))
        if self.hub.faults.silent:
            self.hub.stopping.wait()
            self.close_connection = True
        elif self.hub.faults.status:
            self._answer(self.hub.faults.status)
        elif match := re.fullmatch(r"/cdn/([0-9a-f]{64})", path):
            self._cdn(match[1])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            self._api(*match.groups())
        elif match := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(*match.groups())
        else:
            self._answer(404)

    do_HEAD = do_GET

    def _api(self, repo: str, what: str | None, revision: str | None) -> None:
        folder = self._open(repo, revision)
        if folder is None:
            return
        if what == "tree":
            document = [_entry(file) for file in sorted(folder.iterdir())]
        else:
            document = {"id": repo, "modelId": repo, "sha": self.hub.commit(repo), "siblings": []}
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(document).encode())

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        folder = self._open(repo, revision)
        if folder is None:
            return
        commit = {"X-Repo-Commit": self.hub.commit(repo)}
        file = folder / name
        if not file.is_file():
            self._answer(404, commit | {"X-Error-Code": "EntryNotFound"})
        elif name.endswith(LARGE):
            sha256, size = _sha256(file), file.stat().st_size + self.hub.faults.sizes.get(name, 0)
            self._answer(302, commit | {
                "X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(size),
                "Location": f"http://localhost:{self.hub.port}/cdn/{sha256}",
            })  # fmt: skip
        else:
            content = file.read_bytes()
            self._answer(200, commit | {"ETag": f'"{_git_oid(content)}"'}, content)

    def _open(self, repo: str, revision: str | None) -> Path | None:
        """Return a repository's folder, or answer why not."""
        if repo in self.hub.faults.refuse:
            self._answer(*self.hub.faults.refuse[repo])
        elif repo not in self.hub.folders:
            self._answer(401, {"X-Error-Code": "RepoNotFound"})  # so the Hub, to strangers
        elif revision not in (None, "main", self.hub.commit(repo)):
            self._answer(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            return self.hub.folders[repo]
        return None

    def _cdn(self, sha256: str) -> None:
        files = [f for folder in self.hub.folders.values() for f in folder.glob(f"*{LARGE}")]
        content = next(file.read_bytes() for file in files if _sha256(file) == sha256)
        faults = self.hub.faults
        how = next(faults.breaks, None) if faults.stop_at else None
        if how is None:
            self._answer(200, {}, content)
            return
        if self.start < faults.stop_at:
            self._answer(200, {}, content, end=faults.stop_at)
        self._break(how)

    def _break(self, how: str) -> None:
        self.wfile.flush()
        if how == "hang":
            self.hub.stopping.wait()
        elif how == "reset":  # lingering for no time sends RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        self.close_connection = True

    def _answer(
        self, status: int, headers: dict[str, str] | None = None, content: bytes = b"",
        end: int | None = None,
    ) -> None:  # fmt: skip
        """Send ``content`` from the start that was asked for, up to ``end``."""
        if self.start and status == 200:
            status = 206
            span = f"bytes {self.start}-{len(content) - 1}/{len(content)}"
            headers = {**(headers or {}), "Content-Range": span}
        body = content[self.start :] if status == 206 else content
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body if end is None else body[: end - self.start])


def _entry(file: Path) -> dict[str, object]:
    size = file.stat().st_size
    entry = {"type": "file", "path": file.name, "size": size, "oid": _git_oid(file.read_bytes())}
    if file.name.endswith(LARGE):
        entry["lfs"] = {"oid": _sha256(file), "size": size, "pointerSize": 134}
    return entry


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
