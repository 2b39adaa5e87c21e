"""Where in a sequence a vector is added: ``Steering.positions`` as spans, and the tokens that end a step.

A token ends a step if its own text holds a blank line, as ``".\\n\\n"`` does. Qwen2's tokenizer writes
every blank line as the end of one token. So neither the token before nor a state in the KV cache is
needed, and a token is steered alike in any chunk, batch or order.

Not covered: a blank line over two tokens. ``StepEnds`` refuses tokenizers that write it so.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import ModelError, SteeringError
from ..steering.vector import Positions
from .prompt import decode, encode_text

BLANK_LINE = re.compile(r"\n[^\S\n]*\n")
FOREVER = 2**31 - 1


class Span(NamedTuple):
    """Steered positions of one sequence: ``start <= position < stop``.

    With ``step_ends`` only those of them whose token ends a step.
    """

    start: int = 0
    stop: int = FOREVER
    step_ends: bool = False


EVERYWHERE = Span()
NOWHERE = Span(0, 0)


def span_of(positions: Positions, prompt_length: int | None) -> Span:
    """Return the steered positions of a prompt and its answer.

    The output at the last prompt token chooses the first generated one: it is ``"prompt"`` and
    ``"generated"``. ``"steps"`` are those of ``"generated"`` whose token ends a step.

    Raises:
        SteeringError: ``prompt_length`` is needed, and missing or below 1.
    """
    if positions == "all":
        return EVERYWHERE
    if prompt_length is None or prompt_length < 1:
        raise SteeringError(
            f"positions {positions!r} need the prompt's length, found {prompt_length}: "
            "make_cache(model, steering, prompt_length=len(tokens))."
        )
    if positions == "prompt":
        return Span(stop=prompt_length)
    return Span(start=prompt_length - 1, step_ends=positions == "steps")


def span_in_chunk(positions: Positions, answer: bool, start: int) -> Span:
    """Return the steered positions of a chunk (``prefix.Chunk``) that begins at ``start``.

    The first token of an ``answer`` chunk is the last of the prompt.
    """
    if positions == "all":
        return EVERYWHERE
    if positions == "prompt":
        return Span(stop=start + 1) if answer else EVERYWHERE
    return Span(step_ends=positions == "steps") if answer else NOWHERE


class StepEnds:
    """The tokens of a vocabulary that end a step; found out when first asked for.

    Args:
        vocabulary: how many tokens the network knows.
    """

    def __init__(self, tokenizer: TokenizerWrapper, vocabulary: int):
        self.tokenizer, self._vocabulary = tokenizer, vocabulary

    @cached_property
    def known(self) -> np.ndarray:
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
    def table(self) -> mx.array:
        """``known`` on the device."""
        table = mx.array(self.known)
        mx.eval(table)  # here: another thread may use it
        return table

    def among(self, tokens: Sequence[int]) -> np.ndarray:
        """Return which of the tokens end a step, bool ``(tokens,)``."""
        return self.known[np.asarray(tokens, int)]


def step_ends_of(network: nn.Module) -> StepEnds:
    """Return the step ends of a patched network's vocabulary.

    Raises:
        SteeringError: the network was patched without its tokenizer.
    """
    found = getattr(network.model, "step_ends", None)
    if found is None:
        raise SteeringError(
            "`steps` needs the tokenizer, which tells the tokens that end a step: give the Model that "
            "load returns, or patch(network, tokenizer)."
        )
    return found
