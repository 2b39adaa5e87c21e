"""Constants and functions that tests of several rooms share."""

import os
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.base import create_attention_mask

from mlx_densesteer.model.block import decoder_blocks
from mlx_densesteer.steering.steering import Steering

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
HIDDEN, LAYERS, VOCABULARY = 64, 4, 128


def at_every_layer(vector, strength=1.0, positions="all"):
    """Return the steering at all layers that the vector holds."""
    return Steering(vector, strength, tuple(vector.layers), positions)


def streams(network, tokens, deltas=None, within=lambda position: True):
    """Return the residual stream after every block, worked out by hand: ``h_l + delta_l``."""
    h = network.model.embed_tokens(mx.array([tokens]))
    mask = create_attention_mask(h)
    steered = mx.array([[float(within(p))] for p in range(len(tokens))])
    found = []
    for layer, block in decoder_blocks(network).items():
        h = block(h, mask, None)
        if deltas and layer in deltas:
            h = h + steered * mx.array(deltas[layer])
        found.append(h)
    return found


def checkpoint_cache() -> Path:
    """Where ``scripts/fetch-test-model`` puts the real checkpoint."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "mlx-densesteer"
