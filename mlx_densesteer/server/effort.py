"""``reasoning_effort``: what low, medium and high mean for a model that thinks."""

from dataclasses import dataclass

from ..errors import InputError
from ..steering.request import Amount
from ..text import one_line

LEVELS = ("low", "medium", "high")


@dataclass(frozen=True)
class Effort:
    """How to steer under one level.

    Args:
        amount: how strongly; ``None`` is the vector's usual strength times ``factor``.
        budget: tokens of the thought, from which on it is steered more strongly; ``None`` for no budget.
    """

    amount: Amount | None = None
    factor: float = 1.0
    budget: int | None = None


# Dense is less to think: low is the vector as it is, high the model as it is.
EFFORTS: dict[str, Effort] = {
    "low": Effort(budget=512),
    "medium": Effort(factor=0.5, budget=2048),
    "high": Effort(factor=0.0),
}


def parse_effort(text: str) -> tuple[str, Effort]:
    """Read ``LEVEL=STRENGTH`` or ``LEVEL=STRENGTH:TOKENS``, such as ``low=30%:256``.

    Raises:
        InputError: another form.
    """
    level, equals, rest = text.partition("=")
    amount, colon, tokens = rest.partition(":")
    if level not in LEVELS or not equals or (colon and not (tokens.isdecimal() and int(tokens))):
        raise InputError(
            f"effort {one_line(text, 40)!r}: expected low, medium or high with a strength, and perhaps a "
            "thinking budget: low=30%:256."
        )
    return level, Effort(Amount.parse(amount), budget=int(tokens) if colon else None)
