"""Concurrent clients, `densesteer serve` against `mlx_lm.server`."""

import math
import random
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from clients import CHAT, ClientAnswer, Drive, drive, get
from script import main
from servers import ServerProcess, model_folder, our_server, stock_server

from mlx_densesteer.bench.figures import (
    Measurement,
    Spread,
    Tell,
    alternate,
    quartiles,
    quiet,
    ratio,
)
from mlx_densesteer.bench.subject import Subject
from mlx_densesteer.demo.problems import draw_problem
from mlx_densesteer.model.prompt import encode_prompt

# mild, so that answers stay answers
DOSES = ("2%", "-4%", "6%", "-8%", "10%", "-12%", "14%", "-16%")
NAMES = (
    "densesteer, steered",
    "mlx_lm.server, same questions",
    "densesteer, unsteered",
    "mlx_lm.server",
)
STEERED, ITS_STOCK, UNSTEERED, STOCK = range(4)
HEAD = ("clients", "", "tokens/s", "requests/s", "first token s", "p95", "request p95 s", "errors")
HEAD = (*HEAD, "throughput / mlx_lm", "quartiles")


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
) -> Measurement:
    """Load one server at a time with clients; each sends its next request when it is answered.

    Both servers are processes with their default options and the same model folder. Requests are
    streamed and greedy, every question is another arithmetic story. Four sides: `densesteer serve`
    with a dose for each request at the middle layer; mlx-lm's server with the same questions (it
    ignores `steering`, so its answers are unsteered); both unsteered with other questions. A server
    never sees a question twice, so a prompt cache only helps with common beginnings. Throughput is
    the tokens of all answers over the time from the first request to the last answer. A ratio is
    densesteer's throughput over mlx-lm's with the same questions; the noise is the ratio of
    mlx-lm's throughputs with the two sets. End-of-turn tokens, which only mlx-lm counts, are taken
    out.

    Args:
        clients: numbers of clients at once, in order.
        requests: requests of each client in each round.
        tokens: tokens of an answer at most.
        rounds: rounds of each level.
        seconds: after which no new round begins, for each level; 0 is no limit.
        shared_prefix: begin every conversation with the same system message of so many tokens.
        timeout: seconds until an answer counts as missing.
    """
    levels = [int(level) for level in clients.split(",")]
    layer = subject.model.layer_count // 2
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = model_folder(subject, place)
        vector = subject.vector.save(place / "random.npz")
        tell("the servers load the model")
        stock = stack.enter_context(stock_server(folder, place))
        ours = stack.enter_context(our_server(folder, [vector], place))
        model = get(ours.address, "/v1/models")["data"][0]["id"]
        prefix = system_message(subject, shared_prefix)
        load = _Load((ours, stock), model, layer, tokens, timeout, prefix)
        for side in (STOCK, UNSTEERED, STEERED):
            load.drive(side, "warm", 1, max(levels), max_tokens=8)
        found = {
            str(level): _level(load, level, requests, rounds, seconds, tell) for level in levels
        }
        memory = {"ours": round(ours.resident()), "mlx_lm": round(stock.resident())}
    lowest = {
        side: min(of["ratios"][side]["median"] for of in found.values())
        for side in ("steered", "unsteered")
    }
    errors = sum(of["sides"][NAMES[i]]["errors"] for of in found.values() for i in (0, 2))
    details = {
        "clients": found,
        "doses": DOSES,
        "layer": layer,
        "resident_mib": memory,
    }
    figures = {
        "serve_ratio": lowest["steered"],
        "serve_unsteered_ratio": lowest["unsteered"],
        "serve_errors": errors,
    }
    return Measurement(lines(details), details, figures)


