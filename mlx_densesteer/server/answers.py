"""From a checked request to its answer, whole or streamed."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ..generation.sampling import Sampling
from ..model.model import Model
from .encoding import Encoder
from .engine import Engine
from .faults import Fault
from .jobs import Failed, Job, Said, Taken
from .replies import ApiAnswer
from .schema import ChatRequest, CompletionRequest, check_extra
from .settings import Settings
from .vectors import Vectors, ask, format_model_name, parse_model_name

IGNORED = "X-DenseSteer-Ignored"


@dataclass(frozen=True)
class Answerer:
    """What an answer is made of."""

    settings: Settings
    engine: Engine
    encoder: Encoder
    vectors: Vectors
    model: Model
    fingerprint: str

    async def answer(self, request: Request, asked: ChatRequest | CompletionRequest) -> Response:
        """Answer a request.

        Raises:
            Fault: it is refused, or no answer can be finished.
        """
        ignored = check_extra(asked)
        jobs, name = await self._jobs(asked)
        reply = ApiAnswer(
            chat=isinstance(asked, ChatRequest), model=name,
            fingerprint=self.fingerprint, choices=sum(job.n for job in jobs), n=asked.n or 1,
            token_bytes=self.encoder.token_bytes, with_usage=bool(asked.stream and asked.wants_usage),
        )  # fmt: skip
        headers = (
            {IGNORED: ", ".join(_header_safe(name) for name in ignored[:20])} if ignored else {}
        )
        with ExitStack() as held:
            inbox = held.enter_context(self.engine.holding(jobs))
            async with _Watch(request) as watch:
                early = await self._await_start(reply, jobs, inbox, watch)
                if not asked.stream:
                    for event in early:
                        self._take(reply, event)
                    while not reply.complete:
                        self._take(reply, await watch.first(inbox.get()))
                    body = reply.whole(asked.alternatives is not None)
                    return JSONResponse(body, headers=headers)
            lines = self._stream(reply, early, inbox, asked.wants_usage)
            return EventStream(lines, held.pop_all(), headers)

    async def _jobs(self, asked: ChatRequest | CompletionRequest) -> tuple[list[Job], str]:
        """Return the jobs of a request, and the model's name in its answer: the one that asks for the same."""
        name = self.settings.name
        named = parse_model_name(asked.model, name) if asked.model else None
        steering, vector = ask(named, asked.steering, self.vectors)
        sampling = Sampling(
            asked.temperature or 0.0, asked.top_p or 1.0,
            None if asked.seed is None else asked.seed % 2**64,
        )  # fmt: skip
        limit = min(asked.limit or self.settings.limits.max_tokens, self.settings.limits.max_tokens)
        n = asked.n or 1
        if steering is not None and steering.amount.number and vector is not None:
            name = format_model_name(name, vector, steering.amount)
        jobs = [
            Job(
                tokens, steering, self.model.room(len(tokens), limit), sampling,
                asked.stops, n, asked.alternatives, number * n,
            )
            for number, tokens in enumerate(await self.encoder.encode(asked))
        ]  # fmt: skip
        return jobs, name

    async def _await_start(
        self, reply: ApiAnswer, jobs: list[Job], inbox: asyncio.Queue, watch: "_Watch"
    ) -> list[tuple[Job, Said]]:
        """Wait until the model's thread has taken the jobs: what it refuses is an error, not a stream.

        Return what was said meanwhile.
        """
        started, early = 0, []
        while started < len(jobs):
            event = await watch.first(inbox.get())
            if isinstance(event[1], Said):
                early.append(event)
                continue
            self._take(reply, event)
            started += 1
        return early

    def _take(self, reply: ApiAnswer, event: tuple[Job, Taken | Said | Failed]) -> None:
        job, what = event
        if isinstance(what, Failed):
            raise what.fault
        if isinstance(what, Taken):
            reply.steering = what.steering
        else:
            reply.cached[job.first] = what.cached_tokens
            reply.add(what.choice, what.piece)

    async def _stream(
        self, reply: ApiAnswer, early: list[tuple[Job, Said]], inbox: asyncio.Queue, with_usage: bool
    ) -> AsyncIterator[bytes]:
        """Yield server-sent events."""
        for chunk in reply.opening():
            yield _event(chunk)
        while not reply.complete:
            try:
                async with asyncio.timeout(self.settings.limits.ping):
                    event = early.pop(0) if early else await inbox.get()
            except TimeoutError:
                yield b": still at work\n\n"
                continue
            try:
                self._take(reply, event)
            except Fault as fault:
                yield _event(fault.body)
                return
            if isinstance(event[1], Said):
                yield _event(reply.chunk(event[1].choice, event[1].piece))
        if with_usage:
            yield _event(reply.last())
        yield b"data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """Server-sent events; at the end, whatever it is, ``held`` is let go.

    Not left to the generator: one that was never read is never cleaned up.
    """

    def __init__(self, lines: AsyncIterator[bytes], held: ExitStack, headers: dict[str, str]):
        super().__init__(lines, headers=headers, media_type="text/event-stream")
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            await super().__call__(scope, receive, send)


class _Watch:
    """Notices that the client went away while nothing is sent to it."""

    def __init__(self, request: Request):
        self._request = request

    async def __aenter__(self) -> "_Watch":
        self._gone = asyncio.ensure_future(self._disconnect())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._gone.cancel()
        await asyncio.wait([self._gone])

    async def first(self, waiting):
        """Return what ``waiting`` gives.

        Raises:
            Fault: the client went away before.
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


def _event(body: dict[str, object]) -> bytes:
    return (
        b"data: "
        + json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
        + b"\n\n"
    )


def _header_safe(name: str) -> str:
    return (
        "".join(c if c.isascii() and (c.isalnum() or c in "_-.") else "?" for c in name[:40]) or "?"
    )
