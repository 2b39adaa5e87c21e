"""The thread that owns the model: the real one, with a real worker."""

import asyncio

import pytest

pytest.importorskip("starlette")

from mlx_densesteer import Sampling
from mlx_densesteer.server import engine as engine_module
from mlx_densesteer.server.engine import Engine
from mlx_densesteer.server.worker import Failed, Job, Said, Worker


@pytest.fixture
def started(demo_model):
    """A running engine on the shared demo model; ``took`` lists how many jobs waited at each start of work."""
    took = []

    class Watched(Worker):
        def work(self):
            if self.waiting:
                took.append(self.waiting)
            return super().work()

    engine = Engine(lambda: Watched(demo_model, rows=8, cache_bytes=2**20), rows=8, waiting=8)
    engine.start()
    yield engine, took
    engine.close()


def job(number, max_tokens=3):
    return Job([5 + number, 6, 7, 8], None, max_tokens, Sampling(temp=0.0))


async def answered(engine, number, max_tokens=3, begun=None):
    with engine.holding([job(number, max_tokens)]) as inbox:
        while True:
            _, event = await asyncio.wait_for(inbox.get(), 30)
            assert not isinstance(event, Failed)
            if begun is not None:
                begun.set()
            if isinstance(event, Said) and event.piece.result:
                return


def test_clients_that_ran_together_are_gathered_and_a_single_one_never_waits(started, monkeypatch):
    monkeypatch.setattr(engine_module, "GATHER", 3600.0)  # a wait in vain would show
    engine, took = started

    async def after(seconds, number):
        await asyncio.sleep(seconds)
        await answered(engine, number)

    async def day():
        engine.attach(asyncio.get_running_loop())
        await answered(engine, 0)
        await answered(engine, 1)  # alone before, so it is not made to wait
        begun = asyncio.Event()
        first = asyncio.create_task(answered(engine, 2, 200, begun))
        await begun.wait()
        await asyncio.gather(answered(engine, 3), answered(engine, 4))  # beside the first
        assert not first.done()
        await first
        took.clear()
        await asyncio.gather(*(after(0.03 * number, number) for number in range(3)))

    asyncio.run(day())
    assert took == [3]


def test_a_client_that_does_not_come_is_not_waited_for_long(started):
    engine, took = started

    async def day():
        engine.attach(asyncio.get_running_loop())
        await asyncio.gather(*(answered(engine, number) for number in range(3)))
        took.clear()
        await answered(engine, 4)
        await answered(engine, 5)

    asyncio.run(day())
    assert took == [1, 1]
