"""The load benchmark and the soak, on the demo model with the smallest sizes.

Nothing here looks at how fast anything is.
"""

import json
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import constrained
import pytest
import serve
import servers
import soak
from clients import CHAT, Address, ClientAnswer, Received, ask, drive, get, read
from hostile import Bad, bad_requests, leave_early, post, send_bad
from known_answers import KnownAnswer, known_answers, two_vectors
from script import main

from mlx_densesteer.bench.subject import Subject
from mlx_densesteer.steering.steering import Steering


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject.load("demo")


def event(**fields: object) -> bytes:
    return f"data: {json.dumps(fields)}\n\n".encode()


STREAM = (
    event(choices=[{"delta": {"role": "assistant", "content": ""}}], steering={"fingerprint": "f"})
    + b": keepalive 1/2\n\n"
    + event(choices=[{"delta": {"content": "Good "}}])
    + event(choices=[{"delta": {"content": "day."}}])
    + event(choices=[{"delta": {}, "finish_reason": "stop"}])
    + event(choices=[], usage={"completion_tokens": 3})
    + b"data: [DONE]\n\n"
)


def streamed(*pieces: bytes, problem: str | None = None) -> ClientAnswer:
    timed = [(10.0 + number, piece) for number, piece in enumerate(pieces)]
    return read(Received(10.0, 20.0, 200, "text/event-stream; charset=utf-8", timed, problem))


@pytest.mark.parametrize("cut", range(1, len(STREAM), 7))
def test_a_stream_reads_the_same_wherever_it_is_cut(cut):
    answer = streamed(STREAM[:cut], STREAM[cut:])
    assert (answer.text, answer.tokens, answer.finish, answer.error) == (
        "Good day.",
        3,
        "stop",
        None,
    )
    assert answer.steering == {"fingerprint": "f"} and answer.seconds == 10.0
    complete = STREAM.index(b"\n", STREAM.index(b"Good ")) < cut
    assert answer.first_text == (0.0 if complete else 1.0)


@pytest.mark.parametrize(("stream", "error"), [
    (STREAM.replace(b"data: [DONE]\n\n", b""), "ended without [DONE]"),
    (STREAM.replace(b"completion_tokens", b"tokens"), "an event that is not OpenAI's"),
    (STREAM.replace(b'"usage"', b'"used"'), "without finish_reason or usage"),
    (event(error={"message": "out of memory"}), "in the stream: out of memory"),
    (b"data: {half\n\n", "an event that is not OpenAI's"),
    (b"", "ended without [DONE]"),
])  # fmt: skip
def test_a_stream_that_is_not_whole_is_an_error(stream, error):
    assert error in streamed(stream).error


def test_an_answer_that_is_not_streamed():
    body = {
        "choices": [{"message": {"content": "Good day."}, "finish_reason": "length"}],
        "usage": {"completion_tokens": 4}, "steering": None,
    }  # fmt: skip
    whole = Received(1.0, 3.0, 200, "application/json", [(2.0, json.dumps(body).encode())])
    answer = read(whole)
    assert (answer.text, answer.tokens, answer.finish) == ("Good day.", 4, "length")
    assert answer.error is None and answer.first_text == answer.seconds == 2.0
    refused = Received(1.0, 3.0, 429, "", [(2.0, b'{"error": {"message": "full"}}')])
    assert read(refused).error == "status 429: full"
    assert "OpenAI's shape" in read(Received(1.0, 3.0, 200, "", [(2.0, b"[]")])).error


