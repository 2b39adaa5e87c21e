"""The thought of a reasoning model's answer: parted from the rest, and ended when it is too long.

mlx-lm knows the tokens that open and close a thought (``<think>`` and ``</think>``, or others). Some chat
templates write the first of them into the prompt. An answer has one thought, the first.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import InputError
from ..model.marks import Marks, thought_marks

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


class Parting:
    """Finds the thought in an answer while it is generated.

    Args:
        opened: whether the prompt opens the thought.

    ``opens`` are the tokens of the mark that opens one; empty for a model that does not think.
    """

    def __init__(self, tokenizer: TokenizerWrapper, opened: bool = False):
        self.tokens = 0  # of the thought so far, without its marks
        self.opens, self._closes = thought_marks(tokenizer)
        self._ids: list[int] = []
        self._ends = [0]  # characters of text before the first token, and after each
        self._mark = self._begin = 0 if opened else None  # where the opening mark begins and ends
        self._more: list[tuple[int, int]] = []  # closing marks after that
        self._end = self._rest = None  # where the thought and the closing mark end

    @property
    def closed(self) -> bool:
        """Whether the thought came to its end."""
        return self._rest is not None

    @property
    def open(self) -> bool:
        """Whether the answer is within its thought."""
        return self._begin is not None and not self.closed

    def add(self, token: int, characters: int) -> None:
        """Add the answer's next token; the answer then has so many characters."""
        if not self.opens:
            return
        self._ids.append(token)
        self._ends.append(characters)
        if self._begin is None:
            if self._ends_with(self.opens):
                self._mark, self._begin = self._ends[-1 - len(self.opens)], characters
        elif not self.closed:
            self.tokens += 1
            if self._ends_with(self._closes):
                self._end, self._rest = self._ends[-1 - len(self._closes)], characters
                self.tokens -= len(self._closes)
        elif self._ends_with(self._closes):
            self._more.append((self._ends[-1 - len(self._closes)], characters))

    @property
    def certain(self) -> int | None:
        """How many characters are certain to belong to no mark that is still incomplete; ``None`` for all."""
        mark = self.opens if self._begin is None else self._closes
        for length in range(min(len(mark) - 1, len(self._ids)), 0, -1):
            if tuple(self._ids[-length:]) == mark[:length]:
                return self._ends[-1 - length]
        return None

    def split(self, text: str) -> tuple[str | None, str]:
        """Return thought and answer in the answer's text, or its beginning; ``None`` without a thought.

        A model whose thought was ended by force may close it again: such marks are left out of the answer.
        The thought has no blanks around it, and the answer none between the two. What grows of the text
        grows of them.
        """
        if not self.opens:
            return None, text
        if self._begin is None:
            return None, text if text.strip() else ""  # what a mark may still follow
        thought = text[self._begin : self._end].strip()
        rest = "" if self._rest is None else text[self._rest :]
        for begin, end in reversed(self._more):
            rest = rest[: begin - self._rest] + rest[end - self._rest :]
        before = text[: self._mark]
        return thought, before + rest if before.strip() else rest.lstrip()

    def _ends_with(self, mark: Sequence[int]) -> bool:
        return tuple(self._ids[-len(mark) :]) == mark


def thought_limit(
    marks: Marks, limit: int, answer: Sequence[int], *, opened: bool, skip: int
) -> LogitsProcessor:
    """Return a logits processor of mlx-lm that closes a thought after ``limit`` tokens.

    It forces the closing token where the thought has so many and is still open, and changes nothing else.
    Nothing waits for the device.

    Args:
        answer: tokens of the answer that the processor is not given, before those that it is.
        opened: whether the prompt opens the thought.
        skip: how many tokens it is given that precede the answer.

    Raises:
        ModelError: the tokenizer has no such token.
    """
    opens, closes = marks.thought
    answer = tuple(answer)  # the caller's list may grow
    before = mx.array([opens if opened else closes, *answer], mx.uint32)
    mx.eval(before)  # here: another thread may use it

    def close_long_thought(tokens: mx.array, logits: mx.array) -> mx.array:
        count = len(answer) + tokens.size - skip
        if count < limit:
            return logits
        # the prompt's state stands for its last token; so a place is a number of answer tokens
        read = mx.concatenate([before, tokens[skip:].astype(mx.uint32)])
        at = mx.arange(read.size)
        begin = mx.where(read == opens, at, read.size).min()
        closed = mx.any(mx.logical_and(read == closes, at > begin))
        late = mx.logical_and(mx.logical_not(closed), count - begin.astype(mx.int32) >= limit)
        only = mx.where(mx.arange(logits.shape[-1]) == closes, 0.0, -mx.inf).astype(logits.dtype)
        return mx.where(late, only, logits)

    return close_long_thought


def check_limit(limit: int | None) -> None:
    """Raise ``InputError`` unless it is a whole number of tokens, at least 1."""
    if limit is not None and (type(limit) is not int or limit < 1):
        raise InputError(
            f"a thinking limit of {limit} tokens: expected a whole number, at least 1."
        )
