"""The plugin itself: each mode changes what it says, and nothing else."""

import mlx.core as mx
import numpy as np
import pytest
from helpers import ROOT
from metal_like import OUT_OF_MEMORY, to_tf32

import mlx_densesteer as ds


@pytest.fixture
def rows():
    """Return a function that makes so many rows, all of them equal, and a matrix."""
    matrix = mx.random.normal((96, 40), key=mx.random.key(0))
    row = mx.random.normal((1, 96), key=mx.random.key(1))
    mx.eval(matrix, row)
    return lambda count: (mx.repeat(row, count, axis=0), matrix)


def products(a, b):
    quantized = mx.quantize(b.T, group_size=32, bits=8)
    return [
        a @ b,
        mx.matmul(a, b),
        mx.addmm(mx.zeros(b.shape[1]), a, b),
        mx.quantized_matmul(a, *quantized, group_size=32, bits=8),
    ]


def first(products):
    return [product[0].tolist() for product in products]


def test_under_shapes_a_row_depends_on_the_rows_beside_it_and_only_a_little(rows, metal_like):
    exact = first(products(*rows(1)))
    metal_like.use("shapes")
    found = [first(products(*rows(count))) for count in (1, 5, 31, 32)]
    for one, *more in zip(exact, *found, strict=True):
        assert len(set(map(tuple, more))) == 4
        assert all(other == pytest.approx(one, abs=1e-5) for other in more)


def test_tf32_rounds_products_of_matrices_and_nothing_else(rows, metal_like):
    exact = {count: first(products(*rows(count))) for count in (1, 8)}
    half = rows(8)[0].astype(mx.float16) @ rows(8)[1].astype(mx.float16)
    metal_like.use("tf32")
    a, b = rows(8)
    assert first(products(*rows(1))) == [
        pytest.approx(one, abs=1e-5) for one in exact[1]
    ]  # a vector stays exact
    for found, wanted in zip(first(products(a, b)), exact[8], strict=True):
        difference = np.abs(np.array(found) - wanted).max()
        assert 1e-5 < difference < 3e-2
    assert mx.array_equal(a.astype(mx.float16) @ b.astype(mx.float16), half)
    assert (a @ b[:, :1])[0].item() == pytest.approx(exact[8][0][0], abs=1e-5)
    assert to_tf32(mx.array([1.0, 1 + 2**-10, 1 + 2**-11, 1 + 3 * 2**-11])).tolist() == [
        1, 1 + 2**-10, 1, 1 + 2**-9,
    ]  # fmt: skip


@pytest.mark.parametrize("mode", ["shapes", "tf32"])
def test_attention_has_two_kernels_that_differ_a_little(metal_like, mode):
    q, k, v = (
        mx.random.normal((2, heads, 20, 32), key=mx.random.key(heads + i))
        for i, heads in enumerate((4, 2, 2))
    )
    lengths = mx.array([20, 13])[:, None, None, None]
    causal = mx.arange(20)[:, None] >= mx.arange(20)
    masks = [None, "causal", causal, mx.logical_and(causal, mx.arange(20) < lengths)]
    masks.append(mx.where(masks[-1], 0.0, -1e9))

    def attend():
        return [
            mx.fast.scaled_dot_product_attention(q[:, :, -n:], k, v, scale=0.2, mask=mask)
            for mask in masks
            for n in ((20, 8) if mask is None else (20,))
        ]

    exact = attend()
    metal_like.use(mode)
    found = attend()
    bound = 1e-5 if mode == "shapes" else 1e-2
    for number, (one, other) in enumerate(zip(exact, found, strict=True)):
        assert mx.abs(one - other).max().item() < bound
        assert mx.array_equal(one, other) == (number == 1)  # 8 queries: the other kernel


def test_guard_refuses_what_the_gpu_does_not_have(metal_like):
    metal_like.use("guard")
    one = mx.array([1.0])
    for make in (
        lambda: one.astype(mx.float64),
        lambda: mx.zeros(3, mx.float64),
        lambda: mx.linalg.svd(mx.eye(3)),
    ):
        with pytest.raises(ValueError, match="on the GPU"):
            make()
    assert one.astype(mx.float64, stream=mx.cpu).dtype == mx.float64
    assert mx.linalg.inv(mx.eye(2), stream=mx.cpu).tolist() == [[1, 0], [0, 1]]
    assert mx.linalg.norm(one).item() == 1


def test_waits_are_counted_wherever_they_hide(metal_like):
    a = mx.arange(3)
    mx.async_eval(a)
    mx.eval(a)
    mx.synchronize()
    [
        a[0].item(),
        a.tolist(),
        int(a[1]),
        float(a[1]),
        [0, 1, 2, 3][a[2]],
        np.array(a),
        np.asarray(a),
    ]
    assert bool(a[1])
    assert metal_like.calls[0] == "async_eval"
    assert metal_like.waits == 10
    np.asarray([1, 2])
    a + 1
    assert metal_like.waits == 10


def test_an_evaluation_fails_where_the_test_says(metal_like):
    metal_like.fail_at(2)
    mx.eval(mx.array(1))
    with pytest.raises(RuntimeError) as failed:
        mx.array(1).item()
    assert str(failed.value) == OUT_OF_MEMORY
    assert mx.array(1).item() == metal_like.failures == 1
    metal_like.fail_at(1, times=None, message="gone")
    for _ in range(3):
        with pytest.raises(RuntimeError, match="gone"):
            mx.synchronize()
    metal_like.heal()
    mx.synchronize()


def test_a_device_tells_and_records(metal_like):
    device = metal_like.give_device(2**30)
    assert mx.device_info()["max_recommended_working_set_size"] == 2**30
    assert mx.metal.is_available()
    assert mx.set_wired_limit(2**30) == 0 and device.limit == 2**30
    with pytest.raises(ValueError, match="maximum recommended"):
        mx.set_wired_limit(2**31)
    assert mx.set_wired_limit(0) == 2**30 and device.limits == [2**30, 0]


def test_the_demo_says_the_same_up_to_ties(demo_model, metal_like):
    """What the rest of the run relies on: the modes change the last bits, not what the model says."""
    question = "Ben has 24 stones. Later Ben buys 21. How many stones does Ben have now?"
    alone = ds.generate(demo_model, question, max_tokens=20)
    metal_like.use("shapes", "tf32", "guard")
    assert ds.generate(demo_model, question, max_tokens=20).text == alone.text


def test_the_option_is_for_the_whole_run(pytester, metal_like):
    pytester.makeconftest((ROOT / "tests/metal_like.py").read_text())
    pytester.makepyfile(
        """
        import mlx.core as mx, pytest
        def test_guard():
            with pytest.raises(ValueError, match="float64"):
                mx.zeros(3, mx.float64)
        @pytest.mark.same_bits
        def test_left_out():
            raise AssertionError
        """
    )
    found = pytester.runpytest_subprocess("--metal-like=guard,shapes", "-p", "no:cacheprovider")
    found.assert_outcomes(passed=1, deselected=1)
    with pytest.raises(pytest.UsageError, match="expected some of guard, shapes, tf32"):
        metal_like.use("metal")
