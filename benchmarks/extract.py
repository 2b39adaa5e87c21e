"""Extraction against reading sequences one by one, and against steering-vectors (PyTorch)."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np
from mlx.utils import tree_flatten
from script import main
from steering_vectors_process import SteeringVectorsProcess

from mlx_densesteer.bench import extract
from mlx_densesteer.bench.figures import Figure, Measurement, Tell, alternate, quiet, ratio, timed
from mlx_densesteer.bench.subject import Subject
from mlx_densesteer.extraction.extract import encode_pairs, extract_with_report
from mlx_densesteer.extraction.pairs import Pair, read_pairs
from mlx_densesteer.model.model import find
from mlx_densesteer.steering.request import SMALLEST, parse_layers


def run(
    subject: Subject,
    *,
    pairs: str | None = None,
    oracle: str | None = None,
    limit: int = 50,
    layers: str = "all",
    batch_size: int = 1,
    rounds: int = 2,
    seconds: float = 0.0,
    tell: Tell = quiet,
) -> Measurement:
    """Measure what `densesteer bench extract` does and, with an oracle, steering-vectors itself.

    steering-vectors runs in turn, in a process of its own, on the same model folder in float32.
    Loading and tokenising are counted on neither side. Vectors are compared where ours is more than
    rounding.

    Args:
        pairs: a file of contrastive pairs; by default solutions of the demo's problems.
        oracle: a Python that has torch, transformers and steering-vectors.
        limit: pairs to time at most.
        layers: layers to extract; we compute nothing above the last one.
        batch_size: of steering-vectors.
        rounds: extractions of each side.
        seconds: after which no new round begins, without the oracle; 0 is no limit.
    """
    found = extract.run(
        subject, pairs=pairs, limit=limit, layers=layers, rounds=rounds, seconds=seconds, tell=tell
    )
    if oracle is None:
        return found
    timed_pairs = (read_pairs(pairs) if pairs else extract.drawn_pairs(limit))[:limit]
    chosen = list(parse_layers([layers], range(subject.model.layer_count)))
    other = _against_steering_vectors(subject, oracle, timed_pairs, chosen, batch_size, rounds)
    remark = f"multiply-adds {other['work_ratio']:.2f}; largest relative difference of a vector "
    rows = [
        Figure(
            "",
            "tokens computed, steering-vectors / ours",
            other["token_ratio"],
            remark=f"{remark}{other['largest_relative_difference']:.1e}",
        ),
        Figure.of(
            "",
            "seconds, steering-vectors / ours",
            other["time"],
            remark=f"torch {other['versions']['torch']}, batch size {batch_size}",
        ),
    ]
    details = {**found.details, "oracle": other}
    return replace(found, table=[*found.table, *rows], details=details)


def _against_steering_vectors(
    subject: Subject,
    python: str,
    pairs: Sequence[Pair],
    layers: list[int],
    batch_size: int,
    rounds: int,
) -> dict[str, object]:
    """Let both read the same pairs in turn; compare work, seconds and vectors."""
    texts = [[pair.system, pair.prompt, pair.positive, pair.negative] for pair in pairs]
    found, depth = extract_with_report(subject.model, pairs, layers=layers), layers[-1] + 1
    token_pairs = encode_pairs(subject.model, pairs, extract.LAST_TOKEN)
    theirs: dict[str, object] = {}

    def read_ours() -> float:
        return timed(lambda: extract.read_together(subject, token_pairs, layers))

    with closing(SteeringVectorsProcess(python, find(subject.name))) as other:

        def train_theirs() -> float:
            theirs.update(other.train(texts, layers, batch_size))
            return theirs["seconds"]

        other.train(texts[:1], layers, 1)
        ours, reference = alternate([read_ours, train_theirs], rounds=rounds)
    work = _multiply_adds(subject, theirs["blocks"], theirs["head"])
    return {
        "token_ratio": theirs["blocks"] / subject.model.layer_count / found.tokens,
        "work_ratio": work / _multiply_adds(subject, found.tokens * depth, 0),
        "time": ratio(reference, ours),
        "largest_relative_difference": max(
            float(np.linalg.norm(v - np.array(theirs["vectors"][str(k)])) / np.linalg.norm(v))
            for k, v in found.vector.layers.items()
            if found.layers[k].unit_dose >= SMALLEST  # else v is nothing but rounding
        ),
        "batch_size": batch_size,
        "versions": other.versions,
    }


def _multiply_adds(subject: Subject, blocks: int, head: int) -> float:
    """Return the multiply-adds of weights: positions times parameters, of blocks and of the head."""
    args, block = subject.model.network.args, subject.model.network.model.layers[0]
    size = sum(a.size for _, a in tree_flatten(block.parameters()) if a.ndim == 2)
    return blocks * size + head * args.vocab_size * args.hidden_size


if __name__ == "__main__":
    main(run)
