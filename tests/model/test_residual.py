import mlx.core as mx
import numpy as np
import pytest
from helpers import streams

from mlx_densesteer.errors import InputError
from mlx_densesteer.model.block import patch
from mlx_densesteer.model.residual import TokenPair, record_pairs, residual_norms

ROOT = [1, 2, 3, 4, 5]
PAIRS = [
    TokenPair([*ROOT, 9], [20, 21, 22, 23, 24], [20, 21, 30, 31, 32, 33, 34, 35, 36]),
    TokenPair([*ROOT, 9, 9, 9, 11], [40], [41] * 13),
    TokenPair([*ROOT, 12, 13], [50, 51], [50, 51, 52]),  # one begins like the other
    TokenPair([*ROOT, 12], [60, 61, 62], [60, 61, 62]),  # no difference
    TokenPair([*ROOT, *range(70, 90)], [10, 11, 12], [13, 14, 15, 16]),
]
LINE = [99, 98, 97, 96]
WEIGHS = {
    "last": lambda ids: np.eye(len(ids), dtype=np.float32)[-1],
    "first": lambda ids: np.eye(len(ids), dtype=np.float32)[0],
    "uneven": lambda ids: np.arange(1, len(ids) + 1, dtype=np.float32) / len(ids),
    "by token": lambda ids: np.array([token % 3 + 0.5 for token in ids], np.float32),
}


def read(model, pairs, layers, weigh):
    """All readings put together: ``{layer: (pairs, 2, hidden)}`` and the same of norms."""
    found = {layer: [{}, {}] for layer in layers}
    for reading in record_pairs(model, pairs, layers, weigh):
        for number, row, norm in zip(reading.pairs, reading.rows, reading.norms, strict=True):
            assert number not in found[reading.layer][0], "read twice"
            found[reading.layer][0][number] = row
            found[reading.layer][1][number] = norm
    return {
        layer: [np.stack([d[i] for i in range(len(pairs))]) for d in both]
        for layer, both in found.items()
    }


def alone(model, prompt, response, weigh):
    """The same from each sequence by itself, unpadded."""
    rows, norms = [], []
    for h in streams(model, [*prompt, *response]):
        response_h = np.array(h[0, len(prompt) :].astype(mx.float32)).astype(np.float64)
        rows.append(weigh(response) @ response_h)
        norms.append(np.linalg.norm(response_h, axis=-1).mean())
    return rows, norms


@pytest.mark.parametrize("budget", [1, 40, 4096])
@pytest.mark.parametrize("weigh", WEIGHS.values(), ids=WEIGHS)
def test_batched_equals_one_by_one(tiny, monkeypatch, weigh, budget):
    monkeypatch.setattr("mlx_densesteer.model.residual.BATCH_TOKENS", budget)
    found = read(tiny, PAIRS, range(4), weigh)
    for number, pair in enumerate(PAIRS):
        for side in (0, 1):
            rows, norms = alone(tiny, pair.prompt, pair[1 + side], weigh)
            for layer in range(4):
                got, norm = found[layer][0][number, side], found[layer][1][number, side]
                np.testing.assert_allclose(got, rows[layer], rtol=0, atol=2e-5)
                assert norm == pytest.approx(norms[layer], rel=1e-5)


@pytest.mark.parametrize("pairs", [
    [TokenPair(LINE, [1, 2, 3], [4, 5])],
    [TokenPair([5], [1, 2], [3]), TokenPair([6, 7], [1], [2, 2])],
    [TokenPair(LINE, [1, 1, 2], [1, 1, 3]), TokenPair(LINE, [1, 1, 4], [1, 1, 5])],
], ids=["one pair", "two prompts", "one prompt"])  # fmt: skip
def test_few_pairs(tiny, pairs):
    found = read(tiny, pairs, [3], WEIGHS["uneven"])[3][0]
    for number, pair in enumerate(pairs):
        for side in (0, 1):
            rows, _ = alone(tiny, pair.prompt, pair[1 + side], WEIGHS["uneven"])
            np.testing.assert_allclose(found[number, side], rows[3], rtol=0, atol=2e-5)


def test_a_patched_model_is_read_unsteered(tiny):
    before = read(tiny, PAIRS, [3], WEIGHS["last"])[3][0]
    assert np.array_equal(read(patch(tiny), PAIRS, [3], WEIGHS["last"])[3][0], before)


