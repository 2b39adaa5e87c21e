"""Extraction: tokens and seconds against reading every sequence by itself."""

import random
from collections.abc import Sequence

import mlx.core as mx

from ..demo.problems import calibration, draw_solution
from ..extraction.extract import ReadOut, encode_pairs
from ..extraction.pairs import Pair, read_pairs
from ..extraction.rewriting.rules import merge_steps
from ..generation.answer import split_steps
from ..model.residual import record_pairs
from ..model.token_tree import TokenPair, TokenTree
from ..steering.request import parse_layers
from .figures import Figure, Measurement, Tell, alternate, quiet, ratio, spread, timed
from .subject import Subject

FIGURES = ("extract_token_ratio", "extract_time_ratio")
SUITE = {"limit": 4, "rounds": 10, "seconds": 30.0}
QUICK = {"limit": 4, "rounds": 4, "seconds": 5.0}
COUNTED = 50  # pairs whose tokens are counted at least
DRAWS = 8
LAST_TOKEN = ReadOut.of(-1)


def run(
    subject: Subject,
    *,
    pairs: str | None = None,
    limit: int = 50,
    layers: str = "all",
    rounds: int = 2,
    seconds: float = 0.0,
    tell: Tell = quiet,
) -> Measurement:
    """Count and time how extraction reads pairs, against reading their sequences one by one.

    One by one: each prompt with each response through the blocks, no cache, no head. What extraction
    does with what it read (means, the comparison of layers) is not timed. A *token* is a
    position through every block, padding included. ``extract_token_ratio`` is theirs over ours, of
    up to 50 pairs; ``extract_time_ratio`` their seconds over ours, on ``limit`` of them.

    Args:
        pairs: a file of contrastive pairs; by default solutions of the demo's problems in small
            steps, and the same with their steps merged by the rewriter ``rules``.
        limit: pairs to time at most.
        layers: layers to extract; extraction computes nothing above the last one.
        rounds: extractions of each side.
        seconds: after which no new round begins; 0 is no limit.
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
    return Measurement(
        [
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
    )


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
