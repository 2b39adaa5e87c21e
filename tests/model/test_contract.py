"""What the steered block and caches rely on inside mlx-lm. Fails when an upgrade changes it.

`model/block.py` repeats the arithmetic of mlx-lm's block, `model/cache.py` overrides a few methods of its
caches. If a hash here no longer matches, read the new source, see whether both still do the same, run
the suite, and add the hash.
"""

import hashlib
import inspect
import io
import sys
import textwrap
import tokenize

import pytest
from mlx_lm import generate as _  # noqa: F401  (the name mlx_lm.generate is a function)
from mlx_lm.models import cache, qwen2

generate = sys.modules["mlx_lm.generate"]

KNOWN = {  # mlx-lm 0.32.2
    "TransformerBlock.__call__": ["cdea09b459b8"],
    "TransformerBlock.__init__": ["d1fdaf232dd8"],
    "Attention.__call__": ["db53a96997bb"],
    "Qwen2Model.__call__": ["b09212e83dd7"],
    "make_prompt_cache": ["d6264c257656"],
    "_merge_caches": ["0f974a9d7e42"],
    "_extend_cache": ["bb6e8a3e2195"],
    "KVCache.update_and_fetch": ["436cef10d959"],
    "KVCache.to_quantized": ["dac539e005ae"],
    "BatchKVCache.__init__": ["5a91e7cde9ea"],
    "BatchKVCache.update_and_fetch": ["b2b599bb2aad"],
    "BatchKVCache.prepare": ["bf2e4099b679"],
    "BatchKVCache.finalize": ["c98d8dbc9898"],
    "BatchKVCache.trim": ["e3bc3b3f4429"],
    "BatchKVCache.merge": ["af9b3d0be41d"],
    "BatchKVCache.filter": ["3dfafc288d85"],
    "BatchKVCache.extend": ["c058dff84576"],
    "BatchKVCache.extract": ["b5ee17b4bce1"],
}


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


WATCHED = {
    "TransformerBlock.__call__": qwen2.TransformerBlock.__call__,
    "TransformerBlock.__init__": qwen2.TransformerBlock.__init__,
    "Attention.__call__": qwen2.Attention.__call__,
    "Qwen2Model.__call__": qwen2.Qwen2Model.__call__,
    "make_prompt_cache": cache.make_prompt_cache,
    "_merge_caches": generate._merge_caches,
    "_extend_cache": generate._extend_cache,
    "KVCache.update_and_fetch": cache.KVCache.update_and_fetch,
    "KVCache.to_quantized": cache.KVCache.to_quantized,
    "BatchKVCache.__init__": cache.BatchKVCache.__init__,
    "BatchKVCache.update_and_fetch": cache.BatchKVCache.update_and_fetch,
    "BatchKVCache.prepare": cache.BatchKVCache.prepare,
    "BatchKVCache.finalize": cache.BatchKVCache.finalize,
    "BatchKVCache.trim": cache.BatchKVCache.trim,
    "BatchKVCache.merge": cache.BatchKVCache.merge.__func__,
    "BatchKVCache.filter": cache.BatchKVCache.filter,
    "BatchKVCache.extend": cache.BatchKVCache.extend,
    "BatchKVCache.extract": cache.BatchKVCache.extract,
}


@pytest.mark.parametrize("name", WATCHED)
def test_the_code_is_one_that_we_have_read(name):
    found = source_hash(WATCHED[name])
    assert found in KNOWN[name], (
        f"mlx-lm's {name} changed (hash {found}, known {KNOWN[name]}): read it, check "
        "model/block.py and model/cache.py against it, then add the hash"
    )


def test_names_that_a_mixin_must_not_hide():
    """The steered caches add four names; mlx-lm's own must not grow the same ones."""
    for stock in (cache.KVCache, cache.BatchKVCache, cache.QuantizedKVCache):
        assert not {"shift", "expecting", "_rows", "take"} & set(dir(stock))
    assert "shift" not in inspect.getsource(cache.KVCache)
