"""Minutes of good, bad and leaving clients: is every good answer its own solo run's?"""

import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from .clients import get
from .servers import GRACE, Server, our_server, stop
from .soak_clients import DRAIN, PROBLEMS, Soak
from .solo import Case, saved, solo_cases, two_vectors
from .subject import Subject
from .timing import Tell, quiet

JUDGED = 120  # samples, one a second: until then caches fill, and growth says nothing
GROWTH, SLACK = 1.1, 16.0  # the last quarter may hold so much more than the first: share, MiB

LAST_FAILURES: list[str] = []  # of the last ``run``, for the exit code


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
) -> dict[str, object]:
    """Load `densesteer serve` with all kinds of clients at once and check every answer.

    First each question is answered under each steering alone, in this process. Then every client
    draws what it does: a good request, streamed or not, whose text must be that solo answer and
    whose steering the one asked for; one that it leaves in the middle; a bad one, which must be
    refused with a status of 4xx. Meanwhile the server's memory is read and its `/health` asked.
    In the end nothing may run any more, and its log may hold no traceback and no question.
    Ctrl-C ends it early and still reports.

    Args:
        minutes: how long.
        clients: how many at once.
        questions: different prompts, every second one plain text for `/v1/completions`.
        tokens: tokens of an answer at most.
        timeout: seconds until an answer counts as a hang.
        seed: of the clients' draws.
    """
    LAST_FAILURES.clear()
    vectors = two_vectors(subject)
    tell(f"solo answers to {questions} questions")
    cases = solo_cases(subject, vectors, questions=questions, tokens=tokens)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        with our_server(subject.name, saved(vectors, place), place) as server:
            model = get(server.address, "/v1/models")["data"][0]["id"]
            soak = Soak(server.address, model, cases, timeout)
            soak.all_once(tell)
            warm = Counter(soak.tally)
            samples = soak.go(server, clients, minutes * 60, seed, tell)
            result = {
                "clients": clients,
                "cases": len(cases),
                "different_answers": len({(case.question, case.text) for case in cases}),
                **soak.counts(),
                "once_each_at_first": warm["good"],
                **_ending(server, cases),
                "memory": memory(samples),
            }
    result["failures"] = LAST_FAILURES[:] = failures(result, soak.examples)
    return {"soak_failures": len(LAST_FAILURES), "details": result}


def _ending(server: Server, cases: Sequence[Case]) -> dict[str, object]:
    """Return what is left in the server, what it logged, and how it ends."""
    until = time.monotonic() + DRAIN
    while True:
        try:
            health = get(server.address, "/health")
        except (OSError, RuntimeError) as error:
            health = {"status": repr(error)}
        if not health.get("running", 1) and not health.get("waiting", 1):
            break
        if time.monotonic() > until:
            break
        time.sleep(0.1)
    files = server.open_files()
    alive = server.process.poll() is None
    seconds = stop(server.process)
    said = server.said()
    return {
        "health": health, "open_files": files, "alive": alive, "stop_seconds": round(seconds, 2),
        "exit_code": server.process.returncode, "tracebacks": said.count("Traceback"),
        "questions_in_log": sum(case.question in said for case in cases),
        "log_end": said[-2000:],
    }  # fmt: skip


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


def failures(result: Mapping[str, object], examples: Mapping[str, str]) -> list[str]:
    """Return what must not be, a line each."""
    found = [
        f"{result[name]} {said}; the first: {examples.get(name, '')}"
        for name, said in PROBLEMS.items() if result[name]
    ]  # fmt: skip
    if result["good"] != result["good_sent"]:
        found.append(
            f"{result['good']} of {result['good_sent']} good requests answered as they should be"
        )
    health, held = result["health"], result["memory"]
    if health.get("running") != 0 or health.get("waiting") != 0:
        found.append(f"rows are left {DRAIN:g} s after the end: {health}")
    if not result["alive"]:
        found.append(f"the server died: exit code {result['exit_code']}")
    if result["exit_code"] == -signal.SIGKILL:
        found.append(f"SIGTERM did not end the server within {GRACE:g} s")
    elif result["exit_code"] not in (0, -signal.SIGTERM, 128 + signal.SIGTERM):
        found.append(f"SIGTERM ended the server with exit code {result['exit_code']}")
    for name in ("tracebacks", "questions_in_log"):
        if result[name]:
            found.append(f"{result[name]} {name.replace('_', ' ')}")
    if (
        held
        and held["samples"] >= JUDGED
        and held["last_quarter"] > held["first_quarter"] * GROWTH + SLACK
    ):
        found.append(
            f"memory grew from {held['first_quarter']:.0f} to {held['last_quarter']:.0f} MiB"
        )
    return found


def lines(result: Mapping[str, object]) -> list[str]:
    """Return the report."""
    d = result["details"]
    table = [
        f"{d['clients']} clients; {d['cases']} requests with known answers, "
        f"{d['different_answers']} of these different",
        f"good      {d['good']} of {d['good_sent']} answered with their solo run's text",
        f"left      {d['left']} in the middle; running {d['health'].get('running')}, "
        f"waiting {d['health'].get('waiting')} at the end",
        f"bad       {d['bad_sent']}, statuses " + _statuses(d["statuses"]),
        *(f"          {d[name]} {said}" for name, said in PROBLEMS.items()),
        f"ending    {d['stop_seconds']:.1f} s, exit code {d['exit_code']}, "
        f"{d['open_files']} open files before",
    ]  # fmt: skip
    if held := d["memory"]:
        table.append(
            f"memory    {held['first_quarter']:.0f} MiB in the first quarter, {held['last_quarter']:.0f} in "
            f"the last, {held['largest']:.0f} at most, {held['slope_per_minute']:+.2f} MiB/min"
        )  # fmt: skip
    return (
        [*table, *(f"FAILED    {one}" for one in d["failures"])]
        if d["failures"]
        else [*table, "passed"]
    )


def _statuses(found: Mapping[str, Mapping[str, int]]) -> str:
    total: Counter = Counter()
    for one in found.values():
        total.update(one)
    return ", ".join(f"{status}: {count}" for status, count in sorted(total.items()))
