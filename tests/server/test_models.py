"""Several models on one server: the demo, another one of its size, and a tiny one."""

import contextlib
import gc
import json
import random
import shutil
import signal
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner

pytest.importorskip("starlette")

from server_process import assert_no_internals, server_process
from serving import Serving, serving

from mlx_densesteer import demo
from mlx_densesteer.cli import main
from mlx_densesteer.server import start as start_module

NAMES = ["abacus", "beads", "tiny"]
QUESTION = "Ben has 24 stones. Later Ben buys 21. How many stones does Ben have now?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, hf_folder):
    """Three models: the demo in float32; the same with another last norm; the tiny one, whose size is another."""
    made = tmp_path_factory.mktemp("models")
    weights = mx.load(str(demo.MODEL / "model.safetensors"))
    weights = {name: array.astype(mx.float32) for name, array in weights.items()}
    last = weights["model.norm.weight"]
    changed = weights | {"model.norm.weight": last * mx.linspace(-1.0, 2.0, last.size)}
    for name, arrays in (("abacus", weights), ("beads", changed)):
        shutil.copytree(demo.MODEL, made / name)
        mx.save_safetensors(
            str(made / name / "model.safetensors"), arrays, metadata={"format": "mlx"}
        )
    shutil.copytree(hf_folder, made / "tiny")
    (made / "no model").mkdir()
    return made


@pytest.fixture
def linked(folder, tmp_path):
    """A folder of one's own with links to the three models."""
    made = tmp_path / "linked"
    made.mkdir()
    for name in NAMES:
        (made / name).symlink_to(folder / name)
    return made


@pytest.fixture
def gate(monkeypatch):
    """Let models load only while ``gate`` is set; ``loads`` are the names in the order of loading."""
    gate, load = threading.Event(), start_module.load
    gate.loads = []
    gate.set()

    def held(place):
        gate.loads.append(Path(place).name)
        assert gate.wait(30)
        return load(place)

    monkeypatch.setattr(start_module, "load", held)
    yield gate
    gate.set()


@pytest.fixture
def steps(monkeypatch):
    """Let answers go on only while ``steps`` is set."""
    from mlx_densesteer.generation.batch import Batch

    steps, step = threading.Event(), Batch.step
    steps.set()

    def held(self):
        assert steps.wait(30)
        return step(self)

    monkeypatch.setattr(Batch, "step", held)
    yield steps
    steps.set()


def text(body):
    return body["choices"][0]["message"]["content"]


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def states(server):
    return server.ask("/health")[2]["models"]


def test_a_model_is_loaded_when_a_request_names_it(folder):
    with serving(None, models=folder) as server:
        status, _, health = server.ask("/health")
        assert (status, health["models"], health["model"]) == (200, {}, None)
        listed = server.ask("/v1/models")[2]["data"]
        assert [(one["id"], one["loaded"]) for one in listed] == [(name, False) for name in NAMES]
        status, message = server.refusal({})
        assert status == 400 and "abacus, beads, tiny" in message
        assert server.ask("/v1/steering")[0] == 400
        for path, fields in (("/v1/chat/completions", {}), ("/v1/completions", {"prompt": "Hi"})):
            status, message = server.refusal(
                {"model": "other@dense", "stream": True} | fields, path
            )
            assert status == 404 and "'other'" in message and "abacus, beads, tiny" in message
        assert server.ask("/v1/models/other")[0] == server.ask("/v1/steering?model=other")[0] == 404
        assert states(server) == {}

        body = server.chat(QUESTION, model="Tiny", max_tokens=2)
        assert body["model"] == "tiny" and states(server) == {"tiny": "loaded"}
        body = server.chat(QUESTION, max_tokens=2)  # names none: the one that was loaded last
        assert body["model"] == "tiny"
        overview = server.ask("/v1/steering?model=abacus")[2]
        assert overview["model"]["id"] == "abacus" and states(server) == {"abacus": "loaded"}
        assert server.ask("/v1/models/beads")[2]["loaded"] is False
        assert server.ask("/v1/models/abacus")[2]["loaded"] is True


