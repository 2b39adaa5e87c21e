"""What we rely on inside mlx-lm. Fails when an upgrade changes it under us.

`patch.py` repeats the arithmetic of one block and overrides a few cache methods. If a hash
here no longer matches, read the new source, see whether `SteeredBlock` and the caches still
do the same, run the suite, and add the hash.
"""

import ast
import hashlib
import inspect
import textwrap

import pytest
from mlx_lm.models import cache, qwen2

KNOWN = {  # mlx-lm 0.31.3 (the last one for Python 3.10) and 0.32.2
    "TransformerBlock.__call__": ["67f9ddd4e68f"],
    "TransformerBlock.__init__": ["1ac0981d2ac4"],
    "Qwen2Model.__call__": ["a4e3469119fc", "d0d4e27049c9"],
    "KVCache.update_and_fetch": ["9bb59b931796", "3a1c4bf46de0"],
    "KVCache.to_quantized": ["42b22ee28b19"],
    "BatchKVCache.__init__": ["f044c7272a01"],
    "BatchKVCache.update_and_fetch": ["8184e1c67483", "aa0afe105287"],
    "BatchKVCache.merge": ["b77da0baafa4", "752c86414719"],
    "BatchKVCache.filter": ["cb76ad30f493", "0ffc24811d66"],
    "BatchKVCache.extend": ["903930d1dc6c", "9ccf1b8e0429"],
    "BatchKVCache.extract": ["ff095c4fa939", "f7022dde1ce8"],
}


def source_hash(function) -> str:
    """Hash the code without comments, docstrings and layout."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:12]


WATCHED = {
    "TransformerBlock.__call__": qwen2.TransformerBlock.__call__,
    "TransformerBlock.__init__": qwen2.TransformerBlock.__init__,
    "Qwen2Model.__call__": qwen2.Qwen2Model.__call__,
    "KVCache.update_and_fetch": cache.KVCache.update_and_fetch,
    "KVCache.to_quantized": cache.KVCache.to_quantized,
    "BatchKVCache.__init__": cache.BatchKVCache.__init__,
    "BatchKVCache.update_and_fetch": cache.BatchKVCache.update_and_fetch,
    "BatchKVCache.merge": cache.BatchKVCache.merge.__func__,
    "BatchKVCache.filter": cache.BatchKVCache.filter,
    "BatchKVCache.extend": cache.BatchKVCache.extend,
    "BatchKVCache.extract": cache.BatchKVCache.extract,
}


@pytest.mark.parametrize("name", WATCHED)
def test_the_code_is_one_that_we_have_read(name):
    found = source_hash(WATCHED[name])
    assert found in KNOWN[name], (
        f"mlx-lm's {name} changed (hash {found}, known {KNOWN[name]}): read it, check patch.py "
        "against it, then add the hash"
    )


def test_names_that_a_mixin_must_not_hide():
    """Our caches add three names; mlx-lm's own must not grow the same ones."""
    for stock in (cache.KVCache, cache.BatchKVCache, cache.QuantizedKVCache):
        assert not {"shift", "expect_update", "_expected", "_rows"} & set(dir(stock))
    assert "shift" not in inspect.getsource(cache.KVCache)


def test_what_resuming_a_download_needs_of_huggingface_hub():
    """`hub._resume` calls names that huggingface_hub does not list as public."""
    from huggingface_hub.file_download import http_get, repo_folder_name

    names = inspect.signature(http_get).parameters
    assert {"resume_size", "headers", "expected_size", "displayed_filename"} <= set(names)
    assert repo_folder_name(repo_id="a/b", repo_type="model") == "models--a--b"
