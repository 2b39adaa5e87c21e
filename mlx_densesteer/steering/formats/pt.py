"""Steering vectors that torch saved: a ``SteeringVector`` of ``steering-vectors``, ``{layer: tensor}``, or a bare tensor.

A ``.pt`` file is a zip archive with a pickle (``data.pkl``) and one raw file per storage. An ordinary
unpickler imports and calls whatever the pickle names. This one knows a few names, gives each a harmless
stand-in, and refuses a pickle with any other name.

A tensor is float16, bfloat16, float32 or float64, of shape ``(hidden,)`` or with further dimensions of 1,
contiguous or not, and may be an ``nn.Parameter``. A layer is an integer, or a name that ends in one
(``layer_14``). A bare tensor, ``(hidden,)`` or ``(layers, hidden)``, says neither its layer nor its sign: SEAL, ASC and
ReBalance publish such; the caller has to know both. Files in torch's older format (before 1.6) are refused: they are no zip archives.

Format: torch.save with the zip serialisation, ``torch/serialization.py``.
"""

import io
import pickle
import pickletools
import reprlib
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...errors import VectorFormatError
from ...files import read_archive, read_file
from ...text import one_line
from ..vector import SteeringVector
from .base import LAYER_NAME, check_total, layer_of, meta_of, upper_halves

Towards = Literal["dense", "sparse"]


class _SteeringVectorState:
    """Stands in for ``steering_vectors.SteeringVector``; receives its ``__dict__``."""

    state: dict[str, object] | None = None

    def __setstate__(self, state: dict[str, object]) -> None:
        self.state = state


class _Storage:
    """Stands in for the storage classes of torch, one subclass each."""

    dtype: str


class _Refused(Exception):
    """The pickle uses another name than these, or uses one in another way than torch does."""


class _Unsuitable(Exception):
    """The pickle is harmless, but holds something else than vectors."""


def _rebuild_tensor(
    storage: object, offset: object, size: object, stride: object, *_: object
) -> np.ndarray:
    """Stand in for ``torch._utils._rebuild_tensor_v2``, for one vector or a table of vectors; other dimensions are 1."""
    if not (isinstance(storage, np.ndarray) and type(offset) is int):
        raise _Refused("a tensor without a storage of floats")
    shape = f"a tensor of size {reprlib.repr(size)} and stride {reprlib.repr(stride)}"
    if not (_are_numbers(size) and _are_numbers(stride) and len(size) == len(stride)):
        raise _Refused(shape)
    long = [(count, step) for count, step in zip(size, stride, strict=True) if count != 1] or [
        (1, 1)
    ]
    if not size or len(long) > 2:
        raise _Unsuitable(f"{shape}; expected one vector for each layer")
    reach = offset + sum((count - 1) * step for count, step in long)
    if any(n < 0 or step < 1 for n, step in long) or not 0 <= offset <= reach < len(storage):
        raise _Refused(f"{shape} at {reprlib.repr(offset)} in a storage of {len(storage)}")
    if len(long) == 1:
        return storage[offset : reach + 1 : long[0][1]]
    (rows, down), (width, step) = long
    if rows * width > len(storage):  # a table that repeats its storage
        raise _Refused(shape)
    return np.stack(
        [
            storage[at : at + (width - 1) * step + 1 : step]
            for at in range(offset, offset + rows * down, down)
        ]
    )


def _are_numbers(value: object) -> bool:
    return isinstance(value, tuple) and all(type(one) is int for one in value)


def _rebuild_parameter(data: object, *_: object) -> object:
    """Stand in for ``torch._utils._rebuild_parameter``: the parameter's tensor."""
    return data


_OLDER = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")  # the first object of such a file
MAX_PICKLE_BYTES = 2**20  # real pickles have 2,000 to 3,000

_DTYPES = {"Half": "<f2", "BFloat16": "<u2", "Float": "<f4", "Double": "<f8"}  # u2: upper halves
_GLOBALS = {
    ("steering_vectors.steering_vector", "SteeringVector"): _SteeringVectorState,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("collections", "OrderedDict"): OrderedDict,
    **{
        ("torch", f"{name}Storage"): type(name, (_Storage,), {"dtype": dtype})
        for name, dtype in _DTYPES.items()
    },
}