@pytest.mark.parametrize("keep", [1, 2])
def test_answers_of_several_models_never_mix(folder, tmp_path, gate, keep):
    shutil.copy(demo.VECTOR, tmp_path / "dense.npz")
    names = ["abacus", "beads", "tiny", "abacus@dense=40%"]
    with serving(None, models=folder, folder=tmp_path, keep=keep) as server:
        alone = {name: text(server.chat(QUESTION, model=name, max_tokens=30)) for name in names}
        assert len(set(alone.values())) == 4
        asked = names * 4
        random.Random(keep).shuffle(asked)
        gate.loads.clear()
        with ThreadPoolExecutor(len(asked)) as pool:
            answers = list(pool.map(lambda name: server.chat(QUESTION, model=name, max_tokens=30), asked))  # fmt: skip
        assert [text(body) for body in answers] == [alone[name] for name in asked]
        assert [body["model"] for body in answers] == asked
        assert len(states(server)) <= keep
        assert len(gate.loads) < len(asked) // 2  # those that wait for one model get it together


def test_a_request_for_another_model_is_not_overtaken(folder, gate, steps):
    ended = []

    def ask(server, name):
        ended.append(server.chat(QUESTION, model=name, max_tokens=3)["model"])

    with serving(None, models=folder) as server, ThreadPoolExecutor(4) as pool:
        ask(server, "abacus")
        steps.clear()
        for number, name in enumerate(["abacus", "tiny", "abacus", "tiny"]):
            pool.submit(ask, server, name)
            until(lambda number=number: server.engine.promised == number + 1)
        health = server.ask("/health")[2]
        assert (health["running"], health["waiting"]) == (1, 3)
        assert health["models"] == {"abacus": "loaded"}
        steps.set()
        until(lambda: len(ended) == 5)
        assert ended == ["abacus", "abacus", "tiny", "tiny", "abacus"]
        assert gate.loads == ["abacus", "tiny", "abacus"]


def test_who_waits_is_told_and_may_leave(folder, steps):
    def stream(server, name):
        connection = server.connect()
        body = {"model": name, "stream": True, "max_tokens": 3, "messages": [{"role": "user", "content": "Hi"}]}  # fmt: skip
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})  # fmt: skip
        return connection, connection.getresponse()

    with serving("demo", [], models=folder, ping=0.05) as server, ThreadPoolExecutor(2) as pool:
        steps.clear()
        running = pool.submit(server.chat, QUESTION, max_tokens=2)  # names none: that of -m
        until(lambda: server.engine.promised == 1)
        connection, response = stream(server, "tiny")
        assert [response.readline() for _ in range(4)] == [b": waiting for tiny\n", b"\n"] * 2
        other, _ = stream(server, "beads")
        until(lambda: server.engine.promised == 3)
        other.close()
        until(lambda: server.engine.promised == 2)
        steps.set()
        lines = response.read().decode().split("\n\n")
        assert json.loads(lines[-3].removeprefix("data: "))["model"] == "tiny"
        assert lines[-2] == "data: [DONE]"
        connection.close()
        assert running.result()["model"] == "demo"
        assert states(server) == {"tiny": "loaded"}


def test_a_refusal_after_the_wait_is_told_in_the_stream(folder, gate):
    with serving(None, models=folder, ping=0.05) as server:
        gate.clear()
        connection = server.connect()
        body = {"model": "tiny@none", "stream": True, "messages": [{"role": "user", "content": "Hi"}]}  # fmt: skip
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})  # fmt: skip
        response = connection.getresponse()
        assert response.readline() == b": waiting for tiny\n"
        assert states(server) == {"tiny": "loading"}
        gate.set()
        last = response.read().decode().strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "vector_not_found"
        connection.close()


def test_the_queue_is_limited(folder, steps):
    with serving("demo", [], models=folder, rows=1, queue=1) as server, ThreadPoolExecutor(3) as pool:  # fmt: skip
        steps.clear()
        running = [pool.submit(server.chat, QUESTION, max_tokens=2)]
        until(lambda: server.engine.promised == 1)
        running += [pool.submit(server.chat, "Hi", model="tiny", max_tokens=2) for _ in range(2)]
        until(lambda: server.engine.promised == 3)
        for name in ("tiny", "beads", "demo"):
            assert server.refusal({"model": name})[0] == 429
        steps.set()
        assert [one.result()["model"] for one in running] == ["demo", "tiny", "tiny"]


