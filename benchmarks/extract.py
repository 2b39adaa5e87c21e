"""Extraction against reading sequences one by one, and against steering-vectors (PyTorch)."""

import random
from collections.abc import Sequence
from contextlib import closing

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from script import main
from steering_vectors_process import SteeringVectorsProcess

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
from mlx_densesteer.demo.problems import calibration, draw_solution
from mlx_densesteer.extraction.extract import ReadOut, encode_pairs, extract_with_report
from mlx_densesteer.extraction.pairs import Pair, read_pairs
from mlx_densesteer.extraction.rewriting.rules import merge_steps
from mlx_densesteer.generation.answer import split_steps
from mlx_densesteer.model.model import find
from mlx_densesteer.model.residual import record_pairs
from mlx_densesteer.model.token_tree import TokenPair, TokenTree
from mlx_densesteer.steering.request import SMALLEST, parse_layers

COUNTED = 50  # pairs whose tokens are counted at least
DRAWS = 8
LAST_TOKEN = ReadOut.of(-1)


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
    """Count and time how extraction reads pairs, against reading their sequences one by one.

    One by one: each prompt with each response through the blocks, no cache, no head. What
    extraction does with what it read (means, the comparison of layers) is not timed. A *token* is a
    position through every block, padding included. ``extract_token_ratio`` is theirs over ours, of
    up to 50 pairs; ``extract_time_ratio`` their seconds over ours, on ``limit`` of them.

    With an oracle also against steering-vectors itself, in a process of its own, on the same model
    folder in float32. Loading and tokenising are counted on neither side. Vectors are compared
    where ours is more than rounding.

    Args:
        pairs: a file of contrastive pairs; by default solutions of the demo's problems in small
            steps, and the same with their steps merged by the rewriter ``rules``.
        oracle: a Python that has torch, transformers and steering-vectors.
        limit: pairs to time at most.
        layers: layers to extract; extraction computes nothing above the last one.
        batch_size: of steering-vectors.
        rounds: extractions of each side.
        seconds: after which no new round begins, without the oracle; 0 is no limit.
    """
    most = max(COUNTED, limit)
    found = (read_pairs(pairs) if pairs else drawn_pairs(most))[:most]
    chosen = list(parse_layers([layers], range(subject.model.layer_count)))
    tree = TokenTree.of(encode_pairs(subject.model, found, LAST_TOKEN))
    token_pairs = encode_pairs(subject.model, found[:limit], LAST_TOKEN)

    def ours() -> float:
        return timed(lambda: read_together(subject, token_pairs, chosen))

    def apart() -> float:
        return timed(lambda: read_apart(subject, token_pairs))

    read_apart(subject, token_pairs[:1])  # warm up
    mine, theirs, again = alternate([ours, apart, apart], rounds=rounds, seconds=seconds, tell=tell)
    source = pairs or "the demo's problems"
    table = [
        Figure(
            "extract_token_ratio",
            "tokens computed, one by one / ours",
            tree.tokens_apart / tree.tokens,
            remark=f"{len(found)} pairs of {source}: {tree.tokens_apart:,} / {tree.tokens:,}",
        ),
        Figure.of(
            "extract_time_ratio",
            "seconds of reading, one by one / ours",
            ratio(theirs, mine),
            ratio(theirs, again),
            f"{len(token_pairs)} pairs, {len(chosen)} layers; ours {spread(mine)['median']:.1f} s",
        ),
    ]
    if oracle is None:
        return Measurement(table)
    other = _against_steering_vectors(subject, oracle, found[:limit], chosen, batch_size, rounds)
    table += _oracle_figures(other)
    return Measurement(table, {"oracle": other})


def drawn_pairs(count: int) -> list[Pair]:
    """Return pairs of the demo's calibration problems: the solution with the most steps of a few,
    and the same with its steps merged."""
    pairs = []
    for problem in calibration(count):
        solutions = [draw_solution(problem, random.Random(seed)) for seed in range(DRAWS)]
        sparse = max(solutions, key=lambda text: len(split_steps(text)))
        pairs.append(Pair(problem.question, merge_steps(sparse), sparse))
    return pairs


def read_together(subject: Subject, pairs: Sequence[TokenPair], layers: Sequence[int]) -> None:
    """Read the pairs as extraction does: what they share once, and nothing above the last layer."""
    for _ in record_pairs(subject.model.network, TokenTree.of(pairs), layers, LAST_TOKEN.weights):
        pass


def read_apart(subject: Subject, pairs: Sequence[TokenPair]) -> None:
    for pair in pairs:
        for response in (pair.positive, pair.negative):
            mx.eval(subject.model.network.model(mx.array([[*pair.prompt, *response]])))


def _oracle_figures(other: dict[str, object]) -> list[Figure]:
    """Return the lines of the table about steering-vectors."""
    remark = f"multiply-adds {other['work_ratio']:.2f}; largest relative difference of a vector "
    return [
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
            remark=f"torch {other['versions']['torch']}, batch size {other['batch_size']}",
        ),
    ]


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
    token_pairs = encode_pairs(subject.model, pairs, LAST_TOKEN)
    theirs: dict[str, object] = {}

    def read_ours() -> float:
        return timed(lambda: read_together(subject, token_pairs, layers))

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
    """Return the multiply-adds of weights: positions times parameters, of blocks and head."""
    args, block = subject.model.network.args, subject.model.network.model.layers[0]
    size = sum(a.size for _, a in tree_flatten(block.parameters()) if a.ndim == 2)
    return blocks * size + head * args.vocab_size * args.hidden_size


if __name__ == "__main__":
    main(run)
