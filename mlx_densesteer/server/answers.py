"""Answer checked requests, whole or streamed."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from .._version import __version__
from ..generation.brake import Brake
from ..model.prompt import bytes_of_token
from .encoding import Encoded, Encoder
from .engine import Engine
from .faults import Fault, bad
from .replies import Completion
from .schema import ChatRequest, CompletionRequest, check_extra
from .settings import Settings
from .vectors import Asked, Vectors
from .worker import Event, Failed, Job, Said, Taken

if TYPE_CHECKING:
    from .models import Lease, Models

IGNORED = "X-DenseSteer-Ignored"
Inbox = asyncio.Queue[tuple[Job, Event]]
T = TypeVar("T")


@dataclass(frozen=True)
class Completions:
    """Answers requests for completions."""

    settings: Settings
    engine: Engine
    encoder: Encoder
    vectors: Vectors

    async def answer(
        self, request: Request, asked: ChatRequest | CompletionRequest, ignored: Sequence[str]
    ) -> Response:
        """Answer a request; ``ignored`` are its unknown fields.

        Raises:
            Fault: the request is refused, or its answer cannot be finished.
        """
        ignored, limit = list(ignored), None
        steering = self.vectors.asked(asked.model, asked.steering)
        if isinstance(asked, ChatRequest):
            steering, limit, unused = self.vectors.thinking(steering, asked)
            ignored += unused
        encoded = await self.encoder.encode(asked)
        if getattr(asked, "offered", None) and not encoded.tools:
            ignored.append("tools")  # the model knows none
        steering = self._steered(asked, steering, encoded)
        headers = _headers(ignored)
        jobs = self._jobs(asked, encoded, steering, limit)
        completion = Completion(
            chat=isinstance(asked, ChatRequest),
            model=steering.model if steering else self.settings.name,
            fingerprint=f"mlx-densesteer-{__version__}-{self.vectors.model.fingerprint[:8]}",
            choices=sum(job.n for job in jobs),
            n=asked.n or 1,
            token_bytes=partial(bytes_of_token, self.vectors.model.tokenizer),
            steering=self.vectors.describe(steering.steering) if steering else None,
            with_usage=bool(asked.stream and asked.wants_usage),
            calls=self.encoder.call_reader(encoded) if encoded.tools else None,
            echo=self.encoder.texts(encoded) if getattr(asked, "echo", False) else (),
        )
        with ExitStack() as held:
            inbox = held.enter_context(self.engine.holding(jobs))
            async with _Watch(request) as watch:
                early = await self._await_start(jobs, inbox, watch)
                if not asked.stream:
                    for job, said in early:
                        completion.add(job.first, said)
                    while not completion.complete:
                        job, said = await watch.first(_next(inbox))
                        completion.add(job.first, said)
                    body = completion.whole(asked.alternatives is not None)
                    return JSONResponse(body, headers=headers)
            lines = self._stream(completion, early, inbox, asked.wants_usage)
            return EventStream(lines, held.pop_all(), headers)

    def _steered(
        self, asked: ChatRequest | CompletionRequest, steering: Asked | None, encoded: Encoded
    ) -> Asked | None:
        """Return the steering, if it adds anything; not in tool calls, unless the request wants that.

        Raises:
            Fault: it would leave unsteered what the request scores.
        """
        if steering is None or steering.steering.is_zero:
            return None
        where = steering.steering.positions
        if _scores_prompt(asked) and where not in ("all", "prompt"):
            raise bad(
                f"positions {where} steer nothing of a prompt, so its log-probabilities would be those of the "
                "unsteered model: ask for positions all or prompt, or for strength 0. lm-eval's model "
                "`densesteer` scores texts as answers.",
                "steering",
            )
        in_calls = asked.steering is not None and asked.steering.tool_calls
        if not encoded.tools or in_calls or not self.encoder.knows_calls:
            return steering
        return replace(steering, steering=replace(steering.steering, calls=False))

    def _jobs(
        self,
        asked: ChatRequest | CompletionRequest,
        encoded: Encoded,
        steering: Asked | None,
        think_limit: int | None,
    ) -> list[Job]:
        most = self.settings.limits.max_tokens
        n, stops = asked.n or 1, asked.stops
        if encoded.tools and asked.parallel_tool_calls is False:
            stops += self.encoder.call_ends
        brakes = None if asked.steering is None else asked.steering.brake
        if brakes is None:  # in JSON, repetition may be what the schema demands
            brakes = not encoded.in_json
        return [
            Job(
                tokens=tokens,
                steering=steering.steering if steering else None,
                max_tokens=min(asked.limit or most, most),
                sampling=asked.sampling,
                stop=stops,
                n=n,
                logprobs=asked.alternatives,
                first=number * n,
                think_limit=think_limit,
                grammar=encoded.grammar,
                bias=encoded.bias,
                brake=Brake() if brakes and steering else None,
                echo=_scores_prompt(asked),
            )
            for number, tokens in enumerate(encoded.prompts)
        ]

    async def _await_start(
        self, jobs: list[Job], inbox: Inbox, watch: "_Watch"
    ) -> list[tuple[Job, Said]]:
        """Wait until the model's thread has taken all jobs; return the pieces that came meanwhile.

        So a refused job is an error response, not a stream that breaks off.
        """
        taken, early = 0, []
        while taken < len(jobs):
            job, event = await watch.first(_next(inbox))
            if isinstance(event, Said):
                early.append((job, event))
            else:
                taken += 1
        return early

    async def _stream(
        self,
        completion: Completion,
        early: list[tuple[Job, Said]],
        inbox: Inbox,
        with_usage: bool,
    ) -> AsyncIterator[bytes]:
        """Yield server-sent events."""
        for chunk in completion.opening():
            yield _event(chunk)
        ping, told = self.settings.limits.ping, time.monotonic()
        while not completion.complete:
            try:
                async with asyncio.timeout(max(0.0, told + ping - time.monotonic())):
                    job, said = early.pop(0) if early else await _next(inbox)
            except TimeoutError:
                yield b": still at work\n\n"
                told = time.monotonic()
                continue
            except Fault as fault:
                yield _event(fault.body)
                return
            completion.add(job.first, said)
            for chunk in completion.chunks(said):
                yield _event(chunk)
                told = time.monotonic()
        if with_usage:
            yield _event(completion.last())
        yield b"data: [DONE]\n\n"


async def answer(
    models: "Models", request: Request, asked: ChatRequest | CompletionRequest, *, ping: float
) -> Response:
    """Answer a request with the model that it names, loaded if need be.

    A client that streams gets comments every ``ping`` seconds while it waits for the model; from the first
    one on, a refusal is an event of the stream.

    Raises:
        Fault: as ``Completions.answer``, or the model cannot be had.
    """
    prompts = len(asked.prompts) if isinstance(asked, CompletionRequest) else 1
    answers = (asked.n or 1) * prompts
    ignored = check_extra(asked)
    with ExitStack() as held:
        lease = held.enter_context(models.lease(asked.model, answers))
        if not await wait_for(lease, request, ping if asked.stream else None):
            late = held.pop_all()
            lines = _late(lease, late, request, asked, ignored, ping)
            return EventStream(lines, late, _headers(ignored))
        response = await lease.served.completions.answer(request, asked, ignored)
        if isinstance(response, EventStream):
            response.held.push(held.pop_all())
        return response


async def wait_for(lease: "Lease", request: Request, seconds: float | None = None) -> bool:
    """Wait for the model of a lease, and return whether it is there.

    Raises:
        Fault: it cannot be had, or the client disconnected first.
    """
    if lease.given.done():
        return await lease.wait()
    async with _Watch(request) as watch:
        return await watch.first(lease.wait(seconds))


async def _late(
    lease: "Lease",
    held: ExitStack,
    request: Request,
    asked: ChatRequest | CompletionRequest,
    ignored: Sequence[str],
    ping: float,
) -> AsyncIterator[bytes]:
    """Yield comments until the model is there, then the answer; ``held`` gets what that holds."""
    try:
        yield f": waiting for {lease.name}\n\n".encode()
        while not await lease.wait(ping):
            yield f": waiting for {lease.name}\n\n".encode()
        response = await lease.served.completions.answer(request, asked, ignored)
        assert isinstance(response, EventStream)
        held.push(response.held)
        async for line in response.body_iterator:
            yield line
    except Fault as fault:
        yield _event(fault.body)


class EventStream(StreamingResponse):
    """Server-sent events; closes ``held`` at the end, even if the stream never started.

    A generator cannot: one that was never started runs no clean-up.
    """

    def __init__(self, lines: AsyncIterator[bytes], held: ExitStack, headers: dict[str, str]):
        super().__init__(lines, headers=headers, media_type="text/event-stream")
        self.held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.held:
            await super().__call__(scope, receive, send)


def _scores_prompt(asked: ChatRequest | CompletionRequest) -> bool:
    """Tell whether the log-probabilities of the prompt's own tokens are asked for."""
    return isinstance(asked, CompletionRequest) and bool(asked.echo) and asked.logprobs is not None


