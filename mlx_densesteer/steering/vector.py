"""``SteeringVector`` and its ``.npz`` file (docs/vector-format.md). numpy only, no mlx."""

import hashlib
import io
import json
import math
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from .. import demo
from .._version import __version__
from ..errors import VectorFormatError, VectorMismatchError
from ..files import atomic_file, parse_object, read_archive, read_file
from ..text import one_line
from .places import is_positions

FORMAT = "mlx-densesteer steering vector"
FORMAT_VERSION = 1
HOOK_POINT = "output of decoder block, before the next block"
OPERATOR = "add"
MAX_META_BYTES = 2**20
MAX_TEXT = 4096  # characters of a text in the metadata
SHOWN_RUNS = 64  # of layers; no known model has more blocks of every second one


@dataclass(frozen=True)
class VectorMeta:
    """Where a steering vector comes from and what it fits; ``None`` means "not recorded".

    By layer: ``residual_norms`` is the mean ``||h_l||``; ``margin_gain`` is how much steering there
    favours the dense responses of held-out pairs, in nats per token (``extraction.margin``).
    ``recommended`` is the setting that a sweep found, or at which the vector was trained;
    ``calibration`` holds the strengths that ``extraction.calibrate`` measured.
    """

    model: str
    hidden_size: int
    layer_count: int
    fingerprint: str | None = None
    method: str | None = None
    token: str | None = None
    pair_count: int | None = None
    pairs_sha256: str | None = None
    chat_template_sha256: str | None = None
    quantization: str | None = None
    tested: tuple[Mapping[str, object], ...] = ()
    residual_norms: Mapping[str, float] | None = None
    margin_gain: Mapping[str, float] | None = None
    recommended: Mapping[str, object] | None = None
    calibration: Mapping[str, object] | None = None
    source: str | None = None
    created_by: str = f"mlx-densesteer {__version__}"
    hook_point: str = HOOK_POINT
    operator: str = OPERATOR
    extra: Mapping[str, object] = field(default_factory=dict)


