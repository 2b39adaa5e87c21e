"""The log-likelihood of texts under the model, steered or not: batched, in constant memory."""

from collections.abc import Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import InputError
from ..steering.steering import Steering
from .block import make_cache
from .cache import SteeredBatchKVCache
from .families import head_of
from .prompt import check_ids

ROWS = 16  # sequences that go through the blocks together
BATCH_TOKENS = 4096  # tokens that go through the blocks together at most
LOGITS = 2**24  # logits in memory at a time: 64 MiB, 110 positions of Qwen2.5's vocabulary
PADDING = 256  # tokens of padding that cost less than another pass


def nll(
    network: nn.Module, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> list[float]:
    """Return the mean negative log-likelihood of each response, given its prompt, unsteered.

        nll = -1/n * sum_t log p(response[t] | prompt, response[:t])

    In nats per token. A response is what the model wrote without its end-of-turn token.

    Args:
        prompts: token ids, one prompt for each response. Equal ones are computed once.
        responses: token ids, of any lengths.

    Raises:
        InputError: an empty prompt or response, not as many prompts as responses, or a token that
            the model does not know.
    """
    if empty := [i for i, response in enumerate(responses) if not len(response)]:
        raise InputError(f"response {empty[0]} is empty; expected at least one token.")
    means = [0.0] * len(responses)
    for i, score, _ in log_likelihoods(network, prompts, responses):
        means[i] = -score / len(responses[i])
    return means


def log_likelihoods(
    network: nn.Module,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    *,
    steering: Steering | None = None,
    rows: int = ROWS,
) -> Iterator[tuple[int, float, bool]]:
    """Yield ``(i, log p, greedy)`` of each continuation, given its context, in any order.

        log p = sum_t log p(continuation[t] | context, continuation[:t])

    In nats, log-softmax in float32; 0 for an empty continuation. ``greedy`` says whether greedy
    decoding would write it. The steering's ``positions`` take the context for the prompt.

    Args:
        contexts: token ids, one context for each continuation. Equal ones are computed once.
        continuations: token ids, of any lengths.
        rows: contexts at a time, and continuations at a time.

    Raises:
        InputError: an empty context, not as many contexts as continuations, or a token that the
            model does not know.
    """
    if len(contexts) != len(continuations):
        raise InputError(
            f"{len(contexts)} contexts for {len(continuations)} continuations; expected as many."
        )
    sharing: dict[tuple[int, ...], list[int]] = {}
    for i, context in enumerate(contexts):
        if not len(context):
            raise InputError(f"context {i} is empty; expected at least one token.")
        check_ids(context, network.args.vocab_size, f"context {i}")
        check_ids(continuations[i], network.args.vocab_size, f"continuation {i}")
        sharing.setdefault(tuple(context), []).append(i)

    def longest(context: tuple[int, ...]) -> int:
        return len(context) + max(len(continuations[i]) for i in sharing[context])

    # The longest come first: if memory does not suffice, it fails at once.
    by_length = sorted(sharing, key=longest, reverse=True)
    for start in range(0, len(by_length), rows):
        group = by_length[start : start + rows]
        caches = _fill(network, group, steering)
        waiting = [(row, i) for row, context in enumerate(group) for i in sharing[context]]
        waiting.sort(key=lambda pair: len(continuations[pair[1]]))
        for part in _parts(waiting, [len(continuations[i]) for _, i in waiting], rows):
            after = [(row, group[row][-1]) for row, _ in part]
            scores = _score(network, caches, after, [continuations[i] for _, i in part])
            yield from ((i, *score) for (_, i), score in zip(part, scores, strict=True))
        mx.clear_cache()  # groups differ in shape, so the next one cannot use these buffers


def _parts(
    items: Sequence[tuple[int, int]], lengths: Sequence[int], rows: int
) -> Iterator[Sequence[tuple[int, int]]]:
    """Cut items of ascending lengths into parts of at most ``rows`` items, with little padding."""
    start = 0
    for stop in range(1, len(items) + 1):
        padding = sum(lengths[stop] - n for n in lengths[start:stop]) if stop < len(items) else 0
        if stop == len(items) or stop - start == rows or padding > PADDING:
            yield items[start:stop]
            start = stop


def _fill(
    network: nn.Module, contexts: Sequence[Sequence[int]], steering: Steering | None
) -> list[SteeredBatchKVCache]:
    """Return steered caches, one row a context, that hold each context without its last token."""
    rows = [make_cache(network, steering, prompt=context) for context in contexts]
    caches = [SteeredBatchKVCache.merge(layer) for layer in zip(*rows, strict=True)]
    lengths = [len(context) - 1 for context in contexts]
    width = max(lengths)
    if not width:
        return caches
    for cache in caches:
        cache.prepare(lengths=lengths, right_padding=[width - length for length in lengths])
    for part in _slices(pad_right([context[:-1] for context in contexts])):
        network.model(part, cache=caches)
        mx.eval([(cache.keys, cache.values) for cache in caches])
    for cache in caches:
        cache.finalize()
    return caches


def _score(
    network: nn.Module,
    caches: Sequence[SteeredBatchKVCache],
    after: Sequence[tuple[int, int]],
    continuations: Sequence[Sequence[int]],
) -> list[tuple[float, bool]]:
    """Score each continuation after ``(row of the caches, last token of the context)``.

    ``caches`` stay as they are.
    """
    caches = [cache.take([row for row, _ in after]) for cache in caches]
    inputs = [[last, *tokens[:-1]] for (_, last), tokens in zip(after, continuations, strict=True)]
    totals, greedy = [0.0] * len(after), [True] * len(after)
    start = 0
    for part in _slices(pad_right(inputs)):
        h = network.model(part, cache=caches)
        stop = start + part.shape[1]
        places = [
            (row, t)
            for row, tokens in enumerate(continuations)
            for t in range(start, min(stop, len(tokens)))
        ]
        if places:
            at = mx.array([(row, t - start) for row, t in places])
            targets = [continuations[row][t] for row, t in places]
            found = token_log_likelihoods(network, h[at[:, 0], at[:, 1]], targets)
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


def pad_right(sequences: Sequence[Sequence[int]]) -> mx.array:
    """Return token ids padded on the right, int32 ``(sequences, tokens)``; the causal mask hides the padding."""
    width = max(len(sequence) for sequence in sequences)
    return mx.array(
        [[*sequence, *[0] * (width - len(sequence))] for sequence in sequences], mx.int32
    )


def token_log_likelihoods(
    network: nn.Module, h: mx.array, tokens: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return log p of each token, and whether greedy decoding would choose it.

        log p_i = z_i[tokens[i]] - log sum_v exp z_i[v],    z_i = head(h_i)

    Args:
        h: the normed stream that predicts each token, ``(tokens, hidden)``.

    Returns:
        float64 ``(tokens,)`` in nats, of logits in float32; bool ``(tokens,)``.
    """
    head = head_of(network)
    step = max(1, LOGITS // network.args.vocab_size)
    scores, greedy = np.zeros(len(tokens)), np.zeros(len(tokens), bool)
    for start in range(0, len(tokens), step):
        part = slice(start, start + step)
        logits, targets = head(h[part]).astype(mx.float32), mx.array(tokens[part])
        picked = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        score, best = picked - log_sum_exp(logits), mx.argmax(logits, axis=-1) == targets
        mx.eval(score, best)
        scores[part], greedy[part] = np.array(score), np.array(best)
    return scores, greedy


def log_sum_exp(logits: mx.array) -> mx.array:
    """Return ``log(sum(exp(logits)))`` of each row, summed in two stages.

    mlx's CPU backend adds up one entry after the other in float32: over 151,936 entries the error
    is 1e-4 to 7e-4, always of the same sign.
    """
    rows, width = logits.shape
    whole = width - width % 128
    parts = [mx.logsumexp(logits[:, :whole].reshape(rows, -1, 128), axis=-1)] if whole else []
    if whole < width:
        parts.append(mx.logsumexp(logits[:, whole:], axis=-1, keepdims=True))
    return mx.logsumexp(mx.concatenate(parts, axis=-1), axis=-1)
