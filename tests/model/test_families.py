"""Every kind of block that can be steered: a tiny random model of each of mlx-lm's classes."""

import dataclasses
import importlib
import io
import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from helpers import ROOT
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import KVCache

from mlx_densesteer import generate, generate_batch, load
from mlx_densesteer.errors import ModelError, SteeringError, UnsupportedModelError
from mlx_densesteer.export.function import steered_step
from mlx_densesteer.model.block import SteeredBlock, make_cache, patch, unpatch
from mlx_densesteer.model.cache import SteeredBatchKVCache, token_bytes
from mlx_densesteer.model.config import COMPARED, RULES, check_config
from mlx_densesteer.model.families import decoder_blocks, empty_network, head_of, is_plain, unlike
from mlx_densesteer.model.gradient import response_log_likelihood
from mlx_densesteer.model.likelihood import log_likelihoods
from mlx_densesteer.model.prefix import Chunk, Prefix
from mlx_densesteer.model.residual import residual_norms
from mlx_densesteer.steering.steering import Steering
from mlx_densesteer.steering.vector import SteeringVector, VectorMeta

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "rms_norm_eps": 1e-5, "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5, "norm_epsilon": 1e-5, "norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 128,
    "tie_word_embeddings": True, "rope_scaling": None, "attention_bias": False, "mlp_bias": False, "use_bias": False,
    "sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "num_local_experts": 4,
    "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
    "attention_multiplier": 0.3, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 2.0,
    "logit_scale": 0.5, "use_qk_norm": False, "n_shared_experts": 1, "n_routed_experts": 4, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.0, "kv_lora_rank": 8, "q_lora_rank": 8,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "moe_layer_freq": 1,
    "scale_emb": 2.0, "dim_model_base": 16, "scale_depth": 1.4,
}  # fmt: skip
# mlx-lm's module: whether its block is Qwen2's, and what its arguments need beside SIZES
FAMILIES = {
    "qwen2": (True, {}),
    "llama": (True, {}),  # Mistral, R1-Distill-Llama and SmolLM2 too; here with windows
    "smollm3": (True, {"layer_types": None}),
    "qwen3": (True, {}),
    "qwen2_moe": (True, {}),
    "qwen3_moe": (True, {}),
    "phi3": (True, {}),
    "gemma": (True, {}),
    "glm": (True, {}),
    "helium": (True, {}),
    "ernie4_5": (True, {}),
    "hunyuan_v1_dense": (True, {}),
    "internlm3": (True, {}),
    "mimo": (True, {"num_nextn_predict_layers": 0}),
    "deepseek": (True, {}),
    "deepseek_v3": (True, {}),  # keys and values of other widths
    "gemma3_text": (False, {}),
    "granite": (False, {}),
    "granitemoe": (False, {}),
    "olmo2": (False, {}),
    "olmo3": (False, {}),
    "olmoe": (False, {}),
    "cohere": (False, {}),
    "cohere2": (False, {}),
    "glm4": (False, {"partial_rotary_factor": 0.5}),
    "mixtral": (False, {}),
    "phimoe": (False, {}),
    "minicpm": (False, {}),
    "apertus": (False, {"post_norm": False, "qk_norm": True}),
}
PROMPT = [(7 * i + 3) % 64 for i in range(21)]  # longer than the windows
LAYERS = (1, 2)
EXACT = 2e-5  # of the largest logit, in float32: products of other shapes


def tiny_family(name: str, **more) -> object:
    module = importlib.import_module(f"mlx_lm.models.{name}")
    fields = {field.name for field in dataclasses.fields(module.ModelArgs)}
    given = {key: value for key, value in SIZES.items() if key in fields} | {"model_type": name}
    given |= {key: value for key, value in more.items() if value is not None}
    given = {key: value for key, value in given.items() if key not in more or more[key] is not None}
    mx.random.seed(len(name))
    network = module.Model(module.ModelArgs.from_dict(given))

    def drawn(array: mx.array) -> mx.array:
        if not mx.issubdtype(array.dtype, mx.floating):
            return array
        scale = 0.2 if array.ndim > 1 else 0.1
        return scale * mx.random.normal(array.shape) + (array.ndim == 1)

    network.update(tree_map(drawn, network.parameters()))
    mx.eval(network.parameters())
    return network


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param, tiny_family(request.param, **FAMILIES[request.param][1])


@pytest.fixture
def network(family):
    return family[1]


@pytest.fixture
def steering():
    rng = np.random.default_rng(5)
    vectors = {layer: rng.normal(size=32).astype(np.float32) for layer in LAYERS}
    vector = SteeringVector(vectors, VectorMeta(model="tiny", hidden_size=32, layer_count=4))
    return Steering(vector, 0.5, LAYERS)