class SteeringVector:
    """One direction in the residual stream, ``v_l``, for each of some decoder blocks.

    ``layers`` maps a layer number (0-based, the *output* of that block) to a float32 array of shape
    ``(hidden_size,)``. The arrays are copies and read-only.

    Raises:
        VectorFormatError: no layers, a wrong shape or width, NaN or infinity, a layer number outside
            the model, or an unknown hook point or operator.

    Source: arXiv 2605.29247, section 3.
    """

    def __init__(self, layers: Mapping[int, np.ndarray], meta: VectorMeta, *, name: str = "vector"):
        problems = _meta_problems(meta)
        arrays: dict[int, np.ndarray] = {}
        if not layers:
            problems.append("it holds no layer; at least one is needed")
        for layer in sorted(layers):
            if not 0 <= layer < meta.layer_count:
                problems.append(f"layer {layer} is outside 0..{meta.layer_count - 1}")
            with np.errstate(over="ignore"):  # an overflow gives infinity, which is refused below
                array = np.array(layers[layer], dtype=np.float32)
            if array.shape != (meta.hidden_size,):
                problems.append(
                    f"layer {layer} has shape {array.shape}, expected ({meta.hidden_size},)"
                )
            elif not np.isfinite(array).all():
                problems.append(f"layer {layer} holds NaN or infinity in float32")
            array.setflags(write=False)
            arrays[layer] = array
        if problems:
            raise VectorFormatError(f"{name}: " + "; ".join(problems) + ".")
        self.layers: Mapping[int, np.ndarray] = arrays
        self.meta = meta
        self.name = name

    def __repr__(self) -> str:
        layers = format_layers(self.layers)
        return f"SteeringVector({self.meta.model}, layers {layers}, width {self.meta.hidden_size})"

    def describe(self) -> dict[str, object]:
        """Return the JSON document of the file: the metadata as plain values."""
        known = asdict(self.meta)
        document: dict[str, object] = dict(known.pop("extra"))
        document |= {"format": FORMAT, "format_version": FORMAT_VERSION}
        return document | {"layers": list(self.layers)} | known | {"tested": list(known["tested"])}

    def norms(self) -> dict[int, float]:
        """Return the Euclidean norm of each layer's vector, ``||v_l||``."""
        return {k: float(np.linalg.norm(a.astype(np.float64))) for k, a in self.layers.items()}

    @property
    def residual_norms(self) -> dict[int, float] | None:
        """The mean ``||h_l||`` of each layer, if extraction recorded it."""
        stored = self.meta.residual_norms
        return None if stored is None else {int(k): float(v) for k, v in stored.items()}

    @property
    def margin_gain(self) -> dict[int, float]:
        """How much steering at each layer favours dense responses, in nats per token; may be empty."""
        return {int(k): float(v) for k, v in (self.meta.margin_gain or {}).items()}

    def select(self, layers: Iterable[int]) -> "SteeringVector":
        """Return the same vector with only ``layers``.

        Raises:
            VectorMismatchError: the vector does not hold one of them.
        """
        wanted = sorted(set(layers))
        missing = [layer for layer in wanted if layer not in self.layers]
        if missing:
            raise VectorMismatchError(
                f"{self.name}: no vector for layer {format_layers(missing)}; "
                f"it holds {format_layers(self.layers)}. Choose among these."
            )
        return SteeringVector({k: self.layers[k] for k in wanted}, self.meta, name=self.name)

    def sha256(self) -> str:
        """Return the SHA-256 of layer numbers and float32 values, in hexadecimal."""
        digest = hashlib.sha256()
        for layer, array in self.layers.items():
            digest.update(layer.to_bytes(4, "little") + array.astype("<f4").tobytes())
        return digest.hexdigest()

    def check_fits(self, *, hidden_size: int, layer_count: int, model: str) -> None:
        """Raise unless every layer fits a model of these dimensions.

        Raises:
            VectorMismatchError: with every mismatch found, and the remedy.
        """
        problems = []
        if self.meta.hidden_size != hidden_size:
            problems.append(
                f"layer {min(self.layers)} has width {self.meta.hidden_size}, "
                f"but {model} has hidden size {hidden_size}"
            )
        if beyond := [layer for layer in self.layers if layer >= layer_count]:
            problems.append(
                f"it holds layer {format_layers(beyond)}, but {model} has layers 0..{layer_count - 1}"
            )
        if problems:
            raise VectorMismatchError(
                f"{self.name}: {'; '.join(problems)}. It was made for {one_line(self.meta.model)}. "
                "Use a vector that was extracted from this model."
            )

    def save(self, path: str | Path) -> Path:
        """Write the ``.npz`` file, whole or not at all, and return its path.

        Equal vectors give equal bytes.

        Raises:
            DiskError: the folder is missing, or cannot be written.
        """
        path = Path(path)
        with atomic_file(path) as file:
            file.write(self.to_bytes())
        return path

    def to_bytes(self) -> bytes:
        """Return the content of the ``.npz`` file."""
        document = json.dumps(self.describe(), indent=1, ensure_ascii=False).encode()
        arrays = {"meta": np.frombuffer(document, dtype=np.uint8)}
        arrays |= {f"layer.{layer}": array.astype("<f4") for layer, array in self.layers.items()}
        file = io.BytesIO()
        np.savez(file, **arrays)
        return file.getvalue()

    @classmethod
    def load(cls, path: str | Path) -> "SteeringVector":
        """Read a ``.npz`` file of this format. Nothing in the file is executed.

        The text ``"demo"`` is the embedded demo model's vector; a file of that name is ``./demo``.

        Raises:
            VectorFormatError: no such file, truncated, damaged, not of this format, an unknown
                version, a missing layer, a wrong shape or dtype, NaN or infinity.
        """
        name = None
        if path == demo.NAME:
            path, name = demo.VECTOR, demo.NAME
        path = Path(path)
        return cls.from_bytes(read_file(path), path, name=name or path.name)

    @classmethod
    def from_bytes(cls, data: bytes, path: Path, *, name: str) -> "SteeringVector":
        """Do what ``load`` does with the content of a file; errors name ``path``."""
        members = read_archive(path, data)
        if "meta.npy" not in members:
            raise VectorFormatError(
                f"{path}: has no `meta` entry, so it is not a steering vector of this project. "
                "Convert other files with `densesteer vector import`."
            )
        data = _parse_npy(path, "meta.npy", members["meta.npy"], "|u1")
        meta, listed = parse_document(path, data.tobytes())
        expected = {f"layer.{layer}.npy": layer for layer in listed}
        if missing := [layer for entry, layer in expected.items() if entry not in members]:
            raise VectorFormatError(
                f"{path}: its metadata lists layer {format_layers(missing)}, but the file holds "
                "no such array. The file is incomplete; make or download it again."
            )
        if unknown := sorted(set(members) - set(expected) - {"meta.npy"}):
            raise VectorFormatError(f"{path}: {one_line(unknown[0])} is not part of the format.")
        layers = {
            layer: _parse_npy(path, entry, members[entry], "<f4")
            for entry, layer in expected.items()
        }
        return cls(layers, meta, name=name)


