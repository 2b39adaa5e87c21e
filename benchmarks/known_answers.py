"""Prompts under many steerings, each with the answer of its solo run, to hold a server to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..demo.problems import held_out
from ..generation.stream import generate
from ..model.block import make_cache
from ..model.dose import strength_for
from ..model.prompt import encode_prompt
from ..steering.steering import Positions, Steering
from ..steering.vector import SteeringVector
from .clients import CHAT, COMPLETIONS
from .servers import random_vector
from .subject import Subject

DOSES = (-1.2, -0.6, 0.6, 1.2)  # large ones: answers must differ to tell rows apart
TIE = 1e-2  # logits; products of another shape round otherwise, but never by that much


@dataclass(frozen=True)
class Case:
    """A request and its greedy answer, alone in this process.

    ``max_tokens`` ends it before the first near tie of two tokens, which a batch of another shape
    may decide otherwise.
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
        """Return the request in every way of saying the steering."""
        prompt: dict[str, object] = {"prompt": self.question}
        if self.chat:
            prompt = {"messages": [{"role": "user", "content": self.question}]}
        rest = {**prompt, "max_tokens": self.max_tokens, "temperature": 0.0}
        if (how := self.steering) is None:
            named = [{"model": model}]
            named += [{"model": model, "steering": {"vector": "low", "strength": 0.0}}]
        else:
            (layer,), name = how.layers, how.vector.name
            field = {"vector": name, "strength": how.strength, "layer": layer,
                     "positions": how.positions}  # fmt: skip
            named = [{"model": model, "steering": field}]
            if how.positions == "all":
                one = {"source": name, "scale": how.strength, "layers": [layer]}
                named += [{"model": model, "steering": {"vectors": [one]}},
                          {"model": f"{model}@{name}={how.strength!r}"}]  # fmt: skip
        return [{**name, **rest} for name in named]

    def differs(self, said: Mapping[str, object] | None) -> bool:
        """Tell whether the steering that an answer names is another than this one."""
        if self.steering is None:
            return bool(said)
        return not said or said.get("fingerprint") != self.steering.fingerprint


def two_vectors(subject: Subject) -> list[SteeringVector]:
    """Return a vector of one layer low in the model, and one higher up."""
    count = subject.layer_count
    return [
        random_vector(subject, layer, name)
        for layer, name in ((count // 4, "low"), (max(count // 4 + 1, 2 * count // 3), "high"))
    ]


def saved(vectors: Sequence[SteeringVector], place: Path) -> list[Path]:
    """Write the vectors under their names."""
    return [vector.save(place / f"{vector.name}.npz") for vector in vectors]


def solo_cases(
    subject: Subject, vectors: Sequence[SteeringVector], *, questions: int, tokens: int
) -> list[Case]:
    """Answer every question under every steering, one after the other, greedily."""
    steerings: list[Steering | None] = [None]
    for vector in vectors:
        (layer,) = vector.layers
        norms = {layer: subject.norms[layer]}
        for dose in DOSES:
            steerings.append(_steering(vector, strength_for(vector, norms, dose)))
        strength = strength_for(vector, norms, max(DOSES))
        steerings += [_steering(vector, strength, where) for where in ("prompt", "generated")]
    chat = subject.tokenizer.has_chat_template
    made = [
        _case(subject, problem.question, chat and number % 2 == 0, how, tokens)
        for number, problem in enumerate(held_out(questions))
        for how in steerings
    ]
    return [case for case in made if case is not None]


def _steering(
    vector: SteeringVector, strength: float, positions: Positions = "all"
) -> Steering:  # fmt: skip
    return Steering(vector, strength, tuple(vector.layers), positions)


def _case(
    subject: Subject, question: str, chat: bool, how: Steering | None, tokens: int
) -> Case | None:
    """Return the case, ``None`` if its first token is a near tie already."""
    prompt = encode_prompt(subject.tokenizer, question, raw=not chat)

    def answer(count: int):
        return generate(
            subject.model, subject.tokenizer, prompt, steering=how, max_tokens=count
        )  # fmt: skip

    found = answer(tokens)
    clear = _clear(subject, prompt, found.token_ids, how, found.finish_reason == "stop")
    if not clear:
        return None
    if clear < found.tokens + (found.finish_reason == "stop"):
        found = answer(clear)
    return Case(question, chat, how, clear, found.text)


def _clear(
    subject: Subject, prompt: Sequence[int], answer: Sequence[int], how: Steering | None, ends: bool
) -> int:
    """Return how many tokens, the end of the turn included, are chosen before a near tie."""
    cache = make_cache(subject.model, how, prompt_length=len(prompt))
    logits = subject.model(mx.array([[*prompt, *answer]]), cache=cache)[0, len(prompt) - 1 :]
    best = mx.sort(mx.topk(logits.astype(mx.float32), 2, axis=-1), axis=-1)
    gaps = (best[:, 1] - best[:, 0]).tolist()[: len(answer) + ends]
    return next((i for i, gap in enumerate(gaps) if gap < TIE), len(gaps))