def outputs(network, tokens) -> list[mx.array]:
    """Return every block's output in a stock network's own pass over the tokens."""
    found, layers = [], network.model.layers

    class Seen:
        def __init__(self, block):
            self._block = block

        def __getattr__(self, name):
            return getattr(self._block, name)

        def __call__(self, *given, **named):
            found.append(self._block(*given, **named))
            return found[-1]

    stock = list(layers)
    try:
        layers[:] = [Seen(block) for block in stock]
        network(tokens)
    finally:
        layers[:] = stock
    mx.eval(found)
    return found


def close(a, b, scale=None) -> bool:
    largest = float(mx.abs(b).max()) if scale is None else scale
    return float(mx.abs(a - b).max()) <= EXACT * max(largest, 1.0)


def in_steps(network, cache, tokens, first=13):
    """Return the logits of a prompt read at once, and of one token after the other."""
    parts = [tokens[:first], *[[token] for token in tokens[first:]]]
    return mx.concatenate([network(mx.array([part]), cache) for part in parts], axis=1)


def test_the_block_is_of_the_kind_that_the_table_says(family):
    name, network = family
    kinds = {is_plain(type(block)) for block in decoder_blocks(network).values()}
    assert kinds == {FAMILIES[name][0]}


def test_patching_changes_no_bit_and_is_undone(network):
    tokens = mx.array([PROMPT])
    classes = [type(part) for part in (network.model, *network.model.layers)]
    expected = network(tokens)
    patch(patch(network))
    assert all(isinstance(block, SteeredBlock) for block in network.model.layers)
    assert mx.array_equal(network(tokens), expected)
    assert mx.array_equal(network(tokens, make_cache(network)), expected)
    unpatch(network)
    assert [type(part) for part in (network.model, *network.model.layers)] == classes


def test_strength_zero_decodes_as_stock(network, steering):
    """Bit for bit, with caches that keep everything; mlx-lm's rotating caches sum in another order."""
    plain = [KVCache() for _ in decoder_blocks(network)]
    expected = in_steps(network, plain, PROMPT)
    own = network.make_cache() if hasattr(network, "make_cache") else plain
    rotating = in_steps(network, own, PROMPT) if own is not plain else expected
    got = in_steps(
        patch(network), make_cache(network, dataclasses.replace(steering, strength=0.0)), PROMPT
    )
    assert mx.array_equal(got, expected)
    assert close(got, rotating)


def test_the_vector_is_added_to_the_output_of_its_block(network, steering):
    """Block by block against the same network, in which the block's output is changed by hand."""
    tokens = mx.array([PROMPT])
    unsteered = outputs(network, tokens)
    stock, first = list(network.model.layers), min(LAYERS)

    class Moved:
        def __init__(self, layer):
            self._block, self._delta = stock[layer], mx.array(steering.delta(layer))

        def __getattr__(self, name):
            return getattr(self._block, name)

        def __call__(self, *given, **named):
            return self._block(*given, **named) + self._delta

    for layer in LAYERS:
        network.model.layers[layer] = Moved(layer)
    expected = network(tokens)
    network.model.layers[:] = stock
    seen = {}
    caches = make_cache(network, steering)
    for layer, cache in enumerate(caches):
        cache.record = lambda _, h, layer=layer: seen.update({layer: h})
    got = network(tokens, caches)
    assert close(got, expected)
    assert float(mx.abs(got - network(tokens)).max()) > 0.05  # it did something
    for layer in range(first + 1):  # up to the lowest steered block nothing changes
        assert mx.array_equal(seen[layer], unsteered[layer])
    assert not mx.array_equal(seen[first + 1], unsteered[first + 1])


@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
def test_cached_is_full_and_a_row_of_a_batch_is_alone(network, steering, positions):
    steering = dataclasses.replace(steering, positions=positions)
    other = dataclasses.replace(steering, strength=-1.0)
    patch(network)
    alone = in_steps(network, make_cache(network, steering, prompt=range(13)), PROMPT)
    whole = network(mx.array([PROMPT]), make_cache(network, steering, prompt=range(13)))
    assert close(alone, whole)
    rows = [make_cache(network, one, prompt=range(13)) for one in (steering, None, other)]
    for row, cache in enumerate(rows):
        network(mx.array([PROMPT[row:13]]), cache)  # of different lengths
    batch = [SteeredBatchKVCache.merge(layer) for layer in zip(*rows, strict=True)]
    for at in range(13, len(PROMPT)):
        logits = network(mx.array([[PROMPT[at]]] * 3), batch)
        assert close(logits[0], alone[0, at : at + 1])