class _Watch:
    """Notices a disconnect of the client while nothing is sent to it."""

    def __init__(self, request: Request):
        self._request = request

    async def __aenter__(self) -> "_Watch":
        self._gone = asyncio.ensure_future(self._disconnect())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._gone.cancel()
        await asyncio.wait([self._gone])

    async def first(self, waiting: Coroutine[Any, Any, T]) -> T:
        """Return the result of ``waiting``.

        Raises:
            Fault: the client disconnected first.
        """
        task = asyncio.ensure_future(waiting)
        try:
            await asyncio.wait({task, self._gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Fault(499, "the client went away.")
            return task.result()
        finally:
            task.cancel()

    async def _disconnect(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass


async def _next(inbox: Inbox) -> tuple[Job, Taken | Said]:
    """Return the next event of a job that goes on; raise the fault of one that failed."""
    job, event = await inbox.get()
    if isinstance(event, Failed):
        raise event.fault
    return job, event


def _event(body: dict[str, object]) -> bytes:
    text = json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return b"data: " + text.encode() + b"\n\n"


def _headers(ignored: Sequence[str]) -> dict[str, str]:
    return {IGNORED: ", ".join(map(_header_safe, ignored[:20]))} if ignored else {}


def _header_safe(name: str) -> str:
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "_-.") else "?" for c in name[:40])
    return safe or "?"