def test_a_bfloat16_stream_is_read_as_float32(tiny):
    tiny.set_dtype(mx.bfloat16)
    found = read(tiny, PAIRS, [1], WEIGHS["last"])[1][0]
    assert found.dtype == np.float32 and np.isfinite(found).all()
    rows, _ = alone(tiny, PAIRS[0].prompt, PAIRS[0].positive, WEIGHS["last"])
    np.testing.assert_allclose(found[0, 0], rows[1], rtol=0, atol=0.05)


def test_nothing_above_the_last_layer_is_computed(tiny):
    def refuse(*_):
        raise AssertionError("computed")

    patch(tiny).model.layers[2].self_attn.q_proj = refuse
    assert sorted(read(tiny, PAIRS, [0, 1], WEIGHS["last"])) == [0, 1]
    with pytest.raises(AssertionError, match="computed"):
        read(tiny, PAIRS, [2], WEIGHS["last"])


def test_memory_does_not_grow_with_pairs_or_layers(tiny, monkeypatch):
    monkeypatch.setattr("mlx_densesteer.model.residual.BATCH_TOKENS", 400)
    rng = np.random.default_rng(0)

    def peak(count, layers):
        pairs = [
            TokenPair([*ROOT, *rng.integers(6, 99, 20).tolist()], [1, *[2] * 29], [3, *[4] * 29])
            for _ in range(count)
        ]
        mx.clear_cache()
        mx.reset_peak_memory()
        held = mx.get_active_memory()
        for _ in record_pairs(tiny, pairs, layers, WEIGHS["last"]):
            pass
        return mx.get_peak_memory() - held

    peak(10, range(4))  # kernels and constants
    one, four = peak(10, range(4)), peak(40, range(4))
    assert one > 100_000
    assert four < 1.1 * one
    assert one < 1.2 * peak(10, [3])


def test_no_buffers_are_kept_from_batch_to_batch(tiny, monkeypatch):
    monkeypatch.setattr("mlx_densesteer.model.residual.BATCH_TOKENS", 100)
    pairs = [TokenPair([n], [1] * 30 * n, [2] * 30 * n) for n in range(1, 6)]  # of other shapes
    mx.clear_cache()
    for _ in record_pairs(tiny, pairs, [3], WEIGHS["last"]):
        assert mx.get_cache_memory() > 0  # something to give back
    assert mx.get_cache_memory() == 0


def test_pairs_that_cannot_be_read(tiny):
    with pytest.raises(InputError, match="no pairs"):
        list(record_pairs(tiny, [], [0], WEIGHS["last"]))
    empty = [TokenPair([1], [1], [1]), TokenPair([1], [], [1])]
    with pytest.raises(InputError, match="pair 1 has an empty prompt or response"):
        list(record_pairs(tiny, empty, [0], WEIGHS["last"]))


@pytest.mark.parametrize("first", [0, 1, 4, 6])
def test_residual_norms_are_means_from_the_first_token_on(tiny, first):
    tokens = [7, 7, 7, 7, 8, 9, 1]
    norms = [float(mx.linalg.norm(h[0, first:], axis=-1).mean()) for h in streams(tiny, tokens)]
    found = residual_norms(tiny, tokens, range(4), first=first)
    assert found == {layer: pytest.approx(norm, rel=1e-5) for layer, norm in enumerate(norms)}
    if first == 1:
        assert residual_norms(tiny, tokens, range(4)) == found


@pytest.mark.parametrize(("tokens", "first"), [([5], 1), ([5, 6], 2), ([5, 6], -1)])
def test_residual_norms_of_no_tokens(tiny, tokens, first):
    with pytest.raises(InputError, match=f"first token {first} of {len(tokens)}"):
        residual_norms(tiny, tokens, [0], first=first)


def test_layers_that_the_model_does_not_have(tiny):
    for layers, message in [([99], "layers 99: expected some of 0-3"), ([], "layers none")]:
        with pytest.raises(InputError, match=message):
            list(record_pairs(tiny, PAIRS, layers, WEIGHS["last"]))
        with pytest.raises(InputError, match=message):
            residual_norms(tiny, [1, 2], layers)
