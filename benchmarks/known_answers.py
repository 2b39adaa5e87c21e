"""Requests under many steerings, each with the greedy answer that a server must give."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from clients import CHAT, COMPLETIONS

from mlx_densesteer.bench.subject import Subject
from mlx_densesteer.demo.problems import held_out
from mlx_densesteer.generation.stream import generate
from mlx_densesteer.model.block import make_cache
from mlx_densesteer.model.prompt import encode_prompt
from mlx_densesteer.steering.request import resolve
from mlx_densesteer.steering.steering import Steering
from mlx_densesteer.steering.vector import SteeringVector

DOSES = ("-120%", "-60%", "60%", "120%")  # large, so that the answers of different rows differ
TIE = 1e-2  # logits; products of another shape round differently, by less than that


@dataclass(frozen=True)
class KnownAnswer:
    """A request and its greedy answer, computed in this process by itself.

    ``max_tokens`` ends it before two tokens nearly tie: a batch of another shape may choose the
    other.
    """

    question: str
    chat: bool
    steering: Steering | None
    max_tokens: int
    text: str

    @property
    def path(self) -> str:
        return CHAT if self.chat else COMPLETIONS

    def bodies(self, model: str) -> list[dict[str, object]]:
        """Return the request once for each way of naming its steering."""
        prompt: dict[str, object] = {"prompt": self.question}
        if self.chat:
            prompt = {"messages": [{"role": "user", "content": self.question}]}
        rest = {**prompt, "max_tokens": self.max_tokens, "temperature": 0.0}
        named: list[dict[str, object]] = []
        if (how := self.steering) is None:
            field = {"vector": "low", "strength": 0.0}
            named += [{"model": model}, {"model": model, "steering": field}]
        else:
            field = {
                "vector": how.vector.name,
                "strength": how.strength,
                "layer": how.layers[0],
                "positions": how.positions,
            }
            named.append({"model": model, "steering": field})
            if how.positions == "all":
                named.append({"model": f"{model}@{how.vector.name}={how.strength!r}"})
        return [{**name, **rest} for name in named]

    def differs(self, said: Mapping[str, object] | None) -> bool:
        """Return whether an answer names another steering than this one."""
        if self.steering is None:
            return bool(said)
        return not said or said.get("fingerprint") != self.steering.fingerprint


def two_vectors(subject: Subject) -> list[SteeringVector]:
    """Return a vector of one layer low in the model, and one higher up."""
    count, vector = subject.model.layer_count, subject.vector
    layers = {"low": count // 4, "high": max(count // 4 + 1, 2 * count // 3)}
    return [
        SteeringVector({layer: vector.layers[layer]}, vector.meta, name=name)
        for name, layer in layers.items()
    ]


def saved(vectors: Sequence[SteeringVector], place: Path) -> list[Path]:
    """Write the vectors under their names."""
    return [vector.save(place / f"{vector.name}.npz") for vector in vectors]


def known_answers(
    subject: Subject, vectors: Sequence[SteeringVector], *, questions: int, tokens: int
) -> list[KnownAnswer]:
    """Answer every question under every steering, one after the other, greedily."""
    steerings: list[Steering | None] = [None]
    for vector in vectors:
        steerings += [resolve(subject.model, vector, dose) for dose in DOSES]
        steerings += [
            resolve(subject.model, vector, DOSES[-1], positions=where)
            for where in ("prompt", "generated")
        ]
    chat = subject.model.tokenizer.has_chat_template
    made = [
        _known_answer(subject, problem.question, chat and number % 2 == 0, how, tokens)
        for number, problem in enumerate(held_out(questions))
        for how in steerings
    ]
    return [one for one in made if one is not None]


def _known_answer(
    subject: Subject, question: str, chat: bool, how: Steering | None, tokens: int
) -> KnownAnswer | None:
    """Answer one question; ``None`` if the first token is a near tie already."""
    prompt = encode_prompt(subject.model.tokenizer, question, raw=not chat)
    found = generate(subject.model, prompt, steering=how, max_tokens=tokens)
    ends = found.finish_reason == "stop"
    clear = _clear_tokens(subject, prompt, found.token_ids, how, ends)
    if not clear:
        return None
    if clear < found.tokens + ends:
        found = generate(subject.model, prompt, steering=how, max_tokens=clear)
    return KnownAnswer(question, chat, how, clear, found.text)


def _clear_tokens(
    subject: Subject, prompt: Sequence[int], answer: Sequence[int], how: Steering | None, ends: bool
) -> int:
    """Return how many tokens, the end of the turn included, are chosen before a near tie."""
    network = subject.model.network
    cache = make_cache(network, how, prompt=prompt)
    logits = network(mx.array([[*prompt, *answer]]), cache=cache)[0, len(prompt) - 1 :]
    best = mx.sort(mx.topk(logits.astype(mx.float32), 2, axis=-1), axis=-1)
    gaps = (best[:, 1] - best[:, 0]).tolist()[: len(answer) + ends]
    return next((i for i, gap in enumerate(gaps) if gap < TIE), len(gaps))
