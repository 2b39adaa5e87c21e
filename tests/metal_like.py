"""A pytest plugin: mlx's CPU backend behaves as mlx on a Mac's GPU does, where the two differ.

    def test_something(metal_like):
        device = metal_like.give_device(working_set=5 * 2**30)   # as mx.device_info() tells of a Mac
        metal_like.use("tf32")                                   # for this test; modes below
        metal_like.fail_at(3)                                    # the third evaluation from here on raises
        ...
        assert device.limit == 0                                 # the wired limit, 0: nothing is wired
        assert metal_like.waits <= 12                            # calls that waited for the device

``pytest --metal-like=shapes,tf32,guard PATH`` has the modes for all tests of that run.

guard: float64 and operations without a GPU implementation raise as in mlx, unless they name a CPU stream.
shapes: products and attention choose their kernel by the number of rows, so the last bits of a row depend
    on the rows beside it. Limits of 1, 6 and 32 rows for products, of 8 queries for attention.
tf32: float32 products and attention round their inputs to 10 bits of mantissa, as an M5 does unless
    ``MLX_ENABLE_TF32=0``. Products with a vector (one row or one column) stay exact.

Tests with the mark ``same_bits`` compare products of different shapes more closely than that, or their
tokens without regard to ties: they are left out under shapes and tf32.

Not covered: operators other than ``@``, ``matmul``, ``addmm``, ``quantized_matmul`` and
``scaled_dot_product_attention``, gradients under tf32, other processes, and how fast anything is.

Sources: mlx 0.32, ``backend/metal`` (matmul, quantized, scaled_dot_product_attention, device), ``linalg``.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
import pytest

MODES = ("guard", "shapes", "tf32")

_FAILED = "[METAL] Command buffer execution failed: "
OUT_OF_MEMORY = (
    _FAILED + "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
)
TIMEOUT = _FAILED + "Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)"

# What evaluates; all of them but async_eval wait for the result.
_EVALUATIONS = (
    (mx, ("eval", "async_eval", "synchronize")),
    (mx.array, ("item", "tolist", "__bool__", "__int__", "__float__", "__index__")),
)
_CPU_ONLY = (
    "cholesky", "cholesky_inv", "eig", "eigh", "eigvals", "eigvalsh", "inv", "lu", "lu_factor", "pinv", "qr",
    "solve", "solve_triangular", "svd", "tri_inv",
)  # fmt: skip
_VECTOR_QUERIES = 8  # most queries of the attention kernel for few of them
_VECTOR_ROWS = 6  # from so many rows on a quantised product is a matrix product


@dataclass
class Device:
    """A Mac's GPU: the bytes that may be wired, how many are, and every limit that was set."""

    working_set: int
    limit: int = 0
    limits: list[int] = field(default_factory=list)


