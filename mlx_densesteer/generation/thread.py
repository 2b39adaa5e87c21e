"""A thread for a model, in programs whose main thread must not block: asyncio, apps with a window."""

import asyncio
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar, runtime_checkable

import mlx.core as mx


@runtime_checkable
class Pieces(Protocol):
    """An iterator over the pieces of an answer: what ``stream`` and ``Session.send`` return."""

    def __next__(self) -> str: ...

    def close(self) -> None: ...


Answer = TypeVar("Answer", bound=Pieces)
Value = TypeVar("Value")


class ModelThread(ThreadPoolExecutor):
    """A ``concurrent.futures`` executor whose single thread does all the work with a model.

        with ModelThread() as thread:
            model, tokenizer = thread.submit(load, "demo").result()
            answer = thread.submit(generate, model, tokenizer, "What is 17 * 24?")

    Arrays of mlx belong to the thread that made them until they are computed, so load the model,
    make the caches and generate on this thread.

    If you read an answer without ``iterate`` and not to its end, close it on this thread:
    ``thread.submit(pieces.close)``. mlx-lm's generator raises if another thread collects it.

    A plain ``ThreadPoolExecutor`` that has used mlx sometimes aborts the process at its end
    (github.com/ml-explore/mlx/pull/4110); this one first frees what mlx keeps for the thread.
    """

    def __init__(self) -> None:
        self._open: set[Pieces] = set()
        super().__init__(1, "model", initializer=_begin, initargs=(self._open,))

    async def iterate(self, answer: Future[Answer]) -> AsyncGenerator[str, None]:
        """Yield the pieces of an answer; the event loop goes on while the thread computes.

            answer = thread.submit(stream, model, tokenizer, "What is 17 * 24?")
            async for piece in thread.iterate(answer):
                print(piece)
            answer.result().result   # the Generation

        Each piece is computed on request. Between two pieces the thread does other submitted work,
        so several answers take turns. Leaving the loop, ``aclose`` and cancelling the task end the
        answer after the current step (one token, or reading the prompt), with
        ``finish_reason="interrupted"``. Exceptions on the thread are raised here.

        Raises:
            TypeError: ``answer`` is not the future of an answer.
            RuntimeError: the thread was shut down before the answer's end.
        """
        if not isinstance(answer, Future):
            raise _no_answer(answer)
        try:
            pieces = await _result(answer)
        except asyncio.CancelledError:
            answer.add_done_callback(_abandon)  # the thread may have begun it
            raise
        if not isinstance(pieces, Pieces):
            raise _no_answer(pieces)
        self._open.add(pieces)
        try:
            # None is the end: a future cannot hold a StopIteration
            while (piece := await _result(self.submit(next, pieces, None))) is not None:
                yield piece
        finally:
            await self._close(pieces)

    async def _close(self, pieces: Pieces) -> None:
        """End an answer on the thread: a generator cannot be closed while another thread runs it."""
        try:
            closed = self.submit(pieces.close)
        except RuntimeError:  # shut down: _End closes it
            return
        # A shutdown may cancel the closing; _End then needs the answer.
        closed.add_done_callback(lambda done: done.cancelled() or self._open.discard(pieces))
        waiting = asyncio.wrap_future(closed)
        await asyncio.wait([waiting])  # a second cancellation ends the waiting, not the closing
        if not waiting.cancelled():
            waiting.result()


async def _result(future: Future[Value]) -> Value:
    """Wait for a future. A CancelledError means that this task was cancelled, not the future."""
    waiting = asyncio.wrap_future(future)
    try:
        await asyncio.wait([waiting])
    except asyncio.CancelledError:
        waiting.cancel()  # cancels the future too, unless it has begun
        raise
    if waiting.cancelled():
        raise RuntimeError(
            "cancelled before it was computed: the ModelThread was shut down with cancel_futures, or "
            "the future was cancelled."
        )
    return waiting.result()


def _abandon(answer: Future[Answer]) -> None:
    """Close an answer whose task was cancelled before the first piece."""
    if answer.cancelled() or answer.exception() is not None:
        return
    if isinstance(pieces := answer.result(), Pieces):
        pieces.close()


def _no_answer(found: object) -> TypeError:
    return TypeError(
        f"{type(found).__name__}: expected the future of thread.submit(stream, ...), or of another call "
        "that returns an answer piece by piece."
    )


class _End:
    """Clean up when the thread ends, which deletes its thread-local variables.

    mlx keeps streams for each thread. It would free them later, when Python no longer waits for the
    thread. They then ask for the GIL of an interpreter that may be ending, which aborts the
    process.
    """

    def __init__(self, answers: set[Pieces]) -> None:
        self._answers = answers

    def __del__(self) -> None:
        try:
            for pieces in list(self._answers):
                pieces.close()
        finally:
            mx.clear_streams()


_of_thread = threading.local()


def _begin(answers: set[Pieces]) -> None:
    _of_thread.end = _End(answers)
