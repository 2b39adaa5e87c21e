"""Rewriting by an OpenAI-compatible endpoint, through the ``openai`` client (extra ``rewrite``).

Several requests run at once. The client tries again after 408, 409, 429, 5xx, time-outs and broken
connections, with a pause that doubles or that the endpoint names. Anything else ends the run with
the endpoint's message.
"""

import hashlib
import json
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from ...errors import InputError, install_command
from ...files import whole_characters
from ...text import one_line
from . import INSTRUCTION, SYSTEM, Original, Rewrite, Rewriter, read_answer, request

try:
    import openai
except ImportError as error:
    raise InputError(
        f"an endpoint as rewriter needs the package openai: {install_command('rewrite')}"
    ) from error

KEY = "OPENAI_API_KEY"
_DAY = 86400.0  # seconds
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PATH = "/chat/completions"


class OpenAIRewriter(Rewriter):
    """Asks ``URL/chat/completions`` for each rewrite.

    Args:
        address: ``URL#model``, such as ``http://127.0.0.1:8080/v1#qwen``.
        key: sent as a bearer token if given; never written or printed.
        fields: more fields of the request, such as ``{"temperature": 0}``. Only their names and a
            digest appear in files and messages.
        timeout: seconds without a byte from the endpoint until a request is given up.
        attempts: how often a request is sent at most.
        at_once: how many requests run at the same time.
        per_minute: how many requests begin in a minute at most; 0 is no limit.
        warn: called with a warning for the user.

    Raises:
        InputError: a bad address, a key that cannot be sent, or a limit out of range.
    """

    def __init__(
        self,
        address: str,
        *,
        key: str | None = None,
        fields: Mapping[str, object] | None = None,
        timeout: float = 120.0,
        attempts: int = 6,
        at_once: int = 4,
        per_minute: float = 0.0,
        warn: Callable[[str], None] = lambda _: None,
    ):
        if not 0 < timeout <= _DAY:
            raise InputError(f"a time-out of {timeout} s; expected more than 0, a day at most.")
        if min(attempts, at_once) < 1:
            raise InputError(f"{attempts} attempts, {at_once} at once; expected 1 or more of each.")
        if per_minute and not 60 / _DAY <= per_minute < math.inf:
            raise InputError(
                f"{per_minute} requests per minute; expected 0 for no limit, or at least one a day."
            )
        url, query, self._host, self._model = _parse(address)
        key = (key or "").strip()
        if not (key.isascii() and key.isprintable()):
            raise InputError(f"{KEY} holds characters that no key has; set it again.")
        if key and self._host not in _LOOPBACK and url.startswith("http:"):
            warn(f"{KEY} is sent to {self._host} over plain http; everyone on the way can read it.")
        self._fields, self._attempts, self._at_once = dict(fields or {}), attempts, at_once
        self._secrets = {key: f"[{KEY}]", query: "[query]"}
        self._shown = f"openai:{url}#{self._model}"
        name = f"{self._shown} instruction {INSTRUCTION} {_described(self._fields)}"
        self.name = whole_characters(name.strip())
        self._pace = _Pace(per_minute)
        self._headers = {} if key else {"Authorization": openai.Omit()}
        self._client = openai.OpenAI(
            base_url=url,
            api_key=key or "none",  # not sent: _headers
            max_retries=attempts - 1,
            timeout=timeout,
            default_query=dict(parse_qsl(query, keep_blank_values=True)),
            # A redirect would send problems and query elsewhere. No proxy reaches loopback.
            http_client=openai.DefaultHttpxClient(
                follow_redirects=False, trust_env=self._host not in _LOOPBACK
            ),
        )

    def rewrite(self, originals: Sequence[Original]) -> Iterator[tuple[int, Rewrite]]:
        """Yield rewrites as they come; empty where the model gave no text.

        Raises:
            InputError: the endpoint refused, or failed at the last attempt. Rewrites of requests
                that were under way are yielded first.
        """
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(originals)):
            waiting.put(index)
        done: queue.SimpleQueue[tuple[int, Rewrite] | Exception | None] = queue.SimpleQueue()
        ending = threading.Event()

        def work() -> None:
            try:
                while not ending.is_set():
                    index = waiting.get_nowait()
                    if self._pace.wait(ending):
                        done.put((index, self._ask(originals[index])))
            except queue.Empty:
                pass
            except Exception as error:  # raised in the caller's thread
                ending.set()
                done.put(error)
            finally:
                done.put(None)

        running = min(self._at_once, len(originals))
        for _ in range(running):
            # daemon threads: an interrupted run does not wait for an endpoint that hangs
            threading.Thread(target=work, daemon=True).start()
        failure: Exception | None = None
        try:
            while running:
                result = done.get()
                if result is None:
                    running -= 1
                elif isinstance(result, Exception):
                    failure = failure or result
                else:
                    yield result
        finally:
            ending.set()
        if failure:
            raise failure

    def _ask(self, original: Original) -> Rewrite:
        try:
            completion = self._client.chat.completions.create(
                model=self._model,
                messages=[
                    {"role": "system", "content": SYSTEM},
                    {"role": "user", "content": request(original)},
                ],
                extra_headers=self._headers,
                extra_body=self._fields,
            )
        except openai.APIStatusError as error:
            raise self._error(self._refusal(error)) from error
        except openai.APIConnectionError as error:
            raise self._error(self._failure(str(error.__cause__ or error))) from error
        except (openai.OpenAIError, ValueError, RecursionError) as error:
            raise self._error(self._no_completion(error)) from error
        try:
            choice = completion.choices[0]
            text = read_answer(choice.message.content or "")
        except (AttributeError, LookupError, TypeError) as error:
            raise self._error(self._no_completion(completion)) from error
        return Rewrite(text, choice.finish_reason == "length")

    def _no_completion(self, found: object) -> str:
        return f"{self._host}: found {one_line(found, 200)!r}, expected a chat completion. Check the address."

    def _refusal(self, error: openai.APIStatusError) -> str:
        status, answer = error.status_code, error.response
        said = error.body
        if isinstance(said, Mapping):
            said = said.get("message") or said.get("detail") or said
        shown = one_line(said or "", 300)
        problem = f"{status} {answer.reason_phrase}" + (f": {shown}" if shown else "")
        if status in (408, 409, 429) or status >= 500:
            pause = answer.headers.get("Retry-After")
            return self._failure(f"{problem} (it asks to wait for {pause} s)" if pause else problem)
        remedy = {
            401: f"Set the right key in the environment: export {KEY}=...",
            403: f"The key in {KEY} may not use this model.",
            404: f"Check the address and the model: {self._shown}.",
        }.get(status, "Check the address, the model and the fields.")
        return f"{self._host} refuses: {problem}. {remedy}"

    def _failure(self, problem: str) -> str:
        return (
            f"{self._host}: no rewrite in up to {self._attempts} attempts ({problem}). Finished "
            "rewrites are kept: start the same command again later, or with fewer requests per minute."
        )

    def _error(self, text: str) -> InputError:
        """Return the error without the key and the query."""
        for secret, shown in self._secrets.items():
            text = text.replace(secret, shown) if secret else text
        return InputError(whole_characters(text))


