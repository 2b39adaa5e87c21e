"""Steering vectors of the reference implementation: a ``.pt`` file of ``steering-vectors``.

A ``.pt`` file is a zip archive with a pickle (``data.pkl``) and one raw file per storage. An ordinary
unpickler imports and calls whatever the pickle names. This one knows four names, gives each a harmless
stand-in, and refuses a pickle with any other name.

Format: torch.save with the zip serialisation, ``torch/serialization.py``.
"""

import io
import pickle
import pickletools
import reprlib
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import VectorFormatError
from ...files import read_archive
from ..vector import SteeringVector
from .base import meta_of


class _SteeringVectorState:
    """Stands in for ``steering_vectors.SteeringVector``; receives its ``__dict__``."""

    state: dict[str, object] | None = None

    def __setstate__(self, state: dict[str, object]) -> None:
        self.state = state


class _HalfStorage:
    """Stands in for ``torch.HalfStorage``: the marker of a float16 storage."""


class _Refused(Exception):
    """The pickle uses another name than the four, or uses one in another way than torch does."""


def _rebuild_tensor(
    storage: object, offset: object, size: object, stride: object, *_: object
) -> np.ndarray:
    """Stand in for ``torch._utils._rebuild_tensor_v2``, for contiguous vectors."""
    if not (isinstance(storage, np.ndarray) and isinstance(offset, int)):
        raise _Refused("a tensor without a float16 storage")
    if not (isinstance(size, tuple) and len(size) == 1 and stride == (1,)):
        raise _Refused(
            f"a tensor of size {reprlib.repr(size)} and stride {reprlib.repr(stride)}, "
            "expected a plain vector"
        )
    width = size[0]
    if not (isinstance(width, int) and 0 <= offset <= offset + width <= len(storage)):
        raise _Refused(
            f"a tensor of {reprlib.repr(width)} values at {offset} in a storage of {len(storage)}"
        )
    return storage[offset : offset + width]


MAX_PICKLE_BYTES = 2**20  # real pickles have 2,000 to 3,000

_GLOBALS = {
    ("steering_vectors.steering_vector", "SteeringVector"): _SteeringVectorState,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch", "HalfStorage"): _HalfStorage,
    ("collections", "OrderedDict"): OrderedDict,
}


# What torch.save writes for such a vector (protocol 2), then harmless ones of other protocols: with
# them the error can name the refused global. BUILD, which can set attributes, is allowed once; the
# stand-ins are new for every file, so no attribute stays.
_OPCODES = {
    "PROTO", "GLOBAL", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "MARK", "STOP",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "EMPTY_DICT", "SETITEM", "SETITEMS", "BINUNICODE",
    "BININT", "BININT1", "BININT2", "NEWFALSE", "NEWTRUE", "NEWOBJ", "BUILD", "REDUCE", "BINPERSID",
    "PUT", "GET", "UNICODE", "FRAME", "MEMOIZE", "SHORT_BINUNICODE", "STACK_GLOBAL", "TUPLE2",
    "TUPLE3",
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
            raise _Refused(f"the global {module}.{name}") from None

    def persistent_load(self, pid: object) -> np.ndarray:
        match pid:
            case ("storage", type() as kind, str(key), str(), int(count)) if issubclass(
                kind, _HalfStorage
            ):
                data = self._storages.get(key)
                if data is None or len(data) != 2 * count:
                    raise _Refused(f"a storage {key!r} of {count} values that is not in the file")
                return np.frombuffer(data, dtype="<f2")
        raise _Refused(f"the persistent id {reprlib.repr(pid)}")


def load_pt(path: Path, *, model: str) -> SteeringVector:
    """Do what ``import_vector`` does for a file of ``steering-vectors``; float16 becomes float32 exactly."""
    members = read_archive(path)
    root, pickled, storages = _parts(path, members)
    if members.get(f"{root}byteorder", b"little").strip() != b"little":
        raise VectorFormatError(f"{path}: was saved on a big-endian machine; save it again.")
    layers = _layers(path, _unpickle(path, pickled, storages))
    meta = meta_of(path, "steering-vectors .pt", layers, model)
    return SteeringVector(layers, meta, name=path.name)


def _parts(path: Path, members: dict[str, bytes]) -> tuple[str, bytes, dict[str, bytes]]:
    pickles = [name for name in members if name.endswith("data.pkl") and name.count("/") <= 1]
    if len(pickles) != 1:
        raise VectorFormatError(
            f"{path}: not a file of torch.save (no data.pkl). "
            "Expected a .pt file written by steering-vectors."
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
        names = ", ".join(f"{module}.{name}" for module, name in _GLOBALS)
        raise VectorFormatError(
            f"{path}: refused, its pickle asks for {error}. Nothing was executed. "
            f"Only {names} are read. Take the vector from a source that you trust."
        ) from error
    except (  # what a damaged or hostile pickle raises
        pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError,
        ValueError, OverflowError, ImportError, RecursionError, MemoryError,
    ) as error:  # fmt: skip
        raise VectorFormatError(f"{path}: its pickle is damaged ({error}).") from error


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


def _layers(path: Path, found: object) -> dict[int, np.ndarray]:
    state = found.state if isinstance(found, _SteeringVectorState) else None
    layers = state.get("layer_activations") if isinstance(state, dict) else None
    if not isinstance(layers, dict) or not layers:
        raise VectorFormatError(f"{path}: does not hold a SteeringVector of steering_vectors.")
    kind = state.get("layer_type")
    if kind != "decoder_block":
        raise VectorFormatError(
            f"{path}: layer type {reprlib.repr(kind)}, expected 'decoder_block'. Only vectors that were read at "
            "the output of a decoder block can be used."
        )
    for layer, array in layers.items():
        if type(layer) is not int or not isinstance(array, np.ndarray):
            raise VectorFormatError(f"{path}: layer {reprlib.repr(layer)} is not a tensor.")
    return layers
