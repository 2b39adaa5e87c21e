"""What changes the logits of an answer before its next token is chosen, in this order: bias and penalties, a
grammar, a limit on the thought."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.sample_utils import make_logits_processors

from ..errors import InputError
from ..model.marks import marks_of
from .grammar import Grammar
from .thought import LogitsProcessor, thought_limit

_WHOLE = 2**31 - 1  # tokens of the answer that a penalty looks at


@dataclass(frozen=True)
class LogitBias:
    """Numbers added to logits, as OpenAI defines them. Of the answer alone: the prompt has no penalty.

    Args:
        presence: subtracted from the logit of every token that the answer has.
        frequency: subtracted as often as the answer has the token.
        tokens: added to the logits of these tokens.
    """

    presence: float = 0.0
    frequency: float = 0.0
    tokens: Mapping[int, float] = field(default_factory=dict)

    def check(self, vocabulary: int) -> None:
        """Raise ``InputError`` for a token that the model does not know."""
        if strange := [token for token in self.tokens if not 0 <= token < vocabulary]:
            raise InputError(
                f"logit_bias has the token {strange[0]}: the model knows 0 to {vocabulary - 1}."
            )

    def processor(self, answer: Sequence[int], *, skip: int) -> LogitsProcessor:
        """Return a logits processor of mlx-lm for one answer; the arguments are those of ``Grammar.processor``."""
        steps = make_logits_processors(
            logit_bias=dict(self.tokens),
            presence_penalty=self.presence,
            presence_context_size=_WHOLE,
            frequency_penalty=self.frequency,
            frequency_context_size=_WHOLE,
        )
        before = mx.array([*answer], mx.int32)
        mx.eval(before)  # here: another thread may use it

        def change(tokens: mx.array, logits: mx.array) -> mx.array:
            written = mx.concatenate([before, tokens[skip:].astype(mx.int32)])
            changed = logits.astype(mx.float32)
            for step in steps:
                changed = step(written, changed)
            return changed.astype(logits.dtype)

        return change


def processors(
    network: nn.Module,
    answer: Sequence[int],
    *,
    opened: bool,
    skip: int,
    bias: LogitBias | None = None,
    grammar: Grammar | None = None,
    think_limit: int | None = None,
) -> list[LogitsProcessor]:
    """Return the logits processors of one answer; empty if nothing is changed.

    Args:
        answer: tokens of the answer that they are not given, before those that they are.
        opened: whether the prompt opens the thought.
        skip: how many tokens they are given that precede the answer.

    Raises:
        ModelError: ``think_limit``, for a model that has no marks of a thought.
    """
    made = []
    if bias is not None:
        made.append(bias.processor(answer, skip=skip))
    if grammar is not None:
        made.append(grammar.processor(answer, opened=opened, skip=skip))
    if think_limit is not None:
        marks = marks_of(network)
        made.append(thought_limit(marks, think_limit, answer, opened=opened, skip=skip))
    return made


def gave_up(changes: Sequence[LogitsProcessor]) -> bool:
    """Tell whether a grammar ended the answer because it could not go on."""
    return any(getattr(change, "failed", False) for change in changes)
