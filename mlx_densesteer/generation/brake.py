"""The brake: find degenerate repetition in an answer while it is being generated.

An overdosed model falls into a loop: one word for ever, the same clause, a list whose items are
all the same. The rule looks at token ids only, in constant time a token:

- a token is *stale* when the four tokens that it ends stood at least three times before among
  the last ``window`` tokens;
- a score starts at 0, goes up by 1 with each stale token and down by 2, not below 0, with any
  other; at ``limit`` the answer is a loop.

This is a one-sided cumulative sum (Page, Biometrika 41 (1954), 100-115). It bears a loop that
changes a little (a counter, two words in no order), up to a period of a third of the window; it
has to: a table, a long formula or the same sentence three times are not loops.

Text is shown as it comes until repetition is in sight: from the second time that four tokens come
within the window, text is held back until it has become new again (a quicker score), and a loop is cut
off there. What was shown is never taken back.
"""

import math
from dataclasses import asdict, dataclass

from ..errors import InputError

_GRAM = 4  # tokens: shorter ones come again in any list of equations
_TIMES = 3  # the fourth copy of a passage counts as a repeat
_FALL = 2  # of the score: a loop is two thirds stale
_HOLD_FALL = 3  # of the quicker score: ordinary text is shown again soon


@dataclass(frozen=True)
class Brake:
    """What is done about degenerate repetition: cut it off, lower the strength, go on.

    Args:
        factor: the strength after a brake is ``factor`` times that before, from 0 to below 1.
        tries: the brake of this number sets the strength to 0, and is the last.
        limit: the score at which repetition is degenerate, in tokens.
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
    """One brake: ``dropped`` tokens were cut off behind token ``at_token`` of the answer."""

    at_token: int
    dropped: int
    strength_before: float
    strength_after: float

    def describe(self) -> dict[str, int | float]:
        """Return the brake as JSON writes it."""
        return asdict(self)


class Repetition:
    """Watches the tokens of one answer.

    ``loop_start`` is ``None`` until there is a loop; then the number of tokens before it, and
    further tokens change nothing. ``safe`` is the number of leading tokens that will not be cut
    off: it never falls, and ``loop_start`` is never below it.
    """

    def __init__(self, brake: Brake):
        self.safe = 0
        self.loop_start: int | None = None
        self._brake = brake
        self._tokens: list[int] = []
        self._places: dict[tuple[int, ...], tuple[int, ...]] = {}  # the latest ends of each gram
        self._stale = 0  # the score of the module's docstring
        self._again = 0  # the quicker score: above 0, text is held back

    def feed(self, token: int) -> None:
        """Take the answer's next token."""
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
        """Return the watch over the answer that is left when the loop is cut off.

        It knows the tokens before ``loop_start`` and starts from score 0. What was safe stays so.
        """
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
