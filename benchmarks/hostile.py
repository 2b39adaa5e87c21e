"""Requests that no client should send, and clients that leave in the middle. No mlx."""

import contextlib
import json
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass

from .clients import CHAT, Address

PATIENCE = 2.0  # seconds that half a request is held open
PIECE = 2**16
REFUSED = range(400, 500)


@dataclass(frozen=True)
class Bad:
    """Bytes to send, and what may come back: a status, or nothing where ``silent``.

    ``silent``: the server may close the connection without a word, as HTTP allows for what is no
    HTTP. ``unfinished``: half a request; whoever sends it goes away after ``PATIENCE``.
    ``endless``: what to repeat behind it until the server has had enough.
    """

    name: str
    sent: bytes
    statuses: range | tuple[int, ...] = REFUSED
    silent: bool = False
    unfinished: bool = False
    endless: bytes = b""


def post(body: bytes, *headers: str, path: str = CHAT, length: int | None = None) -> bytes:
    """Return the bytes of a request."""
    lines = [
        f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json",
        f"Content-Length: {len(body) if length is None else length}", "Connection: close", *headers,
    ]  # fmt: skip
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def bad_requests(model: str) -> tuple[Bad, ...]:
    """Return one of each kind; ``model`` is the name of the server's model."""
    good: dict[str, object] = {
        "model": model, "messages": [{"role": "user", "content": "Good day."}], "max_tokens": 1,
    }  # fmt: skip

    def changed(**fields: object) -> bytes:
        return post(json.dumps({**good, **fields}).encode())

    plain = json.dumps(good).encode()
    long = [{"role": "user", "content": "one and two and three " * 20_000}]
    return (
        Bad("malformed JSON", post(plain[:-1]), (400,)),
        Bad("not UTF-8", post(b'{"model": "\xff\xfe"}'), (400,)),
        Bad("a list", post(b"[1, 2]"), (400, 422)),
        Bad("deep JSON", post(b'{"messages":' + b"[" * 50_000), (400,)),
        Bad("no body", post(b""), (400,)),
        Bad("messages of a wrong type", changed(messages=5), (400, 422)),
        Bad("max_tokens of a wrong type", changed(max_tokens="many"), (400, 422)),
        Bad("max_tokens below 1", changed(max_tokens=-1), (400, 422)),
        Bad("temperature not finite", post(plain.replace(b'"max_tokens": 1', b'"temperature": NaN'))),
        Bad("strength of a wrong type", changed(steering={"strength": "much"}), (400, 422)),
        Bad("strength out of float32", changed(steering={"strength": 1e300}), (400, 422)),
        Bad("unknown layer", changed(steering={"strength": 1.0, "layer": 999}), (400, 422)),
        Bad("unknown vector", changed(steering={"vector": "nobody", "strength": 1.0}), (400, 404)),
        Bad("vector by path", changed(steering={"vector": "../../etc/passwd", "strength": 1.0}), (400, 404)),
        Bad("unknown model", changed(model="nobody"), (404,)),
        Bad("unknown vector in the model's name", changed(model=f"{model}@nobody=1"), (400, 404)),
        Bad("prompt longer than the context", changed(messages=long), (400, 413)),
        Bad("body too large, as it says", post(b"{", length=2**40), (400, 413)),
        Bad("body too large, in chunks", _chunked(), (400, 413), silent=True,
            endless=b"10000\r\n" + b" " * PIECE + b"\r\n"),
        Bad("negative length", post(b"{}", length=-1), silent=True),
        Bad("another media type", post(plain).replace(b"application/json", b"text/plain"), (400, 415)),
        Bad("another host", post(plain).replace(b"Host: 127.0.0.1", b"Host: evil.example"), (403, 421)),
        Bad("another origin", post(plain, "Origin: http://evil.example"), (403,)),
        Bad("huge header", post(plain, "X-Long: " + "x" * 300_000), silent=True),
        Bad("very many headers", post(plain, *(f"X-{i}: {i}" for i in range(20_000))), silent=True),
        Bad("another method", post(plain).replace(b"POST", b"PUT", 1), (405,)),
        Bad("unknown path", post(plain, path="/v1/nothing"), (404,)),
        Bad("path upwards", b"GET /page/../../wire.py HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n", (400, 404)),
        Bad("garbage", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9 + b"\r\n\r\n", silent=True),
        Bad("no HTTP version", b"POST\r\n\r\n", silent=True),
        Bad("half a header", post(plain)[:40], silent=True, unfinished=True),
        Bad("half a body", post(plain, length=len(plain) + 99), silent=True, unfinished=True),
    )  # fmt: skip


def _chunked() -> bytes:
    head = post(b"").split(b"\r\n\r\n")[0]
    return head.replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"\r\n\r\n"


def send_bad(address: Address, bad: Bad, timeout: float) -> int | None:
    """Send it and return the status that came back, ``None`` for none.

    Raises:
        TimeoutError: neither an answer nor the end of the connection in time.
    """
    answer = b""
    wait = PATIENCE if bad.unfinished else timeout
    with socket.create_connection(address, timeout=wait) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(bad.sent)
            if bad.endless:
                _flood(connection, bad.endless, timeout)
        try:
            while b"\r\n" not in answer and (piece := connection.recv(PIECE)):
                answer += piece
        except ConnectionResetError:
            pass
        except TimeoutError:
            if not bad.unfinished:
                raise
    words = answer.split(None, 2)
    known = len(words) > 1 and words[0].startswith(b"HTTP/") and words[1].isdigit()
    return int(words[1]) if known else None


def _flood(connection: socket.socket, piece: bytes, timeout: float) -> None:
    """Send until the server says something or closes; 256 MiB at most.

    Raises:
        TimeoutError: it takes neither more bytes nor leave.
    """
    until = time.perf_counter() + timeout
    for _ in range(2**28 // len(piece)):
        connection.sendall(piece)
        connection.settimeout(0.0)
        try:
            said = connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            said = None
        finally:
            connection.settimeout(timeout)
        if said is not None:
            return
        if time.perf_counter() > until:
            raise TimeoutError


def leave_early(
    address: Address, path: str, body: Mapping[str, object], *, pieces: int, rudely: bool, timeout: float
) -> None:  # fmt: skip
    """Send a good request and go away after so many pieces of the answer.

    Without pieces nothing is read, and the row may not even have begun. ``rudely`` resets the
    connection instead of closing it.

    Raises:
        OSError: the server did not take the request; ``TimeoutError`` if it said nothing.
    """
    with socket.create_connection(address, timeout=timeout) as connection:
        connection.sendall(post(json.dumps(body).encode(), path=path))
        for _ in range(pieces):
            if not connection.recv(PIECE):
                break
        if rudely:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