def test_two_models_answer_side_by_side(folder, tmp_path, gate):
    """Each takes turns with the other at the steps, and none of them is unloaded."""
    shutil.copy(demo.VECTOR, tmp_path / "dense.npz")
    with (
        serving(None, models=folder, folder=tmp_path, keep=2) as server,
        ThreadPoolExecutor(4) as pool,
    ):
        for name in ("abacus", "beads"):
            server.chat("Hi", model=name, max_tokens=1)
        asked = ["abacus", "beads"] * 6
        answers = pool.map(lambda name: server.chat(QUESTION, model=name, max_tokens=20), asked)
        assert [body["model"] for body in answers] == asked
        long = pool.submit(server.chat, QUESTION, model="abacus@dense=60", max_tokens=700)
        until(lambda: server.engine.promised == 1)
        server.chat(QUESTION, model="beads", max_tokens=5)
        assert not long.done()
        long.result()
        assert gate.loads == ["abacus", "beads"]
        server.chat("Hi", model="abacus", max_tokens=1)
        server.chat("Hi", model="tiny", max_tokens=1)
        assert set(states(server)) == {"abacus", "tiny"}  # beads was not used for longest


def test_a_model_without_requests_is_unloaded_and_its_memory_is_free(folder):
    with serving(None, models=folder, unload=0.2) as server:
        gc.collect()
        mx.clear_cache()
        threads = {*threading.enumerate()}  # also those of other tests
        before = mx.get_active_memory() + mx.get_cache_memory()
        for _ in range(2):
            server.chat(QUESTION, model="abacus", max_tokens=3)
            network = weakref.ref(server.engine._slots["abacus"].served.vectors.model.network.model)
            assert mx.get_active_memory() > before + 8e6  # its weights take 9.9 MB
            until(lambda: states(server) == {})
            assert network() is None
            assert mx.get_active_memory() + mx.get_cache_memory() < before + 1e6
        assert not [one for one in {*threading.enumerate()} - threads if one.name == "model"]
        body = server.chat(QUESTION, max_tokens=3)  # the one that was loaded last
        assert body["model"] == "abacus"


def test_a_model_that_cannot_be_loaded_is_named_and_tried_again(linked, caplog):
    broken = linked / "broken"
    shutil.copytree(linked / "tiny", broken)
    weights = broken / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with serving(None, models=linked, keep=2) as server:
        server.chat("Hi", model="beads", max_tokens=1)
        for _ in range(2):
            status, message = server.refusal({"model": "broken"})
            assert status == 500 and message.startswith("model broken cannot be loaded: ")
            assert str(linked.parent) not in message
        until(lambda: states(server) == {"beads": "loaded"})
        assert server.chat("Hi", model="beads", max_tokens=1)["model"] == "beads"
        weights.write_bytes(whole)
        assert server.chat("Hi", model="broken", max_tokens=1)["model"] == "broken"
        shutil.rmtree(broken)  # a folder that goes, and one that comes
        assert server.refusal({"model": "broken"})[0] == 404
        (linked / "new").symlink_to(linked / "tiny")
        assert server.chat("Hi", model="new", max_tokens=1)["model"] == "new"
    assert_no_internals(caplog.text.partition("Traceback")[0])


def test_a_model_larger_than_the_memory_is_a_503(folder, metal_like):
    with serving(None, models=folder) as server:
        server.chat("Hi", model="tiny", max_tokens=1)
        metal_like.give_device(working_set=5_000_000)
        with ThreadPoolExecutor(2) as pool:
            refusals = list(pool.map(server.refusal, [{"model": "abacus"}] * 2))
        for status, message in refusals:
            assert status == 503 and message.startswith(
                "no memory for model abacus: the model takes"
            )
            assert str(folder) not in message
        metal_like.give_device(working_set=2**33)
        assert server.chat("Hi", model="abacus", max_tokens=1)["model"] == "abacus"