class _Pace:
    """Says when the next request may begin, for all threads together."""

    def __init__(self, per_minute: float):
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self, ending: threading.Event) -> bool:
        """Wait for the next turn; return ``False`` if ``ending`` was set first."""
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._gap
        return not ending.wait(turn - now)


def _parse(address: str) -> tuple[str, str, str, str]:
    """Return URL without query, query, host and model of ``URL#model``."""
    url, _, model = address.partition("#")
    shown = url.partition("?")[0]  # the query may hold a key
    try:
        parts = urlsplit(url)
        host, _port = parts.hostname, parts.port  # a bad port raises
    except ValueError as error:
        raise InputError(f"openai:{shown}: no valid URL ({error}).") from error
    if parts.username is not None or parts.password is not None:
        raise InputError(f"openai: leave user and password out of the URL; a key goes into {KEY}.")
    if not all("!" <= character <= "~" for character in url):
        raise InputError(f"openai:{shown!r}: no valid URL; blanks and non-ASCII are not allowed.")
    if parts.scheme not in ("http", "https") or not host or not model:
        raise InputError(
            f"openai:{shown}: expected openai:URL#model, such as openai:http://127.0.0.1:8080/v1#qwen."
        )
    path = parts.path.rstrip("/").removesuffix(_PATH)
    return urlunsplit((parts.scheme, parts.netloc, path, "", "")), parts.query, host, model


def _described(fields: Mapping[str, object]) -> str:
    """Return the names and a digest of the fields, whose values may be secret."""
    if not fields:
        return ""
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]
    return f"fields {','.join(sorted(fields))} {digest}"