class Handler(BaseHTTPRequestHandler):
    """Answers a chat request with the same text always, streamed."""

    answer = STREAM

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write(self.answer)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def small_server() -> Iterator[Address]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Address("127.0.0.1", server.server_port)
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def mute_server() -> Iterator[Address]:
    """Accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=8) as listening:
        yield Address("127.0.0.1", listening.getsockname()[1])


def test_clients_send_every_request_once():
    with small_server() as address:
        done = drive(address, CHAT, [{"n": n} for n in range(7)], clients=3, timeout=10.0)
    assert [answer.text for answer in done.answers] == ["Good day."] * 7
    assert all(0 < answer.first_text <= answer.seconds <= done.seconds for answer in done.answers)


def test_nothing_is_raised_by_a_server_that_is_mute_or_gone():
    with mute_server() as address:
        assert ask(address, CHAT, {}, timeout=0.1).problem == "no end after 0.1 s"
        with pytest.raises(OSError):
            get(address, "/health", timeout=0.1)
        with pytest.raises(TimeoutError):
            send_bad(address, Bad("some", post(b"{}")), timeout=0.1)
    assert "ConnectionRefusedError" in ask(address, CHAT, {}, timeout=1.0).problem


def case(text: str, how: Steering | None = None) -> KnownAnswer:
    return KnownAnswer("How many?", True, how, 3, text)


def test_the_soak_tells_another_rows_text_from_a_wrong_one():
    cases = [case("Good day."), case("Good night."), case("Never.")]
    with small_server() as address:
        soaked = soak.Soak(address, "demo", cases[1:], 10.0)
        body = {"model": "demo"}
        soaked.good(cases[1], body, streamed=True)
        assert soaked.tally == Counter(good_sent=1, wrong_text=1)
        soaked.cases = cases
        soaked.good(cases[2], body, streamed=True)
        assert soaked.tally["text_of_another"] == 1 and soaked.tally["good"] == 0
        soaked.good(cases[0], body, streamed=True)
        assert soaked.tally["good"] == 1
        assert soaked.tally["wrong_receipt"] == 1  # it names a steering, none was asked for
        soaked.refused(Bad("some", post(b"{}"), (400,)))
        assert soaked.tally["not_refused"] == 1 and soaked.statuses == {"some": {"200": 1}}
    soaked.good(cases[0], body, streamed=True)
    assert soaked.tally["unanswered"] == 1
    with mute_server() as address:
        late = soak.Soak(address, "demo", cases, 0.1)
        late.good(cases[0], body, streamed=True)
        late.refused(Bad("some", post(b"{}")))
        assert late.tally["hangs"] == 2


def test_what_must_not_be_is_said():
    fine = {
        **dict.fromkeys(soak.PROBLEMS, 0), "good": 5, "good_sent": 5, "alive": True, "exit_code": 0,
        "health": {"running": 0, "waiting": 0}, "tracebacks": 0, "questions_in_log": 0,
        "memory": {"first_quarter": 100.0, "last_quarter": 101.0, "samples": 120},
    }  # fmt: skip
    grown = {**fine["memory"], "last_quarter": 130.0}
    assert soak.failures(fine, {}) == []
    assert soak.failures({**fine, "memory": {**grown, "samples": 30}}, {}) == []
    for change, said in [
        ({"hangs": 1}, "1 hangs; the first: so"),
        ({"good": 4}, "4 of 5 good requests"),
        ({"health": {"running": 1, "waiting": 0}}, "rows are left"),
        ({"alive": False}, "the server died"),
        ({"exit_code": -signal.SIGKILL}, "SIGTERM did not end"),
        ({"exit_code": -signal.SIGABRT}, "SIGTERM ended the server with exit code -6"),
        ({"tracebacks": 2}, "2 tracebacks"),
        ({"memory": grown}, "memory grew from 100 to 130"),
    ]:
        (found,) = soak.failures({**fine, **change}, {"hangs": "so"})
        assert found.startswith(said)


def test_memory_is_read_at_both_ends():
    grows = soak.memory([(float(second), 100.0 + second) for second in range(0, 80, 2)])
    assert grows["first_quarter"] == 109.0 and grows["last_quarter"] == 169.0
    assert grows["slope_per_minute"] == pytest.approx(60.0) and grows["samples"] == 40
    assert soak.memory([(0.0, 1.0)]) is None


def test_percentiles():
    assert serve.percentile([], 95) is None
    assert serve.percentile([3.0], 95) == 3.0
    assert serve.percentile(list(map(float, range(1, 101))), 95) == 95.0
    assert serve.percentile([1.0, 2.0], 50) == 1.0


def test_every_round_and_pair_of_sides_has_questions_of_its_own():
    sets = [serve.questions(f"{pair} {clients} {turn}", 4) for pair in (0, 1) for clients in (1, 4)
            for turn in ("0", "1", "warm")]  # fmt: skip
    assert len({question for one in sets for question in one}) == 4 * len(sets)
    assert serve.questions("0 1 0", 4) == sets[0]


def test_a_shared_prefix_is_about_as_long_as_asked_for(subject):
    assert serve.system_message(subject, 0) is None
    text = serve.system_message(subject, 100)
    assert 100 <= len(subject.model.tokenizer.encode(text)) < 200


def test_known_answers_differ_and_name_the_steering_in_every_way(subject):
    vectors = two_vectors(subject)
    cases = known_answers(subject, vectors, questions=1, tokens=8)
    assert len(cases) > 9 and len({one.text for one in cases}) > 3
    assert all(1 <= one.max_tokens <= 8 for one in cases)
    plain, steered = cases[0], cases[1]
    assert (
        plain.steering is None and not plain.differs(None) and plain.differs({"fingerprint": "f"})
    )
    assert not steered.differs({"fingerprint": steered.steering.fingerprint})
    assert steered.differs(None) and steered.differs({"fingerprint": cases[2].steering.fingerprint})
    assert len(plain.bodies("demo")) == 2
    field, named = steered.bodies("demo")
    strength = field["steering"]["strength"]
    assert float(named["model"].removeprefix("demo@low=")) == strength and "steering" not in named
    prompt = next(one for one in cases if one.steering and one.steering.positions == "prompt")
    assert len(prompt.bodies("demo")) == 1  # a model's name cannot say it


def test_bad_requests_have_names_of_their_own():
    names = [bad.name for bad in bad_requests("demo")]
    assert len(set(names)) == len(names) > 25


def test_a_client_that_leaves_is_no_error():
    with small_server() as address:
        for rudely in (False, True):
            leave_early(address, CHAT, {}, pieces=1, rudely=rudely, timeout=10.0)


def test_a_server_that_does_not_start_gives_its_last_words(tmp_path, monkeypatch):
    command = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    monkeypatch.setattr(servers, "serve_command", lambda *_: command)
    with (
        pytest.raises(subprocess.CalledProcessError, match="exit status 1") as caught,
        servers.our_server("demo", [], tmp_path),
    ):
        pass
    assert "no such model" in caught.value.stderr


def test_no_server_is_left_behind(tmp_path, monkeypatch):
    code = (
        "import sys, time; print('serving on http://127.0.0.1:1', file=sys.stderr, flush=True);"
        "time.sleep(60)"
    )
    monkeypatch.setattr(servers, "serve_command", lambda *_: [sys.executable, "-c", code])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit), servers.our_server("demo", [], tmp_path) as server:
        assert server.address == ("127.0.0.1", 1) and server.resident() > 1
        signal.raise_signal(signal.SIGTERM)
    assert server.process.returncode == -signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def real_server() -> None:
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")


@pytest.mark.slow
def test_the_load_of_answers_in_json(real_server, monkeypatch, capsys):
    pytest.importorskip("llguidance")
    words = "demo --clients 2 --requests 1 --rounds 1 --tokens 6 --json"
    monkeypatch.setattr(sys, "argv", ["benchmarks/constrained.py", *words.split()])
    main(constrained.run)
    result = json.loads(capsys.readouterr().out)
    assert result["constrained_errors"] == 0 < result["constrained_ratio"] <= 1
    assert set(result["details"]["seconds_a_token"]["2"]) == set(constrained.SIDES) - {"a call required"}  # fmt: skip


@pytest.mark.slow
def test_the_load_of_both_servers(real_server, monkeypatch, capsys):
    words = "demo --clients 2 --requests 1 --rounds 1 --tokens 6 --json"
    monkeypatch.setattr(sys, "argv", ["benchmarks/serve.py", *words.split()])
    made = main(serve.run)
    result = json.loads(capsys.readouterr().out)
    assert {"serve_ratio", "serve_unsteered_ratio", "serve_errors"} <= set(result)
    assert result["serve_errors"] == 0
    level = result["details"]["clients"]["2"]
    assert list(level["sides"]) == list(serve.NAMES)
    for side in level["sides"].values():
        assert side["errors"] == 0 and side["requests"] == 2 and side["tokens"] > 0
        assert side["first_token_median"] <= side["first_token_p95"] <= side["request_p95"]
    assert level["same_text"] == {"answers": 2, "same_text": 2, "same_tokens": 2}
    assert level["ratios"]["steered"]["median"] == result["serve_ratio"] > 0
    assert max(map(len, made.table)) < 150 and not any("ERROR" in line for line in made.table)


@pytest.mark.slow
def test_a_short_soak_passes(real_server, monkeypatch, capsys):
    words = "demo --minutes 0.1 --clients 3 --questions 2 --tokens 12"
    monkeypatch.setattr(sys, "argv", ["benchmarks/soak.py", *words.split()])
    made = main(soak.run)
    out = capsys.readouterr().out
    assert made.figures["soak_failures"] == 0, out
    assert out.rstrip().endswith("passed")