def combine(parts: Sequence[tuple[SteeringVector, float]]) -> SteeringVector:
    """Return ``sum_i w_i * v_i`` at every layer that one of the vectors holds.

    The metadata says what model the first vector was made for. Residual norms belong to the model: they
    are kept, as the fingerprint is, if all vectors were made for the same weights. What the parts recommend
    is not: the sum is another vector, whose layers, strength and positions are to be named.

    Raises:
        VectorMismatchError: no vectors, or of models of another width or depth.
    """
    if not parts:
        raise VectorMismatchError("no vectors to combine: expected at least one.")
    first = parts[0][0].meta
    for vector, _ in parts:
        shape = vector.meta.hidden_size, vector.meta.layer_count
        if shape != (first.hidden_size, first.layer_count):
            raise VectorMismatchError(
                f"{vector.name}: width {shape[0]} and {shape[1]} layers, but {parts[0][0].name} has "
                f"{first.hidden_size} and {first.layer_count}. Combine vectors of one model."
            )
    same_weights = len({vector.meta.fingerprint for vector, _ in parts}) == 1
    sums: dict[int, np.ndarray] = {}
    norms: dict[str, float] = {}
    for vector, weight in parts:
        for layer, array in vector.layers.items():
            sums[layer] = sums.get(layer, 0) + weight * array.astype(np.float64)
        norms = (vector.meta.residual_norms or {}) | norms
    name = " + ".join(f"{weight:g} {vector.name}" for vector, weight in parts)
    meta = VectorMeta(
        model=first.model,
        hidden_size=first.hidden_size,
        layer_count=first.layer_count,
        fingerprint=first.fingerprint if same_weights else None,
        method=f"combined: {name}",
        residual_norms=norms if same_weights and first.fingerprint and norms else None,
    )
    return SteeringVector(sums, meta, name=name)


