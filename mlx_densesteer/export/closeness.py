"""How close another program's logits are to run-time steering: measured, then judged."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn

from ..errors import ExportError
from ..model.block import make_cache
from ..model.model import dtype_name
from ..steering.steering import Steering

T, U = TypeVar("T"), TypeVar("U")

EXACT = 1e-5  # of the largest logit, in float32: the order of two additions
LOSSY = 0.1  # of what the steering moves, where its vector is rounded to 16 bits
SLOPE = 0.25  # off 1: a vector that is missing or has another sign is at 1 or 2
STEPS = 8  # of a 16-bit dtype at the largest logit: two orders of adding, through the layers above


@dataclass(frozen=True)
class Reference:
    """Logits of run-time steering and of no steering, float32 ``(tokens, vocabulary)``."""

    tokens: tuple[int, ...]
    steered: mx.array
    unsteered: mx.array
    dtype: str


@dataclass(frozen=True)
class Closeness:
    """What was measured over every token and every entry of the vocabulary.

    ``difference`` is the largest one from run-time steering, ``floor`` the largest from the unsteered
    model once the vector is taken out again (0 where no weight was rounded), ``moved`` the largest that the
    steering makes, ``largest`` the largest logit; ``same`` of ``tokens`` have the same likeliest token.
    ``slope`` is how much of what the steering moves the result moves: 1, where rounding does not drown it.
    """

    difference: float
    floor: float
    moved: float
    largest: float
    same: int
    tokens: int
    slope: float
    dtype: str

    def describe(self) -> dict[str, object]:
        return {
            "largest_difference": self.difference, "without_the_vector": self.floor,
            "moved_by_steering": self.moved, "largest_logit": self.largest, "same_argmax": self.same, "tokens": self.tokens,
        }  # fmt: skip

    def __str__(self) -> str:
        return (
            f"largest difference {self.difference:.1e} from run-time steering ({self.floor:.1e} without "
            f"the vector), at logits up to {self.largest:.1f}, moved by up to {self.moved:.2g}; same likeliest "
            f"token at {self.same} of {self.tokens} positions ({self.dtype})"
        )


def reference(model: nn.Module, tokens: list[int], steering: Steering) -> Reference:
    """Run a patched model steered and unsteered over ``tokens``."""
    batch = mx.array(tokens)[None]
    steered, unsteered = (
        model(batch, make_cache(model, wanted))[0].astype(mx.float32) for wanted in (steering, None)
    )
    mx.eval(steered, unsteered)
    dtype = dtype_name(model.model.norm.weight.dtype)
    return Reference(tuple(tokens), steered, unsteered, dtype)


def compare(expected: Reference, model: nn.Module) -> Closeness:
    """Measure how far a stock ``llama`` model is from run-time steering; its vector is gone afterwards."""
    tokens = mx.array(expected.tokens)[None]
    logits = model(tokens)[0].astype(mx.float32)
    mx.eval(logits)
    for block in model.model.layers:
        block.mlp.down_proj.bias = mx.zeros_like(block.mlp.down_proj.bias)
    without = model(tokens)[0].astype(mx.float32)
    largest = (
        logits - expected.steered, without - expected.unsteered,
        expected.unsteered - expected.steered, expected.steered,
    )  # fmt: skip
    same = (logits.argmax(-1) == expected.steered.argmax(-1)).sum().item()
    figures = [mx.abs(array).max().item() for array in largest]
    wanted = expected.steered - expected.unsteered
    length = (wanted * wanted).sum().item()
    slope = ((logits - without) * wanted).sum().item() / length if length else 1.0
    return Closeness(*figures, same, len(expected.tokens), slope, expected.dtype)


def differing(
    found: dict[str, T], wanted: Iterable[tuple[str, U]], same: Callable[[T, U], bool]
) -> list[str]:
    """Say of each name what is wrong with it; ``found`` is used up."""
    problems = []
    for name, one in wanted:
        if name not in found:
            problems.append(f"{name} is missing")
        elif not same(found.pop(name), one):
            problems.append(f"{name} is another")
    return problems + [f"{name} was not expected" for name in found]


def judge(found: Closeness, name: str) -> None:
    """Refuse what is not run-time steering within the arithmetic of the dtype.

    Raises:
        ExportError: in float32 a difference above 1e-5 of the largest logit; in 16 bits one that is not
            there without the vector, and is above a tenth of what the steering moves and eight steps of the
            dtype at the largest logit: more than rounding explains. In any, a result that moves less than
            0.75 or more than 1.25 times what the steering moves.
    """
    limit = EXACT * found.largest
    if found.dtype != "float32":
        step = mx.finfo(getattr(mx, found.dtype)).eps * found.largest
        limit = found.floor + max(LOSSY * found.moved, STEPS * step)
    if not (found.difference <= limit and abs(found.slope - 1) <= SLOPE):
        raise ExportError(
            f"{name}: {found}; it moves {found.slope:.2f} times what the steering moves. Expected "
            f"{limit:.1e} at most and {1 - SLOPE:g} to {1 + SLOPE:g} times, so it was thrown away. Where "
            "the model is in 16 bits, rounding may drown a small strength: bake a float32 one "
            "(`densesteer convert --bits none --dtype float32`)."
        )
