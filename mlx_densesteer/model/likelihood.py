"""How likely a response is under the unsteered model: batched, and flat in memory."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.base import create_attention_mask

from ..errors import InputError
from ..steering.steering import Steering
from .block import decoder_blocks, make_cache
from .cache import SteeredBatchKVCache

BATCH_TOKENS = 4096  # padded, that go through the blocks at a time; of prompts, of responses
LOGITS = 2**24  # in memory at a time: 64 MiB, 110 positions of Qwen2.5's vocabulary


def nll(
    model: nn.Module, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> list[float]:
    """Return the mean negative log-likelihood of each response, given its prompt.

        nll = -1/n * sum_t log p(response[t] | prompt, response[:t])

    Nats per token, unsteered, log-softmax in float32. Equal prompts in a batch are computed
    once. A response is what the model wrote without its end-of-turn token.

    Args:
        prompts: token ids, one prompt for each response.
        responses: token ids, of any lengths.

    Raises:
        InputError: an empty prompt or response, or not as many of the one as of the other.
    """
    if len(prompts) != len(responses):
        raise InputError(
            f"{len(prompts)} prompts for {len(responses)} responses; expected as many."
        )
    for what, sequences in (("prompt", prompts), ("response", responses)):
        if empty := [i for i, sequence in enumerate(sequences) if not len(sequence)]:
            raise InputError(f"{what} {empty[0]} is empty; expected at least one token.")
    means: dict[int, float] = {}
    for batch in _batches(prompts, responses):
        h = _predictions(model, [prompts[i] for i in batch], [responses[i] for i in batch])
        lengths = [len(responses[i]) for i in batch]
        scores, _ = token_log_likelihoods(model, h, [t for i in batch for t in responses[i]])
        starts = np.cumsum([0, *lengths[:-1]])
        sums = -np.add.reduceat(scores, starts)
        means |= zip(batch, (sums / lengths).tolist(), strict=True)
        mx.clear_cache()  # batches differ in shape: the buffers of one are no use to the next
    return [means[i] for i in range(len(responses))]


def _batches(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> Iterable[list[int]]:
    """Group responses of like length, those to one prompt side by side.

    Lengths of one class differ by a quarter at most, so that neither the padding nor the
    number of times that a prompt is computed grows much.
    """
    order = sorted(
        range(len(responses)),
        key=lambda i: (int(3 * math.log2(len(responses[i]))), prompts[i], len(responses[i])),
    )
    batch: list[int] = []
    for i in order:
        rows = [*batch, i]
        distinct = {tuple(prompts[row]) for row in rows}
        padded = len(rows) * max(len(responses[row]) for row in rows)
        padded_prompts = len(distinct) * max(map(len, distinct))
        if batch and max(padded, padded_prompts) > BATCH_TOKENS:
            yield batch
            rows = [i]
        batch = rows
    if batch:
        yield batch


class _Keys:
    """One block's keys and values of the prompts; then those of responses that go on there."""

    def __init__(self) -> None:
        self.offset: int | mx.array = 0  # where the rotary positions begin

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if isinstance(self.offset, int):
            self.held = keys, values
        else:
            keys = mx.concatenate([self.held[0], keys], axis=2)
            values = mx.concatenate([self.held[1], values], axis=2)
        return keys, values

    def go_on(self, rows: mx.array, offset: mx.array) -> None:
        """Give each response the keys of its prompt, ``rows[i]``."""
        self.held = self.held[0][rows], self.held[1][rows]
        self.offset = offset