def format_layers(layers: Iterable[int]) -> str:
    """Return layer numbers as text: ``0-3, 7``; of more than ``SHOWN_RUNS`` runs, the first."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    shown = [f"{a}" if a == b else f"{a}-{b}" for a, b in runs[:SHOWN_RUNS]]
    return ", ".join([*shown, "..."] if len(runs) > SHOWN_RUNS else shown)


def _meta_problems(meta: VectorMeta) -> list[str]:
    problems = []
    if not (0 < meta.hidden_size < 2**24 and 0 < meta.layer_count < 2**16):
        problems.append(
            f"no model has hidden size {reprlib.repr(meta.hidden_size)} and layer count "
            f"{reprlib.repr(meta.layer_count)}"
        )
    if meta.hook_point != HOOK_POINT:
        problems.append(
            f"hook point {reprlib.repr(meta.hook_point)}, but this version reads {HOOK_POINT!r}"
        )
    if meta.operator != OPERATOR:
        problems.append(
            f"operator {reprlib.repr(meta.operator)}, but this version knows only {OPERATOR!r}"
        )
    norms, gains = meta.residual_norms or {}, meta.margin_gain or {}
    if not all(_LAYER.fullmatch(key) and _is_number(norms[key], above=0) for key in norms):
        problems.append("`residual_norms` does not give a positive number for each layer")
    if not all(_LAYER.fullmatch(key) and _is_number(gains[key]) for key in gains):
        problems.append("`margin_gain` does not give a number for each layer")
    best = meta.recommended
    if best is not None and not (
        is_layers(best.get("layers"))
        and _is_number(best.get("strength"))
        and (best.get("positions") is None or is_positions(best["positions"]))
        and isinstance(best.get("text", ""), str)
    ):
        problems.append("`recommended` has no layers, strength and positions that can be applied")
    if not all(isinstance(setting, Mapping) for setting in meta.tested):
        problems.append("`tested` is not a list of settings")
    if meta.calibration is not None and not _is_calibration(meta.calibration):
        problems.append("`calibration` has no points that can be looked up")
    return problems


_LAYER = re.compile(r"\d{1,5}", re.ASCII)  # the key of a layer's figure


def is_layers(value: object) -> bool:
    """Tell whether a value of a JSON document is a list of layer numbers, at least one."""
    return (
        isinstance(value, list | tuple)
        and 0 < len(value) == len(set(map(str, value)))
        and all(type(layer) is int and layer >= 0 for layer in value)
    )


def _is_calibration(found: Mapping[str, object]) -> bool:
    points = found.get("points")
    return isinstance(points, list | tuple) and all(
        isinstance(point, Mapping)
        and is_layers(point.get("layers"))
        and is_positions(point.get("positions"))
        and _is_number(point.get("kl"), above=0)
        and _is_number(point.get("strength"))
        and point["strength"] != 0
        for point in points
    )


def _is_number(value: object, *, above: float = -math.inf) -> bool:
    """Tell whether a figure can be computed with: not so large or small that a ratio overflows."""
    return (
        type(value) in (int, float)
        and above < value  # type: ignore[operator]
        and (value == 0 or 1e-30 < abs(value) < 1e30)  # type: ignore[arg-type]
    )


def parse_document(path: Path, data: bytes | str) -> tuple[VectorMeta, list[int]]:
    """Read the JSON document of ``SteeringVector.describe``; return the metadata and the layers it lists.

    Raises:
        VectorFormatError: too long, not such a document, or of another version.
    """
    document = parse_object(
        data,
        f"{path}: `meta`",
        error=VectorFormatError,
        limit=MAX_META_BYTES,
        remedy="Make or download the file again.",
    )
    version = document.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise VectorFormatError(
            f"{path}: format version {reprlib.repr(version)}, but this is mlx-densesteer {__version__}, which "
            f"reads version {FORMAT_VERSION}. Install a newer mlx-densesteer."
        )
    del document["format_version"]
    document.pop("format", None)
    layers = document.pop("layers", None)
    if (
        not isinstance(layers, list)
        or not all(type(layer) is int and layer >= 0 for layer in layers)
        or len(set(layers)) != len(layers)
    ):
        raise VectorFormatError(f"{path}: `layers` in its metadata is not a list of layer numbers.")
    names = {f.name for f in fields(VectorMeta)} - {"extra"}
    known = {key: document.pop(key) for key in list(document) if key in names}
    for key in ("model", "hidden_size", "layer_count", "hook_point", "operator"):
        if key not in known:
            raise VectorFormatError(f"{path}: its metadata lacks `{key}`.")
    for key, value in known.items():
        kind = _TYPES.get(key, str)
        optional = value is None and key not in ("model", "hidden_size", "layer_count")
        if not optional and (not isinstance(value, kind) or isinstance(value, bool)):
            raise VectorFormatError(
                f"{path}: `{key}` in its metadata is {reprlib.repr(value)}, expected {kind.__name__}."
            )
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise VectorFormatError(
                f"{path}: `{key}` in its metadata has {len(value)} characters, expected at most {MAX_TEXT}."
            )
    known["tested"] = tuple(map(_with_layers, known.get("tested") or ()))
    known["recommended"] = _with_layers(known.get("recommended"))
    return VectorMeta(**known, extra=document), layers  # type: ignore[arg-type]


_TYPES = {  # every other key is text
    **dict.fromkeys(("hidden_size", "layer_count", "pair_count"), int),
    **dict.fromkeys(("residual_norms", "margin_gain", "recommended", "calibration"), dict),
    "tested": list,
}


def _with_layers(setting: object) -> object:
    """Return a setting with ``layers`` for the ``layer`` that older files have."""
    if not isinstance(setting, dict) or "layer" not in setting or "layers" in setting:
        return setting
    layer = setting["layer"]
    old = {key: value for key, value in setting.items() if key != "layer"}
    return {"layers": None if layer is None else [layer]} | old


_HEADER = re.compile(
    rb"\{'descr': '(<f4|\|u1)', 'fortran_order': False, 'shape': \((\d{1,9}),\), \} *\n"
)


def _parse_npy(path: Path, entry: str, data: bytes, dtype: str) -> np.ndarray:
    """Read one ``.npy`` member of one dimension; ``dtype`` is ``"<f4"`` or ``"|u1"``.

    The header is a Python literal. It is compared with the expected one and never evaluated.
    """
    length = int.from_bytes(data[8:10], "little")
    header = _HEADER.fullmatch(data[10 : 10 + length])
    if data[:8] != b"\x93NUMPY\x01\x00" or header is None or header[1].decode() != dtype:
        raise VectorFormatError(
            f"{path}: {entry} is not a .npy array of one dimension and dtype {dtype} "
            f"({np.dtype(dtype)}); it begins with {data[:100]!r}."
        )
    body = data[10 + length :]
    count, itemsize = int(header[2]), np.dtype(dtype).itemsize
    if count * itemsize != len(body):
        raise VectorFormatError(
            f"{path}: {entry} claims {count} values, {count * itemsize} bytes, but holds {len(body)}."
        )
    return np.frombuffer(body, dtype=dtype)
