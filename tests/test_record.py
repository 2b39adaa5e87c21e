import mlx.core as mx
import numpy as np
import pytest
from test_patch import streams

from mlx_densesteer.errors import InputError
from mlx_densesteer.patch import patch
from mlx_densesteer.record import record, residual_norms

SEQUENCES = [[1, 2, 3], [9] * 17, [5], [7, 7, 7, 7, 8, 9, 1], [3, 3], [4, 5, 6]]


@pytest.mark.parametrize("token", [-1, 0])
def test_batched_reading_equals_one_by_one(tiny, token):
    found = record(tiny, SEQUENCES, [0, 2, 3], token=token)
    assert sorted(found) == [0, 2, 3]
    for number, sequence in enumerate(SEQUENCES):
        alone = streams(tiny, sequence)
        for layer, rows in found.items():
            assert rows.shape == (len(SEQUENCES), 64) and rows.dtype == np.float32
            expected = np.array(alone[layer][0, token])
            np.testing.assert_allclose(rows[number], expected, rtol=0, atol=1e-5)


def test_batches_are_cut_and_put_together_in_order(tiny, monkeypatch):
    whole = record(tiny, SEQUENCES, [1])
    monkeypatch.setattr("mlx_densesteer.record.BATCH_TOKENS", 8)
    np.testing.assert_allclose(record(tiny, SEQUENCES, [1])[1], whole[1], rtol=0, atol=1e-5)


def test_a_patched_model_is_read_unsteered(tiny):
    before = record(tiny, SEQUENCES, [3])
    assert np.array_equal(record(patch(tiny), SEQUENCES, [3])[3], before[3])


def test_a_bfloat16_stream_is_read_as_float32(tiny):
    tiny.set_dtype(mx.bfloat16)
    assert record(tiny, SEQUENCES, [1])[1].dtype == np.float32


def test_residual_norms_leave_the_first_token_out(tiny):
    tokens = SEQUENCES[3]
    norms = [float(mx.linalg.norm(h[0, 1:], axis=-1).mean()) for h in streams(tiny, tokens)]
    found = residual_norms(tiny, tokens, range(4))
    assert found == {layer: pytest.approx(norm, rel=1e-5) for layer, norm in enumerate(norms)}
    assert residual_norms(tiny, [5], [0])[0] > 0


def test_layers_that_the_model_does_not_have(tiny):
    for layers, message in [([99], "layers 99: expected some of 0-3"), ([], "layers none")]:
        with pytest.raises(InputError, match=message):
            record(tiny, SEQUENCES, layers)
        with pytest.raises(InputError, match=message):
            residual_norms(tiny, [1, 2], layers)
    with pytest.raises(InputError, match="no sequences"):
        record(tiny, [], [0])


def test_sequences_that_are_too_short(tiny):
    with pytest.raises(InputError, match="sequence 1 is empty"):
        record(tiny, [[1], []], [0])
    with pytest.raises(InputError, match="1 tokens has no token -2"):
        record(tiny, [[1, 2], [1]], [0], token=-2)
