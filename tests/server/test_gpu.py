"""A GPU that fails: who is told what, and that the next request is answered."""

import asyncio
import contextlib
import json
import urllib.error
import urllib.request

import pytest

pytest.importorskip("starlette")

from helpers import ROOT
from metal_like import OUT_OF_MEMORY, TIMEOUT
from server_process import server_process
from serving import rest, serving

import mlx_densesteer as ds
from mlx_densesteer.errors import DenseSteerError
from mlx_densesteer.server import worker as worker_module
from mlx_densesteer.server.engine import Engine
from mlx_densesteer.server.faults import Fault, internal
from mlx_densesteer.server.prompt_cache import PromptReading
from mlx_densesteer.server.worker import Failed, Job, Said, Worker

LONG = [10 + n % 50 for n in range(280)]  # too long to be read together with others


pytestmark = pytest.mark.usefixtures("nothing_wired", "others_rest")


@pytest.fixture
def others_rest():
    """What fails here fails in the whole process: a server of other tests that computes then would end."""
    rest()


def job(tokens, max_tokens=3, **options):
    return Job(tokens, None, max_tokens, ds.Sampling(), **options)


@contextlib.contextmanager
def started(model, **limits):
    """A running engine with a real worker on the shared model."""
    limits = {"rows": 4} | limits
    engine = Engine(lambda: Worker(model, cache_bytes=2**24, **limits), rows=4, waiting=8)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


async def answer(engine, job):
    """Return the tokens of a job's answer, or its fault."""
    with engine.holding([job]) as inbox:
        while True:
            _, event = await asyncio.wait_for(inbox.get(), 120)
            if isinstance(event, Failed):
                return event.fault
            if isinstance(event, Said) and event.piece.result:
                return event.piece.result.token_ids


def test_wherever_the_gpu_fails_each_client_is_told_and_the_next_is_answered(
    demo_model, metal_like
):
    """The first evaluation of a day fails, then the second, ..., and up to two after it: those of prompts, of
    decoding and of the recovery."""
    jobs = [([5, 6, 7, 8], {}), (LONG, {"logprobs": 2}), ([9, 6, 7], {})]
    wanted = [ds.generate(demo_model, tokens, max_tokens=3).token_ids for tokens, _ in jobs]
    faults = {OUT_OF_MEMORY: (503, "out_of_memory"), TIMEOUT: (500, "internal_error")}
    device = metal_like.give_device()

    async def days(engine):
        engine.attach(asyncio.get_running_loop())
        told = 0
        for number in range(1, 200):
            message = (OUT_OF_MEMORY, TIMEOUT)[number % 2]
            metal_like.fail_at(number, times=1 + number % 3, message=message)
            found = await asyncio.gather(*(answer(engine, job(t, **o)) for t, o in jobs))
            metal_like.heal()
            for one, right in zip(found, wanted, strict=True):
                if isinstance(one, Fault):
                    assert (one.status, one.code) == faults[message]
                    told += 1
                else:
                    assert one == right
            if not metal_like.failures:
                return number, told
            assert await answer(engine, job(jobs[0][0])) == wanted[0]
        raise AssertionError("a day has no end")

    with started(demo_model) as engine:
        number, told = asyncio.run(days(engine))
        assert told >= number > 10  # each failure is told at least one client
        assert engine.alive and not engine.broken
    assert device.limit == 0


def test_a_prompt_that_cannot_be_read_ends_its_own_job_only(demo_model, monkeypatch):
    advance, broken = PromptReading.advance, []

    def failing(self):
        if len(self._tokens) == len(LONG) and self._prefix.length:
            broken.append(self)
            raise RuntimeError(OUT_OF_MEMORY)
        return advance(self)

    monkeypatch.setattr(PromptReading, "advance", failing)
    worker = Worker(demo_model, rows=4, cache_bytes=2**24)
    beside, long = job([5, 6, 7, 8], 20), job(LONG)
    worker.take(beside)
    told = worker.work()
    worker.take(long)
    while worker.busy:
        told += worker.work()
    assert len(broken) == 1
    faults = [(one, event.fault.code) for one, event in told if isinstance(event, Failed)]
    assert faults == [(long, "out_of_memory")]
    ended = [event.piece.result for one, event in told if one is beside and event.piece.result]
    assert ended[0].token_ids == ds.generate(demo_model, [5, 6, 7, 8], max_tokens=20).token_ids


