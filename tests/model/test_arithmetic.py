"""Every key of config.json that changes what a Qwen2 model computes: as stock transformers, or refused by name.

The list was made by reading Qwen2Config, modeling_qwen2, modeling_rope_utils and masking_utils of transformers
5.24 beside models/qwen2.py, models/rope_utils.py and utils.py of mlx-lm 0.32.
"""

import json
import math
import re
import shutil

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from helpers import ROOT, run_with_torch
from mlx.utils import tree_flatten
from mlx_lm.models.rope_utils import initialize_rope

from mlx_densesteer.cli.doctor import tiny_model
from mlx_densesteer.errors import (
    ConversionError,
    ExportError,
    ModelError,
    UnsupportedModelError,
)
from mlx_densesteer.export.llama import llama_config
from mlx_densesteer.model.config import check_config, read_config
from mlx_densesteer.model.convert import convert
from mlx_densesteer.model.families import empty_network
from mlx_densesteer.model.model import load

ABSENT = object()
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 64,
    "num_hidden_layers": 3, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "vocab_size": 260, "rope_theta": 10000.0,
    "tie_word_embeddings": True, "torch_dtype": "float32", "max_position_embeddings": 64,
}  # fmt: skip


def rope(kind, **numbers):
    return {"rope_scaling": {"rope_type": kind, **numbers}}


LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "factor": 4.0}
WINDOW = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}
HALF = ["full_attention", "sliding_attention", "full_attention"]

