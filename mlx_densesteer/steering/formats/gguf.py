"""Control vectors of llama.cpp: GGUF files with one tensor ``direction.N`` for each layer.

llama.cpp adds ``direction.N`` to the output of block N (0-based), which is layer N here. Its loader
refuses ``direction.0``, so llama.cpp cannot steer layer 0. Its own ``cvector-generator`` reads the output
of block k and writes it as ``direction.(k+1)``; ``layer_offset`` 1 reads and writes such files.

The ``gguf`` package of the llama.cpp project is an extra. It trusts every length in a file, so
``check_header`` checks them first. ``model.gguf`` uses the same functions for models.

Format: the GGUF specification of ggml; ``common_control_vector_load`` (common/common.cpp),
``llama_adapter_cvec`` and ``tools/cvector-generator`` of llama.cpp; repeng writes the same.
"""

import contextlib
import json
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ...errors import (
    ConversionError,
    DenseSteerError,
    DiskError,
    VectorFormatError,
    install_command,
)
from ...files import atomic_path, read_file
from ..vector import SteeringVector, format_layers
from .base import check_numbers, check_total, layer_of, meta_of

if TYPE_CHECKING:
    from gguf import GGUFReader

ARCHITECTURE = "controlvector"
_META, _OFFSET = "mlx_densesteer.meta", "mlx_densesteer.layer_offset"
_KEPT = "mlx_densesteer.layer."  # float32 arrays of layers that have no direction
_DIRECTION = re.compile(r"direction\.(\d{1,4})")


def save_control_vector(vector: SteeringVector, path: Path, *, layer_offset: int = 0) -> list[str]:
    """Do what ``export_vector`` does. Layer L becomes ``direction.(L + layer_offset)``.

    Layers and metadata that a control vector cannot hold go into extra fields, which llama.cpp ignores.

    Raises:
        VectorFormatError: the extra ``gguf`` is missing, or llama.cpp can steer no layer of the vector.
    """
    gguf = gguf_package(path, VectorFormatError)
    numbers = {layer: layer + layer_offset for layer in vector.layers}
    check_numbers(path, numbers.values())
    kept = [layer for layer, number in numbers.items() if number < 1]
    if len(kept) == len(numbers):
        raise VectorFormatError(
            f"{path}: llama.cpp steers no layer below 1, and {vector.name} holds only layer "
            f"{format_layers(kept)}. Choose other layers, or write safetensors."
        )
    with atomic_path(path) as made:
        writer = gguf.GGUFWriter(made, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", "qwen2")
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(numbers) - len(kept))
        writer.add_string(_META, json.dumps(vector.describe(), ensure_ascii=False))
        writer.add_int32(_OFFSET, layer_offset)
        for layer in kept:
            writer.add_array(f"{_KEPT}{layer}", vector.layers[layer].tolist())
        for layer in sorted(numbers.keys() - set(kept)):
            writer.add_tensor(f"direction.{numbers[layer]}", vector.layers[layer])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with complete(made, path):
            found = load_control_vector(made, model=vector.meta.model)
            if found.sha256() != vector.sha256():
                raise ValueError("other values came back")
    return _not_expressed(vector, numbers, kept)


def load_control_vector(
    path: Path, *, model: str | None = None, layer_offset: int | None = None
) -> SteeringVector:
    """Do what ``import_vector`` does. ``direction.N`` becomes layer ``N - layer_offset``."""
    gguf = gguf_package(path, VectorFormatError)
    read_file(path, "a control vector (.gguf)")
    check_header(path, VectorFormatError)
    with damage(path, VectorFormatError):
        reader = gguf.GGUFReader(path)
        architecture = contents(reader, "general.architecture")
        if architecture != ARCHITECTURE:
            raise VectorFormatError(
                f"{path}: is a GGUF of architecture {architecture!r}, expected {ARCHITECTURE!r}. "
                "A model is converted with `densesteer convert`."
            )
        offset = contents(reader, _OFFSET) or 0 if layer_offset is None else layer_offset
        layers = _directions(path, reader, int(offset))
        for name, field in reader.fields.items():
            if name.startswith(_KEPT) and name.removeprefix(_KEPT).isdecimal():
                layers[int(name.removeprefix(_KEPT))] = np.array(field.contents(), np.float32)
        document = contents(reader, _META)
        if not isinstance(document, str | None):
            raise VectorFormatError(f"{path}: its {_META} is not text.")
        meta = meta_of(path, "GGUF control vector", layers, model, document)
        return SteeringVector(layers, meta, name=path.name)


