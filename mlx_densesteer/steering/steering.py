"""``Steering``: which vector, how strong, at which layers and positions. No mlx."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from ..errors import SteeringError
from .places import (
    FOREVER,
    Positions,
    Span,
    Thought,
    check_positions,
    need_prompt,
    span_in_chunk,
    span_of,
)
from .vector import SteeringVector, format_layers

# Users are warned from this dose on. At about 1 the 0.5B test checkpoint repeats itself without end
# (benchmarks/dose.py); other projects report collapse from about 1.9 on (docs/steering.md).
LARGE_DOSE = 0.8
LARGE_DOSE_WARNING = (
    "warning: a large dose. The 0.5B test model collapsed at about 100%, others' models at about 190%: "
    "the same words over and over, text without sense, or no text at all. Try a smaller strength."
)

UNSTEERED = "unsteered"  # the fingerprint of no steering


@dataclass(frozen=True)
class ThinkBudget:
    """Steer a thought otherwise once it is long: at ``strength`` from ``tokens`` tokens on.

    Args:
        tokens: how many tokens the thought has before.
        strength: lambda from there on, in place of the steering's own, whatever its positions.

    Raises:
        SteeringError: ``tokens`` is below 1, or the strength is not finite.
    """

    tokens: int
    strength: float

    def __post_init__(self) -> None:
        if type(self.tokens) is not int or not 1 <= self.tokens < FOREVER:
            raise SteeringError(
                f"a thinking budget of {self.tokens} tokens: expected a whole number from 1 to {FOREVER - 1:,}."
            )
        object.__setattr__(self, "strength", _finite(self.strength))


@dataclass(frozen=True)
class Steering:
    """Add ``lambda * v_l`` to the residual stream at the output of some decoder blocks.

        h_l <- h_l + strength * v_l        for every layer l in ``layers``

    Positive strength is towards dense; 0 is the unsteered model, bit for bit.

    Args:
        vector: the steering vector.
        strength: lambda, any finite number.
        layers: 0-based layer numbers.
        positions: at which tokens of the sequence the vector is added (``places`` has a picture).
            ``"all"``: at every token, as the reference does.
            ``"prompt"``: at every prompt token.
            ``"generated"``: at every token whose output chooses a generated one: from the *last
            prompt token* on (which belongs to ``"prompt"`` too).
            ``"first:N"``: at the first N of ``"generated"``.
            ``"steps"``: at those of ``"generated"`` whose own text holds a blank line: they end a
            step, and their output begins the next one.
            ``"think"``: at those of ``"generated"`` whose output chooses a token of the thought, or ends it.
            ``"answer"``: at the others of ``"generated"``.
        budget: steer a long thought otherwise; ``None`` does not.
        calls: whether the text of tool calls in the answer is steered too.

    Raises:
        SteeringError: a strength that is not finite, no layers, unknown positions, or
            ``strength * v_l`` overflows float32.
        VectorMismatchError: a layer that the vector does not hold.

    Source: arXiv 2605.29247, section 3; one layer there, any number here. ``"steps"``: SEAL, arXiv
    2504.07986.
    """

    vector: SteeringVector
    strength: float
    layers: tuple[int, ...]
    positions: Positions = "all"
    budget: ThinkBudget | None = None
    calls: bool = True
    _deltas: dict[int, np.ndarray] = field(init=False, repr=False, compare=False)
    _late: dict[int, np.ndarray] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_positions(self.positions)
        strength = _finite(self.strength)
        layers = tuple(sorted({int(layer) for layer in self.layers}))
        if not layers:
            raise SteeringError("no layers to steer: name at least one.")
        chosen = self.vector.select(layers).layers
        late = strength if self.budget is None else self.budget.strength
        object.__setattr__(self, "strength", strength)
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "_deltas", _scaled(chosen, strength))
        object.__setattr__(self, "_late", _scaled(chosen, late))

    @property
    def is_zero(self) -> bool:
        """Whether nothing is ever added."""
        return not self.strength and (self.budget is None or not self.budget.strength)

    @property
    def in_prompt(self) -> "Steering | None":
        """The steering of the prompt without its last token; ``None`` if nothing is added there."""
        if not self.strength or self.positions not in ("all", "prompt"):
            return None
        return replace(self, positions="all", budget=None, calls=True)

    @property
    def is_everywhere(self) -> bool:
        """Whether every token is steered alike, whatever precedes it."""
        return self.is_zero or (self.positions == "all" and self.budget is None and self.calls)

    @property
    def needs_thought(self) -> bool:
        """Whether it matters where the thought is."""
        return self.positions in ("think", "answer") or self.budget is not None

    def span(self, prompt_length: int | None, opens_thought: bool = False) -> Span:
        """Return the steered positions of a prompt and its answer.

        Args:
            opens_thought: whether the prompt ends within a thought.

        Raises:
            SteeringError: ``prompt_length`` is needed, and missing or below 1.
        """
        if self.budget is not None:
            need_prompt("a thinking budget needs", prompt_length)
        span = span_of(self.positions, prompt_length)
        if not self.calls:
            need_prompt("a gate at tool calls needs", prompt_length)
            span = span._replace(calls=prompt_length - 1)
        if not self.needs_thought:
            return span
        start = prompt_length - 1
        return self._with_thought(span, start, start if opens_thought else FOREVER)

    def span_in_chunk(
        self, answer: bool, start: int, thought: tuple[int, int] = (FOREVER, FOREVER)
    ) -> Span:
        """Return the steered positions of a chunk (``prefix.Chunk``) that begins at ``start``.

        Args:
            thought: the positions of its marks, as ``Marks.thought_in`` returns them.
        """
        span = span_in_chunk(self.positions, answer, start)
        if answer and not self.calls:
            span = span._replace(calls=start)
        if not answer or not self.needs_thought:
            return span
        return self._with_thought(span, start, *thought)

    def _with_thought(self, span: Span, start: int, opened: int, closed: int = FOREVER) -> Span:
        budget = FOREVER if self.budget is None else self.budget.tokens
        return span._replace(thought=Thought(start, opened, closed, budget))

    def delta(self, layer: int) -> np.ndarray | None:
        """Return ``strength * v_layer``, float32 ``(hidden_size,)``; ``None`` if nothing is added there."""
        return self._deltas.get(layer) if self.strength else None

    def late_delta(self, layer: int) -> np.ndarray:
        """Return ``budget.strength * v_layer``, of a steering with a budget."""
        return self._late[layer]

    @property
    def beyond_budget(self) -> "Steering":
        """The steering of a thought beyond its budget, by itself; without a budget this one."""
        if self.budget is None:
            return self
        return replace(self, strength=self.budget.strength, budget=None)

    def weaker(self, factor: float) -> "Steering":
        """Return it with every strength multiplied by ``factor``; at 0 without a budget."""
        budget = self.budget and replace(self.budget, strength=self.budget.strength * factor)
        return replace(self, strength=self.strength * factor, budget=budget if factor else None)

    @property
    def fingerprint(self) -> str:
        """Identify what is added to the stream. Strength 0 has the fingerprint of no steering."""
        if self.is_zero:
            return UNSTEERED
        where: list[object] = [self.positions, self.layers]
        if self.budget is not None:
            where.append(self.budget.tokens)
        if not self.calls:
            where.append("no calls")
        digest = hashlib.sha256(json.dumps(where).encode())
        for layer in self.layers:
            digest.update(self._deltas[layer].astype("<f4").tobytes())
            if self.budget is not None:
                digest.update(self._late[layer].astype("<f4").tobytes())
        return digest.hexdigest()[:16]

    def dose(self, residual_norms: Mapping[int, float]) -> float:
        """Return how much is added, relative to the residual stream; 0.2 is 20 %.

            dose = sum_l( |strength| * ||v_l|| / mean ||h_l|| )

        It is a sum because what one layer adds is still in the stream at the next one: the same dose
        moves the stream about as far at one layer as at three. Doses of different vectors can be
        compared, strengths cannot: norms of the reference's vectors lie between 0.06 and 72.

        Args:
            residual_norms: the mean ``||h_l||`` of each steered layer (``Model.norms``).
        """
        norms = self.vector.norms()
        return sum(abs(self.strength) * norms[k] / residual_norms[k] for k in self.layers)

    def describe(self) -> dict[str, object]:
        """Return the settings as plain values, for JSON."""
        return {
            "vector": self.vector.name,
            "strength": self.strength,
            "layers": list(self.layers),
            "positions": self.positions,
            **({"budget": asdict(self.budget)} if self.budget else {}),
            **({} if self.calls else {"calls": False}),
            "fingerprint": self.fingerprint,
        }


def _finite(strength: float) -> float:
    strength = float(strength)
    if not math.isfinite(strength):
        raise SteeringError(f"strength {strength}: expected a finite number.")
    return strength


def _scaled(arrays: Mapping[int, np.ndarray], strength: float) -> dict[int, np.ndarray]:
    """Return ``strength * array`` of each layer, read-only."""
    with np.errstate(over="ignore"):  # an overflow raises below
        deltas = {k: np.float32(strength) * array for k, array in arrays.items()}
    if bad := [layer for layer, delta in deltas.items() if not np.isfinite(delta).all()]:
        raise SteeringError(
            f"strength {strength:g} overflows float32 at layer {format_layers(bad)}: "
            "choose a smaller one."
        )
    for delta in deltas.values():
        delta.setflags(write=False)
    return deltas
