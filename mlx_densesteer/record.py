"""Reading the residual stream: batched, and flat in memory."""

from collections.abc import Iterable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.base import create_attention_mask

from .errors import InputError
from .patch import decoder_blocks
from .vector import format_layers

BATCH_TOKENS = 4096


def record(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    layers: Iterable[int],
    *,
    token: int = -1,
) -> dict[int, np.ndarray]:
    """Return the unsteered residual stream at one token of each sequence.

    Args:
        sequences: token ids, one sequence a row, of any lengths.
        layers: layer numbers; the array is read at the output of that block.
        token: which token of each sequence, counted from the end if negative.

    Returns:
        ``{layer: (sequences, hidden) float32}``, in the order of ``sequences``. In Hugging
        Face terms layer l is ``hidden_states[l + 1]``, for the last layer before the norm.

    Raises:
        InputError: no sequences, an empty one, one too short for ``token``, or a layer that
            the model does not have.
    """
    if not sequences:
        raise InputError("no sequences to read; expected at least one.")
    layers = _check_layers(model, layers)
    rows: dict[int, list[tuple[int, np.ndarray]]] = {layer: [] for layer in layers}
    for batch in _batches(sequences):
        lengths = [len(sequences[i]) for i in batch]
        if min(lengths) < (token + 1 if token >= 0 else -token):
            raise InputError(f"a sequence of {min(lengths)} tokens has no token {token}.")
        at = mx.array([token if token >= 0 else n + token for n in lengths])[:, None, None]
        for layer, h in _streams(model, [sequences[i] for i in batch], layers):
            picked = mx.take_along_axis(h, at, axis=1)[:, 0].astype(mx.float32)
            rows[layer] += zip(batch, np.array(picked), strict=True)
    return {layer: np.stack([row for _, row in sorted(found, key=lambda x: x[0])])
            for layer, found in rows.items()}  # fmt: skip


def residual_norms(
    model: nn.Module, tokens: Sequence[int], layers: Iterable[int]
) -> dict[int, float]:
    """Return the mean over tokens of ``||h_l||`` at each layer, unsteered.

    The first token is left out where there are others: it is the attention sink, and its
    norm is orders of magnitude above the rest.
    """
    norms = {}
    for layer, h in _streams(model, [tokens], _check_layers(model, layers)):
        lengths = mx.linalg.norm(h[0].astype(mx.float32), axis=-1)
        norms[layer] = float(mx.mean(lengths[1:] if len(tokens) > 1 else lengths))
    return norms


def _check_layers(model: nn.Module, layers: Iterable[int]) -> list[int]:
    wanted, there = sorted(set(layers)), decoder_blocks(model)
    if not wanted or (strange := [layer for layer in wanted if layer not in there]):
        raise InputError(
            f"layers {format_layers(strange) if wanted else 'none'}: expected some of "
            f"{format_layers(there)}."
        )
    return wanted


def _streams(model: nn.Module, sequences: Sequence[Sequence[int]], layers: Sequence[int]):
    """Yield ``(layer, h)`` for right-padded ``sequences``, up to the last layer asked for.

    The causal mask keeps the padding out of every real token. Each block is evaluated
    before the next, so one activation is alive at a time.
    """
    width = max(len(sequence) for sequence in sequences)
    padded = [list(sequence) + [0] * (width - len(sequence)) for sequence in sequences]
    h = model.model.embed_tokens(mx.array(padded))
    mask = create_attention_mask(h)
    for layer, block in decoder_blocks(model).items():
        if layer > layers[-1]:
            return
        h = block(h, mask, None)
        mx.eval(h)
        if layer in layers:
            yield layer, h


def _batches(sequences: Sequence[Sequence[int]]) -> Iterable[list[int]]:
    """Group indices of like length, at most ``BATCH_TOKENS`` padded tokens a group."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    if order and not len(sequences[order[0]]):
        raise InputError(f"sequence {order[0]} is empty; expected at least one token.")
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * len(sequences[i]) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
