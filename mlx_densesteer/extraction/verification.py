"""Is a rewrite a denser form of the same reasoning? Every check of a contrastive pair. No mlx."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..evaluation.grading import grade
from ..generation.answer import density, split_steps
from .quantities import given, written

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
