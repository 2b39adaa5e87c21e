"""Good, bad and leaving clients load `densesteer serve` for minutes; every answer is checked."""

import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clients import Address, ClientAnswer, ask, get, read
from hostile import Bad, bad_requests, leave_early, send_bad
from known_answers import KnownAnswer, known_answers, saved, two_vectors
from script import main
from servers import GRACE, ServerProcess, our_server, stop

from mlx_densesteer.bench.figures import Measurement, Tell, quiet
from mlx_densesteer.bench.subject import Subject

MIX = {"streamed": 45, "whole": 20, "leaves": 15, "bad": 20}
DRAIN = 10.0  # seconds in which left rows must be out of the batch

COUNTS = ("good_sent", "good", "left", "bad_sent", "busy")
PROBLEMS = {
    "text_of_another": "answers with another row's steering",
    "wrong_text": "answers that are not the known ones",
    "wrong_receipt": "answers that name another steering",
    "unanswered": "requests without an answer",
    "server_errors": "statuses of 5xx",
    "hangs": "hangs",
    "not_refused": "bad requests with an unexpected status",
    "interrupted": "interrupted",
}

JUDGED = 120  # samples, one a second: until then caches fill, and memory grows
GROWTH, SLACK = 1.1, 16.0  # allowed growth from the first to the last quarter: factor, MiB


def run(
    subject: Subject,
    *,
    minutes: float = 10.0,
    clients: int = 8,
    questions: int = 6,
    tokens: int = 48,
    timeout: float = 60.0,
    seed: int = 0,
    tell: Tell = quiet,
) -> Measurement:
    """Load `densesteer serve` with all kinds of clients at once and check every answer.

    First this process answers each question under each steering, one at a time. Then every client
    draws what it does: a good request, streamed or not, whose text must be that answer and whose
    steering the one asked for; a good request that it leaves in the middle; or a bad one, which
    must be refused with a status of 4xx. Meanwhile the server's memory is read and `/health` is
    asked. At the end no row may be left, and the log may hold no traceback and no question. Ctrl-C
    ends it early and still reports.

    Args:
        minutes: minutes of load.
        clients: clients at once.
        questions: different prompts, every second one plain text for `/v1/completions`.
        tokens: tokens of an answer at most.
        timeout: seconds until an answer counts as a hang.
        seed: of the clients' draws.
    """
    vectors = two_vectors(subject)
    tell(f"known answers to {questions} questions")
    cases = known_answers(subject, vectors, questions=questions, tokens=tokens)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        with our_server(subject.name, saved(vectors, place), place) as server:
            model = get(server.address, "/v1/models")["data"][0]["id"]
            soak = Soak(server.address, model, cases, timeout)
            soak.all_once(tell)
            warm = soak.tally["good"]
            samples = soak.go(server, clients, minutes * 60, seed, tell)
            details = {
                "clients": clients,
                "cases": len(cases),
                "different_answers": len({(case.question, case.text) for case in cases}),
                **soak.counts(),
                "once_each_at_first": warm,
                **_end(server, cases),
                "memory": memory(samples),
            }
    details["failures"] = failures(details, soak.examples)
    return Measurement(lines(details), details, {"soak_failures": len(details["failures"])})


