"""Rewriting by an OpenAI-compatible endpoint, with the standard library alone.

Several requests run at once. What may pass is tried again after a pause that doubles: 408,
409, 429, 5xx, time-outs, broken connections, answers that are no JSON. Anything else is refused
with the server's own message. Redirects are not followed: they would carry the key elsewhere.
"""

import contextlib
import email.utils
import hashlib
import http.client
import json
import math
import queue
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

from ...errors import InputError
from ...generation.answer import split_steps
from .draft import Draft, Rewrite, whole_characters
from .instruction import SYSTEM, VERSION, read_answer, request
from .transport import Http, Https, NoRedirect

KEY = "OPENAI_API_KEY"
_PASSING = (408, 409, 425, 429)
_LARGEST_ANSWER = 8 * 2**20  # bytes
_LONGEST_PAUSE = 600.0  # seconds; a server that asks for more has run out of something
_DAY = 86400.0  # seconds
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Limits:
    """How an endpoint is asked. ``timeout`` and ``pause`` in seconds.

    ``timeout`` is for the whole answer, however slowly it comes. ``pause`` comes before the
    first repetition and doubles with each; ``per_minute`` 0 is no limit.

    Raises:
        InputError: a value that is not finite or of no use.
    """

    timeout: float = 120.0
    attempts: int = 6
    pause: float = 1.0
    at_once: int = 4
    per_minute: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.timeout <= _DAY:
            raise InputError(
                f"a time-out of {self.timeout} s; expected more than 0, a day at most."
            )
        if not 0 <= self.pause <= _DAY:
            raise InputError(f"a pause of {self.pause} s; expected 0 to a day.")
        if min(self.attempts, self.at_once) < 1:
            raise InputError("expected at least one attempt and one request at once.")
        if self.per_minute and not 60 / _DAY <= self.per_minute < math.inf:
            raise InputError(
                f"{self.per_minute} requests per minute; expected 0 for no limit, or at least "
                "one a day."
            )


