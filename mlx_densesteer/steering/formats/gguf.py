"""Control vectors of llama.cpp: GGUF files with one ``direction.N`` for each layer.

llama.cpp adds ``direction.N`` to the output of block N (0-based), which is our layer N. Its loader
refuses ``direction.0``, so layer 0 cannot be steered there. Its own ``cvector-generator`` writes what it
read at the output of block k as ``direction.(k+1)``; ``layer_offset`` 1 reads and writes such files.

Format: ``common_control_vector_load`` (common/common.cpp) and ``llama_adapter_cvec`` of llama.cpp,
``tools/cvector-generator``; repeng writes the same.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...errors import DiskError, VectorFormatError
from ...files import MAX_BYTES, scratch_folder
from ..vector import SteeringVector, format_layers
from .foreign import check_numbers, layer_of, meta_of
from .gguf_package import check_header, damage, gguf_package

if TYPE_CHECKING:
    from gguf import GGUFReader

ARCHITECTURE = "controlvector"
_META, _OFFSET = "mlx_densesteer.meta", "mlx_densesteer.layer_offset"
_KEPT = "mlx_densesteer.layer."  # float32 arrays of layers that have no direction
_DIRECTION = re.compile(r"direction\.(\d{1,4})")


def save_control_vector(vector: SteeringVector, path: Path, *, layer_offset: int = 0) -> list[str]:
    """Write a control vector, to a temporary name first; return what llama.cpp will not do with it.

    Layers and metadata that llama.cpp has no place for are kept in fields of ours, so that
    ``load_control_vector`` gives back the same vector, bit for bit.

    Args:
        path: the file, which is replaced.
        layer_offset: layer L is written as ``direction.(L + layer_offset)``.

    Raises:
        VectorFormatError: the extra ``gguf`` is missing, or no layer can be expressed.
    """
    gguf = gguf_package(path, VectorFormatError)
    if not path.parent.is_dir():
        raise DiskError(f"{path}: there is no folder {path.parent}. Make it first.")
    numbers = {layer: layer + layer_offset for layer in vector.layers}
    check_numbers(path, numbers.values())
    kept = [layer for layer, number in numbers.items() if number < 1]
    if len(kept) == len(numbers):
        raise VectorFormatError(
            f"{path}: llama.cpp steers no layer below 1, and {vector.name} holds only layer "
            f"{format_layers(kept)}. Choose other layers, or write safetensors."
        )
    with scratch_folder(path) as work:
        writer = gguf.GGUFWriter(work / path.name, ARCHITECTURE)
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
        (work / path.name).replace(path)
    return _not_expressed(vector, numbers, kept)


def load_control_vector(
    path: Path,
    *,
    model: str | None = None,
    layer_offset: int | None = None,
) -> SteeringVector:
    """Read a control vector; ``direction.N`` becomes layer ``N - layer_offset``.

    Args:
        model: that it was made for; needed where the file does not say.
        layer_offset: by default what the file says of itself, else 0 (as llama.cpp's loader applies
            it); 1 for files of llama.cpp's ``cvector-generator``.

    Raises:
        VectorFormatError: no control vector, damaged, larger than 64 MiB, a direction of another type
            or shape, or a layer below 0; the extra ``gguf`` is missing.
    """
    gguf = gguf_package(path, VectorFormatError)
    if path.stat().st_size > MAX_BYTES:
        raise VectorFormatError(f"{path}: has more than {MAX_BYTES} bytes; no vector file has.")
    check_header(path, VectorFormatError)
    with damage(path, VectorFormatError):
        reader = gguf.GGUFReader(path)
        architecture = _contents(reader, "general.architecture")
        if architecture != ARCHITECTURE:
            raise VectorFormatError(
                f"{path}: is a GGUF of architecture {architecture!r}, expected {ARCHITECTURE!r}. "
                "A model is converted with `densesteer convert`."
            )
        offset = _contents(reader, _OFFSET) or 0 if layer_offset is None else layer_offset
        layers = _directions(path, reader, int(offset))
        for name, field in reader.fields.items():
            if name.startswith(_KEPT) and name.removeprefix(_KEPT).isdecimal():
                layers[int(name.removeprefix(_KEPT))] = np.array(field.contents(), np.float32)
        document = _contents(reader, _META)
        if not isinstance(document, str | None):
            raise VectorFormatError(f"{path}: its {_META} is no text.")
        meta = meta_of(path, "GGUF control vector", document, layers, model)
        return SteeringVector(layers, meta, name=path.name)


def _directions(path: Path, reader: "GGUFReader", offset: int) -> dict[int, np.ndarray]:
    from gguf.quants import dequantize

    layers = {}
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


def _contents(reader: "GGUFReader", key: str) -> object:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _not_expressed(
    vector: SteeringVector, numbers: Mapping[int, int], kept: list[int]
) -> list[str]:
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
            "llama.cpp adds every layer of a file; ours adds one by default. Export one (-l), or "
            "name a range there (--control-vector-layer-range)"
        )
    told.append("llama.cpp steers every position, prompt and response")
    return told