@dataclass
class Soak:
    """What the clients do, and counts of what happened; shared by all threads."""

    address: Address
    model: str
    cases: Sequence[KnownAnswer]
    timeout: float
    tally: Counter = field(default_factory=Counter)
    statuses: dict[str, Counter] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.bad = bad_requests(self.model)
        self._stop = threading.Event()

    def all_once(self, tell: Tell) -> None:
        """Send every good and every bad request once, one at a time."""
        for number, case in enumerate(self.cases):
            tell(f"one at a time, {number + 1} of {len(self.cases)} requests")
            bodies = case.bodies(self.model)
            self.good(case, bodies[number % len(bodies)], streamed=number % 3 > 0)
        for bad in self.bad:
            tell(f"one at a time, bad requests: {bad.name}")
            self.refused(bad)

    def go(
        self, server: ServerProcess, clients: int, seconds: float, seed: int, tell: Tell
    ) -> list[tuple[float, float]]:
        """Run all clients; return (seconds, MiB) of the server's memory every second."""
        began = time.monotonic()
        threads = [
            threading.Thread(
                target=self._client, args=(f"{seed} {i}", began + seconds), daemon=True
            )
            for i in range(clients)
        ]
        for thread in threads:
            thread.start()
        samples: list[tuple[float, float]] = []
        try:
            while any(thread.is_alive() for thread in threads):
                now = time.monotonic() - began
                if now > seconds + 2 * self.timeout + DRAIN:
                    self._note("hangs", f"clients still wait {now - seconds:.0f} s after the end")
                    break
                if now <= seconds:
                    samples.append((now, server.resident()))
                    self._healthy()
                tell(
                    f"{now / 60:.1f} of {seconds / 60:.1f} minutes, {self.tally['good']} good answers"
                )
                self._wait(threads)
        except KeyboardInterrupt:
            self._stop.set()
            self._note("interrupted", f"after {(time.monotonic() - began) / 60:.1f} minutes")
        for thread in threads:
            thread.join(self.timeout)
        return samples

    def _wait(self, threads: Sequence[threading.Thread]) -> None:
        """Wait a second, or until all clients are done."""
        until = time.monotonic() + 1.0
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _client(self, seed: str, until: float) -> None:
        rng = random.Random(seed)
        while time.monotonic() < until and not self._stop.is_set():
            kind = rng.choices(list(MIX), list(MIX.values()))[0]
            if kind == "bad":
                self.refused(rng.choice(self.bad))
                continue
            case = rng.choice(self.cases)
            body = rng.choice(case.bodies(self.model))
            if kind == "leaves":
                self.left(case, body, rng)
            else:
                self.good(case, body, streamed=kind == "streamed")

    def good(self, case: KnownAnswer, body: Mapping[str, object], *, streamed: bool) -> None:
        """Send a good request and compare its answer with the known one."""
        if streamed:
            body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        self._count("good_sent")
        until = time.monotonic() + self.timeout
        while True:
            answer = read(ask(self.address, case.path, body, self.timeout))
            if answer.status != 429 or time.monotonic() > until:
                break
            self._count("busy")  # the queue is full: ask again
            time.sleep(0.2)
        self._judge(case, answer, str(body.get("steering") or body["model"]))

    def _judge(self, case: KnownAnswer, answer: ClientAnswer, asked: str) -> None:
        if answer.error:
            self._failed(answer.status, answer.error, asked)
        elif answer.text == case.text:
            self._count("good")
            if case.differs(answer.steering):
                self._note("wrong_receipt", f"{asked}: {answer.steering}")
        else:
            others = [
                other
                for other in self.cases
                if other.question == case.question and other.text.startswith(answer.text)
            ]
            kind = "text_of_another" if answer.text and others else "wrong_text"
            self._note(kind, f"{asked}: {answer.text!r}, expected {case.text!r}")

    def left(self, case: KnownAnswer, body: Mapping[str, object], rng: random.Random) -> None:
        """Leave a good request in the middle."""
        self._count("left")
        streamed, rudely = rng.random() < 0.7, rng.random() < 0.5
        pieces = rng.randint(0, 4) if streamed else 0
        body = {**body, "stream": streamed}
        try:
            leave_early(
                self.address, case.path, body, pieces=pieces, rudely=rudely, timeout=self.timeout
            )
        except OSError as error:
            self._failed(None, f"{type(error).__name__}: {error}", "a client that leaves")

    def refused(self, bad: Bad) -> None:
        """Send a bad request; expect its refusal."""
        self._count("bad_sent")
        try:
            status = send_bad(self.address, bad, self.timeout)
        except OSError as error:
            self._failed(None, f"{type(error).__name__}: {error}", bad.name)
            return
        with self._lock:
            self.statuses.setdefault(bad.name, Counter())[str(status or "closed")] += 1
        if status is not None and status >= 500:
            self._note("server_errors", f"{bad.name}: status {status}")
        elif status not in bad.statuses and not (status is None and bad.silent):
            self._note("not_refused", f"{bad.name}: status {status}")

    def _healthy(self) -> None:
        try:
            get(self.address, "/health", self.timeout)
        except (OSError, RuntimeError) as error:
            self._failed(None, f"/health: {error!r}", "health")

    def _failed(self, status: int | None, error: str, what: str) -> None:
        late = "TimeoutError" in error or "no end after" in error or "timed out" in error
        kind = "hangs" if late else "unanswered"
        self._note("server_errors" if status and status >= 500 else kind, f"{what}: {error}")

    def _count(self, name: str) -> None:
        with self._lock:
            self.tally[name] += 1

    def _note(self, name: str, example: str) -> None:
        """Count a failure and keep the first of its kind."""
        with self._lock:
            self.tally[name] += 1
            self.examples.setdefault(name, example)

    def counts(self) -> dict[str, object]:
        """Return all counts, the zeros too."""
        return {
            **{name: self.tally[name] for name in (*COUNTS, *PROBLEMS)},
            "statuses": {name: dict(found) for name, found in self.statuses.items()},
        }