def _predictions(
    model: nn.Module, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> mx.array:
    """Return the normed stream that predicts each response token, ``(tokens, hidden)``.

    Both sides go through the blocks together, right-padded, so that one block's keys are
    alive at a time. The last response tokens predict nothing and are left out.
    """
    distinct = {tuple(prompt): None for prompt in prompts}
    place = {prompt: row for row, prompt in enumerate(distinct)}
    rows = mx.array([place[tuple(prompt)] for prompt in prompts])
    lengths = mx.array([len(prompt) for prompt in prompts])
    p = model.model.embed_tokens(pad(list(distinct)))
    r = model.model.embed_tokens(pad([response[:-1] for response in responses]))
    causal = create_attention_mask(p)
    mask = _response_mask(lengths, p.shape[1], r.shape[1])
    for block in decoder_blocks(model).values():
        cache = _Keys()
        p = block(p, causal, cache)
        if r.shape[1]:
            cache.go_on(rows, lengths)
            r = block(r, mask, cache)
        mx.eval(p, r)
    last = mx.take_along_axis(p[rows], (lengths - 1)[:, None, None], axis=1)
    h = mx.concatenate([last, r], axis=1)
    kept = [row * h.shape[1] + t for row, response in enumerate(responses)
            for t in range(len(response))]  # fmt: skip
    return model.model.norm(h.reshape(-1, h.shape[-1])[mx.array(kept)])


def _response_mask(lengths: mx.array, prompt_width: int, width: int) -> mx.array:
    """Return ``(rows, 1, width, prompt_width + width)``: the prompt's tokens, then causal."""
    prompt = mx.arange(prompt_width)[None, None, None] < lengths[:, None, None, None]
    own = mx.arange(width)[:, None] >= mx.arange(width)
    rows = len(lengths)
    return mx.concatenate([
        mx.broadcast_to(prompt, (rows, 1, width, prompt_width)),
        mx.broadcast_to(own, (rows, 1, width, width)),
    ], axis=-1)  # fmt: skip


def pad(sequences: Sequence[Sequence[int]]) -> mx.array:
    """Return token ids padded on the right, int32 ``(sequences, tokens)``.

    A causal mask keeps the padding out of the tokens before it.
    """
    width = max(len(sequence) for sequence in sequences)
    return mx.array(
        [[*sequence, *[0] * (width - len(sequence))] for sequence in sequences], mx.int32
    )


def head_of(model: nn.Module) -> Callable[[mx.array], mx.array]:
    """Return what turns the normed stream ``(..., hidden)`` into logits ``(..., vocabulary)``."""
    return model.model.embed_tokens.as_linear if model.args.tie_word_embeddings else model.lm_head


def token_log_likelihoods(
    model: nn.Module, h: mx.array, tokens: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return log p of each token, and whether greedy decoding would have chosen it.

        log p_i = z_i[tokens[i]] - log sum_v exp z_i[v],    z_i = head(h_i)

    The head sees a slice of positions at a time.

    Args:
        h: the normed stream that predicts each token, ``(tokens, hidden)``.

    Returns:
        float64 ``(tokens,)`` in nats, of logits in float32; bool ``(tokens,)``.
    """
    head = head_of(model)
    step = max(1, LOGITS // model.args.vocab_size)
    scores, greedy = np.zeros(len(tokens)), np.zeros(len(tokens), bool)
    for start in range(0, len(tokens), step):
        part = slice(start, start + step)
        logits, targets = head(h[part]).astype(mx.float32), mx.array(tokens[part])
        picked = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        score, best = picked - _log_sum_exp(logits), mx.argmax(logits, axis=-1) == targets
        mx.eval(score, best)
        scores[part], greedy[part] = np.array(score), np.array(best)
    return scores, greedy


def _log_sum_exp(logits: mx.array) -> mx.array:
    """Return ``log(sum(exp(logits)))`` of each row, summed in two stages.

    The CPU backend adds up in float32, one after the other: over 151,936 entries that is off by
    1e-4 to 7e-4, and always to the same side.
    """
    rows, width = logits.shape
    whole = width - width % 128
    parts = [mx.logsumexp(logits[:, :whole].reshape(rows, -1, 128), axis=-1)] if whole else []
    if whole < width:
        parts.append(mx.logsumexp(logits[:, whole:], axis=-1, keepdims=True))
    return mx.logsumexp(mx.concatenate(parts, axis=-1), axis=-1)


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
