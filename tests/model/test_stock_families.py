"""Families against stock transformers: the same folder, the same logits, steered and not."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from helpers import ROOT, run_with_torch

from mlx_densesteer.model.block import make_cache, patch
from mlx_densesteer.model.config import COMPARED, RULES, read_config
from mlx_densesteer.model.families import unlike
from mlx_densesteer.model.model import open_network
from mlx_densesteer.steering.steering import Steering
from mlx_densesteer.steering.vector import SteeringVector, VectorMeta

pytestmark = pytest.mark.slow

HIDDEN, LAYER = 64, 1
SIZES = {
    "hidden_size": HIDDEN, "num_hidden_layers": 4, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 260, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES = {
    "qwen2": {},
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None, "head_dim": 32},
    "qwen3": {"head_dim": 32},
    "smollm3": {},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 32},
    "qwen3_moe": EXPERTS | {"head_dim": 16},
    "phi3": {},
    "gemma3_text": WINDOWS | {"head_dim": 16, "query_pre_attn_scalar": 16},
    "granite": {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 3.0, "attention_multiplier": 0.2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": {},
    "olmo3": WINDOWS,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "cohere": {},
    "cohere2": WINDOWS,
    "glm4": {"head_dim": 16},
    "helium": {"head_dim": 16},
    "ernie4_5": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
VARIANTS = {  # of the families with rules: what differs from SIZES
    "llama, no biases": {},
    "llama, wide heads": {"head_dim": 32},
    "llama, stretched": {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, as many key heads": {"num_key_value_heads": 4},
    "mistral, a window as wide as the context": {"sliding_window": 64},
    "mistral, epsilon": {"rms_norm_eps": 0.1, "sliding_window": None},
    "qwen3, tied": {"tie_word_embeddings": True},
    "qwen3, stretched": {"rope_parameters": YARN | {"rope_theta": 500.0}},
    "qwen3, the usual heads": {"head_dim": 16},
    "smollm3, every second layer": {"no_rope_layer_interval": 2},
    "smollm3, layers by name": {"no_rope_layers": [1, 0, 0, 1]},
    "smollm3, biases": {"attention_bias": True, "mlp_bias": True},
}  # fmt: skip
CASES = {name: (name.partition(",")[0], keys) for name, keys in (FAMILIES | VARIANTS).items()}
TOKENS = [(7 * i + 3) % 250 for i in range(24)]


@pytest.fixture(scope="module")
def vector():
    return np.random.default_rng(3).normal(size=HIDDEN).astype(np.float32)


@pytest.fixture(scope="module")
def folders(vector, tiny_tokenizer_files, tmp_path_factory):
    out = tmp_path_factory.mktemp("families")
    settings = {
        "tokens": TOKENS, "layer": LAYER, "vector": vector.tolist(),
        "models": {name: (kind, SIZES | keys) for name, (kind, keys) in CASES.items()},
    }  # fmt: skip
    (out / "settings.json").write_text(json.dumps(settings))
    done = run_with_torch(
        "-I", ROOT / "tests/stock_families.py", out, out / "settings.json", timeout=600
    )
    print(done.stdout)
    for name in CASES:
        for file in tiny_tokenizer_files.iterdir():
            if file.name not in ("config.json", "generation_config.json") and (out / name).is_dir():
                shutil.copy(file, out / name / file.name)
    return out


@pytest.mark.parametrize("name", CASES)
def test_as_stock_transformers(folders, vector, name):
    assert (folders / name / "logits.npz").is_file(), "transformers did not make it"
    with np.load(folders / name / "logits.npz") as found:
        plain, steered = found["plain"], found["steered"]
    assert unlike(read_config(folders / name)) is None
    network, _ = open_network(folders / name)
    patch(network)
    meta = VectorMeta(model="tiny", hidden_size=HIDDEN, layer_count=4)
    steering = Steering(SteeringVector({LAYER: vector}, meta), 1.0, (LAYER,))
    size = float(np.abs(plain).max())
    for expected, setting in ((plain, None), (steered, steering)):
        got = np.array(network(mx.array([TOKENS]), make_cache(network, setting))[0])
        assert np.abs(got - expected).max() < 1e-3 * max(size, 1.0)
    assert np.abs(steered - plain).max() > 0.02 * size


def test_every_family_that_is_called_compared_is():
    assert COMPARED | set(RULES) == set(FAMILIES)