class OpenAIRewriter:
    """Asks ``URL/chat/completions`` for each draft.

    Args:
        address: ``URL#model``, such as ``http://127.0.0.1:8080/v1#qwen``.
        key: sent as a bearer token where there is one; never written or printed.
        fields: more fields of the request, such as ``{"temperature": 0}``; of these, files and
            messages have the names and a digest only.
        warn: called with what the user should know.

    Raises:
        InputError: an address of another form, or a key that cannot be sent.
    """

    def __init__(
        self,
        address: str,
        *,
        key: str | None = None,
        limits: Limits = Limits(),
        fields: Mapping[str, object] | None = None,
        warn: Callable[[str], None] = lambda _: None,
    ):
        self._url, self._model, host = _parse(address)
        self._key, self._limits, self._fields = (key or "").strip(), limits, dict(fields or {})
        if not (self._key.isascii() and self._key.isprintable()):
            raise InputError(f"{KEY} holds characters that no key has; set it again.")
        if self._key and host not in _LOOPBACK and self._url.startswith("http:"):
            warn(f"{KEY} is sent to {host} over plain http; everyone on the way can read it.")
        self._host = host
        shown, _, query = self._url.partition("?")
        self._shown = f"openai:{shown}#{self._model}"
        self._secrets = {self._key: f"[{KEY}]", query: "[query]"}
        name = f"{self._shown} instruction {VERSION} {_described(self._fields)}"
        self.name = whole_characters(name.strip())
        self._gate = _Gate(limits.per_minute)
        handlers: list[urllib.request.BaseHandler] = [NoRedirect(), Http(), Https()]
        if host in _LOOPBACK:
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    def rewrite(self, drafts: Sequence[Draft]) -> Iterator[tuple[int, Rewrite]]:
        """Yield rewrites as they come; one is empty where the model declined.

        Raises:
            InputError: the endpoint refused, or still failed at the last attempt; what others
                had been asked for meanwhile is yielded before.
        """
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(drafts)):
            waiting.put(index)
        done: queue.SimpleQueue[tuple[int | None, object, threading.Event]] = queue.SimpleQueue()
        ending = threading.Event()
        count = min(self._limits.at_once, len(drafts))
        for _ in range(count):
            # daemons: an interrupted run does not wait for a server that hangs
            threading.Thread(
                target=self._work, args=(drafts, waiting, done, ending), daemon=True
            ).start()
        failure: InputError | None = None
        try:
            while count:
                index, result, taken = done.get()
                if index is None:
                    count -= 1
                    failure = failure or result  # type: ignore[assignment]
                else:
                    yield index, result  # type: ignore[misc]
                    taken.set()
        finally:
            ending.set()
        if failure:
            raise failure

    def _work(self, drafts, waiting, done, ending: threading.Event) -> None:
        end: BaseException | None = None
        try:
            while not ending.is_set():
                index = waiting.get_nowait()
                rewrite = self._ask(drafts[index], ending)
                if rewrite is not None:
                    taken = threading.Event()
                    done.put((index, rewrite, taken))
                    while not (taken.wait(0.2) or ending.is_set()):
                        pass  # the caller keeps what was paid for before more is asked for
        except queue.Empty:
            pass
        except BaseException as error:  # handed over to the thread that reads
            end = error
            ending.set()
        finally:
            done.put((None, end, ending))

    def _ask(self, draft: Draft, ending: threading.Event) -> Rewrite | None:
        """Return the rewrite, or ``None`` if the end came before it was asked for."""
        body = json.dumps({
            "model": self._model,
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": request(draft, len(split_steps(draft.response)))},
            ],
            **self._fields,
        }).encode()  # fmt: skip
        for attempt in range(1, self._limits.attempts + 1):
            if not self._gate.wait(ending):
                return None
            problem, pause = "", None
            try:
                return _read(self._post(body))
            except urllib.error.HTTPError as error:
                problem, pause = self._tell(error), _retry_after(error.headers)
                if error.code not in _PASSING and error.code < 500:
                    raise InputError(self._refusal(error.code, problem)) from error
            except (OSError, http.client.HTTPException, _Garbage) as error:
                problem = self._hide(str(getattr(error, "reason", None) or error) or repr(error))
            if attempt == self._limits.attempts:
                break
            if pause is not None and pause > _LONGEST_PAUSE:
                problem += f" (it asks to wait for {pause:.0f} s)"
                break
            self._gate.pause(self._backoff(attempt) if pause is None else pause)
        raise InputError(
            f"{self._host}: no rewrite after {attempt} attempts; the last one: {problem}. What is "
            "done is kept: start the same command again later, or with a lower --requests-per-minute."
        )

    def _backoff(self, attempt: int) -> float:
        return min(60.0, self._limits.pause * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        asked = urllib.request.Request(self._url, body, headers)
        with self._opener.open(asked, timeout=self._limits.timeout) as answer:
            data = answer.read(_LARGEST_ANSWER + 1)
        if len(data) > _LARGEST_ANSWER:
            raise _Garbage(f"an answer of more than {_LARGEST_ANSWER} bytes")
        return data

    def _tell(self, error: urllib.error.HTTPError) -> str:
        """Return what the server says, in one line."""
        text = ""
        with contextlib.suppress(OSError, http.client.HTTPException):
            text = error.read(2**16).decode("utf-8", "replace").strip()
        with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
            said = json.loads(text)
            said = said.get("error", said.get("message", said.get("detail", text)))
            text = said.get("message", text) if isinstance(said, dict) else str(said)
        shown = " ".join(str(text).split())[:300]
        return self._hide(f"{error.code} {error.reason}" + (f": {shown}" if shown else ""))

    def _refusal(self, code: int, problem: str) -> str:
        remedy = {
            401: f"Set the right key in the environment: export {KEY}=...",
            403: f"The key in {KEY} may not use this model.",
            404: f"Check the address and the model: {self._shown}.",
        }.get(code, "Check the address, the model and --rewriter-fields.")
        return f"{self._host} refuses: {problem}. {remedy}"

    def _hide(self, text: str) -> str:
        for secret, shown in self._secrets.items():
            text = text.replace(secret, shown) if secret else text
        return whole_characters(text)


class _Garbage(Exception):
    """An answer that is no chat completion."""


class _Gate:
    """When the next request may leave, for all threads together."""

    def __init__(self, per_minute: float):
        self._gap = 60.0 / per_minute if per_minute > 0 else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self, ending: threading.Event) -> bool:
        """Wait for our turn; ``False`` if the end came first."""
        while True:
            with self._lock:
                now = time.monotonic()
                if now >= self._next:
                    self._next = now + self._gap
                    return not ending.is_set()
                rest = self._next - now
            if ending.wait(rest):
                return False

    def pause(self, seconds: float) -> None:
        """Let nobody ask for so long: a busy server is busy for all of us."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


def _parse(address: str) -> tuple[str, str, str]:
    url, _, model = address.partition("#")
    shown = url.partition("?")[0]  # a key may stand in the query
    try:
        parts = urlsplit(url)
        host, _port = parts.hostname, parts.port
    except ValueError as error:
        raise InputError(f"openai:{shown}: no valid URL ({error}).") from error
    if parts.username is not None or parts.password is not None:
        raise InputError(f"openai: leave user and password out of the URL; a key goes into {KEY}.")
    if not all("!" <= character <= "~" for character in url):
        raise InputError(f"openai:{shown!r}: no valid URL; it has a blank or no ASCII in it.")
    if parts.scheme not in ("http", "https") or not host or not model:
        raise InputError(
            f"openai:{shown}: expected openai:URL#model, such as "
            "openai:http://127.0.0.1:8080/v1#qwen."
        )
    path = parts.path.rstrip("/")
    path = path if path.endswith("/chat/completions") else f"{path}/chat/completions"
    return urlunsplit(parts._replace(path=path)), model, host


def _described(fields: Mapping[str, object]) -> str:
    """Return the names and a digest of the fields: a value may be a secret."""
    if not fields:
        return ""
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]
    return f"fields {','.join(sorted(fields))} {digest}"


def _read(data: bytes) -> Rewrite:
    try:
        choice = json.loads(data)["choices"][0]
        text, reason = choice["message"].get("content"), choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        shown = " ".join(data[:200].decode("utf-8", "replace").split())
        raise _Garbage(f"no chat completion: {shown!r}") from error
    if text is not None and not isinstance(text, str):
        raise _Garbage(f"the content is {type(text).__name__}, expected a text")
    return Rewrite(read_answer(text or ""), reason == "length")


def _retry_after(headers) -> float | None:
    """Return the seconds of a ``Retry-After`` header, which may also be a date."""
    value = headers.get("Retry-After") if headers else None
    if not value:
        return None
    with contextlib.suppress(ValueError):
        return max(0.0, float(value))
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return None
