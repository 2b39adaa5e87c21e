"""What this package relies on inside mlx-lm. Fails when an upgrade changes it.

`model/block.py` repeats the arithmetic of mlx-lm's block, `model/cache.py` overrides a few methods of its
caches, and `generation/` drives its loops. If a hash here no longer matches, read the new source, see
whether what is named beside it is still right, run the suite, and add the hash.
"""

import hashlib
import inspect
import io
import sys
import textwrap
import tokenize

import pytest
from mlx_lm import generate as _  # noqa: F401  (the name mlx_lm.generate is a function)
from mlx_lm import sample_utils, utils
from mlx_lm.models import base, cache, qwen2

generate = sys.modules["mlx_lm.generate"]


def source_hash(function) -> str:
    """Hash the code without comments, docstrings and layout; the same under every Python."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    text = textwrap.dedent(inspect.getsource(function))
    tokens, begins = [], True
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in layout:
            begins = True
        elif not (begins and token.type == tokenize.STRING):
            tokens.append(token.string)
            begins = False
    return hashlib.sha256(" ".join(tokens).encode()).hexdigest()[:12]


BLOCK, CACHE = "model/block.py", "model/cache.py"
STREAM, BATCH, LOAD = "generation/stream.py", "generation/batch.py", "model/model.py"
WATCHED = {  # mlx-lm 0.32.2: what, known hashes, where to look here
    qwen2.TransformerBlock: {
        "__call__": (["cdea09b459b8"], BLOCK),
        "__init__": (["d1fdaf232dd8"], BLOCK),
    },
    qwen2.Attention: {"__call__": (["db53a96997bb"], BLOCK)},
    qwen2.Qwen2Model: {"__call__": (["b09212e83dd7"], f"{BLOCK}, distributed/loading.py")},
    base: {"create_attention_mask": (["c1c3c8c31632"], f"{CACHE}, export/function.py")},
    cache: {"make_prompt_cache": (["d6264c257656"], BLOCK)},
    cache.KVCache: {
        "update_and_fetch": (["436cef10d959"], CACHE),
        "to_quantized": (["dac539e005ae"], CACHE),
        "trim": (["d1df6d2740a7"], "model/prefix.py"),
        "make_mask": (["3f4c061f8269"], f"{CACHE}: windows"),
    },
    cache.QuantizedKVCache: {
        "update_and_fetch": (["2b15737b1f32"], CACHE),
        "trim": (["d1df6d2740a7"], "model/prefix.py"),
    },
    cache.BatchKVCache: {
        "__init__": (["5a91e7cde9ea"], CACHE),
        "update_and_fetch": (["b2b599bb2aad"], CACHE),
        "prepare": (["bf2e4099b679"], CACHE),
        "finalize": (["c98d8dbc9898"], CACHE),
        "trim": (["e3bc3b3f4429"], CACHE),
        "merge": (["af9b3d0be41d"], CACHE),
        "filter": (["3dfafc288d85"], CACHE),
        "extend": (["c058dff84576"], CACHE),
        "extract": (["b5ee17b4bce1"], CACHE),
    },
    generate: {
        "generate_step": (["049e21244e22"], STREAM),
        "speculative_generate_step": (["2039bced00bd"], STREAM),
        "_merge_caches": (["0f974a9d7e42"], CACHE),
        "_extend_cache": (["bb6e8a3e2195"], CACHE),
    },
    generate.PromptProcessingBatch: {
        "prompt": (["bac97090f0e0"], BATCH),
        "generate": (["97db1a7149ba"], BATCH),
        "split": (["bbe8c72c6dab"], BATCH),
    },
    generate.GenerationBatch: {
        "_step": (["f7e9a2bc9fb9"], BATCH),
        "next": (["8e324e49bd40"], BATCH),
        "filter": (["d15132b6d0fe"], BATCH),
        "extend": (["6501469f1dc7"], BATCH),
        "extract_cache": (["3657020ee7b6"], BATCH),
    },
    generate.BatchGenerator: {
        "__init__": (["2b6c53336cff"], BATCH),
        "insert_segments": (["f8e966188ad0"], BATCH),
        "_next": (["c491d4d03cd8"], BATCH),
        "remove": (["5faf1deb1550"], BATCH),
        "extract_cache": (["70be74f285fd"], BATCH),
        "close": (["dae8b39fe82f"], BATCH),
    },
    utils: {
        "load_model": (["116103b5ecf2"], LOAD),
        "load_tokenizer": (["e1c59a2a43d9"], LOAD),
        "load_adapters": (["758d4bc91d55"], LOAD),
        "_get_classes": (["9ff7fadd53cd"], "model/families.py"),
    },
    sample_utils: {
        "make_sampler": (["254c45c99533"], "generation/sampling.py"),
        "apply_top_p": (["51b3c07a09c2"], "generation/sampling.py"),
    },
}


@pytest.mark.parametrize(
    ("owner", "name"), [(owner, name) for owner, names in WATCHED.items() for name in names]
)
def test_the_code_is_one_that_we_have_read(owner, name):
    known, where = WATCHED[owner][name]
    function = getattr(owner, name)
    found = source_hash(getattr(function, "__func__", function))
    assert found in known, (
        f"mlx-lm's {owner.__name__}.{name} changed (hash {found}, known {known}): read it, check "
        f"{where} against it, then add the hash"
    )


def test_names_that_a_mixin_must_not_hide():
    """The steered caches add these; mlx-lm's own must not grow the same ones."""
    for stock in (cache.KVCache, cache.BatchKVCache, cache.QuantizedKVCache):
        added = {"shift", "expecting", "noted", "thoughts", "record", "instead", "_rows", "take"}
        assert not added & set(dir(stock))
    assert "shift" not in inspect.getsource(cache.KVCache)
