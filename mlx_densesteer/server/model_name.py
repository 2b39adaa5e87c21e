"""Steering as a model name: ``qwen2.5-1.5b@dense=0.8``, which every client can send."""

import math
from typing import NamedTuple

from .faults import Fault, bad, excerpt
from .schema import STRENGTH


class Named(NamedTuple):
    """What a model name asks for. ``strength`` is ``None`` where it is the vector's own."""

    vector: str
    strength: float | None
    relative: bool


def parse_model_name(text: str, base: str) -> Named | None:
    """Return what ``BASE@VECTOR=STRENGTH`` asks for, ``None`` for the bare name.

    ``STRENGTH`` is a number, or a percentage of the residual stream's norm; without it the
    vector's own strength is meant. Upper and lower case of ``BASE`` are alike.

    Raises:
        Fault: another model (404), or a strength that is no number (400).
    """
    name, at, rest = text[: len(base)], text[len(base) : len(base) + 1], text[len(base) + 1 :]
    if name.casefold() != base.casefold() or at not in ("", "@") or (at and not rest):
        raise Fault(
            404,
            f"model {excerpt(text)}: this server has {base} alone, steered as {base}@VECTOR=STRENGTH; "
            "see /v1/models.",
            "model",
            "model_not_found",
        )
    if not at:
        return None
    vector, equals, number = rest.partition("=")
    if not equals:
        return Named(vector, None, False)
    relative = number.endswith("%")
    try:
        strength = float(number.removesuffix("%"))
    except ValueError:
        strength = math.nan
    strength = strength / 100 if relative else strength
    if not abs(strength) <= STRENGTH:  # not a number is refused, too
        raise bad(
            f"strength {excerpt(number)} in the model's name: expected a number (0.8) or a percentage "
            f"of the residual stream (10%), {STRENGTH:g} at most.",
            "model",
        )
    return Named(vector, strength, relative)


def format_model_name(base: str, vector: str, strength: float) -> str:
    """Return the name that asks for a vector at exactly this strength."""
    short = f"{strength:g}"
    return f"{base}@{vector}={short if float(short) == strength else repr(strength)}"
