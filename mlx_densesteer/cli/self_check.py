"""Does a steered block do what it says, with the mlx and mlx-lm that are installed?"""

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.qwen2 import Model, ModelArgs

from ..model.block import decoder_blocks, make_cache, unpatch
from ..steering.steering import Steering
from ..steering.vector import SteeringVector, VectorMeta


def tiny_model(*, layers: int = 4, hidden: int = 64, vocabulary: int = 128, seed: int = 0) -> Model:
    """Return a random Qwen2 model of a few thousand float32 weights."""
    mx.random.seed(seed)
    model = Model(ModelArgs(
        model_type="qwen2", hidden_size=hidden, num_hidden_layers=layers,
        intermediate_size=2 * hidden, num_attention_heads=4, num_key_value_heads=2,
        rms_norm_eps=1e-6, vocab_size=vocabulary, tie_word_embeddings=True,
    ))  # fmt: skip
    mx.eval(model.parameters())
    return model.eval()


def largest_error() -> float:
    """Return the largest difference between steered logits and the sum made by hand.

    Two layers are steered, the prompt is read in two chunks; the model gets its stock
    blocks back.
    """
    model = tiny_model()
    tokens = mx.arange(12)[None]
    rng = np.random.default_rng(0)
    arrays = {layer: rng.normal(size=64).astype(np.float32) for layer in (1, 2)}
    vector = SteeringVector(arrays, VectorMeta(model="tiny", hidden_size=64, layer_count=4))
    cache = make_cache(model, Steering(vector, 2.0, (1, 2)))
    steered = mx.concatenate([model(tokens[:, :7], cache), model(tokens[:, 7:], cache)], axis=1)
    unpatch(model)
    h = model.model.embed_tokens(tokens)
    mask = create_attention_mask(h)
    for layer, block in decoder_blocks(model).items():
        h = block(h, mask, None)
        if layer in arrays:
            h = h + 2.0 * mx.array(arrays[layer])
    expected = model.model.embed_tokens.as_linear(model.model.norm(h))
    return float(mx.abs(steered - expected).max())
