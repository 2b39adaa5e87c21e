"""The brake: find degenerate repetition in an answer while it is generated.

An overdosed model falls into a loop: one word for ever, the same clause, a list of equal items. The
rule reads token ids only, in constant time a token:

- A token is *stale* if the four tokens that end with it occurred at least three times before among
  the last ``window`` tokens.
- A score starts at 0. A stale token adds 1; any other subtracts 2, not below 0. At ``limit`` the
  answer is a loop.

This is a one-sided cumulative sum (Page, Biometrika 41 (1954), 100-115). It also finds loops that
change a little (a counter, two words in random order), up to a period of a third of the window. A
table, a long formula or the same sentence three times are not loops.

Text is held back from the second time that four tokens occur within the window, until a second,
quicker score is 0 again. A loop is cut off where holding back began, so shown text is never taken
back.
"""

import math
from dataclasses import dataclass

from ..errors import InputError

_GRAM = 4  # tokens: shorter sequences recur in any list of equations
_TIMES = 3  # earlier copies; the fourth counts as a repeat
_FALL = 2  # of the score, so more than two thirds of a loop are stale
_HOLD_FALL = 3  # of the quicker score, so ordinary text is shown again soon


@dataclass(frozen=True)
class Brake:
    """How to handle degenerate repetition: cut it off, lower the strength, go on.

    Args:
        factor: each brake multiplies the strength by it; from 0 to below 1.
        tries: the brake of this number sets the strength to 0 and is the last.
        limit: the score at which an answer is a loop, in tokens.
        window: how far back a token counts as repeated, in tokens.

    Raises:
        InputError: a value out of its range.
    """

    factor: float = 0.5
    tries: int = 3
    limit: int = 64
    window: int = 256

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and 0 <= self.factor < 1):
            raise InputError(f"brake factor {self.factor}: expected 0 or more, below 1.")
        if self.tries < 1:
            raise InputError(f"brake tries {self.tries}: expected at least 1.")
        if self.limit < _GRAM:
            raise InputError(f"brake limit {self.limit}: expected at least {_GRAM} tokens.")
        if self.window < self.limit:
            raise InputError(f"brake window {self.window}: expected at least limit = {self.limit}.")


@dataclass(frozen=True)
class Braked:
    """One brake: ``dropped`` tokens were cut off after the first ``at_token`` of the answer."""

    at_token: int
    dropped: int
    strength_before: float
    strength_after: float


class Repetition:
    """Find a loop in the tokens of one answer.

    ``loop_start`` is ``None`` until there is a loop, then the number of tokens before it; later
    tokens change nothing. ``safe`` is the number of leading tokens that will not be cut off: it
    never falls, and ``loop_start`` is never below it.
    """

    def __init__(self, brake: Brake):
        self.safe = 0
        self.loop_start: int | None = None
        self._brake = brake
        self._tokens: list[int] = []
        self._places: dict[tuple[int, ...], tuple[int, ...]] = {}  # where each gram ended last
        self._stale = 0  # the score
        self._again = 0  # the quicker score; above 0, text is held back

    def feed(self, token: int) -> None:
        """Add the answer's next token."""
        if self.loop_start is not None:
            return
        self._tokens.append(token)
        length = len(self._tokens)
        if length >= _GRAM:
            self._score(length, tuple(self._tokens[-_GRAM:]))
        if self._stale >= self._brake.limit:
            self.loop_start = self.safe
        elif not self._again:
            self.safe = length

    def after(self) -> "Repetition":
        """Return the ``Repetition`` of the answer without its loop: score 0, ``safe`` as before."""
        rest = Repetition(self._brake)
        for token in self._tokens[: self.loop_start]:
            rest.feed(token)
        rest._stale = rest._again = 0
        rest.safe = max(rest.safe, self.safe)
        return rest

    def _score(self, length: int, gram: tuple[int, ...]) -> None:
        places = self._places.get(gram, ())
        self._places[gram] = (*places[1 - _TIMES :], length)
        oldest = length - self._brake.window
        if len(places) == _TIMES and places[0] >= oldest:
            self._stale += 1
        else:
            self._stale = max(0, self._stale - _FALL)
        if places and places[-1] >= oldest:
            self._again += 1
        else:
            self._again = max(0, self._again - _HOLD_FALL)
