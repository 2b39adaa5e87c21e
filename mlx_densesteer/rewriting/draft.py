"""What goes into a rewriter and what comes out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Draft:
    """A correct response that is to be made denser; ``tokens`` as the target counts them."""

    id: str
    question: str
    response: str
    tokens: int


@dataclass(frozen=True)
class Rewrite:
    """A denser response; ``truncated`` if the rewriter was cut off."""

    text: str
    truncated: bool = False


class Rewriter(Protocol):
    """Makes responses denser. ``name`` tells it from every other one, in files too."""

    name: str

    def rewrite(self, drafts: Sequence[Draft]) -> Iterator[tuple[int, Rewrite | None]]:
        """Yield ``(index, rewrite)`` as each is ready, ``None`` where there will be none yet."""
        ...
