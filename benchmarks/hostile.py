"""Requests that a server must refuse, and clients that leave in the middle. No mlx."""

import contextlib
import json
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass

from clients import CHAT, Address

PATIENCE = 2.0  # seconds that half a request is held open
PIECE = 2**16
REFUSED = range(400, 500)
INVALID = (400, 404, 413, 422)  # well-formed HTTP with a body that is refused


@dataclass(frozen=True)
class Bad:
    """Bytes to send, and the statuses that may come back.

    ``silent``: the server may also close the connection without an answer, as HTTP allows for
    malformed requests. ``unfinished``: half a request; the client closes after ``PATIENCE``
    seconds. ``endless``: repeated behind ``sent`` until the server answers or closes.
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
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"Content-Length: {len(body) if length is None else length}",
        "Connection: close",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def bad_requests(model: str) -> tuple[Bad, ...]:
    """Return one of each kind; ``model`` is the name of the server's model."""
    message = {"role": "user", "content": "Good day."}
    good: dict[str, object] = {"model": model, "messages": [message], "max_tokens": 1}
    plain = json.dumps(good).encode()
    request = post(plain)
    long = [{"role": "user", "content": "one and two and three " * 20_000}]
    fields: dict[str, dict[str, object]] = {
        "messages of a wrong type": {"messages": 5},
        "max_tokens of a wrong type": {"max_tokens": "many"},
        "max_tokens below 1": {"max_tokens": -2},
        "strength of a wrong type": {"steering": {"strength": "much"}},
        "strength out of float32": {"steering": {"strength": 1e300}},
        "unknown layer": {"steering": {"strength": 1.0, "layer": 999}},
        "unknown vector": {"steering": {"vector": "unknown", "strength": 1.0}},
        "vector by path": {"steering": {"vector": "../../etc/passwd", "strength": 1.0}},
        "unknown model": {"model": "unknown"},
        "unknown vector in the model's name": {"model": f"{model}@unknown=1"},
        "prompt longer than the context": {"messages": long},
    }
    up = b"GET /page/../../wire.py HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    garbage = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9 + b"\r\n\r\n"
    many = [f"X-{i}: {i}" for i in range(20_000)]
    chunk = b"10000\r\n" + b" " * PIECE + b"\r\n"
    return (
        *(
            Bad(name, post(json.dumps({**good, **changed}).encode()), INVALID)
            for name, changed in fields.items()
        ),
        Bad("malformed JSON", post(plain[:-1]), (400,)),
        Bad("not UTF-8", post(b'{"model": "\xff\xfe"}'), (400,)),
        Bad("a list", post(b"[1, 2]"), INVALID),
        Bad("deep JSON", post(b'{"messages":' + b"[" * 50_000), (400,)),
        Bad("no body", post(b""), (400,)),
        Bad("a number that is not finite", post(plain.replace(b": 1}", b": NaN}")), INVALID),
        Bad("body too large, as it says", post(b"{", length=2**40), (400, 413)),
        Bad("body too large, in chunks", _chunked(), (400, 413), silent=True, endless=chunk),
        Bad("negative length", post(b"{}", length=-1), silent=True),
        Bad("another media type", request.replace(b"application/json", b"text/plain"), (400, 415)),
        Bad("another host", request.replace(b"127.0.0.1", b"evil.example"), (403, 421)),
        Bad("another origin", post(plain, "Origin: http://evil.example"), (403,)),
        Bad("huge header", post(plain, "X-Long: " + "x" * 300_000), silent=True),
        Bad("very many headers", post(plain, *many), silent=True),
        Bad("another method", request.replace(b"POST", b"PUT", 1), (405,)),
        Bad("unknown path", post(plain, path="/v1/nothing"), (404,)),
        Bad("path upwards", up, (400, 404)),
        Bad("garbage", garbage, silent=True),
        Bad("no HTTP version", b"POST\r\n\r\n", silent=True),
        Bad("half a header", request[:40], silent=True, unfinished=True),
        Bad("half a body", post(plain, length=len(plain) + 99), silent=True, unfinished=True),
    )


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
    """Send until the server answers or closes; 256 MiB at most.

    Raises:
        TimeoutError: the server takes no more bytes and does not answer.
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
    address: Address,
    path: str,
    body: Mapping[str, object],
    *,
    pieces: int,
    rudely: bool,
    timeout: float,
) -> None:
    """Send a good request and leave after ``pieces`` pieces of the answer.

    With 0 pieces nothing is read, and the row may not have begun. ``rudely`` resets the connection
    instead of closing it.

    Raises:
        OSError: the server did not take the request; ``TimeoutError``: it sent nothing.
    """
    with socket.create_connection(address, timeout=timeout) as connection:
        connection.sendall(post(json.dumps(body).encode(), path=path))
        for _ in range(pieces):
            if not connection.recv(PIECE):
                break
        if rudely:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
