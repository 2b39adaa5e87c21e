"""What many tests share: a tiny random network, the demo model, the real checkpoint; and the two tiers."""

import os
import signal
import sys
from pathlib import Path

# Newer GPUs round float32 products to TF32 unless told not to; exactness is what is tested here.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

# pytest-xdist gives its workers the size of a terminal that the chat's tests do not have.
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)

# A job in a shell's background ignores Ctrl-C, and all its children would.
signal.signal(signal.SIGINT, signal.default_int_handler)

import mlx.core as mx
import numpy as np
import pytest
from helpers import HIDDEN, LAYERS, VOCABULARY, checkpoint_cache

pytest_plugins = ["metal_like", "pytester"]

mx.default_stream(mx.default_device())  # a function file runs on the thread that has the first one


from mlx_densesteer.model.model import Model, load
from mlx_densesteer.steering.vector import SteeringVector, VectorMeta


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the slow tests too (CI)")


def pytest_collection_modifyitems(config, items):
    """Leave the slow tests out, unless all are asked for or the tests are named (path, -k, -m).

    Of all, the files with slow ones come first: the others then fill what time two workers have left.
    """
    if config.option.all:
        marks = ("slow", "checkpoint")
        slow = {i.path for i in items if any(map(i.get_closest_marker, marks))}
        items.sort(key=lambda item: item.path not in slow)
    named = config.args_source is pytest.Config.ArgsSource.ARGS
    if config.option.all or named or config.option.keyword or config.option.markexpr:
        return
    slow = [i for i in items if i.get_closest_marker("slow") or i.get_closest_marker("checkpoint")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in set(slow)]


@pytest.fixture
def tiny():
    """A random float32 Qwen2 *network* with stock blocks and no tokenizer, new for every test."""
    from mlx_densesteer.cli.doctor import tiny_model

    return tiny_model(layers=LAYERS, hidden=HIDDEN, vocabulary=VOCABULARY)


@pytest.fixture(scope="session")
def demo_model() -> Model:
    """The embedded demo model, one for all tests: leave its weights and its tokenizer as they are."""
    model = load("demo")
    mx.eval(model.network.parameters())  # so that every thread may read them
    return model


@pytest.fixture
def nothing_wired(monkeypatch):
    """No claim on wired memory yet: servers and answers of other tests may still hold theirs."""
    from mlx_densesteer.generation import wired

    monkeypatch.setattr(wired, "_claims", set())


@pytest.fixture
def make_vector():
    """Return a function that makes a random vector for the tiny model."""

    def make(layers=range(LAYERS), *, seed=0, size=1.0, hidden=HIDDEN, layer_count=LAYERS):
        rng = np.random.default_rng(seed)
        arrays = {layer: size * rng.normal(size=hidden).astype(np.float32) for layer in layers}
        meta = VectorMeta(model="Tiny-Qwen2", hidden_size=hidden, layer_count=layer_count)
        return SteeringVector(arrays, meta)

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer_files(tmp_path_factory) -> Path:
    """A folder with a byte-level tokenizer and Qwen's chat layout, 300 entries or so."""
    import json

    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory, tiny_tokenizer_files) -> Path:
    """A tiny random Qwen2 as a Hugging Face folder in bfloat16."""
    import json
    import shutil

    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlx_densesteer.cli.doctor import tiny_model

    folder = tmp_path_factory.mktemp("hf") / "Tiny-Qwen2"
    shutil.copytree(tiny_tokenizer_files, folder)
    model = tiny_model(layers=LAYERS, hidden=HIDDEN, vocabulary=260)
    weights = {name: array.astype(mx.bfloat16) for name, array in tree_flatten(model.parameters())}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS, "intermediate_size": 2 * HIDDEN, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "vocab_size": 260, "rope_theta": 1000000.0,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "eos_token_id": 258,
        "max_position_embeddings": 512,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def thinking_folder(tmp_path_factory) -> Path:
    """A model that thinks (``thinking.py``), with a template like Qwen3's, and its vector ``out.npz``."""
    from thinking import make_folder

    return make_folder(tmp_path_factory.mktemp("thinking") / "Clockwork", "Qwen3")


@pytest.fixture
def unsynced(monkeypatch):
    """Give files of gigabytes their names before they are on the disk; small ones test that they are not."""
    monkeypatch.setattr("mlx_densesteer.files._sync", lambda path: None)


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The real Qwen2.5-Coder-0.5B-Instruct as an MLX folder in float32."""
    folder = checkpoint_cache() / "Qwen2.5-Coder-0.5B-Instruct-float32"
    if not folder.is_dir():
        message = f"no real checkpoint in {folder}: run scripts/fetch-test-model"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def real_model(checkpoint) -> Model:
    """The real checkpoint, loaded once."""
    return load(checkpoint)


def pytest_report_header(config) -> list[str]:
    lines = ["tier: all" if config.option.all else "tier: quick (--all: everything)"]
    if sys.platform == "linux":
        from mlx_densesteer.cli.doctor import openblas_core

        core = openblas_core()
        slow = "NOT loaded, float32 will be slow (scripts/test loads it)"
        lines.append(f"OpenBLAS: {slow if core is None else f'loaded, with the code for {core}'}")
    return lines