class MetalLike:
    """What a test asks of the plugin; all of it ends with the test."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self._patch = patch
        self.calls: list[str] = []  # names of the evaluations so far
        self.failures = 0  # evaluations that were made to fail
        self._fail_at: int | None = None
        self._left, self._message = 0, ""

    @property
    def waits(self) -> int:
        """How many calls so far waited for the device: ``eval``, ``item``, ``numpy.array``, ..."""
        return len(self.calls) - self.calls.count("async_eval")

    def watch(self) -> None:
        """Begin to record evaluations; the fixture has called this."""
        for owner, names in _EVALUATIONS:
            for name in names:
                self._wrap(owner, name, functools.partial(self._evaluated, name))
        for name in ("array", "asarray"):

            def converts(given: object = None, name: str = name) -> None:
                if isinstance(given, mx.array):
                    self._evaluated(f"numpy.{name}")

            self._wrap(np, name, converts, tell_argument=True)

    def fail_at(self, number: int, *, times: int | None = 1, message: str = OUT_OF_MEMORY) -> None:
        """Let the ``number``-th evaluation from here on raise, and in all ``times`` (``None``: all) of them."""
        self._fail_at = len(self.calls) + number
        self._left, self._message = math.inf if times is None else times, message
        self.failures = 0

    def heal(self) -> None:
        """Let no further evaluation fail."""
        self._fail_at = None

    def give_device(self, working_set: int = 5 * 2**30) -> Device:
        """Let mlx tell of a Mac with this working set in bytes, and return what is wired there."""
        device = Device(working_set)
        info = {
            "architecture": "applegpu_g13g",
            "device_name": "Apple M1",
            "max_buffer_length": working_set // 2,
            "max_recommended_working_set_size": working_set,
            "memory_size": working_set * 3 // 2,
            "resource_limit": 499000,
        }

        def set_wired_limit(limit: int) -> int:
            if limit > device.working_set:
                raise ValueError(
                    "[metal::set_wired_limit] Setting a wired limit larger than the maximum "
                    "recommended working set size is not allowed."
                )
            before, device.limit = device.limit, limit
            device.limits.append(limit)
            return before

        for module in (mx, mx.metal):
            self._patch.setattr(module, "device_info", lambda device=None: dict(info))
            self._patch.setattr(module, "set_wired_limit", set_wired_limit)
        self._patch.setattr(mx.metal, "is_available", lambda: True)
        return device

    def use(self, *modes: str) -> None:
        """Switch modes on; they go with those of the whole run."""
        for mode in modes:
            if mode not in MODES:
                raise pytest.UsageError(
                    f"--metal-like={mode}: expected some of {', '.join(MODES)}."
                )
            {"guard": self._guard, "shapes": self._shapes, "tf32": self._tf32}[mode]()

    def _evaluated(self, name: str) -> None:
        self.calls.append(name)
        if self._fail_at is not None and len(self.calls) >= self._fail_at and self._left > 0:
            self._left -= 1
            self.failures += 1
            raise RuntimeError(self._message)

    def _wrap(
        self, owner: object, name: str, before: Callable[..., None], *, tell_argument: bool = False
    ) -> None:
        real = getattr(owner, name)

        @functools.wraps(real)
        def call(*arguments: object, **options: object) -> object:
            before(*arguments[:1]) if tell_argument else before()
            return real(*arguments, **options)

        self._patch.setattr(owner, name, call)

    def _guard(self) -> None:
        evaluations = {name for _, names in _EVALUATIONS for name in names}
        for name in dir(mx):
            function = getattr(mx, name)
            if type(function).__name__ == "nb_func" and name not in evaluations:
                self._patch.setattr(mx, name, _without_float64(function))
        for name in ("astype", "view"):
            self._patch.setattr(mx.array, name, _without_float64(getattr(mx.array, name)))
        for name in _CPU_ONLY:
            self._patch.setattr(mx.linalg, name, _cpu_only(getattr(mx.linalg, name)))

    def _shapes(self) -> None:
        product, attention = mx.matmul, mx.fast.scaled_dot_product_attention

        def matmul(a: mx.array, b: mx.array, **options: object) -> mx.array:
            if min(a.ndim, b.ndim) < 2:
                return product(a, b, **options)
            rows, dtype, summed = _rows(a, b), mx.result_type(a, b), None
            a, b = a.astype(mx.float32), b.astype(mx.float32)
            parts = 1 + (rows > 1) + (rows >= 6) + (rows >= 32)
            step = -(-a.shape[-1] // parts)
            for start in range(0, a.shape[-1], step):
                part = product(a[..., start : start + step], b[..., start : start + step, :])
                summed = part if summed is None else summed + part
            return summed.astype(dtype)

        self._products(matmul, matmul)
        self._patch.setattr(mx.fast, "scaled_dot_product_attention", _attention(attention))

    def _tf32(self) -> None:
        product, attention = mx.matmul, mx.fast.scaled_dot_product_attention

        def matmul(a: mx.array, b: mx.array, **options: object) -> mx.array:
            both = a.dtype == b.dtype == mx.float32
            if both and min(a.ndim, b.ndim) > 1 and _rows(a, b) > 1 and b.shape[-1] > 1:
                a, b = to_tf32(a), to_tf32(b)
            return product(a, b, **options)

        self._products(matmul, product)
        self._patch.setattr(mx.fast, "scaled_dot_product_attention", _attention(attention))

    def _products(self, matmul: Callable[..., mx.array], quantised_few: Callable) -> None:
        """Make every product with ``matmul``, those of few rows with quantised weights with the other."""

        def addmm(
            c: mx.array, a: mx.array, b: mx.array, alpha: float = 1.0, beta: float = 1.0, **options
        ) -> mx.array:
            summed = alpha * _wide(matmul, a, b) + beta * c.astype(mx.float32)
            return summed.astype(mx.result_type(a, b, c))

        def quantized_matmul(
            x, w, /, scales, biases=None, transpose=True, group_size=None, bits=None, mode="affine", **options
        ) -> mx.array:  # fmt: skip
            w = mx.dequantize(w, scales, biases, group_size=group_size, bits=bits, mode=mode)
            w = w.swapaxes(-1, -2) if transpose else w
            product = matmul if _rows(x, w) >= _VECTOR_ROWS else quantised_few
            return _wide(product, x, w).astype(x.dtype)

        self._patch.setattr(mx, "quantized_matmul", quantized_matmul)
        self._patch.setattr(mx, "addmm", addmm)
        self._patch.setattr(mx, "matmul", matmul)
        self._patch.setattr(mx.array, "__matmul__", matmul)


def to_tf32(a: mx.array) -> mx.array:
    """Round float32 to 10 bits of mantissa, ties to even."""
    bits = a.view(mx.uint32)
    bits = bits + 0x0FFF + ((bits >> 13) & 1)
    return (bits & mx.array(0xFFFFE000, mx.uint32)).view(mx.float32)


def _rows(a: mx.array, b: mx.array) -> int:
    """Return how many rows of ``a`` one kernel takes; mlx joins those of a batch if ``b`` is one matrix."""
    return a.size // a.shape[-1] if b.ndim == 2 else a.shape[-2]


def _wide(product: Callable[..., mx.array], a: mx.array, b: mx.array) -> mx.array:
    """Return the product in float32; numbers of 16 bits lose nothing by it, under tf32 neither."""
    return product(a.astype(mx.float32), b.astype(mx.float32))


def _attention(few: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Return an attention that has a kernel of its own for more than ``_VECTOR_QUERIES`` queries."""

    def attention(
        q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array | str | None = None, **options
    ) -> mx.array:  # fmt: skip
        if q.shape[2] <= _VECTOR_QUERIES or options.get("sinks") is not None:
            return few(q, k, v, scale=scale, mask=mask, **options)
        queries, length, repeats = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
        k, v = mx.repeat(k, repeats, axis=1), mx.repeat(v, repeats, axis=1)
        scores = _wide(mx.matmul, q * scale, k.swapaxes(-1, -2))
        if isinstance(mask, str):
            mask = mx.arange(length - queries, length)[:, None] >= mx.arange(length)
        if mask is not None and mask.dtype == mx.bool_:
            scores = mx.where(mask, scores, mx.finfo(mx.float32).min)
        elif mask is not None:
            scores = scores + mask
        return _wide(mx.matmul, mx.softmax(scores, axis=-1), v).astype(q.dtype)

    return attention


