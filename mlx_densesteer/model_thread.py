"""A thread that owns a model, for programs whose main thread must not wait: asyncio, an app's window."""

import asyncio
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import mlx.core as mx


class Pieces(Protocol):
    """An answer while it comes: what ``stream`` and ``Session.send`` return."""

    def __next__(self) -> str: ...

    def close(self) -> None: ...


Answer = TypeVar("Answer", bound=Pieces)


class ModelThread(ThreadPoolExecutor):
    """A ``concurrent.futures`` executor with one thread, on which all happens that touches a model.

        with ModelThread() as thread:
            model, tokenizer = thread.submit(load, "demo").result()
            answer = thread.submit(generate, model, tokenizer, "What is 17 * 24?")

    Arrays of mlx that are not computed yet belong to the thread that made them, so load the model,
    make the caches and generate on this thread. It does one thing after the other; a result or an
    exception arrives in the future.

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
        """
        try:
            pieces = await asyncio.wrap_future(answer)
        except asyncio.CancelledError:
            answer.add_done_callback(_abandon)  # it may be begun already
            raise
        self._open.add(pieces)
        try:
            # the end is a value: no future can hold a StopIteration
            while (piece := await asyncio.wrap_future(self.submit(next, pieces, None))) is not None:
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
        # shielded: a second cancellation may end the waiting, not the closing
        await asyncio.shield(asyncio.wrap_future(closed))


def _abandon(answer: Future[Answer]) -> None:
    """End an answer that nobody waits for any more, before its first piece."""
    if not answer.cancelled() and answer.exception() is None:
        answer.result().close()


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
