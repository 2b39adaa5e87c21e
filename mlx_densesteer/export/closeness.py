"""How close an exported model comes to run-time steering: tensors and logits compared."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import mlx.core as mx
import mlx.nn as nn

from ..errors import ExportError
from ..model.block import make_cache
from ..model.families import decoder_blocks, last_bias, stream_dtype
from ..model.machine import rounds_to_tf32
from ..model.model import dtype_name
from ..steering.steering import Steering

T, U = TypeVar("T"), TypeVar("U")

# Limits of ``judge``.
EXACT = 1e-5  # float32: share of the largest logit; sums are in another order
TF32 = 3e-3  # the same where products are rounded; 1e-4 at 6 layers and 7e-4 at 24 were measured
LOSSY = 0.1  # 16 bits: share of what the steering moves; the vector is rounded
STEPS = 8  # 16 bits: steps of the dtype at the largest logit; sums are in another order
SLOPE = 0.25  # 16 bits: distance from 1; a missing vector is 1 away, a negated one 2
EXACT_LENGTH = 0.003  # float32: distance from 1; a strength wrong by 1 % is 0.006 away or more
ERRORS = 3  # float32: standard errors of the length, on top of that


@dataclass(frozen=True)
class Reference:
    """Logits of run-time steering and of no steering, float32 ``(tokens, vocabulary)``.

    ``biases`` are those that the blocks have on their output without a vector.
    """

    tokens: tuple[int, ...]
    steered: mx.array
    unsteered: mx.array
    dtype: str
    biases: tuple[mx.array | None, ...]


class Change(NamedTuple):
    """How a change of logits compares with the one that is expected.

    - ``slope``: ``<change, expected> / ||expected||^2``: how much of the expected change there is. What rounding
      does to ``expected`` makes it smaller.
    - ``length``: ``||change|| / ||expected||``. What one logit cannot tell from rounding, all of them can.
    - ``error``: the standard error of ``length``: the tokens have lengths of their own.
    """

    slope: float
    length: float
    error: float

    def is_right(self) -> bool:
        """Tell whether it is the expected change in float32, but for rounding."""
        return self.slope >= 1 - SLOPE and abs(self.length - 1) <= self.room

    @property
    def room(self) -> float:
        """How far from 1 ``length`` may be in float32."""
        return EXACT_LENGTH + ERRORS * self.error


@dataclass(frozen=True)
class Closeness:
    """Figures over every token and every entry of the vocabulary.

    - ``difference``: the largest difference of a logit from run-time steering.
    - ``floor``: the largest difference of a logit from the unsteered model, without the vector; 0
      where no weight was rounded.
    - ``moved``: the largest change of a logit by the steering.
    - ``largest``: the largest logit.
    - ``same``: at how many of the ``tokens`` positions the likeliest token is the same.
    - ``change``: the change without the vector to that with it, beside the change by steering.
    """

    difference: float
    floor: float
    moved: float
    largest: float
    same: int
    tokens: int
    change: Change
    dtype: str

    def describe(self) -> dict[str, object]:
        """Return the figures as plain values for JSON."""
        return {
            "largest_difference": self.difference,
            "without_the_vector": self.floor,
            "moved_by_steering": self.moved,
            "largest_logit": self.largest,
            "same_argmax": self.same,
            "tokens": self.tokens,
        }

    def __str__(self) -> str:
        return (
            f"largest difference {self.difference:.1e} from run-time steering ({self.floor:.1e} without "
            f"the vector), at logits up to {self.largest:.1f}, moved by up to {self.moved:.2g}; same likeliest "
            f"token at {self.same} of {self.tokens} positions ({self.dtype})"
        )


def reference(network: nn.Module, tokens: list[int], steering: Steering) -> Reference:
    """Run a patched network steered and unsteered over ``tokens``."""
    batch = mx.array(tokens)[None]
    steered, unsteered = (
        network(batch, make_cache(network, one))[0].astype(mx.float32) for one in (steering, None)
    )
    mx.eval(steered, unsteered)
    dtype = dtype_name(stream_dtype(network))
    biases = tuple(last_bias(block) for block in decoder_blocks(network).values())
    return Reference(tuple(tokens), steered, unsteered, dtype, biases)


def compare(expected: Reference, network: nn.Module) -> Closeness:
    """Compare a stock ``llama`` network with run-time steering, and remove its vector."""
    tokens = mx.array(expected.tokens)[None]
    logits = network(tokens)[0].astype(mx.float32)
    mx.eval(logits)
    for block, own in zip(network.model.layers, expected.biases, strict=True):
        baked = block.mlp.down_proj.bias
        block.mlp.down_proj.bias = mx.zeros_like(baked) if own is None else own.astype(baked.dtype)
    without = network(tokens)[0].astype(mx.float32)
    moved = expected.steered - expected.unsteered
    return Closeness(
        difference=mx.abs(logits - expected.steered).max().item(),
        floor=mx.abs(without - expected.unsteered).max().item(),
        moved=mx.abs(moved).max().item(),
        largest=mx.abs(expected.steered).max().item(),
        same=(logits.argmax(-1) == expected.steered.argmax(-1)).sum().item(),
        tokens=len(expected.tokens),
        change=change(logits - without, moved),
        dtype=expected.dtype,
    )


def change(found: mx.array, expected: mx.array) -> Change:
    """Compare two changes of logits, ``(tokens, vocabulary)``; where none is expected, 1."""
    along = (found * expected).sum().item()
    mine, theirs = (mx.square(one).sum(-1) for one in (found, expected))
    total, wanted = mine.sum().item(), theirs.sum().item()
    if not (total and wanted):
        return Change(1.0, 1.0, 0.0) if not (total or wanted) else Change(0.0, 0.0, 0.0)
    length = math.sqrt(total / wanted)
    apart = mx.square(mine / total - theirs / wanted).sum().item()
    return Change(along / wanted, length, length / 2 * math.sqrt(apart))


def float32_share() -> float:
    """Return which share of the largest logit rounding may be, of products in float32 on this device."""
    return TF32 if rounds_to_tf32() else EXACT


def differing(
    found: dict[str, T], wanted: Iterable[tuple[str, U]], same: Callable[[T, U], bool]
) -> list[str]:
    """Return a text for each name that is missing, another, or not expected. Empties ``found``."""
    problems = []
    for name, one in wanted:
        if name not in found:
            problems.append(f"{name} is missing")
        elif not same(found.pop(name), one):
            problems.append(f"{name} is another")
    return problems + [f"{name} was not expected" for name in found]


def judge(found: Closeness, name: str) -> None:
    """Refuse a result that differs from run-time steering by more than rounding.

    In float32 ``difference`` may be 1e-5 of the largest logit (3e-3 where products are rounded to TF32),
    and the length of ``change`` must be 0.997 to 1.003, three of its standard errors aside, and its slope
    0.75 or more. In 16 bits ``difference`` may be ``floor``, plus a tenth of ``moved`` or eight steps of the
    dtype at the largest logit, whichever is more, and the slope must be 0.75 to 1.25.

    Raises:
        ExportError: a figure is beyond its limit.
    """
    if found.dtype == "float32":
        limit, around = float32_share() * found.largest, found.change.room
        times, well = found.change.length, found.change.is_right()
    else:
        step = mx.finfo(getattr(mx, found.dtype)).eps * found.largest
        limit, around = found.floor + max(LOSSY * found.moved, STEPS * step), SLOPE
        times, well = found.change.slope, abs(found.change.slope - 1) <= SLOPE
    if not (found.difference <= limit and well):
        raise ExportError(
            f"{name}: {found}; it moves {times:.3f} times what the steering moves. Expected "
            f"{limit:.1e} at most and {1 - around:.3f} to {1 + around:.3f} times, so it was thrown away. Where "
            "the model is in 16 bits, rounding may drown a small strength: bake a float32 one "
            "(`densesteer convert --bits none --dtype float32`)."
        )
