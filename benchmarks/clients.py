"""Clients that load a server over HTTP: each sends its next request when the last is answered.

While the clock runs they only store bytes and moments, to leave the machine to the server; answers
are parsed afterwards. No mlx.
"""

import http.client
import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PIECE = 2**16
MISSHAPEN = (ValueError, LookupError, TypeError, AttributeError)  # JSON of another shape


class Address(NamedTuple):
    """Where a server listens."""

    host: str
    port: int


@dataclass
class Received:
    """A response as bytes, each piece with its moment (``time.perf_counter``)."""

    began: float
    ended: float = 0.0
    status: int | None = None
    content_type: str = ""
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    problem: str | None = None


@dataclass(frozen=True)
class ClientAnswer:
    """An answer as the client sees it; seconds count from before it opened its connection.

    ``error`` says what is wrong: no answer in time, a status other than 200, an error within the
    stream, no end. ``tokens`` is the number in the server's usage.
    """

    status: int | None
    seconds: float
    first_text: float | None
    text: str
    tokens: int
    finish: str | None
    steering: Mapping[str, object] | None
    error: str | None


@dataclass(frozen=True)
class Drive:
    """The answers in the order of their requests; wall seconds and the clients' CPU seconds."""

    answers: list[ClientAnswer]
    seconds: float
    cpu_seconds: float


def ask(address: Address, path: str, body: Mapping[str, object], timeout: float) -> Received:
    """Send a request over a new connection and keep what comes until the connection ends.

    Each request has its own connection, because mlx_lm.server supports nothing else. After
    ``timeout`` seconds the connection is closed. Raises nothing; ``problem`` says what went wrong.
    """
    payload = json.dumps(body).encode()
    kept = Received(began=time.perf_counter())
    connection = http.client.HTTPConnection(*address, timeout=timeout)
    try:
        headers = {"Content-Type": "application/json", "Connection": "close"}
        connection.request("POST", path, payload, headers)
        response = connection.getresponse()
        kept.status, kept.content_type = response.status, response.getheader("Content-Type", "")
        while piece := response.read1(PIECE):
            now = time.perf_counter()
            kept.pieces.append((now, piece))
            if now - kept.began > timeout:
                raise TimeoutError
    except TimeoutError:
        kept.problem = f"no end after {timeout:g} s"
    except (OSError, http.client.HTTPException) as error:
        kept.problem = f"{type(error).__name__}: {error}"
    finally:
        connection.close()
    kept.ended = time.perf_counter()
    return kept


def get(address: Address, path: str, timeout: float = 10.0) -> dict:
    """Return the JSON object at ``path``.

    Raises:
        OSError: no answer; ``RuntimeError``: a status other than 200, or no JSON.
    """
    connection = http.client.HTTPConnection(*address, timeout=timeout)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        said = response.read()
    except http.client.HTTPException as error:
        raise ConnectionError(f"GET {path}: {error!r}") from error
    finally:
        connection.close()
    if response.status != 200:
        raise RuntimeError(f"GET {path}: status {response.status}, expected 200")
    try:
        return json.loads(said)
    except ValueError as error:
        raise RuntimeError(f"GET {path}: no JSON: {said[:80]!r}") from error


def drive(
    address: Address,
    path: str,
    bodies: Sequence[Mapping[str, object]],
    *,
    clients: int,
    timeout: float,
) -> Drive:
    """Send all requests, ``clients`` of them at any time, and wait for the answers."""
    received: list[Received | None] = [None] * len(bodies)
    todo, start = iter(range(len(bodies))), threading.Barrier(clients + 1)
    lock = threading.Lock()

    def client() -> None:
        start.wait()
        while True:
            with lock:
                number = next(todo, None)
            if number is None:
                return
            received[number] = ask(address, path, bodies[number], timeout)

    threads = [threading.Thread(target=client, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    start.wait()
    began, worked = time.perf_counter(), time.process_time()
    for thread in threads:
        thread.join()
    seconds, worked = time.perf_counter() - began, time.process_time() - worked
    return Drive([read(one) for one in received if one is not None], seconds, worked)


def read(received: Received) -> ClientAnswer:
    """Parse an answer, streamed or not."""
    whole = b"".join(piece for _, piece in received.pieces)
    if received.problem or received.status != 200:
        said = received.problem or f"status {received.status}: {_message(whole)}"
        return _answer(received, error=said)
    if "text/event-stream" in received.content_type:
        return _read_stream(received)
    try:
        said = json.loads(whole)
        text, finish = _text(said), said["choices"][0]["finish_reason"]
        tokens = said["usage"]["completion_tokens"]
    except MISSHAPEN as error:
        return _answer(received, error=f"no answer in OpenAI's shape: {error!r}")
    seconds = received.ended - received.began
    found = {"tokens": tokens, "finish": finish, "steering": said.get("steering")}
    return _answer(received, text=text, first_text=seconds, **found)


def _read_stream(received: Received) -> ClientAnswer:
    """Parse the events of a stream; the moment of an event is that of its last byte."""
    text, rest, done, found = "", b"", False, {"error": None}
    for moment, piece in received.pieces:
        *complete, rest = (rest + piece).split(b"\n")
        for line in complete:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                done = True
                continue
            try:
                event = json.loads(data)
                new = _text(event)
                _note(event, found)
            except MISSHAPEN as error:
                found["error"] = f"an event that is not OpenAI's: {error!r}"
                continue
            if new and "first_text" not in found:
                found["first_text"] = moment - received.began
            text += new
    if found["error"] is None:
        if not done:
            found["error"] = "the stream ended without [DONE]"
        elif "finish" not in found or "tokens" not in found:
            found["error"] = "a stream without finish_reason or usage"
    return _answer(received, text=text, **found)


def _note(event: Mapping[str, object], found: dict) -> None:
    """Keep an event's error, steering, usage and finish reason."""
    if "error" in event:
        found["error"] = f"in the stream: {_message(json.dumps(event).encode())}"
    if event.get("steering"):
        found["steering"] = event["steering"]
    if event.get("usage"):
        found["tokens"] = event["usage"]["completion_tokens"]
    for choice in event.get("choices", []):
        if choice.get("finish_reason"):
            found["finish"] = choice["finish_reason"]


def _text(said: Mapping[str, object]) -> str:
    """Return the text of an answer or event of either endpoint."""
    text = ""
    for choice in said.get("choices", []):
        where = choice.get("delta") or choice.get("message") or {}
        text += where.get("content") or choice.get("text") or ""
    return text


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except MISSHAPEN:
        return body[:200].decode("utf-8", "replace").strip()


def _answer(
    received: Received,
    *,
    text: str = "",
    tokens: int = 0,
    finish: str | None = None,
    first_text: float | None = None,
    steering: Mapping[str, object] | None = None,
    error: str | None = None,
) -> ClientAnswer:
    seconds = received.ended - received.began
    return ClientAnswer(received.status, seconds, first_text, text, tokens, finish, steering, error)
