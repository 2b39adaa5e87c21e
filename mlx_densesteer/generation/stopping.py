"""Where a response ends: its limits, and the texts that stop it, found while it streams."""

from collections.abc import Sequence

from ..errors import InputError


def check_limits(max_tokens: int, stop: Sequence[str]) -> None:
    """Check how long a response may be, and the texts that end it.

    Raises:
        InputError: ``max_tokens`` is below 1, or a stop text is empty.
    """
    if max_tokens < 1:
        raise InputError(f"max tokens {max_tokens}: expected at least 1.")
    if any(not text for text in stop):
        raise InputError("a stop text is empty; expected at least one character.")


class Pending:
    """The text of a response as it comes, held back where a stop text could be beginning.

    ``text`` is what has been released, ``held`` what may still turn out to be a stop text, and
    ``stopped`` says that one came. Only the end of the text is ever looked at again.
    """

    def __init__(self, stops: Sequence[str] = ()):
        self.held, self.stopped = "", False
        self._stops = tuple(stops)
        self._released: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._released)

    def feed(self, piece: str) -> str:
        """Add ``piece`` and return what can be said now.

        After a stop text that is what precedes it; then nothing more is said.
        """
        if self.stopped:
            return ""
        self.held += piece
        if found := [at for at in map(self.held.find, self._stops) if at >= 0]:
            self.stopped = True
            return self._release(min(found), drop=True)
        return self._release(len(self.held) - _held_back(self.held, self._stops))

    def finish(self) -> str:
        """The end came: release what was held."""
        return self._release(len(self.held))

    def _release(self, length: int, *, drop: bool = False) -> str:
        piece, self.held = self.held[:length], "" if drop else self.held[length:]
        if piece:
            self._released.append(piece)
        return piece


def _held_back(text: str, stops: Sequence[str]) -> int:
    """Return how many last characters of ``text`` could begin one of ``stops``."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
