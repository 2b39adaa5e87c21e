"""Extraction: tokens and seconds against reading every sequence by itself."""

import random
import time
from collections.abc import Sequence
from contextlib import closing

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..demo.problems import calibration, draw_solution
from ..extraction.extract import ReadOut, encode_pairs, extract_with_report
from ..extraction.pairs import Pair, read_pairs
from ..extraction.rewriting.rules import merge_steps
from ..generation.answer import split_steps
from ..model.model import find
from ..model.token_tree import TokenPair, TokenTree
from ..steering.steering import SMALLEST, parse_layers
from .oracle import Oracle
from .report import Row, ratio
from .subject import Subject
from .timing import Tell, alternate, over, quiet, spread, timed

FIGURES = ("extract_token_ratio", "extract_time_ratio")
SUITE = {"limit": 4, "rounds": 10, "seconds": 30.0}
QUICK = {"limit": 4, "rounds": 4, "seconds": 5.0}
DRAWS = 8


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
) -> dict[str, object]:
    """Count and time ``extract`` against reading the same sequences one after the other.

    One by one is what steering-vectors does at its batch size 1, here in mlx: each prompt with
    each response through the blocks, no cache, no head. A *token* is a position through every
    block, padding included; ``extract_token_ratio`` is theirs over ours, worked out for up to 50 pairs,
    ``extract_time_ratio`` their seconds over ours on ``limit`` of them. With an oracle,
    steering-vectors itself runs in turn in a process of its own, on a model folder in float32,
    and the vectors are compared where ours is more than rounding; loading and tokenising are counted on neither side.

    Args:
        pairs: a file of contrastive pairs; by default solutions of the demo's problems in small
            steps, and the same with their steps merged by the rewriter ``rules``.
        oracle: a Python that has torch, transformers and steering-vectors.
        limit: pairs to time at most.
        layers: layers to extract; nothing above the last one is computed by us.
        batch_size: of steering-vectors.
        rounds: extractions of each side.
        seconds: then no new round is begun; 0 is no limit.
    """
    found = read_pairs(pairs) if pairs else drawn_pairs(max(50, limit))
    chosen = list(parse_layers([layers], range(subject.layer_count)))
    timed_pairs = found[:limit]
    token_pairs = encode_pairs(subject.tokenizer, timed_pairs, ReadOut.of(-1))
    counted = found[: max(50, limit)]
    tree = TokenTree.of(encode_pairs(subject.tokenizer, counted, ReadOut.of(-1)))

    def ours() -> float:
        return timed(
            lambda: extract_with_report(
                subject.model, subject.tokenizer, timed_pairs, layers=chosen
            )
        )

    def apart() -> float:
        return timed(lambda: _read_apart(subject, token_pairs))

    _read_apart(subject, token_pairs[:1])  # warm up
    mine, theirs, again = alternate([ours, apart, apart], rounds=rounds, seconds=seconds, tell=tell)
    times = spread(over(theirs, mine))
    details = {
        "pairs": len(counted),
        "source": pairs or "the demo's problems",
        "tokens": {"ours": tree.tokens, "apart": tree.tokens_apart},
        "timed_pairs": len(timed_pairs),
        "time": {"ratio": times, "null": spread(over(theirs, again))},
        "seconds": {"ours": spread(mine), "apart": spread(theirs)},
        "shares": _shares(token_pairs),
        "layers": len(chosen),
    }
    if oracle:
        details["oracle"] = _against_oracle(
            subject, oracle, timed_pairs, chosen, batch_size=batch_size, rounds=rounds
        )
    return {
        "extract_token_ratio": tree.tokens_apart / tree.tokens,
        "extract_time_ratio": times["median"],
        "details": details,
    }


