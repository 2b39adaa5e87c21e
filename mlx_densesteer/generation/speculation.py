"""Speculative decoding: a small draft model proposes tokens, the steered target checks them.

Every token is the target's own choice: the draft changes the speed, not the text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import InputError
from ..model.model import Model
from ..model.prefix import Chunk


@dataclass(frozen=True, eq=False)
class Draft:
    """An unsteered model that proposes tokens to another one.

    Args:
        model: smaller than the target, with the target's tokenizer.
        tokens: how many it proposes at a time.

    Raises:
        InputError: ``tokens`` is below 1.
    """

    model: Model
    tokens: int = 3

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise InputError(f"{self.tokens} draft tokens: expected at least 1.")
        object.__setattr__(self, "model", Model.of(self.model))

    def network(self, vocabulary: int) -> Callable[..., mx.array]:
        """Return the draft's network for a target of another number of rows, ``vocabulary``.

        Models of one tokenizer may differ in the rows beyond it (Qwen2.5: 151936 and 152064). No text
        has these tokens, but a model may choose one: the draft then reads its last row instead, and
        never proposes what the target does not know. mlx would read beyond the rows.
        """
        network, known = self.model.network, self.model.vocabulary
        if known == vocabulary:
            return network

        def within(tokens: mx.array, **options: object) -> mx.array:
            return network(mx.minimum(tokens, known - 1), **options)[..., :vocabulary]

        return within

    def chunks(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Return what the draft reads of ``chunks``: as ``network``, its last row for those it lacks."""
        last = self.model.vocabulary - 1
        return [c._replace(tokens=tuple(min(token, last) for token in c.tokens)) for c in chunks]

    def check(self, tokenizer: TokenizerWrapper) -> None:
        """Raise ``InputError`` unless the target's tokenizer gives ordinary tokens the same numbers.

        Added tokens may differ: the target takes no proposal that it would not choose itself.
        """
        ours, theirs = _ordinary(self.model.tokenizer), _ordinary(tokenizer)
        if ours != theirs:
            different = len(dict(ours.items() ^ theirs.items()))
            raise InputError(
                f"the draft model's tokenizer differs from the model's ({len(ours)} and "
                f"{len(theirs)} ordinary tokens, {different} of them not the same). Choose a draft of the "
                "same family."
            )


def _ordinary(tokenizer: TokenizerWrapper) -> dict[str, int]:
    """Return the vocabulary without the added tokens."""
    added = tokenizer.get_added_vocab()
    return {token: n for token, n in tokenizer.get_vocab().items() if token not in added}
