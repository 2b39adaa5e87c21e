"""Concurrent clients with JSON schemas and tools: `densesteer serve` against itself without them."""

import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

from clients import CHAT, drive, get
from script import main
from serve import questions
from servers import model_folder, our_server, stock_server

from mlx_densesteer.bench.figures import Measurement, Tell, alternate, quartiles, quiet, ratio
from mlx_densesteer.bench.subject import Subject
from mlx_densesteer.generation.grammar import calls_are_json

SCHEMA = {
    "type": "object",
    "properties": {
        "steps": {"type": "array", "items": {"type": "string"}, "minItems": 3},
        "answer": {"type": "number"},
    },
    "required": ["steps", "answer"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{name.capitalize()} numbers.",
            "parameters": {
                "type": "object",
                "properties": {"why": {"type": "string"}, "numbers": {"type": "array", "items": {"type": "number"}}},
                "required": ["why", "numbers"],
            },
        },
    }
    for name in ("add", "multiply")
]  # fmt: skip
FORM = {"type": "json_schema", "json_schema": {"name": "solution", "schema": SCHEMA}}
SIDES = {
    "text": {},
    "JSON schema": {"response_format": FORM},
    "a call required": {"tools": TOOLS, "tool_choice": "required"},
    "half of them JSON": {},  # every other request
    "mlx_lm.server, text": None,
}


def run(
    subject: Subject,
    *,
    clients: str = "1,4,8,16",
    requests: int = 2,
    tokens: int = 64,
    rounds: int = 3,
    dose: str = "10%",
    timeout: float = 600.0,
    tell: Tell = quiet,
) -> Measurement:
    """Load `densesteer serve` with clients whose answers are text, JSON of a schema, or tool calls.

    All its answers are steered, greedy and streamed, of at most so many tokens. A ratio is the throughput
    in tokens per second over that of text; of mlx_lm.server, whose answers are unsteered text, it is the
    other way round: text of densesteer over its.

    Args:
        clients: numbers of clients at once, in order.
        requests: requests of each client in each round.
        tokens: tokens of an answer at most.
        rounds: rounds of each level.
        dose: of a random vector at the middle layer.
        timeout: seconds until an answer counts as missing.
    """
    layer = subject.model.layer_count // 2
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = model_folder(subject, place)
        vector = subject.vector.save(place / "random.npz")
        tell("the servers load the model")
        stock = stack.enter_context(stock_server(folder, place))
        ours = stack.enter_context(our_server(folder, [vector], place))
        model = get(ours.address, "/v1/models")["data"][0]["id"]
        steering = {"vector": "random", "strength": dose, "layer": layer, "brake": False}
        sides = list(SIDES)
        if not calls_are_json(subject.model):
            sides.remove("a call required")
        turns = dict.fromkeys(sides, 0)
        errors: list[str] = []

        def ask(side: str, count: int) -> float:
            """Return the seconds for a token."""
            turns[side] += 1
            bodies = []
            for number, text in enumerate(questions(f"{side} {turns[side]}", requests * count)):
                more = SIDES[side]
                if side == "half of them JSON":
                    more = SIDES["JSON schema"] if number % 2 else {}
                body = {"messages": [{"role": "user", "content": f"{text} Answer in JSON."}]}
                body |= {"max_tokens": tokens, "temperature": 0.0, "stream": True}
                body |= {"stream_options": {"include_usage": True}}
                if more is not None:
                    body |= {"model": model, "steering": steering} | more
                bodies.append(body)
            address = (stock if SIDES[side] is None else ours).address
            done = drive(address, CHAT, bodies, clients=count, timeout=timeout)
            errors.extend(f"{side}: {one.error}" for one in done.answers if one.error)
            return done.seconds / max(1, sum(one.tokens for one in done.answers))

        for side in sides:
            ask(side, 2)
        errors.clear()
        found = {}
        for count in map(int, clients.split(",")):
            taken = alternate(
                [lambda side=side, count=count: ask(side, count) for side in sides],
                rounds=rounds,
                tell=lambda message, count=count: tell(f"{count} clients, {message}"),
            )
            found[str(count)] = dict(zip(sides, taken, strict=True))
    lines, worst = [], 1.0
    for count, of in found.items():
        for side, seconds in of.items():
            speed = 1 / statistics.median(seconds)
            if SIDES[side] is None:
                spread = ratio(seconds, of["text"])
            else:
                spread = ratio(of["text"], seconds)
                worst = min(worst, spread["median"])
            lines.append(
                f"{count:>3} clients  {side:20} {speed:7.1f} tokens/s  {spread['median']:.3f} ({quartiles(spread)})"
            )
    lines += [f"ERROR: {one}" for one in dict.fromkeys(errors)]
    details = {"seconds_a_token": found, "errors": errors, "dose": dose, "layer": layer}
    return Measurement(
        lines, details, {"constrained_ratio": worst, "constrained_errors": len(errors)}
    )


if __name__ == "__main__":
    main(run)