@dataclass(frozen=True)
class _Load:
    """Makes and sends the requests of a side; ``model`` is its name at `densesteer serve`."""

    servers: tuple[ServerProcess, ServerProcess]
    model: str
    layer: int
    tokens: int
    timeout: float
    prefix: str | None

    def drive(
        self, side: int, turn: str, requests: int, clients: int, *, max_tokens: int | None = None
    ) -> Drive:
        """Send the questions of this turn: the same for a densesteer side and its stock side.

        Raises:
            RuntimeError: there was no answer at all.
        """
        asked = questions(f"{side // 2} {clients} {turn}", requests * clients)
        limit = max_tokens or self.tokens
        bodies = [self._body(side, number, text, limit) for number, text in enumerate(asked)]
        address = self.servers[side in (ITS_STOCK, STOCK)].address
        done = drive(address, CHAT, bodies, clients=clients, timeout=self.timeout)
        if not any(answer.tokens for answer in done.answers):
            raise RuntimeError(f"{NAMES[side]}: no answer at all: {done.answers[0].error}")
        return done

    def _body(self, side: int, number: int, question: str, tokens: int) -> dict[str, object]:
        messages = [{"role": "user", "content": question}]
        if self.prefix:
            messages.insert(0, {"role": "system", "content": self.prefix})
        body: dict[str, object] = {
            "messages": messages,
            "max_tokens": tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if side in (STEERED, UNSTEERED):  # mlx-lm would look for a model of that name
            body["model"] = self.model
        if side in (STEERED, ITS_STOCK):
            dose = DOSES[number % len(DOSES)]
            body["steering"] = {"vector": "random", "strength": dose, "layer": self.layer}
        return body


def _level(
    load: _Load, clients: int, requests: int, rounds: int, seconds: float, tell: Tell
) -> dict[str, object]:
    """Measure one number of clients."""
    drives: list[list[Drive]] = [[] for _ in NAMES]

    def ask(side: int) -> float:
        done = load.drive(side, str(len(drives[side])), requests, clients)
        drives[side].append(done)
        return done.seconds / sum(written(side, answer) for answer in done.answers)

    tell(f"{clients} clients")
    taken = alternate(
        [lambda side=side: ask(side) for side in range(len(NAMES))],
        rounds=rounds,
        seconds=seconds,
        tell=lambda message: tell(f"{clients} clients, {message}"),
    )
    answers = [[answer for one in of for answer in one.answers] for of in drives]
    # the two do the same work where the texts agree
    same = [
        (a, b)
        for a, b in zip(answers[UNSTEERED], answers[STOCK], strict=True)
        if a.text == b.text and not a.error
    ]
    return {
        "ratios": {
            "steered": ratio(taken[ITS_STOCK], taken[STEERED]),
            "unsteered": ratio(taken[STOCK], taken[UNSTEERED]),
            "null": ratio(taken[STOCK], taken[ITS_STOCK]),
        },
        "sides": {
            name: _figures(side, answers[side], drives[side]) for side, name in enumerate(NAMES)
        },
        "same_text": {
            "answers": len(answers[UNSTEERED]),
            "same_text": len(same),
            "same_tokens": sum(written(UNSTEERED, a) == written(STOCK, b) for a, b in same),
        },
    }


def written(side: int, answer: ClientAnswer) -> int:
    """Return an answer's tokens without the end of the turn, which mlx-lm counts."""
    return answer.tokens - (side in (STOCK, ITS_STOCK) and answer.finish == "stop")


def _figures(
    side: int, answers: Sequence[ClientAnswer], drives: Sequence[Drive]
) -> dict[str, object]:
    """Return what clients saw of a side, all rounds together."""
    seconds = sum(one.seconds for one in drives)
    good = [answer for answer in answers if answer.error is None]
    first = [one.first_text for one in good if one.first_text is not None]
    whole = [one.seconds for one in good]
    tokens = sum(written(side, one) for one in good)
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


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Return the smallest value that so many percent of the values do not exceed."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def questions(seed: str, count: int) -> list[str]:
    """Return different arithmetic stories; another seed has others."""
    rng, found = random.Random(seed), {}
    while len(found) < count:
        found[draw_problem(rng).question] = None
    return list(found)


def system_message(subject: Subject, tokens: int) -> str | None:
    """Return a text of about so many tokens; ``None`` for 0."""
    text = ""
    for question in questions("prefix", tokens):
        if len(encode_prompt(subject.model.tokenizer, text or "a", raw=True)) >= tokens:
            break
        text += question + " "
    return text.strip() or None


def lines(details: Mapping[str, object]) -> list[str]:
    """Return the table."""
    levels, memory = details["clients"], details["resident_mib"]
    cells = [HEAD, *(line for level, of in levels.items() for line in _cells(level, of))]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = [(level, *item) for level, of in levels.items() for item in of["sides"].items()]
    share = max(side["client_cpu_share"] for _, _, side in sides)
    same = {
        key: sum(of["same_text"][key] for of in levels.values())
        for key in ("answers", "same_text", "same_tokens")
    }
    return [
        *("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells),
        "",
        "mlx_lm.server ignores `steering`: its answers to the same questions are unsteered. The ratio",
        "in this row is the noise: its throughput with the other questions over that with these.",
        f"Unsteered: {same['same_text']} of {same['answers']} texts are mlx_lm's, "
        f"{same['same_tokens']} with as many tokens.",
        f"Resident at the end: densesteer {memory['ours']} MiB, mlx_lm {memory['mlx_lm']} MiB. "
        f"The clients took {share:.0%} of one core at most.",
        *(
            f"ERROR at {level} clients, {name}: {side['first_error']}"
            for level, name, side in sides
            if side["errors"]
        ),
    ]


def _cells(level: str, of: Mapping[str, dict]) -> Iterator[tuple[str, ...]]:
    ratios: list[Spread | None] = [of["ratios"][key] for key in ("steered", "null", "unsteered")]
    for one, (name, side) in zip([*ratios, None], of["sides"].items(), strict=True):
        times = [side[key] for key in ("first_token_median", "first_token_p95", "request_p95")]
        yield (
            level if name == NAMES[0] else "",
            name,
            f"{side['tokens_per_second']:.1f}",
            f"{side['requests_per_second']:.2f}",
            *("-" if value is None else f"{value:.3f}" for value in times),
            str(side["errors"]),
            f"{one['median']:.3f}" if one else "",
            quartiles(one) if one else "",
        )


if __name__ == "__main__":
    main(run)
