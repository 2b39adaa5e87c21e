"""Contrastive pairs -> recorded activations -> ``SteeringVector``."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.nn as nn
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .errors import InputError
from .model import chat_template_sha256, inspect
from .prompt import encode_prompt
from .record import record
from .vector import SteeringVector, VectorMeta


@dataclass(frozen=True)
class Pair:
    """One problem with two responses: ``positive`` is dense, ``negative`` sparse."""

    prompt: str
    positive: str
    negative: str


def extract(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    pairs: Sequence[Pair],
    *,
    layers: Iterable[int] | None = None,
    token: int = -1,
) -> SteeringVector:
    """Return the mean difference of the pairs' residual streams at one token.

        v_l = mean_i( h_l(prompt_i + positive_i)[token] - h_l(prompt_i + negative_i)[token] )

    The prompt goes through the chat template, the responses are plain text after it, so
    token -1 (the default) is the last content token of the response, never an end-of-turn token.
    Not normalised. Source: arXiv 2605.29247, section 3.

    Raises:
        InputError: no pairs, an empty response, a response that ``token`` lies outside of,
            or a layer that the model does not have.
    """
    if not pairs:
        raise InputError("no contrastive pairs; expected at least one.")
    if token >= 0:
        raise InputError(f"token {token}: expected a negative number, counted from the end.")
    info = inspect(model, tokenizer.name_or_path)
    chosen = range(info.layer_count) if layers is None else sorted(set(layers))
    sequences = []
    for number, pair in enumerate(pairs):
        prompt = encode_prompt(tokenizer, pair.prompt)
        for response in (pair.positive, pair.negative):
            tokens = tokenizer.encode(response.strip(), add_special_tokens=False)
            if len(tokens) < -token:
                raise InputError(
                    f"pair {number} has a response of {len(tokens)} tokens, expected at least "
                    f"{-token} in both."
                )
            sequences.append(prompt + tokens)
    rows = record(model, sequences, chosen, token=token)
    means = {k: (r[0::2].astype(np.float64) - r[1::2]).mean(axis=0) for k, r in rows.items()}
    meta = VectorMeta(
        model=info.name,
        hidden_size=info.hidden_size,
        layer_count=info.layer_count,
        fingerprint=info.fingerprint,
        method="mean difference",
        token=f"{token} of the response",
        pair_count=len(pairs),
        pairs_sha256=pairs_sha256(pairs),
        chat_template_sha256=chat_template_sha256(tokenizer),
        quantization=info.quantization,
    )
    return SteeringVector(means, meta)


def pairs_sha256(pairs: Iterable[Pair]) -> str:
    """Return the SHA-256 of the pairs' texts in order, in hexadecimal."""
    rows = [[pair.prompt, pair.positive, pair.negative] for pair in pairs]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()
