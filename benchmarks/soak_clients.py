"""The clients of a soak: good ones, whose answers are checked, bad ones, and ones that leave."""

import random
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .clients import Address, Answer, ask, get, read
from .hostile import Bad, bad_requests, leave_early, send_bad
from .servers import Server
from .solo import Case
from .timing import Tell

MIX = {"streamed": 45, "whole": 20, "leaves": 15, "bad": 20}
DRAIN = 10.0  # seconds in which left rows must be out of the batch

COUNTS = ("good_sent", "good", "left", "bad_sent", "busy")
PROBLEMS = {
    "text_of_another": "answers with another row's steering",
    "wrong_text": "answers that are not the solo run's",
    "wrong_receipt": "answers that name another steering",
    "unanswered": "requests without an answer",
    "server_errors": "statuses of 5xx",
    "hangs": "hangs",
    "not_refused": "bad requests with an unexpected status",
    "interrupted": "interrupted",
}


@dataclass
class Soak:
    """What the clients do, and what they met; threads share it."""

    address: Address
    model: str
    cases: Sequence[Case]
    timeout: float
    tally: Counter = field(default_factory=Counter)
    statuses: dict[str, Counter] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.bad = bad_requests(self.model)
        self._stop = threading.Event()

    def all_once(self, tell: Tell) -> None:
        """Send every good and every bad request once, alone."""
        for number, case in enumerate(self.cases):
            tell(f"alone with the server, {number + 1} of {len(self.cases)} requests")
            bodies = case.bodies(self.model)
            self.good(case, bodies[number % len(bodies)], streamed=number % 3 > 0)
        for bad in self.bad:
            tell(f"alone with the server, bad requests: {bad.name}")
            self.refused(bad)

    def go(
        self, server: Server, clients: int, seconds: float, seed: int, tell: Tell
    ) -> list[tuple[float, float]]:
        """Let the clients loose; return (seconds, MiB) of the server every second."""
        began = time.monotonic()
        threads = [
            threading.Thread(target=self._client, args=(f"{seed} {i}", began + seconds), daemon=True)
            for i in range(clients)
        ]  # fmt: skip
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
                self._stop.wait(1.0)
        except KeyboardInterrupt:
            self._stop.set()
            self._note("interrupted", f"after {(time.monotonic() - began) / 60:.1f} minutes")
        for thread in threads:
            thread.join(self.timeout)
        return samples

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

    def good(self, case: Case, body: Mapping[str, object], *, streamed: bool) -> None:
        """Send a good request and hold its answer against the solo run's."""
        if streamed:
            body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        self._count("good_sent")
        until = time.monotonic() + self.timeout
        while True:
            answer = read(ask(self.address, case.path, body, self.timeout))
            if answer.status != 429 or time.monotonic() > until:
                break
            self._count("busy")  # the queue is full: come again
            time.sleep(0.2)
        self._judge(case, answer, str(body.get("steering") or body["model"]))

    def _judge(self, case: Case, answer: Answer, asked: str) -> None:
        if answer.error:
            self._failed(answer.status, answer.error, asked)
        elif answer.text == case.text:
            self._count("good")
            if case.differs(answer.steering):
                self._note("wrong_receipt", f"{asked}: {answer.steering}")
        else:
            others = [
                other for other in self.cases
                if other.question == case.question and other.text.startswith(answer.text)
            ]  # fmt: skip
            kind = "text_of_another" if answer.text and others else "wrong_text"
            self._note(kind, f"{asked}: {answer.text!r}, expected {case.text!r}")

    def left(self, case: Case, body: Mapping[str, object], rng: random.Random) -> None:
        """Leave a good request in the middle."""
        self._count("left")
        streamed = rng.random() < 0.7
        try:
            leave_early(
                self.address, case.path, {**body, "stream": streamed}, rudely=rng.random() < 0.5,
                pieces=rng.randint(0, 4) if streamed else 0, timeout=self.timeout,
            )  # fmt: skip
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
