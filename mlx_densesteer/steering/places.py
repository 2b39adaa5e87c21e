"""The language of places: at which tokens of a sequence a vector is added (``Steering.positions``). No mlx.

    <|im_start|>user 17 * 3? <|im_end|> <|im_start|>assistant \\n | <think> 17 * 3 .\\n\\n = 51 </think> 51 <|im_end|>
    prompt     =========================================== = ==
    generated                                               ==   ======= == = = ===== = == ======== ==
    first:3                                                 ==   ======= ==
    steps                                                                       =====
    think                                                        ======= == = = ===== = ==
    answer                                                  ==                             ======== ==

A place is a token whose output chooses the next one. So the last prompt token is ``prompt`` and ``generated``,
``</think>`` belongs to ``answer``, and the last token before it to ``think``: its output ends the thought.
Where the prompt itself opens the thought, as R1's template does, ``think`` begins with the last prompt token.
"""

import re
from typing import Literal, NamedTuple

from ..errors import SteeringError

Positions = str  # "all", "prompt", "generated", "steps", "think", "answer" or "first:N"
POSITIONS = ("all", "generated", "prompt", "steps", "think", "answer", "first:N")
EXPECTED = f"expected one of {', '.join(POSITIONS)} (N from 1 on)"
FOREVER = 2**31 - 1

_FIRST = re.compile(r"first:([1-9]\d{0,8})", re.ASCII)


class Thought(NamedTuple):
    """Where the thought of an answer is: the first one that begins at ``start`` or later.

    Args:
        start: the position of the last prompt token.
        opened, closed: the positions of its two marks, as far as they are known. ``opened`` is ``start`` if
            the prompt opens it.
        budget: how many tokens it has before it is steered otherwise (``Steering.budget``).
    """

    start: int
    opened: int = FOREVER
    closed: int = FOREVER
    budget: int = FOREVER


class Span(NamedTuple):
    """Steered positions of one sequence: ``start <= position < stop``, and of them only those of ``mark``.

    Args:
        mark: ``"steps"`` are the tokens that end a step; ``"think"`` those of ``thought``, ``"answer"`` the
            others.
        calls: from here on the text of tool calls is not steered.
    """

    start: int = 0
    stop: int = FOREVER
    mark: Literal["", "steps", "think", "answer"] = ""
    thought: Thought | None = None
    calls: int = FOREVER


EVERYWHERE = Span()
NOWHERE = Span(0, 0)


def is_positions(value: object) -> bool:
    """Tell whether a value is one of ``POSITIONS``, with a number from 1 on for ``N``."""
    return isinstance(value, str) and (
        value in POSITIONS[:-1] or _FIRST.fullmatch(value) is not None
    )


def check_positions(positions: object) -> None:
    """Raise ``SteeringError`` unless it is one of ``POSITIONS``."""
    if not is_positions(positions):
        raise SteeringError(f"positions {positions!r}: {EXPECTED}.")


def span_of(positions: Positions, prompt_length: int | None) -> Span:
    """Return the steered positions of a prompt and its answer.

    Raises:
        SteeringError: ``prompt_length`` is needed, and missing or below 1.
    """
    if positions == "all":
        return EVERYWHERE
    need_prompt(f"positions {positions!r} need", prompt_length)
    if positions == "prompt":
        return Span(stop=prompt_length)
    return _generated(positions, prompt_length - 1)


def need_prompt(what: str, prompt_length: int | None) -> None:
    """Raise ``SteeringError`` unless the prompt has tokens; ``what`` needs it."""
    if prompt_length is None or prompt_length < 1:
        raise SteeringError(
            f"{what} the prompt, found {prompt_length} tokens: make_cache(model, steering, prompt=tokens)."
        )


def span_in_chunk(positions: Positions, answer: bool, start: int) -> Span:
    """Return the steered positions of a chunk (``prefix.Chunk``) that begins at ``start``.

    The first token of an ``answer`` chunk is the last of the prompt.
    """
    if positions == "all":
        return EVERYWHERE
    if positions == "prompt":
        return Span(stop=start + 1) if answer else EVERYWHERE
    # from 0 on, as a chunk has no token before ``start``, and no mask is needed for "generated"
    return _generated(positions, start)._replace(start=0) if answer else NOWHERE


def _generated(positions: Positions, start: int) -> Span:
    if first := _FIRST.fullmatch(positions):
        return Span(start, start + int(first[1]))
    return Span(start, mark="" if positions == "generated" else positions)
