"""A thread that owns a model, for programs whose main thread must not wait: asyncio, an app's window."""

import asyncio
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar, runtime_checkable

import mlx.core as mx


@runtime_checkable
class Pieces(Protocol):
    """An answer while it comes: what ``stream`` and ``Session.send`` return."""

    def __next__(self) -> str: ...

    def close(self) -> None: ...


Answer = TypeVar("Answer", bound=Pieces)
Value = TypeVar("Value")


class ModelThread(ThreadPoolExecutor):
    """A ``concurrent.futures`` executor with one thread, on which all happens that touches a model.

        with ModelThread() as thread:
            model, tokenizer = thread.submit(load, "demo").result()
            answer = thread.submit(generate, model, tokenizer, "What is 17 * 24?")

    Arrays of mlx that are not computed yet belong to the thread that made them, so load the model,
    make the caches and generate on this thread. It does one thing after the other; a result or an
    exception arrives in the future.

    An answer that is read without ``iterate`` and not to its end has to be closed on this thread too,
    with ``thread.submit(pieces.close)``: mlx-lm's generator complains where it is collected on another.

    A plain ``ThreadPoolExecutor`` that has used mlx aborts the process now and then as it ends
    (github.com/ml-explore/mlx/pull/4110); this one gives back what mlx keeps for the thread first.
    """

    def __init__(self) -> None:
        self._open: set[Pieces] = set()
        super().__init__(1, "model", initializer=_begin, initargs=(self._open,))

    async def iterate(self, answer: Future[Answer]) -> AsyncGenerator[str, None]:
        """Yield an answer piece by piece; the event loop goes on while the thread computes.

            answer = thread.submit(stream, model, tokenizer, "What is 17 * 24?")
            async for piece in thread.iterate(answer):
                print(piece)
            answer.result().result   # the Generation

        A piece is computed when it is asked for; between two pieces the thread takes what else was
        submitted, so several answers come in turns. Leaving the loop, ``aclose`` and cancelling the
        task end the answer: the step that runs (one token, or reading the prompt) is finished,
        nothing is computed after it, and the result has ``finish_reason="interrupted"``. What goes
        wrong on the thread is raised here.

        Raises:
            TypeError: ``answer`` is something else.
            RuntimeError: the thread was shut down before the answer's end.
        """
        if not isinstance(answer, Future):
            raise _no_answer(answer)
        try:
            pieces = await _result(answer)
        except asyncio.CancelledError:
            answer.add_done_callback(_abandon)  # it may be begun already
            raise
        if not isinstance(pieces, Pieces):
            raise _no_answer(pieces)
        self._open.add(pieces)
        try:
            # the end is a value: no future can hold a StopIteration
            while (piece := await _result(self.submit(next, pieces, None))) is not None:
                yield piece
        finally:
            await self._close(pieces)

    async def _close(self, pieces: Pieces) -> None:
        """End an answer on the thread: a generator cannot be closed while it runs elsewhere."""
        try:
            closed = self.submit(pieces.close)
        except RuntimeError:  # shut down: the thread closes it as it ends
            return
        # not before it is closed: a shutdown may cancel what waits
        closed.add_done_callback(lambda done: done.cancelled() or self._open.discard(pieces))
        waiting = asyncio.wrap_future(closed)
        await asyncio.wait([waiting])  # a second cancellation ends the waiting, not the closing
        if not waiting.cancelled():  # by a shutdown, that is: the thread closes it as it ends
            waiting.result()


async def _result(future: Future[Value]) -> Value:
    """Wait for what the thread computes. A CancelledError is that of the task, and of nothing else."""
    waiting = asyncio.wrap_future(future)
    try:
        await asyncio.wait([waiting])
    except asyncio.CancelledError:
        waiting.cancel()  # and the future, if it is not begun
        raise
    if waiting.cancelled():
        raise RuntimeError(
            "cancelled before it was computed: the ModelThread was shut down with cancel_futures, or "
            "the future was cancelled."
        )
    return waiting.result()


def _abandon(answer: Future[Answer]) -> None:
    """End an answer that nobody waits for any more, before its first piece."""
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
    """What a thread has to do last; it goes with the thread's own variables, and does it then.

    mlx keeps streams for a thread. Left to themselves they go later, when Python no longer waits for the
    thread; they then ask an interpreter that may be ending for the GIL, and that aborts the process.
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
