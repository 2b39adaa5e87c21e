"""Speculative decoding: a small draft model proposes tokens, the steered target checks them.

Every token is the target's own choice: the draft changes the speed, not the text.
"""

from dataclasses import dataclass

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import InputError
from ..model.model import Model


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

    def check(self, tokenizer: TokenizerWrapper) -> None:
        """Raise ``InputError`` unless the target's tokenizer gives every token the same number."""
        ours, theirs = self.model.tokenizer.get_vocab(), tokenizer.get_vocab()
        if ours != theirs:
            different = sum(theirs.get(token) != number for token, number in ours.items())
            raise InputError(
                f"the draft model's tokenizer differs from the model's ({len(ours)} and "
                f"{len(theirs)} tokens, {different} of them not the same). Choose a draft of the "
                "same family."
            )
