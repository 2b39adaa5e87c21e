import numpy as np
import pytest

import mlx_densesteer as ds
from mlx_densesteer.errors import InputError
from mlx_densesteer.extraction import pairs_sha256
from mlx_densesteer.model import inspect
from mlx_densesteer.prompt import encode_prompt
from mlx_densesteer.record import record

PAIRS = [
    ds.Pair("1 + 1?", "It is 2.", "We add.\n\nIt is 2."),
    ds.Pair("What is 3 * 4?", "12", "We multiply 3 by 4.\n\nThat is 12."),
    ds.Pair("And 9 - 5?", "9 - 5 = 4", "9.\n\nMinus 5.\n\n4.\n"),
]


@pytest.fixture(scope="module")
def loaded(hf_folder):
    model, tokenizer = ds.load(hf_folder)
    return model, tokenizer, inspect(model, hf_folder)


def test_the_vector_is_the_mean_difference_at_the_last_token(loaded):
    model, tokenizer, _ = loaded
    vector = ds.extract(model, tokenizer, PAIRS)
    assert list(vector.layers) == [0, 1, 2, 3]
    differences = []
    for pair in PAIRS:
        prompt = encode_prompt(tokenizer, pair.prompt)
        rows = [
            record(model, [prompt + tokenizer.encode(text.strip())], [2])[2][0]
            for text in (pair.positive, pair.negative)
        ]
        differences.append(rows[0] - rows[1])
    # the model computes in bfloat16, and a batch rounds in another order
    np.testing.assert_allclose(vector.layers[2], np.mean(differences, axis=0), rtol=0, atol=0.05)
    assert np.linalg.norm(vector.layers[2]) > 0.1


def test_metadata_says_where_it_comes_from(loaded):
    model, tokenizer, info = loaded
    meta = ds.extract(model, tokenizer, PAIRS, layers=[1]).meta
    assert (meta.model, meta.fingerprint) == ("Tiny-Qwen2", info.fingerprint)
    assert (meta.hidden_size, meta.layer_count, meta.quantization) == (64, 4, "none")
    assert (meta.method, meta.token, meta.pair_count) == (
        "mean difference",
        "-1 of the response",
        3,
    )
    assert meta.pairs_sha256 == pairs_sha256(PAIRS) != pairs_sha256(PAIRS[::-1])
    assert len(meta.chat_template_sha256) == 64


def test_swapping_the_responses_turns_the_vector_around(loaded):
    model, tokenizer, _ = loaded
    swapped = [ds.Pair(p.prompt, p.negative, p.positive) for p in PAIRS]
    there = ds.extract(model, tokenizer, PAIRS).layers[1]
    back = ds.extract(model, tokenizer, swapped).layers[1]
    np.testing.assert_allclose(back, -there, rtol=0, atol=1e-5)


def test_pairs_that_cannot_be_used(loaded):
    model, tokenizer, _ = loaded
    with pytest.raises(InputError, match="no contrastive pairs"):
        ds.extract(model, tokenizer, [])
    with pytest.raises(InputError, match="pair 1 has a response of 0 tokens"):
        ds.extract(model, tokenizer, [PAIRS[0], ds.Pair("x", " ", "y")])
    with pytest.raises(InputError, match="token 0: expected a negative number"):
        ds.extract(model, tokenizer, PAIRS, token=0)
    with pytest.raises(InputError, match="pair 1 has a response of 2 tokens, expected at least 3"):
        ds.extract(model, tokenizer, PAIRS, token=-3)
    with pytest.raises(InputError, match="layers 99"):
        ds.extract(model, tokenizer, PAIRS, layers=[99])