def test_a_new_strength_computes_the_layers_above_only(network, steering):
    chunks = [Chunk(tuple(PROMPT[:9])), Chunk(tuple(PROMPT[9:]))]
    prefix = Prefix(network, keep_bytes=2**20)
    prefix.fill(chunks, steering)
    stronger = dataclasses.replace(steering, strength=1.5)
    work = prefix.fill(chunks, stronger)
    assert work.block_tokens == len(PROMPT) * (4 - 1 - min(LAYERS))
    fresh = Prefix(network)
    fresh.fill(chunks, stronger)
    for one, other in zip(prefix.caches, fresh.caches, strict=True):
        assert mx.array_equal(*(cache.keys[..., : cache.offset, :] for cache in (one, other)))
        assert mx.array_equal(*(cache.values[..., : cache.offset, :] for cache in (one, other)))


def test_a_steered_layer_costs_nothing_in_a_plain_block_and_one_operation_elsewhere(
    family, steering
):
    name, network = family
    patch(network)
    counts = []
    for one in (None, steering):
        graph = io.StringIO()
        mx.export_to_dot(graph, network(mx.array([[1]]), make_cache(network, one)))
        counts.append(graph.getvalue().count("shape=rectangle"))
    assert counts[1] - counts[0] == (0 if FAMILIES[name][0] else len(LAYERS))


QUANTISED = {"head_dim": 32}  # the width of a group


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])
def test_keys_and_values_can_be_quantised(name, steering):
    network = tiny_family(name, **QUANTISED)
    quantised, whole = Prefix(network, kv_bits=8), Prefix(network)
    logits = []
    for prefix in (quantised, whole):
        prefix.fill([Chunk(tuple(PROMPT[:-1]))], steering)
        logits.append(network(mx.array([PROMPT[-1:]]), prefix.caches)[0, -1])
    moved = float(mx.abs(network(mx.array([PROMPT]))[0, -1] - logits[1]).max())
    assert 0 < float(mx.abs(logits[0] - logits[1]).max()) < 0.4 * moved