def rows(result: dict) -> list[Row]:
    """Return the table's rows."""
    d = result["details"]
    table = [
        Row("tokens computed, one by one / ours", f"{result['extract_token_ratio']:.3f}",
            remark=f"{d['pairs']} pairs of {d['source']}: {d['tokens']['apart']:,} / {d['tokens']['ours']:,}"),
        ratio("seconds of an extraction, one by one / ours", d["time"]["ratio"], d["time"]["null"],
              f"{d['timed_pairs']} pairs, {d['layers']} layers; ours {d['seconds']['ours']['median']:.1f} s"),
    ]  # fmt: skip
    if "oracle" in d:
        o = d["oracle"]
        table += [
            Row("tokens computed, steering-vectors / ours", f"{o['token_ratio']:.3f}",
                remark=f"multiply-adds {o['work_ratio']:.2f}; largest relative difference of a vector "
                       f"{o['largest_relative_difference']:.1e}"),
            ratio("seconds, steering-vectors / ours", o["time"],
                  remark=f"torch {o['versions']['torch']}, batch size {o['batch_size']}"),
        ]  # fmt: skip
    return table


def drawn_pairs(count: int) -> list[Pair]:
    """Return pairs of the demo's calibration problems: the sparsest of some solutions, and the
    same with its steps merged."""
    pairs = []
    for problem in calibration(count):
        solutions = [draw_solution(problem, random.Random(seed)) for seed in range(DRAWS)]
        sparse = max(solutions, key=lambda text: len(split_steps(text)))
        pairs.append(Pair(problem.question, merge_steps(sparse), sparse))
    return pairs


def _read_apart(subject: Subject, pairs: Sequence[TokenPair]) -> None:
    for pair in pairs:
        for response in (pair.positive, pair.negative):
            mx.eval(subject.model.model(mx.array([[*pair.prompt, *response]])))


def _shares(pairs: Sequence[TokenPair]) -> dict[str, int]:
    """Return how many positions sharing each part saves, and how many padding costs."""
    tree = TokenTree.of(pairs)
    stems = [stem for batch in tree.batches for stem in batch.stems]
    saved = {
        "prompt_once": sum(len(pair.prompt) for pair in pairs),
        "template_once": (len(pairs) - 1) * len(tree.root),
        "common_beginnings": sum(stem.stop - stem.prompt for stem in stems),
    }
    padding = tree.tokens - (tree.tokens_apart - sum(saved.values()))
    responses = sum(len(pair.positive) + len(pair.negative) for pair in pairs)
    return {"apart": tree.tokens_apart, **saved, "padding": padding, "responses": responses}


def _against_oracle(
    subject: Subject,
    python: str,
    pairs: Sequence[Pair],
    layers: list[int],
    *,
    batch_size: int,
    rounds: int,
) -> dict[str, object]:
    """Train both on the same pairs in turn; compare work, seconds and vectors."""
    texts = [[pair.system, pair.prompt, pair.positive, pair.negative] for pair in pairs]
    results: dict[str, dict] = {}

    def ours() -> float:
        began = time.perf_counter()
        found = extract_with_report(subject.model, subject.tokenizer, pairs, layers=layers)
        # where a vector is nothing but rounding there is nothing to compare
        vectors = {
            layer: found.vector.layers[layer]
            for layer, one in found.layers.items()
            if one.relative_norm >= SMALLEST
        }
        results["ours"] = {"vectors": vectors, "blocks": found.tokens * (layers[-1] + 1)}
        return time.perf_counter() - began

    with closing(Oracle(python, find(subject.name))) as other:

        def theirs() -> float:
            results["theirs"] = other.train(texts, layers, batch_size)
            return results["theirs"]["seconds"]

        other.train(texts[:1], layers, 1)
        mine, reference = alternate([ours, theirs], rounds=rounds)
    a, b = results["ours"], results["theirs"]
    return {
        "token_ratio": (b["blocks"] / subject.layer_count) / (a["blocks"] / (layers[-1] + 1)),
        "work_ratio": _work(subject, b["blocks"], b["head"]) / _work(subject, a["blocks"], 0),
        "time": spread(over(reference, mine)),
        "largest_relative_difference": max(
            float(np.linalg.norm(v - np.array(b["vectors"][str(k)])) / np.linalg.norm(v))
            for k, v in a["vectors"].items()
        ),
        "batch_size": batch_size,
        "versions": other.versions,
    }


def _work(subject: Subject, blocks: int, head: int) -> float:
    """Return multiply-adds of weights: positions times parameters, of blocks and of the head."""
    args, block = subject.model.args, subject.model.model.layers[0]
    size = sum(a.size for _, a in tree_flatten(block.parameters()) if a.ndim == 2)
    return blocks * size + head * args.vocab_size * args.hidden_size
