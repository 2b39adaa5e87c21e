"""Shared by the readers and writers of other programs' vector files."""

import hashlib
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...errors import VectorFormatError
from ...files import MAX_BYTES
from ..vector import VectorMeta, format_layers, parse_document

# the name of a layer's tensor: layer.14, layer_14, direction.14, 14
LAYER_NAME = re.compile(r"(?:[A-Za-z_][\w.]*[._])?(\d{1,4})", re.ASCII)
LARGEST_NUMBER = 9999  # of a layer in a file


def check_numbers(path: Path, numbers: Iterable[int]) -> None:
    """Raise ``VectorFormatError`` for a layer number that ``import_vector`` would not read."""
    if bad := [number for number in numbers if number > LARGEST_NUMBER]:
        raise VectorFormatError(
            f"{path}: the layer offset makes it layer {bad[0]}; expected {LARGEST_NUMBER} at most."
        )


def check_total(path: Path, counts: Iterable[int]) -> None:
    """Raise ``VectorFormatError`` for layers of so many values that they cannot all be in the file.

    Layers may share bytes of a file, so a small one could fill the memory.
    """
    if (total := 4 * sum(counts)) > MAX_BYTES:
        raise VectorFormatError(
            f"{path}: its layers have {total:,} bytes as float32; a vector has at most {MAX_BYTES:,}."
        )


def upper_halves(array: np.ndarray) -> np.ndarray:
    """Return bfloat16 as float32: ``array`` holds the upper halves, as uint16."""
    return (array.astype(np.uint32) << 16).view(np.float32)


def layer_of(path: Path, name: str, number: int, offset: int, taken: Container[int]) -> int:
    """Return the layer of the tensor ``name``: ``number - offset``; not below 0, not in ``taken``."""
    layer = number - offset
    if layer < 0:
        raise VectorFormatError(
            f"{path}: {name} would be layer {layer}; the layer offset {offset} does not fit."
        )
    if layer in taken:
        raise VectorFormatError(f"{path}: layer {layer} is there twice.")
    return layer


def meta_of(
    path: Path,
    kind: str,
    layers: Mapping[int, np.ndarray],
    model: str | None,
    document: str | None = None,
) -> VectorMeta:
    """Return the metadata of a file that holds ``layers``.

    Args:
        kind: the kind of file, for ``VectorMeta.source``.
        model: the model's name from the user; it replaces the document's.
        document: the JSON that ``vector export`` wrote into the file. Without it, the last layer of the
            file is taken for the model's last.

    Raises:
        VectorFormatError: no layers, several widths, no document and no ``model``, or a document that
            lists other layers.
    """
    if document is not None:
        meta, listed = parse_document(path, document)
        if sorted(listed) != sorted(layers):
            raise VectorFormatError(
                f"{path}: its metadata lists layer {format_layers(listed)}, but it holds "
                f"{format_layers(layers)}. The file is incomplete, or the layer offset does not fit."
            )
        if model in (None, meta.model):
            return meta
        return replace(meta, model=model, fingerprint=None)
    widths = sorted({array.shape[-1] if array.ndim else 0 for array in layers.values()})
    if len(widths) != 1:
        raise VectorFormatError(f"{path}: its layers have widths {widths}, expected one width.")
    if not model:
        raise VectorFormatError(
            f"{path}: does not say which model it was made for. Name the model."
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return VectorMeta(
        model=model,
        hidden_size=widths[0],
        layer_count=max(layers) + 1,
        source=f"{path.name} ({kind}, sha256 {digest})",
    )
