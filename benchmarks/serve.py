"""Concurrent clients: `densesteer serve`, each request steered differently, against `mlx_lm.server`."""

import math
import random
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from ..demo.problems import draw_problem
from ..model.dose import strength_for
from ..model.prompt import encode_prompt
from .clients import CHAT, Answer, Drive, drive, get
from .servers import Server, common_folder, our_server, random_vector, stock_server
from .subject import Subject
from .timing import Tell, alternate, over, quiet, spread

FIGURES = ("serve_ratio", "serve_unsteered_ratio", "serve_errors")
SUITE = {"clients": "1,4,8,16", "requests": 2, "tokens": 24, "rounds": 3, "seconds": 60.0}
QUICK = {"clients": "1,8", "requests": 2, "tokens": 16, "rounds": 1}
DOSES = (0.02, -0.04, 0.06, -0.08, 0.1, -0.12, 0.14, -0.16)  # mild: the answers stay answers
NAMES = ("ours, steered", "mlx_lm.server, same questions", "ours, unsteered", "mlx_lm.server")
STEERED, ITS_STOCK, UNSTEERED, STOCK = range(4)


def run(
    subject: Subject,
    *,
    clients: str = "1,4,8,16",
    requests: int = 4,
    tokens: int = 64,
    rounds: int = 3,
    seconds: float = 0.0,
    shared_prefix: int = 0,
    timeout: float = 600.0,
    tell: Tell = quiet,
) -> dict[str, object]:
    """Let clients ask our server and mlx-lm's, in turn, each client as soon as it is answered.

    Both servers are processes with their default options and the same model folder; one is asked
    at a time. Requests are streamed and greedy, every question is an arithmetic story of its own.
    Four sides: ours with a strength for each request at the middle layer; mlx-lm's with the
    same questions (it ignores `steering`, so its answers are unsteered); ours unsteered and mlx-lm's
    with other questions. A server never sees a question twice, so no prompt cache helps but for
    the beginnings that questions share. Throughput is the tokens of all answers over the time from
    the first request to the last answer, the end with fewer clients included. A ratio is our
    throughput over mlx-lm's with the same questions; the null is mlx-lm's own with the one and
    the other. End-of-turn tokens, which mlx-lm's usage counts, are taken out.

    Args:
        clients: how many at once, levels in order.
        requests: requests of each client in each round.
        tokens: tokens of an answer at most.
        rounds: rounds of each level.
        seconds: for each level: then no new round is begun; 0 is no limit.
        shared_prefix: begin every conversation with the same system message of so many tokens.
        timeout: seconds until an answer counts as missing.
    """
    levels = [int(level) for level in clients.split(",")]
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        load = _Load(subject, tokens, timeout, _shared(subject, shared_prefix))
        folder = common_folder(subject, place)
        vector = random_vector(subject, load.layer, "random").save(place / "random.npz")
        tell("the servers load the model")
        stock = stack.enter_context(stock_server(folder, place))
        ours = stack.enter_context(our_server(folder, [vector], place))
        load.model = get(ours.address, "/v1/models")["data"][0]["id"]
        for server, side in ((stock, STOCK), (ours, UNSTEERED), (ours, STEERED)):
            load.drive(server, side, "warm", 1, max(levels), max_tokens=8)
        found = {
            str(level): _level(load, ours, stock, level, requests, rounds, seconds, tell)
            for level in levels
        }
        memory = {"ours": round(ours.resident()), "mlx_lm": round(stock.resident())}
    lowest = {
        side: min(of["ratios"][side]["median"] for of in found.values())
        for side in ("steered", "unsteered")
    }
    return {
        "serve_ratio": lowest["steered"],
        "serve_unsteered_ratio": lowest["unsteered"],
        "serve_errors": sum(of["sides"][NAMES[i]]["errors"] for of in found.values() for i in (0, 2)),
        "details": {
            "clients": found, "requests_per_client": requests, "tokens": tokens,
            "shared_prefix": shared_prefix, "doses": list(DOSES), "layer": load.layer,
            "resident_mib": memory,
        },
    }  # fmt: skip


