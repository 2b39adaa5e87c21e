"""Steering vectors as safetensors: a tensor ``layer.L`` for each layer, the metadata in the header.

Files of other programs are read if each tensor is a vector whose name ends in the layer's number:
``layer.14``, ``layer_14``, ``direction.14``, ``14``.

Format: the safetensors format of Hugging Face; ``__metadata__["densesteer"]`` is the JSON document of
docs/vector-format.md.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ...errors import VectorFormatError
from ...files import atomic_file, read_file
from ..vector import SteeringVector
from .base import LAYER_NAME, check_numbers, layer_of, meta_of, upper_halves

_KEY = "densesteer"
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def save_safetensors(vector: SteeringVector, path: Path, *, layer_offset: int = 0) -> list[str]:
    """Do what ``export_vector`` does; return no remarks, because the format holds the whole vector."""
    from safetensors.numpy import save

    numbers = {layer: layer + layer_offset for layer in vector.layers}
    if min(numbers.values()) < 0:
        raise VectorFormatError(f"{path}: the layer offset {layer_offset} gives a layer below 0.")
    check_numbers(path, numbers.values())
    arrays = {f"layer.{numbers[layer]}": np.array(a) for layer, a in vector.layers.items()}
    document = json.dumps(vector.describe(), ensure_ascii=False)
    data = save(arrays, metadata={_KEY: document, "layer_offset": str(layer_offset)})
    with atomic_file(path) as file:
        file.write(data)
    return []


def load_safetensors(
    path: Path, *, model: str | None = None, layer_offset: int | None = None
) -> SteeringVector:
    """Do what ``import_vector`` does for a file of one float vector a tensor."""
    from safetensors import SafetensorError, deserialize, safe_open

    data = read_file(path, "a vector's file (.safetensors)")
    try:
        tensors = deserialize(data)
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise VectorFormatError(f"{path}: not a complete safetensors file ({error}).") from error
    offset = _offset(path, metadata) if layer_offset is None else layer_offset
    layers: dict[int, np.ndarray] = {}
    for name, tensor in tensors:
        match, kind, shape = LAYER_NAME.fullmatch(name), tensor["dtype"], tensor["shape"]
        if match is None or kind not in _DTYPES or len(shape) != 1:
            raise VectorFormatError(
                f"{path}: {name[:60]!r} of type {kind} and shape {shape}, expected one float vector for each "
                "layer: layer.14, layer_14, direction.14."
            )
        layer = layer_of(path, name, int(match[1]), offset, layers)
        array = np.frombuffer(tensor["data"], _DTYPES[kind])
        layers[layer] = upper_halves(array) if kind == "BF16" else array
    meta = meta_of(path, "safetensors", layers, model, metadata.get(_KEY))
    return SteeringVector(layers, meta, name=path.name)


def _offset(path: Path, metadata: Mapping[str, str]) -> int:
    text = metadata.get("layer_offset", "0") if _KEY in metadata else "0"
    if not re.fullmatch(r"-?\d{1,4}", text):
        raise VectorFormatError(f"{path}: its layer_offset {text[:20]!r} is not a number.")
    return int(text)
