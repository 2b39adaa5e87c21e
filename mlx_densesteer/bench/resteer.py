"""What it costs to turn the dial on a prefix that was read, against reading it again."""

import mlx.core as mx

from ..model.prefix import Chunk, Prefix
from ..steering.steering import Steering
from .report import Row, ratio
from .subject import Subject
from .timing import Tell, alternate, over, quiet, spread, timed

FIGURES = ("resteer_ratio", "resteer_excess", "resteer_identical")
SUITE = {"rounds": 10, "seconds": 20.0}
QUICK = {"prefix_tokens": 128, "rounds": 3, "seconds": 4.0}
PLENTY = 2**40  # bytes: the whole residual stream is kept
DEPTHS = (0.25, 0.5, 0.75)


def run(
    subject: Subject,
    *,
    prefix_tokens: int = 512,
    rounds: int = 5,
    seconds: float = 0.0,
    tell: Tell = quiet,
) -> dict[str, object]:
    """Fill caches under a new strength: re-steered, by a full prefill, and by another one as null.

    One layer is steered, at a quarter, half and three quarters of the depth. ``Prefix.fill`` goes
    on from the residual stream that it kept there; the full prefill is ``fill`` of a new
    ``Prefix`` that keeps nothing. Every round has a strength that was not there before. A ratio is
    seconds re-steered over seconds of the full prefill; ``expected`` is (layers above the steered
    one) / (all layers); the excess is ratio / expected - 1, goal at most 0.1. Nobody reads what
    the last block puts out, so of it either side computes little more than keys and values:
    ``expected_strict`` leaves that block out, (layers above - 1) / (all - 1).
    ``resteer_ratio`` is that at half depth, ``resteer_excess`` the largest. ``resteer_identical``:
    the caches, and the logits that follow, are bit for bit those of the full prefill.

    Args:
        prefix_tokens: random tokens that were read.
        rounds: turns of the dial at each depth.
        seconds: for each depth: then no new round is begun; 0 is no limit.
    """
    chunks = [Chunk(tuple(subject.tokens(prefix_tokens)))]
    count = subject.layer_count
    found = {}
    for depth in DEPTHS:
        layer = int(depth * count)
        dial = _Dial(subject, layer, chunks)
        again, full, null = alternate(
            [dial.resteer, dial.full, dial.full], rounds=rounds, seconds=seconds,
            tell=lambda message, layer=layer: tell(f"layer {layer}, {message}"),
        )  # fmt: skip
        expected = (count - 1 - layer) / count
        cost = spread(over(again, full))
        found[str(depth)] = {
            "layer": layer,
            "ratio": cost,
            "null": spread(over(null, full)),
            "expected": expected,
            "expected_strict": max(0, count - 2 - layer) / max(1, count - 1),
            "excess": cost["median"] / expected - 1 if expected else None,
            "share_of_block_tokens": dial.share,
            "resteer_seconds": spread(again),
            "full_seconds": spread(full),
            "residual_bytes": dial.kept_bytes,
            "identical": dial.identical(),
        }
    excesses = [one["excess"] for one in found.values() if one["excess"] is not None]
    return {
        "resteer_ratio": found["0.5"]["ratio"]["median"],
        "resteer_excess": max(excesses, default=None),
        "resteer_identical": all(one["identical"] for one in found.values()),
        "details": {"depths": found, "prefix_tokens": prefix_tokens, "layers": count},
    }


def rows(result: dict) -> list[Row]:
    """Return the table's rows."""
    d = result["details"]
    table = []
    for one in d["depths"].values():
        same = "identical bits" if one["identical"] else "THE CACHES DIFFER"
        table.append(ratio(
            f"re-steer at layer {one['layer']} of {d['layers']}, cost / full prefill", one["ratio"],
            one["null"],
            f"{_expectation(one)}; {d['prefix_tokens']} tokens in {one['full_seconds']['median']:.2f} s; "
            f"keeps {one['residual_bytes'] / 2**20:.1f} MiB; {same}",
        ))  # fmt: skip
    return table


def _expectation(one: dict) -> str:
    if one["excess"] is None:
        return "no layer above"
    return (
        f"layers above: {one['expected']:.3f} ({100 * one['excess']:+.0f} %), "
        f"{one['expected_strict']:.3f} without the last"
    )


class _Dial:
    """A prefix whose strength at one layer is turned again and again."""

    def __init__(self, subject: Subject, layer: int, chunks: list[Chunk]):
        self._subject, self._layer, self._chunks = subject, layer, chunks
        self._prefix = Prefix(subject.model, keep_bytes=PLENTY)
        self._prefix.fill(chunks, self._turn(0))
        self._turns = 0
        self.resteer()  # warm up

    @property
    def kept_bytes(self) -> int:
        return self._prefix.residual_bytes

    def _turn(self, number: int) -> Steering:
        return self._subject.steering((self._layer,), strength=0.1 + 0.01 * number)

    def resteer(self) -> float:
        """Turn the dial; return the seconds."""
        self._turns += 1
        how = self._turn(self._turns)
        mx.synchronize()
        return timed(lambda: self._prefix.fill(self._chunks, how))

    def full(self) -> float:
        """Read everything again at the strength in force; return the seconds."""
        prefix, how = Prefix(self._subject.model), self._turn(self._turns)
        mx.synchronize()
        return timed(lambda: prefix.fill(self._chunks, how))

    @property
    def share(self) -> float:
        """The part of a full prefill's (tokens x blocks) that a turn computes."""
        fresh = Prefix(self._subject.model)
        full = fresh.fill(self._chunks, self._turn(self._turns)).block_tokens
        self._turns += 1
        return self._prefix.fill(self._chunks, self._turn(self._turns)).block_tokens / full

    def identical(self) -> bool:
        """Compare caches and the next logits with those of a full prefill, bit by bit."""
        fresh = Prefix(self._subject.model)
        fresh.fill(self._chunks, self._turn(self._turns))
        token = mx.array([[self._chunks[0].tokens[-1]]])
        logits = [self._subject.model(token, cache=p.caches) for p in (self._prefix, fresh)]
        pairs = [(one.state, other.state)
                 for one, other in zip(self._prefix.caches, fresh.caches, strict=True)]  # fmt: skip
        same = all(
            mx.array_equal(a, b).item()
            for one, other in pairs
            for a, b in zip(one, other, strict=True)
        )
        return bool(same and mx.array_equal(*logits).item())
