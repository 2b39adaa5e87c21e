"""How long a person waits for the next answer of a chat, here and with mlx-lm."""

import tempfile
from contextlib import ExitStack
from pathlib import Path

from clients import CHAT, ask, read
from mlx_lm.generate import stream_generate
from mlx_lm.models.cache import make_prompt_cache
from script import main
from serve import questions
from servers import ServerProcess, model_folder, our_server, stock_server

from mlx_densesteer.bench.figures import (
    Figure,
    Measurement,
    Spread,
    Tell,
    alternate,
    quiet,
    ratio,
    spread,
    timed,
)
from mlx_densesteer.bench.subject import Subject
from mlx_densesteer.generation.session import Session


def run(
    subject: Subject,
    *,
    turns: int = 5,
    tokens: int = 300,
    rounds: int = 2,
    seconds: float = 0.0,
    timeout: float = 600.0,
    tell: Tell = quiet,
) -> Measurement:
    """Chat with four sides in turn, and add up the seconds to the first text from the second turn on.

    `densesteer serve` and `mlx_lm.server`, each as a process with its defaults, get the whole conversation with
    every question, as clients send it. A `Session` and mlx-lm's `stream_generate` with a prompt cache, which gets
    the new question alone (as `mlx_lm.chat` does), keep it in this process. All are unsteered and greedy, and every
    side goes on from its own answers. Each round has other questions.

    Args:
        turns: questions of a conversation, at least 2.
        tokens: tokens of an answer at most.
        rounds: conversations of each side.
        seconds: after which no new round begins; 0 is no limit.
        timeout: seconds until an answer of a server counts as missing.
    """
    waits: list[list[list[float]]] = [[], [], [], []]

    def talk(side: int, answer) -> float:
        asked = questions(f"turns {len(waits[side])}", turns)
        waits[side].append([answer(text) for text in asked][1:])
        return sum(waits[side][-1])

    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = model_folder(subject, place)
        tell("the servers load the model")
        servers = [
            stack.enter_context(our_server(folder, [], place)),
            stack.enter_context(stock_server(folder, place)),
        ]
        for server in servers:
            _Client(server, 8, timeout)("Warm up.")
        sides = [
            lambda: talk(0, _Client(servers[0], tokens, timeout)),
            lambda: talk(1, _Client(servers[1], tokens, timeout)),
            lambda: talk(2, _session(subject, tokens)),
            lambda: talk(3, _prompt_cache(subject, tokens)),
        ]
        served, stock, session, cached = alternate(sides, rounds=rounds, seconds=seconds, tell=tell)
    each = [spread([wait for talk in of for wait in talk]) for of in waits]
    return Measurement(
        [
            Figure.of(
                "turn_serve_ratio",
                "wait for the next answer, densesteer serve / mlx_lm.server",
                ratio(served, stock),
                remark=_medians(*each[:2]),
            ),
            Figure.of(
                "turn_session_ratio",
                "the same, Session / mlx-lm's prompt cache",
                ratio(session, cached),
                remark=_medians(*each[2:]),
            ),
        ],
        {"waits": waits},
    )


def _medians(ours: Spread, theirs: Spread) -> str:
    return f"median of all turns {ours['median']:.2f} s, mlx-lm {theirs['median']:.2f} s"


class _Client:
    """A client that keeps its conversation; called with a question, it returns the seconds to the first text."""

    def __init__(self, server: ServerProcess, tokens: int, timeout: float):
        self._server, self._timeout, self._messages = server, timeout, []
        self._options = {"max_tokens": tokens, "temperature": 0.0, "stream": True}
        self._options["stream_options"] = {"include_usage": True}

    def __call__(self, text: str) -> float:
        self._messages.append({"role": "user", "content": text})
        body = {"messages": self._messages, **self._options}
        answer = read(ask(self._server.address, CHAT, body, self._timeout))
        if answer.error or answer.first_text is None:
            raise RuntimeError(f"no answer: {answer.error or 'no text'}")
        self._messages.append({"role": "assistant", "content": answer.text})
        return answer.first_text


def _session(subject: Subject, tokens: int):
    session = Session(subject.model, max_tokens=tokens)

    def answer(text: str) -> float:
        reply = session.send(text)
        wait = timed(lambda: next(reply))
        for _ in reply:
            pass
        return wait

    return answer


def _prompt_cache(subject: Subject, tokens: int):
    network, tokenizer = subject.model
    subject.take_side(None)
    caches = make_prompt_cache(network)

    def answer(text: str) -> float:
        message = {"role": "user", "content": text}
        prompt = tokenizer.apply_chat_template([message], add_generation_prompt=True)
        pieces = stream_generate(network, tokenizer, prompt, max_tokens=tokens, prompt_cache=caches)
        wait = timed(lambda: next(pieces))
        for _ in pieces:
            pass
        return wait

    return answer


if __name__ == "__main__":
    main(run)