def test_a_prompt_that_fails_hides_no_failure_of_the_rows(demo_model, metal_like, monkeypatch):
    advance = PromptReading.advance

    def failing(self):
        if len(self._tokens) == len(LONG):
            metal_like.fail_at(3)  # past what belongs to the prompt's own stream
            raise RuntimeError(OUT_OF_MEMORY)
        return advance(self)

    monkeypatch.setattr(PromptReading, "advance", failing)
    worker = Worker(demo_model, rows=4, cache_bytes=2**24)
    jobs = [job([5, 6, 7, 8], 20), job(LONG)]
    worker.take(jobs[0]), worker.work(), worker.take(jobs[1])
    with pytest.raises(RuntimeError, match="Insufficient Memory"):
        worker.work()
    assert [one for one, _ in worker.recover(internal())] == jobs


def test_who_waits_is_answered_after_a_failed_step(demo_model):
    worker = Worker(demo_model, rows=1, cache_bytes=2**24)
    first, second = job([5, 6, 7, 8]), job([9, 6, 7])
    worker.take(first), worker.take(second)
    worker.work()
    assert worker.waiting == 1
    assert [one for one, _ in worker.recover(internal())] == [first]
    told = []
    while worker.busy:
        told += worker.work()
    assert {one for one, _ in told} == {second}
    wanted = ds.generate(demo_model, [9, 6, 7], max_tokens=3).token_ids
    assert told[-1][1].piece.result.token_ids == wanted


def test_memory_is_wired_while_requests_come_and_not_after_minutes_of_quiet(
    demo_model, metal_like, monkeypatch
):
    device = metal_like.give_device()
    worker = Worker(demo_model, rows=1, cache_bytes=2**24)
    assert device.limit == 0
    worker.take(job([5, 6, 7]))
    while worker.busy:
        worker.work()
        assert device.limit == device.working_set
    worker.rest()  # after seconds
    assert device.limit == device.working_set
    monkeypatch.setattr(worker_module, "UNWIRE", 0.0)
    worker.rest()
    assert device.limit == 0
    worker.take(job([5, 6, 7]))
    worker.work()
    assert device.limit == device.working_set
    worker.close()
    assert device.limit == 0


def test_a_stream_tells_that_memory_ran_out(server, monkeypatch):
    from mlx_densesteer.generation.batch import Batch

    step, left = Batch.step, [2]

    def failing(self):
        left[0] -= bool(self.running)
        if not left[0]:
            raise RuntimeError(OUT_OF_MEMORY)
        return step(self)

    monkeypatch.setattr(Batch, "step", failing)
    connection = server.connect()
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 20}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})  # fmt: skip
    response = connection.getresponse()
    assert response.status == 200
    last = response.read().decode().strip().split("\n")[-1]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == ("server_error", "out_of_memory")
    assert "METAL" not in error["message"] and "memory ran out" in error["message"]


def test_where_recovery_fails_too_clients_are_told_and_the_server_ends(metal_like):
    with serving() as server:
        metal_like.fail_at(1, times=None)
        assert server.refusal({})[0] == 500
        server.thread.join(30)
        assert not server.thread.is_alive()
        metal_like.heal()
    assert isinstance(server.error, DenseSteerError)


PROGRAM = """
import sys
sys.path.insert(0, TESTS)
import pytest
from helpers import ROOT
from metal_like import MetalLike
from mlx_densesteer.cli import main
from mlx_densesteer.server.worker import Worker

metal, take = MetalLike(pytest.MonkeyPatch()), Worker.take
metal.watch()

def failing(self, job):
    metal.fail_at(1, times=None)
    return take(self, job)

Worker.take = failing
main()
"""


@pytest.mark.slow
def test_the_process_of_a_dead_gpu_ends_with_an_error_for_launchd():
    with server_process(program=("-c", f"TESTS = {str(ROOT / 'tests')!r}{PROGRAM}")) as server:
        body = json.dumps({"messages": [{"role": "user", "content": "Hi"}]}).encode()
        request = urllib.request.Request(
            f"{server.url}/v1/chat/completions", body, {"Content-Type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=60)
        assert json.loads(refused.value.read())["error"]["code"] == "internal_error"
        assert server.process.wait(60) == 1
        server._reader.join()
        assert "could not go on after an error" in server.said
        assert "Traceback" not in server.said
