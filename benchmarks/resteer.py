"""The cost of a new strength on a prefix that was read, against reading the prefix again."""

import mlx.core as mx
from script import main

from mlx_densesteer.bench.figures import (
    Figure,
    Measurement,
    Tell,
    alternate,
    quiet,
    ratio,
    spread,
    timed,
)
from mlx_densesteer.bench.subject import Subject
from mlx_densesteer.model.prefix import Chunk, Prefix
from mlx_densesteer.steering.steering import Steering

DEPTHS = (0.25, 0.5, 0.75)
KEEP = 2**40  # bytes: the whole residual stream


def run(
    subject: Subject,
    *,
    prefix_tokens: int = 512,
    rounds: int = 5,
    seconds: float = 0.0,
    tell: Tell = quiet,
) -> Measurement:
    """Fill caches under a new strength: re-steered, by a full prefill, and by another one as noise.

    One layer is steered, at a quarter, half and three quarters of the depth. ``Prefix.fill`` goes
    on from the residual stream that it kept there; the full prefill is ``fill`` of a new
    ``Prefix``. Every round has a new strength. A ratio is seconds re-steered over seconds of the
    full prefill; ``expected`` is (layers above the steered one) / (all layers), the excess is ratio
    / expected - 1. Of the last block either side computes little more than keys and values;
    ``expected_strict`` leaves it out: (layers above - 1) / (all - 1). ``resteer_ratio`` is the
    ratio at half depth, ``resteer_excess`` the largest excess, and ``resteer_identical`` says
    whether caches and next logits are those of the full prefill, bit for bit.

    Args:
        prefix_tokens: random tokens that were read.
        rounds: changes of the strength at each depth.
        seconds: after which no new round begins, for each depth; 0 is no limit.
    """
    chunks = [Chunk(tuple(subject.tokens(prefix_tokens)))]
    found = [
        _at_layer(subject, int(depth * subject.model.layer_count), chunks, rounds, seconds, tell)
        for depth in DEPTHS
    ]
    excesses = [one["excess"] for one in found if one["excess"] is not None]
    return Measurement(
        [
            *(_figure(subject, depth, one) for depth, one in zip(DEPTHS, found, strict=True)),
            Figure(
                "resteer_excess",
                "largest cost / (layers above / all layers) - 1",
                max(excesses, default=None),
            ),
            Figure(
                "resteer_identical",
                "caches and logits are those of a full prefill",
                all(one["identical"] for one in found),
            ),
        ],
        {"depths": found},
    )


def _figure(subject: Subject, depth: float, one: dict[str, object]) -> Figure:
    return Figure.of(
        "resteer_ratio" if depth == 0.5 else "",
        f"re-steer at layer {one['layer']} of {subject.model.layer_count}, cost / full prefill",
        one["ratio"],
        one["noise"],
        f"layers above {one['expected']:.3f}, without the last {one['expected_strict']:.3f}; "
        f"full prefill {one['full_seconds']['median']:.2f} s; keeps {one['residual_bytes'] / 2**20:.1f} MiB",
    )


def _at_layer(
    subject: Subject, layer: int, chunks: list[Chunk], rounds: int, seconds: float, tell: Tell
) -> dict[str, object]:
    """Measure one depth."""
    count, strengths = subject.model.layer_count, _Strengths(subject, layer, chunks)
    strengths.resteer()  # warm up
    again, full, null = alternate(
        [strengths.resteer, strengths.full, strengths.full],
        rounds=rounds,
        seconds=seconds,
        tell=lambda message: tell(f"layer {layer}, {message}"),
    )
    cost, expected = ratio(again, full), (count - 1 - layer) / count
    return {
        "layer": layer,
        "ratio": cost,
        "noise": ratio(null, full),
        "expected": expected,
        "expected_strict": max(0, count - 2 - layer) / max(1, count - 1),
        "excess": cost["median"] / expected - 1 if expected else None,
        "resteer_seconds": spread(again),
        "full_seconds": spread(full),
        "residual_bytes": strengths.prefix.residual_bytes,
        **strengths.compared(),
    }


class _Strengths:
    """A prefix that is filled under one strength after the other at one layer."""

    def __init__(self, subject: Subject, layer: int, chunks: list[Chunk]):
        self._subject, self._layer, self._chunks = subject, layer, chunks
        self._number = 0
        self.prefix = Prefix(subject.model.network, keep_bytes=KEEP)
        self.prefix.fill(chunks, self._current)

    @property
    def _current(self) -> Steering:
        return self._subject.steering((self._layer,), strength=0.1 + 0.01 * self._number)

    def resteer(self) -> float:
        """Change the strength; return the seconds."""
        self._number += 1
        return self._fill(self.prefix)

    def full(self) -> float:
        """Read everything again at the current strength; return the seconds."""
        return self._fill(Prefix(self._subject.model.network))

    def _fill(self, prefix: Prefix) -> float:
        steering = self._current
        mx.synchronize()
        return timed(lambda: prefix.fill(self._chunks, steering))

    def compared(self) -> dict[str, object]:
        """Change the strength once more; compare work, caches and next logits, bit by bit."""
        self._number += 1
        network = self._subject.model.network
        fresh = Prefix(network)
        works = [p.fill(self._chunks, self._current).block_tokens for p in (self.prefix, fresh)]
        token = mx.array([[self._chunks[0].tokens[-1]]])
        states = []
        for prefix in (self.prefix, fresh):
            logits = network(token, cache=prefix.caches)
            states.append([logits, *(array for cache in prefix.caches for array in cache.state)])
        identical = all(mx.array_equal(a, b).item() for a, b in zip(*states, strict=True))
        return {"share_of_block_tokens": works[0] / works[1], "identical": identical}


if __name__ == "__main__":
    main(run)
