import asyncio
import contextlib
import gc
import subprocess
import sys
import threading
from functools import partial

import pytest

from mlx_densesteer import (
    ModelThread,
    Session,
    Steering,
    SteeringVector,
    demo,
    generate,
    load,
    stream,
)
from mlx_densesteer.demo.problems import held_out
from mlx_densesteer.errors import DenseSteerError

QUESTION = held_out(1)[0].question


@pytest.fixture(scope="module")
def thread():
    with ModelThread() as thread:
        yield thread


@pytest.fixture(scope="module")
def model(thread):
    """The demo model and its tokenizer, loaded on the thread."""
    return thread.submit(load, "demo").result()


@pytest.fixture
def forwards(model, monkeypatch):
    """Where each forward pass leaves a mark: the thread that ran it."""
    passes, kind = [], type(model[0])
    forward = kind.__call__

    def counted(self, *arguments, **options):
        passes.append(threading.current_thread())
        return forward(self, *arguments, **options)

    monkeypatch.setattr(kind, "__call__", counted)
    return passes


async def on(thread, call=lambda: None, *arguments):
    """Wait for the thread to have done all that was submitted, and then this."""
    return await asyncio.wrap_future(thread.submit(call, *arguments))


async def collect(pieces):
    return "".join([piece async for piece in pieces])


class Held:
    """Pieces of which each waits until the event loop says so; they know whether they were closed."""

    def __init__(self, pieces=("a", "b", "c")):
        self.pieces, self.go, self.closed, self.asked = (
            iter(pieces),
            threading.Semaphore(0),
            False,
            0,
        )

    def __next__(self):
        self.asked += 1
        assert self.go.acquire(timeout=60), "the event loop stands still"
        return next(self.pieces)

    def close(self):
        self.closed = True


def test_the_event_loop_goes_on_while_a_piece_is_computed(thread, model, forwards):
    """A piece is not computed before the loop has ticked three times: a blocked loop would never."""

    async def main():
        ticks = 0
        answer = thread.submit(stream, *model, QUESTION, max_tokens=400)
        held = Held(await asyncio.wrap_future(answer))

        async def tick():
            nonlocal ticks
            while True:
                await asyncio.sleep(0)
                ticks += 1
                if not ticks % 3:
                    held.go.release()

        ticking = asyncio.create_task(tick())
        text = await collect(thread.iterate(thread.submit(lambda: held)))
        ticking.cancel()
        return text, ticks, held, answer.result().result

    text, ticks, held, result = asyncio.run(main())
    assert ticks >= 3 * held.asked and held.asked > 10
    assert {runner.name for runner in forwards} == {"model_0"}
    assert result.finish_reason == "stop" and result.text == text
    assert text == thread.submit(generate, *model, QUESTION, max_tokens=400).result().text


def test_cancelling_ends_the_computing_and_not_the_thread(thread, model, forwards):
    async def main():
        heard = asyncio.Event()
        answer = thread.submit(stream, *model, QUESTION, max_tokens=400)

        async def listen():
            async for _ in thread.iterate(answer):
                heard.set()

        task = asyncio.create_task(listen())
        await heard.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await on(thread)  # idle
        computed = len(forwards)
        for _ in range(100):
            await asyncio.sleep(0)
        await on(thread)
        pieces = answer.result()
        assert len(forwards) == computed < 10
        assert pieces.result.finish_reason == "interrupted" and 0 < pieces.result.tokens < 10
        assert list(pieces) == []  # closed, and it computes nothing more
        assert len(forwards) == computed
        again = thread.submit(stream, *model, QUESTION, max_tokens=400)
        return await collect(thread.iterate(again))

    text = asyncio.run(main())
    assert text == thread.submit(generate, *model, QUESTION, max_tokens=400).result().text


def test_a_second_cancellation_does_not_keep_the_answer_open(thread):
    async def main():
        held = Held()
        task = asyncio.create_task(collect(thread.iterate(thread.submit(lambda: held))))
        while not held.asked:
            await asyncio.sleep(0)
        task.cancel()  # the first piece is being computed
        await asyncio.sleep(0)
        task.cancel()  # the task waits for its end
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not held.closed
        held.go.release()
        await on(thread)
        assert held.closed and held.asked == 1

    asyncio.run(main())


def test_leaving_the_loop_closes(thread):
    async def main():
        held = Held()
        held.go.release()
        async with contextlib.aclosing(thread.iterate(thread.submit(lambda: held))) as pieces:
            async for piece in pieces:
                assert piece == "a"
                break
        assert held.closed and held.asked == 1

    asyncio.run(main())


