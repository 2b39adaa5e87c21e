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
    """A denser response; ``truncated`` if the rewriter was cut off.

    Half a surrogate pair in ``text``, which no tokenizer and no file takes, becomes U+FFFD.
    """

    text: str
    truncated: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", whole_characters(self.text))


def whole_characters(text: str) -> str:
    """Return ``text`` with U+FFFD for each lone surrogate; two that make a pair are joined."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Rewriter(Protocol):
    """Makes responses denser.

    ``name`` tells it from every other one, in files too: what was rewritten under it is not
    asked for again. So it has to change with whatever changes the rewrites.
    """

    name: str

    def rewrite(self, drafts: Sequence[Draft]) -> Iterator[tuple[int, Rewrite | None]]:
        """Yield ``(index, rewrite)`` as each is ready, ``None`` where there will be none yet."""
        ...
