"""How a sequence is cut into chunks, and which of their positions are steered. No mlx arrays."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .cache import EVERYWHERE, NOWHERE, Span

STEP = 2048  # tokens that go through the blocks together at most


class Chunk(NamedTuple):
    """Tokens that are read together.

    ``answer``: read at positions whose output chose a token of an answer, the last token of the
    question first. Other chunks are prompt.
    """

    tokens: tuple[int, ...]
    answer: bool = False


def steered_span(positions: str, answer: bool, start: int) -> Span:
    """Return what is steered of tokens from ``start`` on, of an answer or of prompt.

    The last token of a prompt, with which an answer begins, is ``"prompt"`` and ``"generated"``.
    """
    if positions == "all":
        return EVERYWHERE
    if positions == "generated":
        return EVERYWHERE if answer else NOWHERE
    return Span(stop=start + 1) if answer else EVERYWHERE


def common_beginning(a: Sequence[Chunk], b: Sequence[Chunk]) -> int:
    """Return how many leading chunks are the same."""
    same = 0
    while same < min(len(a), len(b)) and a[same] == b[same]:
        same += 1
    return same


def pieces(tokens: Sequence[int]) -> Iterator[Sequence[int]]:
    """Cut the tokens of a chunk into parts of at most ``STEP``."""
    for start in range(0, len(tokens), STEP):
        yield tokens[start : start + STEP]
