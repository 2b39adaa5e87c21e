"""Speculative decoding: a small draft model proposes tokens, the steered target checks them.

The target's own choice decides every token, so steering, strength and text are the target's;
the draft can only make it faster.
"""

from dataclasses import dataclass

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import InputError
from ..steering.steering import Steering
from ..steering.vector import SteeringVector


@dataclass(frozen=True, eq=False)
class Draft:
    """A model that drafts tokens for another one, unsteered unless it has a vector.

    Args:
        model: a Qwen2 model of mlx-lm, smaller than the target.
        tokenizer: its tokenizer, that of the target.
        tokens: how many it proposes at a time.
        vector: a steering vector for the draft (of its own width), or ``None``.
        layers: the draft's steered layers, by default all of ``vector``.
        factor: the draft's strength is the target's times this, whatever the dial says.

    Raises:
        InputError: ``tokens`` is below 1.
        VectorMismatchError: the vector does not fit the draft.
    """

    model: nn.Module
    tokenizer: TokenizerWrapper
    tokens: int = 3
    vector: SteeringVector | None = None
    layers: tuple[int, ...] | None = None
    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise InputError(f"{self.tokens} draft tokens: expected at least 1.")
        if self.vector is not None:
            self.vector.check_fits(
                hidden_size=self.model.args.hidden_size,
                layer_count=self.model.args.num_hidden_layers,
                model="the draft model",
            )

    def steering(self, target: Steering | None) -> Steering | None:
        """Return how the draft is steered while the target is steered like ``target``."""
        if target is None or self.vector is None:
            return None
        return Steering(
            self.vector, self.factor * target.strength, self.layers, positions=target.positions
        )

    def check(self, tokenizer: TokenizerWrapper) -> None:
        """Raise unless the target's tokenizer gives every token the same number.

        Raises:
            InputError: the tokenizers differ.
        """
        ours, theirs = self.tokenizer.get_vocab(), tokenizer.get_vocab()
        if ours != theirs:
            different = sum(theirs.get(token) != number for token, number in ours.items())
            raise InputError(
                f"the draft model's tokenizer differs from the model's ({len(ours)} and "
                f"{len(theirs)} tokens, {different} of them not the same). Choose a draft of the "
                "same family."
            )
