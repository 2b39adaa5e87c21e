"""How likely continuations are under a steering: batched, each shared context computed once.

Teacher-forced: every token is predicted from the true ones before it, in a residual stream
that is steered as it would be if the model had written them.
"""

import copy
from collections.abc import Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn

from ..errors import InputError
from ..steering.steering import Steering
from .block import make_cache
from .cache import SteeredBatchKVCache
from .likelihood import BATCH_TOKENS, pad, token_log_likelihoods


def log_likelihoods(
    model: nn.Module,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    *,
    steering: Steering | None = None,
    rows: int = 16,
) -> Iterator[tuple[int, float, bool]]:
    """Yield ``(i, log p, greedy)`` of each continuation, given its context, as they are done.

        log p = sum_t log p(continuation[t] | context, continuation[:t])

    Nats, log-softmax in float32; 0 for an empty continuation. ``greedy`` says whether greedy
    decoding would have written it. The context is the prompt of the steering's ``positions``.

    Args:
        contexts: token ids, one context for each continuation. Equal ones are computed once.
        continuations: token ids, of any lengths.
        rows: contexts at a time, and continuations at a time.

    Raises:
        InputError: an empty context, or not as many of the one as of the other.
    """
    if len(contexts) != len(continuations):
        raise InputError(
            f"{len(contexts)} contexts for {len(continuations)} continuations; expected as many."
        )
    sharing: dict[tuple[int, ...], list[int]] = {}
    for i, context in enumerate(contexts):
        if not len(context):
            raise InputError(f"context {i} is empty; expected at least one token.")
        sharing.setdefault(tuple(context), []).append(i)
    for group in _chunks(sorted(sharing, key=len, reverse=True), rows):
        caches = _fill(model, group, steering)
        waiting = [(row, i) for row, context in enumerate(group) for i in sharing[context]]
        waiting.sort(key=lambda pair: len(continuations[pair[1]]))
        for part in _chunks(waiting, rows):
            after = [(row, group[row][-1]) for row, _ in part]
            scores = _score(model, caches, after, [continuations[i] for _, i in part])
            yield from ((i, *score) for (_, i), score in zip(part, scores, strict=True))
        mx.clear_cache()  # groups differ in shape: the buffers of one are no use to the next


def _fill(
    model: nn.Module, contexts: Sequence[Sequence[int]], steering: Steering | None
) -> list[SteeredBatchKVCache]:
    """Return steered caches, one row a context, that hold all but each context's last token."""
    rows = [make_cache(model, steering, prompt_length=len(context)) for context in contexts]
    caches = [SteeredBatchKVCache.merge(layer) for layer in zip(*rows, strict=True)]
    lengths = [len(context) - 1 for context in contexts]
    width = max(lengths)
    if not width:
        return caches
    for cache in caches:
        cache.prepare(lengths=lengths, right_padding=[width - length for length in lengths])
    for part in _slices(pad([context[:-1] for context in contexts])):
        model.model(part, cache=caches)
        mx.eval([(cache.keys, cache.values) for cache in caches])
    for cache in caches:
        cache.finalize()
    return caches


def _score(
    model: nn.Module,
    caches: Sequence[SteeredBatchKVCache],
    after: Sequence[tuple[int, int]],
    continuations: Sequence[Sequence[int]],
) -> list[tuple[float, bool]]:
    """Score each continuation after ``(row of the caches, last token of the context)``.

    ``caches`` stay as they are.
    """
    caches = [copy.copy(cache) for cache in caches]
    for cache in caches:
        cache.filter([row for row, _ in after])  # new arrays; a row may come several times
    inputs = [[last, *tokens[:-1]] for (_, last), tokens in zip(after, continuations, strict=True)]
    totals, greedy = [0.0] * len(after), [True] * len(after)
    start = 0
    for part in _slices(pad(inputs)):
        h = model.model(part, cache=caches)
        stop = start + part.shape[1]
        places = [(row, t) for row, tokens in enumerate(continuations)
                  for t in range(start, min(stop, len(tokens)))]  # fmt: skip
        if places:
            at = mx.array([(row, t - start) for row, t in places])
            targets = [continuations[row][t] for row, t in places]
            found = token_log_likelihoods(model, h[at[:, 0], at[:, 1]], targets)
            for (row, _), score, best in zip(places, *found, strict=True):
                totals[row] += float(score)
                greedy[row] = greedy[row] and bool(best)
        start = stop
    return list(zip(totals, greedy, strict=True))


def _slices(tokens: mx.array) -> Iterator[mx.array]:
    """Cut ``(rows, tokens)`` into parts of at most ``BATCH_TOKENS``."""
    step = max(1, BATCH_TOKENS // tokens.shape[0])
    for start in range(0, tokens.shape[1], step):
        yield tokens[:, start : start + step]


def _chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