def _end(server: ServerProcess, cases: Sequence[KnownAnswer]) -> dict[str, object]:
    """Wait until no row is left, stop the server; return what it held and how it ended."""
    until = time.monotonic() + DRAIN
    while True:
        try:
            health = get(server.address, "/health")
        except (OSError, RuntimeError) as error:
            health = {"status": repr(error)}
        if health.get("running") == health.get("waiting") == 0 or time.monotonic() > until:
            break
        time.sleep(0.1)
    files, alive = server.open_files(), server.process.poll() is None
    seconds = stop(server.process)
    said = server.said()
    return {
        "health": health,
        "open_files": files,
        "alive": alive,
        "stop_seconds": round(seconds, 2),
        "exit_code": server.process.returncode,
        "tracebacks": said.count("Traceback"),
        "questions_in_log": sum(case.question in said for case in cases),
        "log_end": said[-2000:],
    }


def memory(samples: Sequence[tuple[float, float]]) -> dict[str, float] | None:
    """Return medians of the first and last quarter in MiB, and the slope in MiB a minute.

    The slope is the least-squares line through all samples.
    """
    if len(samples) < 4:
        return None
    quarter = len(samples) // 4
    times, sizes = zip(*samples, strict=True)
    slope = statistics.linear_regression(times, sizes).slope
    return {
        "first_quarter": statistics.median(sizes[:quarter]),
        "last_quarter": statistics.median(sizes[-quarter:]),
        "largest": max(sizes),
        "slope_per_minute": slope * 60,
        "samples": len(samples),
    }


def failures(details: Mapping[str, object], examples: Mapping[str, str]) -> list[str]:
    """Return a line for each failure."""
    d, health, held = details, details["health"], details["memory"]
    found = [
        f"{d[name]} {said}; the first: {examples.get(name, '')}"
        for name, said in PROBLEMS.items()
        if d[name]
    ]
    if d["good"] != d["good_sent"]:
        found.append(f"{d['good']} of {d['good_sent']} good requests have the known answer")
    if health.get("running") != 0 or health.get("waiting") != 0:
        found.append(f"rows are left {DRAIN:g} s after the end: {health}")
    if not d["alive"]:
        found.append(f"the server died: exit code {d['exit_code']}")
    if d["exit_code"] == -signal.SIGKILL:
        found.append(f"SIGTERM did not end the server within {GRACE:g} s")
    elif d["exit_code"] not in (0, -signal.SIGTERM, 128 + signal.SIGTERM):
        found.append(f"SIGTERM ended the server with exit code {d['exit_code']}")
    for name in ("tracebacks", "questions_in_log"):
        if d[name]:
            found.append(f"{d[name]} {name.replace('_', ' ')}")
    if held and held["samples"] >= JUDGED:
        first, last = held["first_quarter"], held["last_quarter"]
        if last > first * GROWTH + SLACK:
            found.append(f"memory grew from {first:.0f} to {last:.0f} MiB")
    return found


def lines(details: Mapping[str, object]) -> list[str]:
    """Return the report."""
    d, health = details, details["health"]
    statuses: Counter = sum((Counter(of) for of in d["statuses"].values()), Counter())
    shown = ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items()))
    table = [
        f"{d['clients']} clients; {d['cases']} requests with known answers, "
        f"{d['different_answers']} of these different",
        f"good      {d['good']} of {d['good_sent']} answered with the known text",
        f"left      {d['left']} in the middle; running {health.get('running')}, "
        f"waiting {health.get('waiting')} at the end",
        f"bad       {d['bad_sent']}, statuses {shown}",
        *(f"          {d[name]} {said}" for name, said in PROBLEMS.items()),
        f"ending    {d['stop_seconds']:.1f} s, exit code {d['exit_code']}, "
        f"{d['open_files']} open files before",
    ]
    if held := d["memory"]:
        table.append(
            f"memory    {held['first_quarter']:.0f} MiB in the first quarter, "
            f"{held['last_quarter']:.0f} in the last, {held['largest']:.0f} at most, "
            f"{held['slope_per_minute']:+.2f} MiB/min"
        )
    verdict = [f"FAILED    {one}" for one in d["failures"]] or ["passed"]
    return [*table, *verdict]


if __name__ == "__main__":
    sys.exit(bool(main(run).figures["soak_failures"]))