# What torch.save writes for such a vector (protocol 2), then harmless ones of other protocols: with
# them the error can name the refused global. BUILD, which can set attributes, is allowed once; the
# stand-ins are new for every file, so no attribute stays.
_OPCODES = {
    "PROTO", "GLOBAL", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "MARK", "STOP",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "EMPTY_DICT", "SETITEM", "SETITEMS", "BINUNICODE",
    "BININT", "BININT1", "BININT2", "NEWFALSE", "NEWTRUE", "NEWOBJ", "BUILD", "REDUCE", "BINPERSID",
    "PUT", "GET", "UNICODE", "FRAME", "MEMOIZE", "SHORT_BINUNICODE", "STACK_GLOBAL", "TUPLE2",
    "TUPLE3", "NONE", "INT", "LONG1", "BINFLOAT", "EMPTY_LIST", "APPEND", "APPENDS",
}  # fmt: skip


def _fresh(stand_in: Any) -> Any:
    """Return a copy of a stand-in that the pickle may change."""
    if stand_in is OrderedDict:  # built in: no attribute can be set
        return stand_in
    if isinstance(stand_in, type):
        return type(stand_in.__name__, (stand_in,), {})
    return partial(stand_in)


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, storages: dict[str, bytes]):
        super().__init__(io.BytesIO(data))
        self._storages = storages
        self._globals = {name: _fresh(stand_in) for name, stand_in in _GLOBALS.items()}

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._globals[module, name]
        except KeyError:
            if module == "torch" and name.endswith("Storage"):
                raise _Unsuitable(
                    f"a tensor of {reprlib.repr(name)}; expected float16, bfloat16, float32 or float64"
                ) from None
            raise _Refused(f"the global {module}.{name}") from None

    def persistent_load(self, pid: object) -> np.ndarray:
        match pid:
            case ("storage", type() as kind, str(key), str(), int(count)) if (
                issubclass(kind, _Storage) and kind is not _Storage
            ):
                data, dtype = self._storages.get(key), np.dtype(kind.__base__.dtype)
                if data is None or len(data) != dtype.itemsize * count:
                    raise _Refused(
                        f"a storage {reprlib.repr(key)} of {reprlib.repr(count)} values that is not in "
                        "the file"
                    )
                return np.frombuffer(data, dtype)
        raise _Refused(f"the persistent id {reprlib.repr(pid)}")


def load_pt(
    path: Path, *, model: str, layer: int | None = None, towards: Towards | None = None
) -> SteeringVector:
    """Do what ``import_vector`` does for a file of torch; float16 and bfloat16 become float32 exactly."""
    data = read_file(path, "a vector's file (.pt)")
    if _OLDER in data[:32]:
        raise VectorFormatError(
            f"{path}: is in torch's format from before 1.6. Load it with torch, and save it again "
            "with torch.save."
        )
    members = read_archive(path, data)
    root, pickled, storages = _parts(path, members)
    if members.get(f"{root}byteorder", b"little").strip() != b"little":
        raise VectorFormatError(f"{path}: was saved on a big-endian machine; save it again.")
    layers = _layers(path, _unpickle(path, pickled, storages), layer, towards)
    meta = meta_of(path, "steering-vectors .pt" if layer is None else "tensor .pt", layers, model)
    return SteeringVector(layers, meta, name=path.name)


def _parts(path: Path, members: dict[str, bytes]) -> tuple[str, bytes, dict[str, bytes]]:
    pickles = [name for name in members if name.endswith("data.pkl") and name.count("/") <= 1]
    if len(pickles) != 1:
        raise VectorFormatError(
            f"{path}: not a file of torch.save (no data.pkl). "
            "Expected a .pt file of steering-vectors, or of torch.save({layer: tensor})."
        )
    root = pickles[0].removesuffix("data.pkl")
    prefix = f"{root}data/"
    storages = {n.removeprefix(prefix): d for n, d in members.items() if n.startswith(prefix)}
    return root, members[pickles[0]], storages