def test_errors_arrive_and_two_answers_come_in_turns(thread, model):
    vector = SteeringVector.load(demo.VECTOR)

    async def main():
        wrong = thread.submit(stream, *model, "", max_tokens=4)
        with pytest.raises(DenseSteerError, match="empty"):
            await collect(thread.iterate(wrong))

        failing = Held(1 // n for n in (1, 0))
        failing.go.release(2)
        with pytest.raises(ZeroDivisionError):
            await collect(thread.iterate(thread.submit(lambda: failing)))
        assert failing.closed

        answers = [
            thread.submit(
                stream, *model, QUESTION, steering=Steering(vector, s, (5,)), max_tokens=400
            )
            for s in (-7.13, 4.76)
        ]
        return await asyncio.gather(*(collect(thread.iterate(answer)) for answer in answers))

    texts = asyncio.run(main())
    for text, strength in zip(texts, (-7.13, 4.76), strict=True):
        steering = Steering(vector, strength, (5,))
        alone = thread.submit(generate, *model, QUESTION, steering=steering, max_tokens=400)
        assert text == alone.result().text
    assert texts[0] != texts[1]


def test_a_session_is_usable_after_a_cancelled_answer(thread, model):
    async def main():
        session = await on(thread, partial(Session, *model, max_tokens=400))
        async with contextlib.aclosing(
            thread.iterate(thread.submit(session.send, QUESTION))
        ) as pieces:
            said = await pieces.__anext__()
        assert [turn.reply.text.startswith(said) for turn in session.turns] == [True]
        assert session.turns[0].reply.finish_reason == "interrupted"
        return await collect(thread.iterate(thread.submit(session.regenerate)))

    text = asyncio.run(main())
    assert text == thread.submit(generate, *model, QUESTION, max_tokens=400).result().text


def test_what_is_left_open_ends_with_the_thread(capfd):
    """On the thread: mlx-lm's generator complains where it is destroyed on another one."""

    async def main():
        with ModelThread() as thread:
            model = await on(thread, load, "demo")
            answer = thread.submit(stream, *model, QUESTION, max_tokens=400)
            pieces = thread.iterate(answer)
            assert await pieces.__anext__()
        assert list(answer.result()) == []
        await pieces.aclose()

    asyncio.run(main())
    assert capfd.readouterr().err == ""


def test_an_answer_read_by_hand_is_closed_on_the_thread(thread, model, monkeypatch):
    """Collected elsewhere when closed, it has nothing left of which mlx could complain."""
    complaints = []
    monkeypatch.setattr(sys, "unraisablehook", lambda one: complaints.append(str(one.exc_value)))
    pieces = thread.submit(stream, *model, QUESTION, max_tokens=400).result()
    assert thread.submit(next, pieces).result()
    thread.submit(pieces.close).result()
    assert pieces.result.finish_reason == "interrupted"
    del pieces
    gc.collect()
    assert not complaints


def test_a_shutdown_cancels_no_task(capfd):
    """What it cancels ends in a RuntimeError, for the answer that waits and for the one that is made."""

    async def main():
        thread, held, other = ModelThread(), Held(), Held()
        begun, busy = threading.Event(), threading.Event()
        held.go.release()
        other.go.release()
        read = thread.iterate(thread.submit(lambda: held))
        left = thread.iterate(thread.submit(lambda: other))
        assert await read.__anext__() == await left.__anext__() == "a"
        thread.submit(lambda: begun.set() or busy.wait(60))
        begun.wait(60)  # else the shutdown cancels this one too, and the thread takes the next
        waiting = [
            asyncio.create_task(read.__anext__()),
            asyncio.create_task(collect(thread.iterate(thread.submit(Held)))),
            asyncio.create_task(left.aclose()),
        ]
        for _ in range(10):
            await asyncio.sleep(0)  # each has submitted what it waits for
        thread.shutdown(wait=False, cancel_futures=True)
        busy.set()
        ends = await asyncio.gather(*waiting, return_exceptions=True)
        thread.shutdown()
        assert held.closed and other.closed  # by the thread
        return ends

    *cancelled, closed = asyncio.run(main())
    for error in cancelled:
        assert isinstance(error, RuntimeError) and "was shut down" in str(error)
    assert closed is None and capfd.readouterr().err == ""


def test_what_is_no_answer(capfd, caplog):
    async def main():
        with ModelThread() as thread:
            model = await on(thread, load, "demo")
            whole = thread.submit(generate, *model, QUESTION, max_tokens=4)
            for wrong in (stream(*model, QUESTION), whole, asyncio.wrap_future(whole)):
                with pytest.raises(TypeError, match=r"the future of thread\.submit\(stream"):
                    await collect(thread.iterate(wrong))
            begun, go = threading.Event(), threading.Event()
            task = asyncio.create_task(
                collect(thread.iterate(thread.submit(lambda: begun.set() or go.wait(60))))
            )
            while not begun.is_set():
                await asyncio.sleep(0)
            task.cancel()  # there is nothing to close once it is made
            with pytest.raises(asyncio.CancelledError):
                await task
            go.set()

    asyncio.run(main())
    assert capfd.readouterr().err == "" and not caplog.records


@pytest.mark.parametrize("ending", ["", "thread.shutdown()"])
def test_a_process_with_a_model_thread_ends_well(ending):
    """Of processes with a plain ThreadPoolExecutor one in four or so aborts."""
    code = (
        "import mlx.core as mx\nfrom mlx_densesteer import ModelThread\nthread = ModelThread()\n"
        f"thread.submit(lambda: mx.random.normal((300, 300)).sum().item()).result()\n{ending}"
    )
    for _ in range(8):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr


def test_an_answer_that_is_cancelled_while_it_begins_is_ended(thread):
    """The call that makes it runs on; what it makes is closed, not left open."""
    held, begun, go = Held(), threading.Event(), threading.Event()

    def slow():
        begun.set()
        assert go.wait(60)
        return held

    async def main():
        task = asyncio.create_task(collect(thread.iterate(thread.submit(slow))))
        await asyncio.sleep(0)  # a task that is cancelled before it runs iterates over nothing
        while not begun.is_set():
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        go.set()
        await on(thread)

    asyncio.run(main())
    assert held.closed and held.asked == 0
