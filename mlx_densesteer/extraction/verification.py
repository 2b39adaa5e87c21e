"""Is a rewrite a denser form of the same reasoning? Every check of a contrastive pair. No mlx."""

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

from ..evaluation.grading import grade
from ..generation.answer import density, split_steps

if TYPE_CHECKING:
    from ..evaluation.tasks import Problem

NLL_MARGIN = 0.5  # nats per token; docs/pairs.md says where it comes from


def most_tokens(original: int) -> int:
    """Return how long a rewrite of so many tokens may be: a quarter more and 64.

    A denser form of the same reasoning is not longer at all; beyond this it is something else.
    """
    return original + original // 4 + 64


# In the order in which they are checked; a rejection is counted under the first that holds.
REASONS = {
    "single step": "the original has one step; there is nothing to merge",
    "no rewrite": "the rewriter gave none",
    "empty": "the rewrite has no text",
    "too long": "it has over a quarter and 64 tokens more than the original, or leaves the context",
    "truncated": "the rewrite was cut off before its end",
    "other answer": "its final answer is not that of the original",
    "new number": "it has a number that is neither in the original nor in the question",
    "not fewer steps": "it has as many steps as the original, or more",
    "not denser": "it has no more tokens per step than the original",
    "unlikely": "its NLL under the target exceeds the original's by more than the margin",
}


@dataclass(frozen=True)
class Response:
    """A response and its figures under the target model.

    ``tokens`` counts those of the text without the end of turn; ``nll`` is the mean negative
    log-likelihood in nats per token, unsteered, ``None`` where it was not computed: it takes a
    pass of the model, and only a rewrite without any other fault is worth one.
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
) -> tuple[str, ...]:
    """Return why ``rewrite`` does not make a pair with ``original``: keys of ``REASONS``.

    None of them is an accepted pair, if ``is_unlikely`` says no as well. ``original`` has been
    graded correct, so that a correct rewrite has the same answer. ``longest`` is in tokens,
    by default ``most_tokens``; what is longer is not read.
    """
    if original.steps < 2:
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
        "not fewer steps": rewrite.steps >= original.steps,
        "not denser": (rewrite.density or 0.0) <= (original.density or 0.0),
    }
    return tuple(reason for reason in REASONS if found.get(reason))


def is_unlikely(original: float, rewrite: float, margin: float = NLL_MARGIN) -> bool:
    """Tell whether ``nll(rewrite) > nll(original) + margin``, in nats per token.

    It is where either is not a number.
    """
    return not rewrite <= original + margin


def new_numbers(problem: "Problem", original: str, rewrite: str) -> list[str]:
    """Return the numbers in ``rewrite`` that neither the original nor the question gives."""
    return sorted(map(str, written(rewrite) - given(original) - given(problem.prompt)))


_NUMBER = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?(?![0-9])|[0-9]+(?:\.[0-9]+)?|\.[0-9]+")
# begins where digits begin: from inside a long number it would be tried again and again
_PERCENT = re.compile(r"((?<![0-9])[0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*(?:\\?%|percent\b)")
_LATEX_COMMA = re.compile(r"(?<=[0-9])(?:\{,\}|\\,|\\!|,\\!)(?=[0-9]{3})")
_LABEL = re.compile(
    r"^[ \t]*(?:[#>*-]+[ \t]*)?(?:\*\*)?(?:step[ \t]+)?[0-9]+[.):](?:\*\*)?[ \t]", re.I | re.M
)
_UNITS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_WORDS = {
    **{word: (str(n),) for n, word in enumerate(_UNITS)},
    **{word: (str(10 * n),) for n, word in enumerate(_TENS, 2)},
    "hundred": ("100",), "thousand": ("1000",), "million": ("1000000",), "dozen": ("12",),
    "once": ("1",), "twice": ("2",), "double": ("2",), "doubles": ("2",), "doubled": ("2",),
    "triple": ("3",), "triples": ("3",), "tripled": ("3",), "thrice": ("3",),
    "half": ("0.5", "1", "2"), "halves": ("0.5", "1", "2"), "third": ("1", "3"),
    "thirds": ("3",), "quarter": ("0.25", "1", "4"), "quarters": ("0.25", "4"),
    "fourth": ("1", "4"), "fourths": ("4",), "fifth": ("0.2", "1", "5"), "fifths": ("0.2", "5"),
    "percent": ("100",),
}  # fmt: skip
_WORD = re.compile(rf"\b(?:{'|'.join(_WORDS)})\b", re.I)
_COMPOUND = re.compile(rf"\b({'|'.join(_TENS)})[- ]({'|'.join(_UNITS[1:10])})\b", re.I)


def written(text: str) -> set[Decimal]:
    """Return the numbers that ``text`` writes in digits, without sign.

    2.50 is 2.5, and 1,000 is 1000, with LaTeX's commas too. The number of a step or of a list
    item at the start of a line is none.
    """
    return {Decimal(n.replace(",", "")) for n in _NUMBER.findall(_LABEL.sub("", _plain(text)))}


def given(text: str) -> set[Decimal]:
    """Return the numbers that ``text`` gives in any form, without sign.

    In digits, labels included; as English words ("twenty-five", "half", "a dozen"); and 35 %
    gives 0.35 and 100 as well.
    """
    text = _plain(text)
    found = {Decimal(number.replace(",", "")) for number in _NUMBER.findall(text)}
    for percent in _PERCENT.findall(text):
        found |= {Decimal(f"{percent}e-2"), Decimal(100)}
    for word in _WORD.findall(text):
        found |= {Decimal(number) for number in _WORDS[word.lower()]}
    for tens, units in _COMPOUND.findall(text):
        found.add(10 * (2 + _TENS.index(tens.lower())) + Decimal(_UNITS.index(units.lower())))
    return found


def _plain(text: str) -> str:
    return _LATEX_COMMA.sub(",", text)