@dataclass
class _Load:
    """Makes the requests of a side and sends them."""

    subject: Subject
    tokens: int
    timeout: float
    prefix: str | None
    model: str = ""  # how our server calls it
    layer: int = field(init=False)

    def __post_init__(self) -> None:
        self.layer = self.subject.layer_count // 2

    def drive(
        self, server: Server, side: int, round_name: str, requests: int, clients: int, *,
        max_tokens: int | None = None,
    ) -> Drive:  # fmt: skip
        """Send the questions of this round: the same for a side of ours and its stock side."""
        questions = _questions(f"{side // 2} {clients} {round_name}", requests * clients)
        bodies = [
            self._body(side, number, question, max_tokens or self.tokens)
            for number, question in enumerate(questions)
        ]
        done = drive(server.address, CHAT, bodies, clients=clients, timeout=self.timeout)
        if not any(answer.tokens for answer in done.answers):
            raise RuntimeError(f"{NAMES[side]}: no answer at all: {done.answers[0].error}")
        return done

    def _body(self, side: int, number: int, question: str, tokens: int) -> dict[str, object]:
        messages = [{"role": "user", "content": question}]
        if self.prefix:
            messages.insert(0, {"role": "system", "content": self.prefix})
        body: dict[str, object] = {
            "messages": messages, "max_tokens": tokens, "temperature": 0.0, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        if side in (STEERED, UNSTEERED):  # mlx-lm would look for a model of that name
            body["model"] = self.model
        if side in (STEERED, ITS_STOCK):
            dose = DOSES[number % len(DOSES)]
            norms = {self.layer: self.subject.norms[self.layer]}
            strength = strength_for(self.subject.vector, norms, dose)
            body["steering"] = {"vector": "random", "strength": strength, "layer": self.layer}
        return body


def _level(
    load: _Load, ours: Server, stock: Server, clients: int, requests: int, rounds: int,
    seconds: float, tell: Tell,
) -> dict[str, object]:  # fmt: skip
    """Measure one number of clients."""
    drives: list[list[Drive]] = [[] for _ in NAMES]

    def side(number: int) -> float:
        server = ours if number in (STEERED, UNSTEERED) else stock
        done = load.drive(server, number, str(len(drives[number])), requests, clients)
        drives[number].append(done)
        return done.seconds / sum(map(_written(number), done.answers))

    tell(f"{clients} clients")
    taken = alternate(
        [lambda number=number: side(number) for number in range(len(NAMES))], rounds=rounds,
        seconds=seconds, tell=lambda message: tell(f"{clients} clients, {message}"),
    )  # fmt: skip
    return {
        "ratios": {
            "steered": spread(over(taken[ITS_STOCK], taken[STEERED])),
            "unsteered": spread(over(taken[STOCK], taken[UNSTEERED])),
            "null": spread(over(taken[STOCK], taken[ITS_STOCK])),
        },
        "sides": {name: _figures(i, drives[i]) for i, name in enumerate(NAMES)},
        "same_text": _agreement(_all(drives[UNSTEERED]), _all(drives[STOCK])),
    }


def _figures(side: int, drives: Sequence[Drive]) -> dict[str, object]:
    """Return what clients saw of a side, all rounds together."""
    answers, seconds = _all(drives), sum(one.seconds for one in drives)
    good = [answer for answer in answers if answer.error is None]
    first = [one.first_text for one in good if one.first_text is not None]
    whole = [one.seconds for one in good]
    tokens = sum(map(_written(side), good))
    return {
        "requests": len(answers),
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "requests_per_second": len(good) / seconds,
        "first_token_median": statistics.median(first) if first else None,
        "first_token_p95": percentile(first, 95),
        "request_median": statistics.median(whole) if whole else None,
        "request_p95": percentile(whole, 95),
        "errors": len(answers) - len(good),
        "first_error": next((one.error for one in answers if one.error), None),
        "client_cpu_share": sum(one.cpu_seconds for one in drives) / seconds,
    }


def _written(side: int):
    """Return what counts an answer's tokens without the end of the turn; mlx-lm counts it."""
    ends = side in (STOCK, ITS_STOCK)
    return lambda answer: answer.tokens - (ends and answer.finish == "stop")


def _agreement(ours: Sequence[Answer], theirs: Sequence[Answer]) -> dict[str, int]:
    """Count the unsteered answers that are mlx-lm's: the two do the same work where they are."""
    same = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.text == b.text and not a.error]
    counts = (_written(UNSTEERED), _written(STOCK))
    equal = sum(counts[0](a) == counts[1](b) for a, b in same)
    return {"answers": len(ours), "same_text": len(same), "same_tokens": equal}