def _unpickle(path: Path, data: bytes, storages: dict[str, bytes]) -> object:
    try:
        _check_opcodes(data)
        return _Unpickler(data, storages).load()
    except _Refused as error:
        raise VectorFormatError(
            f"{path}: refused, its pickle asks for {error}. Nothing was executed. Only tensors and "
            "SteeringVector are read. Take the vector from a source that you trust, or save it as "
            "torch.save({layer: tensor})."
        ) from error
    except _Unsuitable as error:
        raise VectorFormatError(f"{path}: holds {error}.") from error
    except (  # what a damaged or hostile pickle raises
        pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError,
        ValueError, OverflowError, ImportError, RecursionError, MemoryError,
    ) as error:  # fmt: skip
        raise VectorFormatError(f"{path}: its pickle is damaged ({one_line(error)}).") from error


def _check_opcodes(data: bytes) -> None:
    if len(data) > MAX_PICKLE_BYTES:
        raise _Refused(f"{len(data)} bytes of objects")
    builds, slots, tuples, last = 0, 0, set(), ""
    for opcode, argument, _ in pickletools.genops(data):
        builds += opcode.name == "BUILD"
        # Refuse tuples that hold one tuple twice: nested, their hash would take for ever.
        if opcode.name.endswith("PUT") or opcode.name == "MEMOIZE":
            if "TUPLE" in last:
                tuples.add(slots if argument is None else argument)
            slots += 1
        elif opcode.name.endswith("GET") and argument in tuples:
            raise _Refused("a tuple in two places")
        last = opcode.name
        if opcode.name not in _OPCODES or builds > 1:
            raise _Refused(f"the operation {opcode.name}")
        # The unpickler allocates memory up to the memo slot that a PUT names.
        if opcode.name.endswith("PUT") and argument > len(data):
            raise _Refused(f"memo slot {argument}")


def _bare(
    path: Path, found: np.ndarray, layer: int | None, towards: Towards | None
) -> dict[int, np.ndarray]:
    """Return the vector of a tensor that says neither its layer nor its sign."""
    table = f"a table of {len(found)} vectors" if found.ndim == 2 else "one vector"
    if layer is None or towards is None:
        raise VectorFormatError(
            f"{path}: holds {table}, without a layer and a sign. Say which layer's output it is added to (--layer), "
            "and whether it points towards dense or towards sparse reasoning (--towards)."
        )
    if found.ndim == 2 and not 0 <= layer < len(found):
        raise VectorFormatError(f"{path}: holds {table}, so it has no row for layer {layer}.")
    check_total(path, [found.size])
    row = found[layer] if found.ndim == 2 else found
    row = upper_halves(row) if row.dtype == "<u2" else row
    return {layer: row if towards == "dense" else -row}


def _layers(
    path: Path, found: object, layer: int | None = None, towards: Towards | None = None
) -> dict[int, np.ndarray]:
    named = found
    if isinstance(found, _SteeringVectorState):
        state = found.state if isinstance(found.state, dict) else {}
        named, kind = state.get("layer_activations"), state.get("layer_type")
        if kind != "decoder_block":
            raise VectorFormatError(
                f"{path}: layer type {reprlib.repr(kind)}, expected 'decoder_block'. Only vectors that were read "
                "at the output of a decoder block can be used."
            )
    if isinstance(found, np.ndarray):
        return _bare(path, found, layer, towards)
    if not isinstance(named, dict) or not named:
        raise VectorFormatError(
            f"{path}: holds no vectors by layer. Expected a SteeringVector of steering_vectors, or "
            "torch.save({layer: tensor})."
        )
    if layer is not None or towards is not None:
        raise VectorFormatError(
            f"{path}: names its layers, and is read as towards dense. Leave --layer and --towards out; a negative "
            "strength steers the other way."
        )
    check_total(path, (array.size for array in named.values() if isinstance(array, np.ndarray)))
    layers: dict[int, np.ndarray] = {}
    for name, array in named.items():
        match = LAYER_NAME.fullmatch(name) if isinstance(name, str) else None
        number = int(match[1]) if match else name
        if type(number) is not int or not isinstance(array, np.ndarray) or array.ndim != 1:
            raise VectorFormatError(f"{path}: layer {reprlib.repr(name)} is not one vector.")
        layer = layer_of(path, reprlib.repr(name), number, 0, layers)
        layers[layer] = upper_halves(array) if array.dtype == "<u2" else array
    return layers