def test_vectors_belong_to_their_model(folder, tmp_path):
    (tmp_path / "beads").mkdir()
    for name in ("shared", "beads/its-own"):
        shutil.copy(demo.VECTOR, tmp_path / f"{name}.npz")
    with serving("demo", models=folder, folder=tmp_path, keep=2) as server:
        assert set(vectors(server, "demo")) == {"demo", "shared"}
        assert set(vectors(server, "beads")) == {"its-own", "shared"}
        assert set(vectors(server, "abacus")) == {"shared"}
        assert set(vectors(server, "tiny")) == set()  # of another size
        for asked in ({"model": "abacus@its-own"}, {"model": "abacus", "steering": {"vector": "its-own"}}):  # fmt: skip
            status, message = server.refusal(asked)
            assert status == 400 and message == "no vector 'its-own': abacus has shared."
        status, message = server.refusal({"model": "tiny@shared"})
        assert status == 400 and "vector 'shared' cannot be used" in message
        assert server.chat("Hi", model="beads@its-own=10%", max_tokens=1)["steering"]["dose"] == 0.1
        server.chat("Hi", model="tiny", max_tokens=1)
        assert "demo" not in states(server)
        assert (
            server.chat("Hi", model="demo@demo=20%", max_tokens=1)["steering"]["vector"] == "demo"
        )
        listed = [one["id"] for one in server.ask("/v1/models")[2]["data"]]
        assert listed[:3] == ["demo", "demo@demo=20%", "demo@shared=20%"]
        assert set(NAMES) <= set(listed)


def vectors(server, model):
    return [one["name"] for one in server.ask(f"/v1/steering?model={model}")[2]["vectors"]]


def test_the_end_waits_for_no_model(folder, gate):
    with serving(None, models=folder, grace=0.2) as server, ThreadPoolExecutor(1) as pool:
        gate.clear()
        asked = pool.submit(server.refusal, {"model": "abacus"})
        until(lambda: states(server) == {"abacus": "loading"})
        server.uvicorn.should_exit = True
        assert asked.result() == (503, "the server is shutting down.")
        gate.set()
        server.thread.join(20)
        assert not server.thread.is_alive() and server.error is None


def test_a_model_that_cannot_go_on_ends_the_server(folder, monkeypatch):
    from mlx_densesteer.server.worker import Worker

    def failing(*_):
        raise RuntimeError("the device is gone")

    with serving(None, models=folder, keep=2) as server:
        for name in ("abacus", "tiny"):
            server.chat("Hi", model=name, max_tokens=1)
        for name in ("work", "recover"):
            monkeypatch.setattr(Worker, name, failing)
        with contextlib.suppress(OSError):
            assert server.refusal({"model": "abacus"})[0] == 500
        server.thread.join(20)
        assert "could not go on" in str(server.error)


def test_the_options_go_together(folder, tmp_path, monkeypatch):
    def refused(*words):
        result = CliRunner().invoke(main, ["serve", *map(str, words)])
        assert result.exit_code == 2, result.output
        return " ".join(result.output.split())

    assert "add -m MODEL, or --models DIR" in refused()
    for words in (("--keep", 2), ("--idle", 1)):
        assert "--models DIR: add it" in refused("-m", "demo", *words)
    for words in (("-v", "demo"), ("--name", "x")):
        assert "-v and --name are for the model of -m" in refused("--models", folder, *words)
    refused("--models", folder, "--idle", 0)

    monkeypatch.chdir(folder.parent)
    agent = ["serve", "--models", folder.name, "--keep", "2", "--idle", "5", "--install-agent"]
    monkeypatch.setattr("sys.platform", "linux")
    result = CliRunner().invoke(main, agent)
    assert result.exit_code == 0, result.output
    words = [line.strip() for line in result.output.splitlines()]
    at = words.index("<string>--models</string>")
    told = [word.removeprefix("<string>").removesuffix("</string>") for word in words[at : at + 6]]
    assert told == ["--models", str(folder), "--keep", "2", "--idle", "5.0"]


SLOW = """
import time
from mlx_densesteer.server import start
load = start.load
start.load = lambda place: (place != "demo" and time.sleep(1.5), load(place))[1]
from mlx_densesteer.cli import main
main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_a_model_is_loaded_ends_the_process(folder, number, code):
    with server_process("--models", str(folder), "--grace", "0", program=("-c", SLOW)) as server:
        assert "serving 4 models (demo, abacus, beads, tiny)" in server.said
        client = Serving(None, server.url)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(client.refusal, {"model": "tiny"})
            until(lambda: states(client) == {"tiny": "loading"})
            assert server.stop(number, 20) == code
            assert asked.result()[0] == 503
        assert_no_internals(server.said)
