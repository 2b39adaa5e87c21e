"""What problems are answered under: a steering, words around the question, or a sampling. No mlx.

The baselines of ``densesteer eval --baseline`` are conditions: what a person could do instead of
steering, and a random direction in the place of the steering's.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..errors import InputError
from ..steering.steering import UNSTEERED, Steering
from ..steering.vector import SteeringVector
from ..text import one_line
from .solutions import Solution
from .tasks import Problem

if TYPE_CHECKING:
    from ..generation.sampling import Sampling

SPECS = "instruction:TEXT, prefix:TEXT, few-shot:N, random, random:SEED or budget:N"


@dataclass(frozen=True)
class Condition:
    """What a problem is answered under. Without any field it is the unsteered model.

    A condition that only steers has the fingerprint of its steering. The name has no part in it.

    Args:
        name: in tables.
        steering: what is added to the residual stream.
        instruction: the system message; it follows the run's own system message, if there is one.
        examples: turns before the question; their own system messages have no part.
        suffix: follows the question after a blank line.
        prefix: the response begins with it. It is part of the response: its tokens and steps count.
            For the steering's ``positions`` it is part of the prompt.
        sampling: draws the tokens; its seed, the problem and ``number`` seed each response. ``None``
            is greedy.
        number: tells the samples of one problem apart.

    Raises:
        InputError: a sampling without a seed, or text that is not valid Unicode.
    """

    name: str = ""
    steering: Steering | None = None
    instruction: str | None = None
    examples: tuple[Solution, ...] = ()
    suffix: str = ""
    prefix: str = ""
    sampling: "Sampling | None" = None
    number: int = 0

    def __post_init__(self) -> None:
        if self.sampling is not None and self.sampling.seed is None:
            raise InputError(
                "a sampling without a seed: a run that goes on could not repeat it. Give it a seed."
            )
        texts = [self.instruction or "", self.suffix, self.prefix, *sum(self.turns, ())]
        if any(re.search("[\ud800-\udfff]", text) for text in texts):
            raise InputError(
                f"{one_line(self.name)}: is not valid UTF-8 text; convert it to UTF-8."
            )

    @classmethod
    def of(cls, given: "Steering | Condition | None") -> "Condition":
        """Return the condition that only steers, or ``given`` if it is a condition."""
        return given if isinstance(given, Condition) else cls(steering=given)

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """What the user said in each earlier turn, and the response."""
        return tuple((one.prompt, one.response) for one in self.examples)

    @property
    def fingerprint(self) -> str:
        """Identify the condition in a journal."""
        steering = self.steering.fingerprint if self.steering else UNSTEERED
        told = {
            "instruction": self.instruction,
            "examples": self.turns,
            "suffix": self.suffix,
            "prefix": self.prefix,
            "sampling": self.sampling and [asdict(self.sampling), self.number],
        }
        told = {name: value for name, value in told.items() if value}
        if not told:
            return steering
        text = json.dumps([steering, told])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def system(self, system: str | None) -> str | None:
        """Return the system message: the run's own, and the instruction."""
        if not self.instruction:
            return system
        return f"{system}\n\n{self.instruction}" if system else self.instruction

    def question(self, problem: Problem) -> str:
        """Return the user turn."""
        return f"{problem.prompt}\n\n{self.suffix}" if self.suffix else problem.prompt

    def seeded(self, problem: Problem) -> "Sampling | None":
        """Return the sampling of the response to ``problem``, with a seed of its own; ``None`` if greedy."""
        if self.sampling is None:
            return None
        text = json.dumps([self.sampling.seed, problem.id, problem.prompt, self.number])
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        return replace(self.sampling, seed=seed)

    def describe(self) -> dict[str, object]:
        """Return what differs from the unsteered model as plain values, for JSON."""
        told: dict[str, object] = {
            "steering": self.steering and self.steering.describe(),
            "instruction": self.instruction,
            "examples": len(self.examples),
            "suffix": self.suffix,
            "prefix": self.prefix,
        }
        told = {name: value for name, value in told.items() if value}
        return told | {"fingerprint": self.fingerprint}


class Baseline(NamedTuple):
    """A baseline as it is asked for: ``spec``, and what it says."""

    spec: str
    kind: str
    text: str = ""
    number: int = 0

    @classmethod
    def parse(cls, spec: str) -> "Baseline":
        """Read one of ``SPECS``.

        Raises:
            InputError: anything else.
        """
        kind, given, rest = spec.partition(":")
        if kind in ("instruction", "prefix") and rest.strip():
            return cls(spec, kind, rest)
        digits = rest.isascii() and rest.isdecimal() and len(rest) <= 9
        if kind == "random" and (digits or not given):
            return cls(spec, kind, number=int(rest or 0))
        if kind in ("few-shot", "budget") and digits and int(rest):
            return cls(spec, kind, number=int(rest))
        raise InputError(f"baseline {one_line(spec)}: expected {SPECS}, with N of at least 1.")

    def condition(self, steering: Steering | None, examples: Sequence[Solution] = ()) -> Condition:
        """Return the condition, for a run with this steering and these examples.

        Raises:
            InputError: ``random`` without a steering, or ``few-shot`` with too few examples.
        """
        made = Condition(name=self.spec)
        if self.kind == "instruction":
            return replace(made, instruction=self.text)
        if self.kind == "prefix":
            return replace(made, prefix=self.text)
        if self.kind == "budget":
            return replace(made, suffix=f"Use at most {self.number} tokens.")
        if self.kind == "few-shot":
            if len(examples) < self.number:
                raise InputError(
                    f"baseline {self.spec}: there are {len(examples)} examples. Give a file with more "
                    "(--examples FILE), or ask for fewer."
                )
            return replace(made, examples=tuple(examples[: self.number]))
        if steering is None or steering.is_zero:
            raise InputError(
                f"baseline {self.spec}: needs a steering, whose norm and place it takes. Give a vector and "
                "a strength that is not 0 (-v FILE), or leave it out."
            )
        vector = random_like(steering.vector, self.number)
        return replace(made, steering=replace(steering, vector=vector))


def random_like(vector: SteeringVector, seed: int = 0) -> SteeringVector:
    """Return a vector with random directions: at each layer Gaussian, with the norm of ``vector`` there."""
    layers = {}
    for layer, norm in vector.norms().items():
        # The 1: for layer 0 numpy would draw what it draws for the seed alone, as others may have.
        drawn = np.random.default_rng([seed, layer, 1]).normal(size=vector.meta.hidden_size)
        layers[layer] = norm / np.linalg.norm(drawn) * drawn
    return SteeringVector(layers, vector.meta, name=f"random:{seed}")


def check_apart(examples: Iterable[Solution], problems: Iterable[Problem]) -> None:
    """Raise ``InputError`` if an example is one of the problems."""
    asked = {
        text.strip(): problem for problem in problems for text in (problem.prompt, problem.question)
    }
    for number, example in enumerate(examples, 1):
        if problem := asked.get(example.prompt.strip()):
            raise InputError(
                f"example {number} is {problem.id}, which is among the problems: its answer would be in the "
                "prompt. Take examples from another split, or leave the problem out (--skip, --limit)."
            )
