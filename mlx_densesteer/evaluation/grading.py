"""Grading: what answer a response gives, and whether it is the gold answer. No mlx.

Source: the evaluation protocol of the reference code of arXiv 2605.29247. GSM8K: the last
number. Tasks that ask for a box: the last ``\\boxed{}`` after the usual clean-up of MATH.
"""

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING

from .equivalence import agree

if TYPE_CHECKING:
    from .tasks import Problem


@dataclass(frozen=True)
class Grade:
    """How a response was graded.

    ``correct`` is what counts and ``found`` the answer that it was read from, ``None`` where
    the response gives none. ``by_reference`` is the verdict of the reference's string rule.
    ``by_math_verify`` is that of math-verify; ``None`` for the rule "number", without the
    extra ``eval``, without a box, and where math-verify found no verdict in time.
    """

    correct: bool
    found: str | None
    by_reference: bool
    by_math_verify: bool | None


def grade(problem: "Problem", response: str) -> Grade:
    """Grade a response by the problem's rule.

    "number": the last number of the response. The reference compares it with the gold
    answer as a string, after removing ``,``, ``$`` and a final ``.``; its pattern also takes
    a lone ``$$`` or ``..`` for a number, and 72.00 is not 72. What counts here is the last
    match that has a digit, compared as a number.

    "boxed": the content of the last ``\\boxed{}``. What counts is the verdict of math-verify
    on this content, so that both verdicts judge the same answer; without one, the string rule.

    Raises:
        InputError: math-verify is installed but cannot be used.
    """
    if problem.rule == "number":
        return _grade_number(problem.answer, response)
    return _grade_boxed(problem.answer, response)


_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def _grade_number(gold: str, response: str) -> Grade:
    matches = [_strip_number(match) for match in _NUMBER.findall(response)]
    gold = _strip_number(gold)
    found = next((m for m in reversed(matches) if any(c.isdigit() for c in m)), None)
    return Grade(
        correct=found is not None and _same_number(found, gold),
        found=found,
        by_reference=bool(matches) and matches[-1] == gold,
        by_math_verify=None,
    )


def _strip_number(text: str) -> str:
    return text.strip().replace(",", "").replace("$", "").removesuffix(".")


def _same_number(found: str, gold: str) -> bool:
    try:
        return Decimal(found.rstrip(".")) == Decimal(gold)
    except InvalidOperation:
        return found == gold


def _grade_boxed(gold: str, response: str) -> Grade:
    found = last_boxed(response)
    if not found:
        return Grade(correct=False, found=None, by_reference=False, by_math_verify=None)
    by_reference = normalise(found) == normalise(gold)
    by_math_verify = agree(gold, found)
    correct = by_reference if by_math_verify is None else by_math_verify
    return Grade(correct, found, by_reference, by_math_verify)


_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last ``\boxed{}``, or ``None`` if there is none or it is cut off.

    Braces nest; an escaped one, as of a set, is text.
    """
    start = text.rfind("\\boxed")
    match = re.compile(r"\\boxed\s*\{").match(text, start) if start >= 0 else None
    if match is None:
        return None
    depth = 1
    for brace in _BRACE.finditer(text, match.end()):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[match.end() : brace.start()].strip()
    return None


_REWRITES = [(re.compile(pattern), new) for pattern, new in (
    (r"\\[!,;:> ]|\\q?quad(?![a-zA-Z])|~", ""),  # spacing
    (r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])", ""),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\\$|\$", ""),
    (r"\\?%", ""),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree", ""),
    (r"(?<=[0-9}\s])\s*\\(?:text|mbox)\{[^{}]*\}(?:\^\{?\d\}?)?\s*$", ""),  # a unit
    (r"\\(?:text|mbox|mathrm|textbf|mathbf)\{([^{}]*)\}", r"\1"),
    (r"^\s*[a-zA-Z]\s*(?:=|\\in(?![a-zA-Z]))\s*", ""),  # x = 5
    (r"(?<![0-9])\.(?=[0-9])", "0."),
    (r"(\.[0-9]*?)0+(?![0-9])", r"\1"),
    (r"\.(?![0-9])", ""),
    (r"\s+", ""),
    (r"\\sqrt([0-9a-zA-Z])", r"\\sqrt{\1}"),
    (r"\\frac([0-9])([0-9])", r"\\frac{\1}{\2}"),
    (r"\\frac([0-9])\{", r"\\frac{\1}{"),
    (r"(\\frac\{[^{}]*\})([0-9])", r"\1{\2}"),
    (r"^(-?)([0-9]+)/([0-9]+)$", r"\1\\frac{\2}{\3}"),
    (r"^(-?)0+(?=[0-9])", r"\1"),
)]  # fmt: skip
_THOUSANDS = re.compile(r"-?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")


def normalise(answer: str) -> str:
    """Return an answer in LaTeX without what only typesetting or taste decides.

    Spacing, ``\\left``, kinds of fractions, degrees, currency, percent, units after a number,
    ``\\text``, one variable before ``=``, separators of thousands, zeros around a number.
    """
    for pattern, new in _REWRITES:
        answer = pattern.sub(new, answer)
    return answer.replace(",", "") if _THOUSANDS.fullmatch(answer) else answer
