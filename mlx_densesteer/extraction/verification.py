"""The checks of a contrastive pair: is the rewrite a denser or shorter form of the same reasoning? No mlx."""

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

from ..evaluation.grading import grade
from ..evaluation.numbers import decimals, tidy
from ..generation.answer import density, split_steps

if TYPE_CHECKING:
    from ..evaluation.tasks import Problem

NLL_MARGIN = 0.5  # nats per token; docs/pairs.md says where it comes from


def most_tokens(original: int) -> int:
    """Return how many tokens a rewrite may have: a quarter and 64 more than the original."""
    return original + original // 4 + 64


# in the order of the checks; a rejection is counted under its first reason
REASONS = {
    "single step": "the original has one step; there is nothing to merge",
    "no rewrite": "the rewriter has none",
    "empty": "the rewrite has no text",
    "too long": "it has over a quarter and 64 tokens more than the original, or leaves the context",
    "truncated": "the rewrite was cut off before its end",
    "other answer": "its final answer is not that of the original",
    "new number": "it has a number that is neither in the original nor in the question",
    "not fewer steps": "it has as many steps as the original, or more",
    "not denser": "it has no more tokens per step than the original",
    "not shorter": "it has as many tokens as the original, or more",
    "unlikely": "its NLL under the target exceeds the original's by more than the margin",
}


@dataclass(frozen=True)
class Response:
    """A response and its figures under the target model.

    ``tokens`` does not count the end of turn. ``nll`` is the mean negative log-likelihood in nats
    per token, unsteered. It is ``None`` where the rewrite has another fault.
    """

    text: str
    tokens: int
    nll: float | None = None
    truncated: bool = False

    @property
    def steps(self) -> int:
        return len(split_steps(self.text))

    @property
    def density(self) -> float | None:
        return density(self.tokens, self.steps)


def verify(
    problem: "Problem",
    original: Response,
    rewrite: Response | None,
    *,
    longest: int | None = None,
    shorter: bool = False,
) -> tuple[str, ...]:
    """Return why ``rewrite`` makes no pair with ``original``: keys of ``REASONS``, or none.

    ``original`` must be correct: a correct rewrite then has the same answer. A rewrite of more
    than ``longest`` tokens (by default ``most_tokens``) is not read. With ``shorter`` it must have fewer tokens,
    and need be no denser. The NLL is left to ``is_unlikely``.
    """
    if not may_be_rewritten(original, shorter=shorter):
        return ("single step",)
    if rewrite is None:
        return ("no rewrite",)
    if not rewrite.text.strip():
        return ("empty",)
    if rewrite.tokens > (most_tokens(original.tokens) if longest is None else longest):
        return ("too long",)
    found = {
        "truncated": rewrite.truncated,
        "other answer": not grade(problem, rewrite.text).correct,
        "new number": bool(new_numbers(problem, original.text, rewrite.text)),
    }
    if shorter:
        found["not shorter"] = rewrite.tokens >= original.tokens
    else:
        found["not fewer steps"] = rewrite.steps >= original.steps
        found["not denser"] = (rewrite.density or 0.0) <= (original.density or 0.0)
    return tuple(reason for reason in REASONS if found.get(reason))


def may_be_rewritten(original: Response, *, shorter: bool = False) -> bool:
    """Tell whether a rewrite of ``original`` can have fewer steps, or need only be ``shorter``."""
    return shorter or original.steps > 1


def is_unlikely(original: float, rewrite: float, margin: float = NLL_MARGIN) -> bool:
    """Tell whether ``nll(rewrite) > nll(original) + margin``, or an NLL is NaN; nats per token."""
    return not rewrite <= original + margin


def new_numbers(problem: "Problem", original: str, rewrite: str) -> list[str]:
    """Return the numbers in ``rewrite`` that neither the original nor the question gives."""
    return sorted(map(str, written(rewrite) - given(original) - given(problem.prompt)))


_PERCENT = re.compile(r"((?<![0-9])[0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*(?:\\?%|percent\b)")
_EXPONENT = re.compile(r"(?<=[A-Za-z}])\^(?:\{-?[0-9]\}|[0-9])")  # of a unit or a variable
_LABEL = re.compile(
    r"^[ \t]*(?:[#>*-]+[ \t]*)?(?:\*\*)?(?:step[ \t]+)?[0-9]+[.):](?:\*\*)?[ \t]", re.I | re.M
)
_UNITS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_WORDS = {word: {Decimal(n)} for n, word in enumerate(_UNITS)}
_WORDS |= {word: {Decimal(10 * n)} for n, word in enumerate(_TENS, 2)}
for _number, _names in {
    "0.2": "fifth fifths",
    "0.25": "quarter quarters",
    "0.5": "half halves",
    "1": "once half halves third quarter fourth fifth",
    "2": "twice double doubles doubled half halves",
    "3": "thrice triple triples tripled third thirds",
    "4": "quarter quarters fourth fourths",
    "5": "fifth fifths",
    "12": "dozen",
    "100": "hundred percent",
    "1000": "thousand",
    "1000000": "million",
}.items():
    for _name in _names.split():
        _WORDS.setdefault(_name, set()).add(Decimal(_number))
_WORD = re.compile(rf"\b(?:{'|'.join(_WORDS)})\b", re.I)
_COMPOUND = re.compile(rf"\b({'|'.join(_TENS)})[- ]({'|'.join(_UNITS[1:10])})\b", re.I)


def written(text: str) -> set[Decimal]:
    """Return the numbers that ``text`` writes in digits, without sign.

    2.50 is 2.5, and 1,000 is 1000, with separators of LaTeX and Unicode too. The number of a step
    or of a list item at the start of a line does not count, nor does the exponent of a letter.
    """
    return decimals(_EXPONENT.sub("", _LABEL.sub("", tidy(text))))


def given(text: str) -> set[Decimal]:
    """Return the numbers that ``text`` gives in any form, without sign.

    In digits, labels included, and as English words ("twenty-five", "half", "a dozen"). 35 % gives
    0.35 and 100 too.
    """
    text = tidy(text)
    found = decimals(text)
    for percent in set(_PERCENT.findall(text)):
        found |= {Decimal(f"{percent}e-2"), Decimal(100)}
    for word in set(_WORD.findall(text)):
        found |= _WORDS[word.lower()]
    for tens, units in set(_COMPOUND.findall(text)):
        found.add(sum(_WORDS[tens.lower()] | _WORDS[units.lower()]))
    return found
