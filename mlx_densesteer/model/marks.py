"""The tokens of a vocabulary that mark a place: those that end a step, and those around a thought or a tool call.

A token ends a step if its own text holds a blank line, as ``".\\n\\n"`` does. Qwen2's tokenizer writes
every blank line as the end of one token. So neither the token before nor a state in the KV cache is
needed, and a token is steered alike in any chunk, batch or order.

A thought is between two tokens, such as ``<think>`` and ``</think>``, and so is a call of a tool; mlx-lm knows
them of a tokenizer.

Not covered: a blank line over two tokens, which is refused; for places, marks of several tokens.
"""

import re
from collections.abc import Collection, Sequence
from functools import cached_property

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import ModelError, SteeringError
from ..steering.places import FOREVER
from .prompt import decode, encode_text

BLANK_LINE = re.compile(r"\n[^\S\n]*\n")


class Marks:
    """The tokens of a vocabulary that mark a place; found out when first asked for.

    Args:
        vocabulary: how many tokens the network knows.
    """

    def __init__(self, tokenizer: TokenizerWrapper, vocabulary: int):
        self.tokenizer, self._vocabulary = tokenizer, vocabulary

    @cached_property
    def step_ends(self) -> np.ndarray:
        """Whether each token ends a step, bool ``(vocabulary,)``.

        Raises:
            ModelError: the tokenizer writes a blank line as several tokens.
        """
        known = np.zeros(self._vocabulary, bool)
        for token, number in self.tokenizer.get_vocab().items():
            # byte-level tokenizers write a line break as Ċ
            if token.count("\n") + token.count("Ċ") > 1 and number < self._vocabulary:
                known[number] = bool(BLANK_LINE.search(decode(self.tokenizer, [number])))
        probe = [token for token in encode_text(self.tokenizer, "1.\n\n2") if token < len(known)]
        if not known[probe].any():
            raise ModelError(
                "the tokenizer writes a blank line as several tokens, so no token ends a step by itself: "
                "neither positions nor a read-out can be `steps` with this model. Use positions "
                "`generated`, or the read-out `mean-response`."
            )
        return known

    @cached_property
    def step_end_table(self) -> mx.array:
        """``step_ends`` on the device."""
        table = mx.array(self.step_ends)
        mx.eval(table)  # here: another thread may use it
        return table

    def ending_steps(self, tokens: Sequence[int]) -> np.ndarray:
        """Return which of the tokens end a step, bool ``(tokens,)``."""
        return self.step_ends[np.asarray(tokens, int)]

    @cached_property
    def thought(self) -> tuple[int, int]:
        """The tokens that open and close a thought.

        Raises:
            ModelError: the tokenizer has none, or writes one as several tokens.
        """
        opens, closes = marks = thought_marks(self.tokenizer)
        if self._are_single(*marks):
            return opens[0], closes[0]
        found = "has no tokens around a thought, such as <think> and </think>"
        if opens:
            found = f"writes {self.tokenizer.think_start} or {self.tokenizer.think_end} as several tokens"
        raise ModelError(
            f"the tokenizer {found}: with this model neither positions `think` and `answer` nor a thinking "
            "budget is possible. Use positions `generated`, or a model that thinks."
        )

    @cached_property
    def call(self) -> tuple[int, int]:
        """The tokens that open and close a tool call.

        Raises:
            ModelError: the tokenizer has none, or writes one as several tokens.
        """
        opens, closes = marks = call_marks(self.tokenizer)
        if self._are_single(*marks):
            return opens[0], closes[0]
        raise ModelError(
            "the tokenizer has no single tokens around a tool call, such as <tool_call> and </tool_call>: with "
            "this model tool calls are steered as all else."
        )

    def _are_single(self, opens: Sequence[int], closes: Sequence[int]) -> bool:
        return len(opens) == len(closes) == 1 and max(*opens, *closes) < self._vocabulary

    def opens_thought(self, prompt: Sequence[int]) -> bool:
        """Tell whether a prompt ends within a thought.

        Raises:
            ModelError: as ``thought``.
        """
        opens, closes = self.thought
        ends = getattr(self.tokenizer, "eos_token_ids", ())
        return last_opens(prompt, (opens,), (closes,), ends)

    def thought_in(self, tokens: Sequence[int], start: int, *, opened: bool) -> tuple[int, int]:
        """Return the positions of a thought's marks in an answer; ``FOREVER`` for those not in it.

        Args:
            tokens: the last prompt token and the answer, whole or its beginning.
            start: the position of the first one.
            opened: whether the prompt opens the thought. ``start`` then stands for the mark.
        """
        opens, closes = self.thought
        begin, end = (start if opened else FOREVER), FOREVER
        for position, token in enumerate(tokens, start):
            if token == opens:
                begin = min(begin, position)
            elif token == closes and position > begin:
                end = min(end, position)
        return begin, end


def thought_marks(tokenizer: TokenizerWrapper) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens that open and close a thought, as mlx-lm knows them; empty for other models."""
    if not tokenizer.has_thinking:
        return (), ()
    return tuple(tokenizer.think_start_tokens), tuple(tokenizer.think_end_tokens)


def call_marks(tokenizer: TokenizerWrapper) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens that open and close a tool call, as mlx-lm knows them; empty for other models."""
    if not getattr(tokenizer, "has_tool_calling", False):
        return (), ()
    return tuple(tokenizer.tool_call_start_tokens), tuple(tokenizer.tool_call_end_tokens)


def last_opens(
    prompt: Sequence[int], opens: Sequence[int], closes: Sequence[int], ends: Collection[int]
) -> bool:
    """Tell whether the last mark of a prompt's last turn opens a thought.

    Args:
        opens, closes: the marks, as sequences of tokens; empty for a model that has none.
        ends: the tokens that end a turn. An earlier answer may have been cut off within its thought.
    """
    if not opens:
        return False
    for end in range(len(prompt), 0, -1):
        if prompt[end - 1] in ends:
            return False
        for mark, opening in ((opens, True), (closes, False)):
            if mark and tuple(prompt[max(0, end - len(mark)) : end]) == tuple(mark):
                return opening
    return False


def marks_of(network: nn.Module) -> Marks:
    """Return the marks of a patched network's vocabulary.

    Raises:
        SteeringError: the network was patched without its tokenizer.
    """
    found = getattr(network.model, "marks", None)
    if found is None:
        raise SteeringError(
            "positions `steps`, `think` and `answer` and a thinking budget need the tokenizer, which tells "
            "the tokens that mark them: give the Model that load returns, or patch(network, tokenizer)."
        )
    return found