def test_keys_and_values_that_mlx_lm_cannot_quantise_are_refused():
    wide = {"kv_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32}
    with pytest.raises(SteeringError, match="cannot quantise the keys and values of a deepseek_v3"):
        Prefix(tiny_family("deepseek_v3", **wide), kv_bits=8)


def test_the_head_is_what_the_network_does_after_its_blocks(network):
    tokens = mx.array([PROMPT])
    expected = network(tokens)
    assert mx.array_equal(head_of(network)(network.model(tokens)), expected)
    assert mx.array_equal(head_of(patch(network))(network.model(tokens)), expected)


def test_readings_agree_with_the_network(network, steering):
    """Norms and likelihoods read the network's own pass."""
    tokens, prompt = PROMPT, PROMPT[:9]
    unsteered = outputs(network, mx.array([tokens]))
    norms = residual_norms(network, tokens, range(4))
    for layer, h in enumerate(unsteered):
        assert norms[layer] == pytest.approx(
            float(mx.linalg.norm(h, axis=-1)[0, 1:].mean()), rel=1e-5
        )
    ((_, score, _),) = log_likelihoods(network, [prompt], [tokens[9:]], steering=steering)
    assert score == pytest.approx(
        _steered_likelihood(network, prompt, tokens[9:], steering), rel=1e-4
    )


def _steered_likelihood(network, prompt, response, steering):
    caches = make_cache(network, steering, prompt=prompt)
    logits = network(mx.array([[*prompt, *response]]), caches)[0, len(prompt) - 1 : -1]
    scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return float(mx.take_along_axis(scores, mx.array(response)[:, None], axis=-1).sum())


@pytest.mark.parametrize("positions", ["all", "generated"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_likelihood_has_its_gradient(network, steering, positions, recompute):
    prompt, response = PROMPT[:9], PROMPT[9:]
    steering = dataclasses.replace(steering, positions=positions)
    deltas = {layer: mx.array(steering.delta(layer)) for layer in LAYERS}

    def value(deltas):
        return response_log_likelihood(
            network, prompt, response, deltas, positions=positions, recompute=recompute
        )

    expected = _steered_likelihood(network, prompt, response, steering)
    assert float(value(deltas)) == pytest.approx(expected, rel=1e-4)
    slope = mx.grad(value)(deltas)[LAYERS[0]]
    step = 1e-2 * slope / mx.linalg.norm(slope)
    up, down = (value({**deltas, LAYERS[0]: deltas[LAYERS[0]] + s * step}) for s in (1, -1))
    assert float(up - down) == pytest.approx(2e-2 * float(mx.linalg.norm(slope)), rel=0.05)


def test_the_traced_step_computes_the_same(network, steering):
    patch(network)
    expected = network(mx.array([PROMPT]), make_cache(network, steering))[:, -1]
    vectors = {layer: mx.array(steering.vector.layers[layer])[None, None] for layer in LAYERS}
    shapes = [
        shape for cache in _filled(network) for shape in (cache.keys.shape, cache.values.shape)
    ]
    empty = [mx.zeros((1, heads, 32, width)) for _, heads, _, width in shapes]
    step = steered_step(network, vectors, 32)
    got = step(mx.array([PROMPT]), mx.array(0), mx.array(0.5), *empty)[0]
    assert close(got, expected)


def _filled(network):
    caches = make_cache(network)
    mx.eval(network(mx.array([[1]]), caches))
    return caches


def test_the_bytes_of_a_token(network):
    patch(network)
    held = sum(a[..., :1, :].nbytes for c in _filled(network) for a in (c.keys, c.values))
    assert token_bytes(network) == held


def test_the_documentation_names_every_family():
    text = (ROOT / "docs/models.md").read_text("utf-8")
    for name in {*FAMILIES, *COMPARED, *RULES}:
        assert f"`{name}`" in text, name


UNLIKE = [  # what mlx-lm computes otherwise than transformers: a reviewer compared each, as test_stock_families does
    ("phi3", {"sliding_window": 8}, "sliding_window"),
    ("mixtral", {"sliding_window": 8}, "sliding_window"),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window"),
    ("olmoe", {"clip_qkv": 0.1}, "clip_qkv"),
    ("granite", {"hidden_act": "gelu"}, "hidden_act"),
    ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]}, "layer_types"),
    ("gemma3_text", {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
    ("gemma3_text", {"final_logit_softcapping": 2.0}, "final_logit_softcapping"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma3_text", {"hidden_activation": "silu"}, "hidden_activation"),
    ("gemma3_text", {"layer_types": 5}, "layer_types"),
    ("phi3", {"rope_scaling": {"rope_type": "longrope"}}, "a stretched context"),
    ("phimoe", {}, "was not compared"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "named"), UNLIKE)
def test_what_was_not_compared_is_told(kind, changes, named):
    base = {
        key: SIZES[key]
        for key in ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings")
    }
    config = check_config(base | {"model_type": kind} | changes, "x")
    assert named in unlike(config)
    if "compared" not in named:
        neutral = {
            "hidden_dropout": 0.1,
            "bos_token_id": 1,
            "use_cache": True,
            "sliding_window": None,
        }
        assert unlike(check_config(base | {"model_type": kind} | neutral, "x")) is None


@pytest.mark.parametrize("name", ["cohere2", "mixtral", "qwen2_moe", "gemma"])
def test_a_whole_model_generates(name, tiny_tokenizer_files, tmp_path, steering):
    """With a configuration of which mlx-lm's class drops the length of the context."""
    folder = shutil.copytree(tiny_tokenizer_files, tmp_path / name)
    more = {"vocab_size": 300, "query_pre_attn_scalar": 8}
    network = tiny_family(name, **more)
    config = {key: value for key, value in (SIZES | more).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": name}))
    weights = dict(tree_flatten(network.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    model = load(folder)
    assert model.context == SIZES["max_position_embeddings"]
    plain, steered = (generate(model, "hi", steering=one, max_tokens=6) for one in (None, steering))
    assert len(plain.token_ids) == len(steered.token_ids) == 6
    ((_, row),) = generate_batch(model, ["hi"], steering=steering, max_tokens=6)
    assert row.token_ids == steered.token_ids


REFUSED = {
    "mamba2": "no single stack",
    "qwen3_next": "keeps a ArraysCache",
    "lfm2": "has no norm",
    "gpt2": "no single stack",
    "nanbeige": "keeps 8 caches for 4 blocks",
    "gemma2": "cannot compute rows of different lengths",  # a fault of mlx-lm 0.32.2
    "falcon_h1": "has no norm",
    "bert": "which mlx-lm does not have",
    "cache": "which mlx-lm does not have",  # a module, but no model
    "olmo": "which mlx-lm does not have",  # its module ends the process
    "../x": "which mlx-lm does not have",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_steered_says_why(name):
    config = SIZES | {"model_type": name} | {
        "state_size": 4, "conv_kernel": 4, "num_heads": 4, "n_groups": 1, "expand": 1, "chunk_size": 8,
        "time_step_limit": [0.0, 1.0], "time_step_rank": 4, "use_conv_bias": True, "conv_bias": False,
        "conv_L_cache": 3, "block_dim": 32, "block_ff_dim": 32, "block_multiple_of": 8, "layer_types": ["conv"] * 4,
        "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False, "full_attn_idxs": [1],
        "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "linear_conv_kernel_dim": 3, "full_attention_interval": 2, "partial_rotary_factor": 0.5,
        "num_loops": 2, "n_ctx": 64, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "num_hidden_layers": 4,
    }  # fmt: skip
    with pytest.raises((UnsupportedModelError, ModelError), match=REFUSED[name]):
        empty_network(config, "x")