def _all(drives: Sequence[Drive]) -> list[Answer]:
    return [answer for one in drives for answer in one.answers]


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Return the smallest value that so many percent of the values do not exceed."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def _questions(seed: str, count: int) -> list[str]:
    """Return different arithmetic stories; another seed has others."""
    rng, found = random.Random(seed), {}
    while len(found) < count:
        found[draw_problem(rng).question] = None
    return list(found)


def _shared(subject: Subject, tokens: int) -> str | None:
    """Return a system message of about so many tokens."""
    text = ""
    for question in _questions("prefix", tokens):
        if len(encode_prompt(subject.tokenizer, text or "a", raw=True)) >= tokens:
            break
        text += question + " "
    return text.strip() or None


def lines(result: Mapping[str, object]) -> list[str]:
    """Return the table."""
    d = result["details"]
    head = (
        "clients", "", "tokens/s", "requests/s", "first token s", "p95", "request p95 s", "errors",
        "throughput / mlx_lm", "quartiles",
    )  # fmt: skip
    cells = [head, *(line for level, of in d["clients"].items() for line in _cells(level, of))]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    shares = [
        side["client_cpu_share"] for of in d["clients"].values() for side in of["sides"].values()
    ]
    same = {key: sum(of["same_text"][key] for of in d["clients"].values())
            for key in ("answers", "same_text", "same_tokens")}  # fmt: skip
    memory = d["resident_mib"]
    return [
        *("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells),
        "",
        "mlx_lm.server ignores `steering`: beside our steered answers it gives unsteered ones to the same",
        "questions. The ratio in its own row is itself with the one questions over itself with the others.",
        f"Unsteered: {same['same_text']} of {same['answers']} texts are mlx_lm's, "
        f"{same['same_tokens']} with as many tokens.",
        f"Resident at the end: ours {memory['ours']} MiB, mlx_lm {memory['mlx_lm']} MiB. "
        f"The clients took {max(shares):.0%} of one core at most.",
        *_errors(d["clients"]),
    ]


def _cells(level: str, of: Mapping[str, dict]) -> Iterator[tuple[str, ...]]:
    ratios = (of["ratios"]["steered"], of["ratios"]["null"], of["ratios"]["unsteered"], None)
    for number, (name, side) in enumerate(of["sides"].items()):
        ratio, range_ = "", ""
        if one := ratios[number]:
            ratio = f"{one['median']:.3f}"
            range_ = f"{one['low']:.3f}-{one['high']:.3f}" if one["count"] > 1 else "one round"
        yield (
            "" if number else level, name, f"{side['tokens_per_second']:.1f}",
            f"{side['requests_per_second']:.2f}", _seconds(side["first_token_median"]),
            _seconds(side["first_token_p95"]), _seconds(side["request_p95"]), str(side["errors"]),
            ratio, range_,
        )  # fmt: skip


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _errors(levels: Mapping[str, dict]) -> list[str]:
    return [
        f"ERROR at {level} clients, {name}: {side['first_error']}"
        for level, of in levels.items() for name, side in of["sides"].items() if side["errors"]
    ]  # fmt: skip