def _without_float64(function: Callable) -> Callable:
    @functools.wraps(function)
    def guarded(*arguments: object, **options: object) -> object:
        result = function(*arguments, **options)
        found = result.values() if isinstance(result, dict) else result
        found = found if isinstance(found, list | tuple) else [found]
        if any(isinstance(one, mx.array) and one.dtype == mx.float64 for one in found):
            _refuse_on_gpu("float64 is not supported on the GPU", options)
        return result

    return guarded


def _cpu_only(function: Callable) -> Callable:
    message = (
        f"[linalg::{function.__name__}] This op is not yet supported on the GPU. Explicitly pass a "
        "CPU stream to run it."
    )

    @functools.wraps(function)
    def guarded(*arguments: object, **options: object) -> object:
        _refuse_on_gpu(message, options)
        return function(*arguments, **options)

    return guarded


def _refuse_on_gpu(message: str, options: dict[str, object]) -> None:
    if "cpu" not in str(options.get("stream")):
        raise ValueError(message)


_run = pytest.MonkeyPatch()  # what --metal-like changes


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--metal-like",
        default="",
        metavar="MODES",
        help=f"let mlx compute as on a Mac's GPU: some of {','.join(MODES)}",
    )


def _modes(config: pytest.Config) -> list[str]:
    return [mode for mode in config.getoption("--metal-like").split(",") if mode]


def pytest_configure(config: pytest.Config) -> None:
    MetalLike(_run).use(*_modes(config))


def pytest_unconfigure() -> None:
    _run.undo()


def pytest_report_header(config: pytest.Config) -> str | None:
    return f"metal-like: {', '.join(modes)}" if (modes := _modes(config)) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if {"shapes", "tf32"} & set(_modes(config)):
        out = [item for item in items if item.get_closest_marker("same_bits")]
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]


@pytest.fixture
def metal_like(monkeypatch: pytest.MonkeyPatch) -> MetalLike:
    """mlx as on a Mac's GPU, where the test asks for it; evaluations are recorded."""
    made = MetalLike(monkeypatch)
    made.watch()
    return made
