"""Biases and penalties, against what OpenAI's documentation says of them."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_densesteer.errors import InputError
from mlx_densesteer.generation.logits import LogitBias


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("bias", [
    LogitBias(0.5, 0.25, {3: -100.0, 5: 2.0}), LogitBias(presence=-2.0), LogitBias(frequency=1.5),
    LogitBias(tokens={0: 1.0}),
])  # fmt: skip
@pytest.mark.parametrize("before", [[], [5, 5, 2]])
def test_of_the_answer_alone(dtype, bias, before):
    prompt, answer = [7, 1, 1], [4, 4, 4, 0]
    logits = mx.random.normal((1, 9), key=mx.random.key(1)).astype(dtype)
    expected = np.array(logits.astype(mx.float32))
    for token in range(9):
        count = [*before, *answer].count(token)
        change = bias.tokens.get(token, 0) - bias.presence * (count > 0) - bias.frequency * count
        expected[0, token] += change
    found = bias.processor(before, skip=3)(mx.array([*prompt, *answer]), logits)
    assert found.dtype == dtype
    tolerance = 1e-6 if dtype == mx.float32 else 0.5
    assert np.allclose(np.array(found.astype(mx.float32)), expected, atol=tolerance, rtol=2**-7)
    at_first = bias.processor([], skip=3)(mx.array(prompt), logits)  # no token yet
    expected = np.array(logits.astype(mx.float32))
    for token, value in bias.tokens.items():
        expected[0, token] += value
    assert np.allclose(np.array(at_first.astype(mx.float32)), expected, atol=tolerance, rtol=2**-7)


def test_a_token_that_the_model_does_not_know():
    with pytest.raises(InputError, match="the token 9: the model knows 0 to 8"):
        LogitBias(tokens={9: 1.0}).check(9)