HONOURED = {  # the keys of CONFIG to change; "head": the files hold an lm_head of their own ("copy": equal)
    "as it is": {},
    "theta absent": {"rope_theta": ABSENT},
    "theta": {"rope_theta": 500000.0},
    "theta inside": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    "theta inside scaling": {"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 100.0}},
    "empty scaling": {"rope_scaling": {}, "rope_parameters": {"rope_theta": 100.0}},
    "two types": {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 4.0}},
    "traditional": {"rope_traditional": True},
    "linear": rope("linear", factor=4.0),
    "dynamic": rope("dynamic", factor=4.0),
    "llama3": rope("llama3", **LLAMA3, original_max_position_embeddings=32),
    "llama3 without original": rope("llama3", **LLAMA3),
    "yarn": rope("yarn", factor=4.0, original_max_position_embeddings=32),
    "yarn without original": rope("yarn", factor=4.0),
    "yarn, original outside": rope("yarn", factor=4.0, original_max_position_embeddings=1024)
    | {"original_max_position_embeddings": 16},
    "yarn, attention factor": rope("yarn", factor=4.0, attention_factor=1.5),
    "yarn, mscale alone": rope("yarn", factor=4.0, mscale=2.0),
    "yarn, mscale for all": rope("yarn", factor=4.0, mscale_all_dim=2.0),
    "yarn, both": rope("yarn", factor=4.0, mscale=2.0, mscale_all_dim=0.5),
    "yarn, both and the factor": rope(
        "yarn", factor=4.0, mscale=2.0, mscale_all_dim=0.5, attention_factor=1.25
    ),
    "yarn, betas": rope("yarn", factor=8.0, beta_fast=8, beta_slow=2),
    "yarn, no betas": rope("yarn", factor=8.0, beta_fast=None, beta_slow=None),
    "yarn, factor 1": rope("yarn", factor=1.0),
    "partial rotation of 1": {"partial_rotary_factor": 1.0},
    "tied, no head": {"tie_word_embeddings": True},
    "tied, another head": {"head": "own"},
    "tied, the same head": {"head": "copy"},
    "untied": {"tie_word_embeddings": False, "head": "own"},
    "tying absent, a head": {"tie_word_embeddings": ABSENT, "head": "own"},
    "tying absent, the same head": {"tie_word_embeddings": ABSENT, "head": "copy"},
    "window off": WINDOW | {"use_sliding_window": False},
    "window null": WINDOW | {"sliding_window": None},
    "window as wide as the context": WINDOW | {"sliding_window": 64},
    "window from a layer that is not there": WINDOW | {"max_window_layers": 3},
    "window, layers all full": WINDOW | {"layer_types": ["full_attention"] * 3},
    "layer types": {"layer_types": ["full_attention"] * 3},
    "activation absent": {"hidden_act": ABSENT},
    "activation": {"hidden_act": "swish"},
    "epsilon absent": {"rms_norm_eps": ABSENT},
    "epsilon": {"rms_norm_eps": 0.5},
    "context absent": {"max_position_embeddings": ABSENT},
    "head size": {"head_dim": 16},
    "key heads null": {"num_key_value_heads": None},
    "causal": {"is_causal": True},
    "mrope": {"use_mrope": True},
    "biases": {"attention_bias": False},
    "dropout": {"attention_dropout": 0.5},
    "another family's keys": {"logit_scale": 2.0, "attn_logit_softcapping": 1.0, "mlp_bias": True},
}  # fmt: skip
REFUSED = {  # what is refused, and what the message names
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu'.*expected silu"),
    "window": (WINDOW, "sliding_window 16"),
    "window's default": (WINDOW | {"sliding_window": ABSENT, "max_position_embeddings": 8192}, "sliding_window 4096"),
    "window from layer 2 on": (WINDOW | {"max_window_layers": 2}, "sliding_window 16"),
    "layers with a window": (WINDOW | {"layer_types": HALF}, "sliding_window 16"),
    "layers without a window's width": ({"layer_types": HALF}, "sliding_window None"),
    "unknown layers": ({"layer_types": ["linear_attention"] * 3}, "layer_types"),
    "too few layers": ({"layer_types": ["full_attention"]}, "layer_types"),
    "head size": ({"head_dim": 32}, "head_dim 32.*which is 16"),
    "causal": ({"is_causal": False}, "is_causal False"),
    "layers that differ": ({"per_layer_config": {"1": {"head_dim": 8}}}, "per_layer_config"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "partial rotation inside": (rope("linear", factor=2.0, partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
    "longrope": (rope("longrope", **LONG, original_max_position_embeddings=32), "'longrope'.*expected default, linear"),
    "proportional": (rope("proportional", factor=2.0), "'proportional'"),
    "mrope": (rope("mrope", mrope_section=[2, 3, 3]), "'mrope'"),
    "truncate": (rope("yarn", factor=4.0, truncate=False), "truncate of yarn False"),
    "attention factor": (rope("yarn", factor=1.0, attention_factor=1.5), "attention_factor of yarn 1.5"),
    "nested": ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "expected one rotary embedding"),
    "no dictionary": ({"rope_scaling": "linear"}, "rope_parameters 'linear'"),
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised with 'gptq'"),
    "bitsandbytes": ({"quantization_config": {"quant_method": "bitsandbytes"}}, "'bitsandbytes'"),
    "awq of another layout": ({"quantization_config": {"quant_method": "awq", "version": "gemv"}}, "'awq'"),
    "quantised somehow": ({"quantization_config": 4}, "quantised with 4"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("smollm3", {"use_sliding_window": True, "sliding_window": 16}, "sliding_window 16"),
        ("smollm3", WINDOW | {"max_window_layers": 28}, "sliding_window 16"),
        ("qwen3", {"attention_bias": True}, "attention_bias True"),
        ("qwen3", WINDOW, "sliding_window 16"),
        ("mistral", {"sliding_window": 16}, "sliding_window 16"),
        ("mistral", {"max_position_embeddings": 8192}, "sliding_window 4096"),
        ("mistral", {"sliding_window": None, "attention_bias": True}, "attention_bias True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"head_dim": 15}, "heads of an even size"),
        ("llama", {"head_dim": "16"}, "head_dim '16'"),
        ("llama", {"mlp_bias": 1}, "mlp_bias 1"),
        ("llama", rope("longrope", **LONG, original_max_position_embeddings=32), "'longrope'"),
    ],
)
def test_other_families_refuse_by_name(kind, changes, named):
    with pytest.raises(ModelError, match=re.escape(named)):
        check_config(changed(changes) | {"model_type": kind}, "x")


def changed(changes):
    config = {**CONFIG, **{k: v for k, v in changes.items() if k != "head"}}
    return {key: value for key, value in config.items() if value is not ABSENT}


@pytest.fixture(scope="module")
def write(tmp_path_factory, tiny_tokenizer_files):
    """Return a function that writes a tiny random model with some keys changed."""
    base = tiny_model(layers=3, hidden=64, vocabulary=260)
    weights = {name: 2 * array for name, array in tree_flatten(base.parameters())}

    def make(folder, changes, extra=None):
        shutil.copytree(tiny_tokenizer_files, folder)
        arrays = dict(weights)
        embedding = weights["model.embed_tokens.weight"]
        if head := changes.get("head"):
            arrays["lm_head.weight"] = embedding if head == "copy" else embedding[::-1]
        if changes.get("num_key_value_heads", 2) is None:
            for name, array in weights.items():
                if "k_proj" in name or "v_proj" in name:
                    arrays[name] = mx.concatenate([array, array[::-1]])
        mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(changed(changes)))
        return folder

    return make


@pytest.fixture(scope="module")
def models(write, tmp_path_factory):
    folder = tmp_path_factory.mktemp("arithmetic")
    return {name: write(folder / name, changes) for name, changes in HONOURED.items()}


@pytest.fixture(scope="module")
def stock(models, tmp_path_factory):
    """The logits of stock transformers, by name."""
    out = tmp_path_factory.mktemp("stock") / "out.npz"
    folder = next(iter(models.values())).parent
    print(run_with_torch("-I", ROOT / "tests/stock_logits.py", folder, out, timeout=600).stdout)
    with np.load(out) as arrays:
        return dict(arrays)


def logits(folder):
    return np.array(load(folder).network(mx.arange(48)[None])[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", HONOURED)
def test_as_stock_transformers(models, stock, name):
    assert np.abs(logits(models[name]) - stock[name]).max() < 1e-3


@pytest.mark.slow
def test_the_table_would_notice(stock):
    """Most changes move the logits by tens, so that ignoring one would not pass as 1e-3."""
    moved = {name: np.abs(found - stock["as it is"]).max() for name, found in stock.items()}
    assert stock.keys() == HONOURED.keys()
    assert sum(difference > 10 for difference in moved.values()) >= 20


@pytest.mark.parametrize("name", HONOURED)
def test_what_was_read_is_read_alike_again(name):
    once = check_config(changed(HONOURED[name]), "x")
    assert check_config(json.loads(json.dumps(once)), "x") == once


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name, tmp_path):
    changes, message = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps(changed(changes)))
    for action in (lambda: load(tmp_path), lambda: convert(tmp_path, tmp_path / "out")):
        with pytest.raises(UnsupportedModelError, match=message):
            action()


READ = {  # the values that mlx-lm gets
    "tying absent, a head": {"tie_word_embeddings": False},
    "tied, another head": {"tie_word_embeddings": False},
    "tied, the same head": {"tie_word_embeddings": True},
    "theta absent": {"rope_theta": 10000.0, "rope_scaling": None},
    "theta inside scaling": {"rope_theta": 100.0},
    "epsilon absent": {"rms_norm_eps": 1e-6},
    "key heads null": {"num_key_value_heads": 4},
}
YARN = {  # original context, attention factor
    "yarn without original": (64, 1 + 0.1 * math.log(4)),
    "yarn, original outside": (16, 1 + 0.1 * math.log(4)),
    "yarn, attention factor": (64, 1.5),
    "yarn, mscale alone": (64, 1 + 0.1 * math.log(4)),
    "yarn, both": (64, (1 + 0.2 * math.log(4)) / (1 + 0.05 * math.log(4))),
}


@pytest.mark.parametrize("name", [*READ, *YARN])
def test_what_mlx_lm_gets(models, name):
    config = read_config(models[name])
    for key, value in READ.get(name, {}).items():
        assert config[key] == value, key
    if name in YARN:
        scaling = config["rope_scaling"]
        made = initialize_rope(16, 10000.0, False, scaling, 64)
        found = scaling["original_max_position_embeddings"], scaling["attention_factor"]
        assert found == pytest.approx(YARN[name]) and made.mscale == pytest.approx(YARN[name][1])


@pytest.mark.parametrize("name", ["yarn, both", "dynamic", "tying absent, a head", "traditional"])
def test_converted_it_computes_the_same_here_and_in_stock_mlx_lm(models, tmp_path, name):
    expected = logits(models[name])
    folder = convert(models[name], tmp_path / "out", bits=None)
    assert np.array_equal(logits(folder), expected)
    stock = np.array(mlx_lm.load(str(folder))[0](mx.arange(48)[None])[0])
    assert np.abs(stock - expected).max() < 1e-3


def pack(nibbles):
    """Pack columns of 4-bit numbers as AutoAWQ's GEMM layout does: eight a word, in its order."""
    words = np.zeros((nibbles.shape[0], nibbles.shape[1] // 8), np.uint32)
    for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        words |= nibbles[:, column::8].astype(np.uint32) << np.uint32(4 * place)
    return mx.array(words.view(np.int32))


def test_awq_is_read_as_autoawq_writes_it(write, models, tmp_path):
    rng = np.random.default_rng(0)
    plain = mx.load(str(models["as it is"] / "model.safetensors"))
    packed, dense = {}, {}
    for name, array in plain.items():
        stem, _, kind = name.rpartition(".")
        if not stem.endswith("_proj") or kind != "weight":
            packed[name] = dense[name] = array.astype(mx.float16)
            continue
        rows, columns = array.shape[1], array.shape[0]  # AutoAWQ keeps (in, out)
        numbers = rng.integers(0, 16, (rows, columns))
        zeros = rng.integers(0, 16, (rows // 32, columns))
        scales = rng.uniform(0.01, 0.03, zeros.shape).astype(np.float16)
        values = (numbers - zeros.repeat(32, 0)) * scales.repeat(32, 0).astype(np.float32)
        dense[name] = mx.array(values.T).astype(mx.float16)
        packed |= {
            f"{stem}.qweight": pack(numbers),
            f"{stem}.qzeros": pack(zeros),
            f"{stem}.scales": mx.array(scales),
        }
    method = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "version": "gemm",
        "zero_point": True,
    }
    folder = write(tmp_path / "awq", {"quantization_config": method})
    mx.save_safetensors(str(folder / "model.safetensors"), packed, metadata={"format": "pt"})
    network, _ = load(folder)
    for name, module in network.named_modules():
        if name.endswith("_proj"):
            made = mx.dequantize(module.weight, module.scales, module.biases, group_size=32, bits=4)
            assert mx.allclose(made, dense[f"{name}.weight"], atol=2e-3), name
    with pytest.raises(ConversionError, match="is quantised already"):
        convert(tmp_path / "awq", tmp_path / "out")
    with pytest.raises(ExportError, match="is quantised, but not by mlx-lm"):
        llama_config(read_config(tmp_path / "awq"), "x")


DAMAGED = {
    "hidden_size": ("64", [64], 64.0, 0, -64, True, None, ABSENT, 2**31, 10**400, {}),
    "num_hidden_layers": ([3], "3", 10**9, ABSENT),
    "num_attention_heads": ("\x1b[31mred\x1b]0;t\x07", 0, 128, 64),
    "num_key_value_heads": (3, 0, "2", 8),
    "intermediate_size": (None, 1e400),
    "vocab_size": ("260", -1),
    "max_position_embeddings": ("64", 0, None),
    "rms_norm_eps": ("1e-6", None, -1.0, float("nan"), {"__float__": "Infinity"}),
    "rope_theta": ("10000", None, 0, -1, float("inf"), [1]),
    "tie_word_embeddings": ("yes", 1, None),
    "use_sliding_window": ("yes", 1),
    "architectures": (10**1000, {}, [1], True),
    "eos_token_id": ("2", [1.5], {}, [[1]], True, 260, -1, [1, 2**64]),
    "torch_dtype": (5, ["float32"]),
    "quantization": (
        "x",
        {"bits": 4},
        {},
        False,
        {"bits": "4", "group_size": 64},
        {"bits": 4, "group_size": 0},
    ),
}
ROPES = (
    rope("linear"), rope("linear", factor="4"), rope("linear", factor=0), rope("linear", factor=-1),
    rope("yarn"), rope("yarn", factor=4.0, beta_fast="32"), rope("yarn", factor=4.0, mscale="1", mscale_all_dim=1),
    rope("yarn", factor=4.0, original_max_position_embeddings="32"), rope("llama3", factor=4.0),
    rope("yarn", factor=float("nan")), rope("yarn", factor=True), rope("dynamic"),
)  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [{key: value} for key, values in DAMAGED.items() for value in values] + list(ROPES),
    ids=lambda changes: (
        re.sub(" object at \\w+", "", str(changes))[:50].encode("unicode_escape").decode()
    ),
)
def test_a_value_of_a_wrong_kind_is_named(changes, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(changed(changes)))
    (key,) = changes
    named = "rotary embedding" if key in ("rope_scaling", "rope_theta") else key
    named += r"|config\.json: is not JSON that can be read"  # a number too large, or not finite
    with pytest.raises(ModelError, match=named) as raised:
        load(tmp_path)
    assert len(str(raised.value)) < 400 + len(str(tmp_path)) and "\x1b" not in str(raised.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff",
        b'"text"',
        b"1" + b"0" * 5000,
        b"null",
    ],
)
def test_a_config_that_is_none(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        load(tmp_path)


def test_a_family_of_any_name():
    config = CONFIG | {"model_type": "x" * 1000}
    with pytest.raises(ModelError, match="architectures 5, expected names"):
        check_config(config | {"architectures": 5}, "x")
    with pytest.raises(UnsupportedModelError, match=r"x: is a x{60} model, which mlx-lm does not"):
        empty_network(config, "x")