def _directions(path: Path, reader: "GGUFReader", offset: int) -> dict[int, np.ndarray]:
    from gguf.quants import dequantize

    layers = {}
    check_total(path, (int(tensor.n_elements) for tensor in reader.tensors))
    for tensor in reader.tensors:
        match = _DIRECTION.fullmatch(tensor.name)
        kind = tensor.tensor_type.name
        if match is None or kind not in ("F32", "F16", "BF16") or len(tensor.shape) != 1:
            raise VectorFormatError(
                f"{path}: {tensor.name} of type {kind} and shape {tuple(map(int, tensor.shape))}, "
                "expected float vectors direction.1, direction.2, ..."
            )
        layer = layer_of(path, tensor.name, int(match[1]), offset, layers)
        layers[layer] = np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)
    return layers


def contents(reader: "GGUFReader", key: str) -> Any:
    """Return the value of a field, ``None`` if the file has none."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _not_expressed(
    vector: SteeringVector, numbers: Mapping[int, int], kept: list[int]
) -> list[str]:
    """Return what llama.cpp does differently with this vector; it cannot steer the layers ``kept``."""
    told = []
    if kept:
        told.append(
            f"layer {format_layers(kept)} is kept for `vector import` only: llama.cpp steers no "
            "layer below 1"
        )
    beyond = [k for k, number in numbers.items() if number >= vector.meta.layer_count]
    if beyond:
        told.append(
            f"layer {format_layers(beyond)} is beyond the last block at this offset; llama.cpp ignores it"
        )
    if len(numbers) - len(kept) > 1:
        told.append(
            "llama.cpp steers every layer of a file, not one. Export one, or name a range there "
            "(--control-vector-layer-range)"
        )
    told.append("llama.cpp steers every position, prompt and response")
    return told


def gguf_package(path: Path, kind: type[DenseSteerError] = ConversionError) -> Any:
    """Return the package ``gguf``; raise ``kind`` where the extra is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise kind(
            f"{path}: GGUF files need the package gguf: {install_command('gguf')}"
        ) from error
    return gguf


@contextlib.contextmanager
def damage(path: Path, kind: type[DenseSteerError] = ConversionError) -> Iterator[None]:
    """Raise ``kind`` for the exceptions of the gguf package, which has no error class of its own."""
    try:
        yield
    except DenseSteerError:
        raise
    except Exception as error:
        raise kind(f"{path}: not a complete GGUF file ({error}). Download it again.") from error


@contextlib.contextmanager
def complete(made: Path, path: Path) -> Iterator[None]:
    """Raise ``DiskError`` for a file just ``made`` that cannot be read: the package does not notice
    a full disk when it closes a file."""
    try:
        with damage(made, DiskError):
            yield
    except DenseSteerError as error:
        raise DiskError(
            f"{path}: what was written did not arrive on the disk ({error.__cause__ or error}). Make "
            "room on the disk, or choose another place."
        ) from error


_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value
_STRING, _ARRAY = 8, 9


def check_header(path: Path, kind: type[DenseSteerError] = ConversionError) -> None:
    """Raise ``kind`` unless the file is as long as its header claims, without reading the values.

    Arrays of arrays are refused too: files of models and vectors have none.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        magic = file.read(4)
        if magic != b"GGUF":
            raise kind(f"{path}: is not a GGUF file: it does not begin with GGUF.")
        with damage(path, kind):
            version, tensors, fields = struct.unpack("<IQQ", file.read(20))
            if version not in (2, 3):
                raise ValueError(f"version {version}, expected 2 or 3")
            for _ in range(fields):
                _skip(file, _number(file, "<Q"), size)
                _skip_value(file, _number(file, "<I"), size)
            for _ in range(tensors):
                _skip(file, _number(file, "<Q"), size)
                _skip(file, 8 * _number(file, "<I") + 12, size)


def _skip_value(file: IO[bytes], kind: int, size: int) -> None:
    if kind == _STRING:
        _skip(file, _number(file, "<Q"), size)
    elif kind == _ARRAY:
        of, count = struct.unpack("<IQ", file.read(12))
        if of == _STRING:
            for _ in range(count):
                _skip(file, _number(file, "<Q"), size)
        else:
            _skip(file, _SIZES[of] * count, size)
    else:
        _skip(file, _SIZES[kind], size)


def _number(file: IO[bytes], form: str) -> int:
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _skip(file: IO[bytes], count: int, size: int) -> None:
    if file.tell() + count > size:
        raise ValueError(f"it claims {count} bytes at {file.tell()}, but ends at {size}")
    file.seek(count, 1)
