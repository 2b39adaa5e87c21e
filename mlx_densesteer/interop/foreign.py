"""What is known of a vector whose file does not say where it comes from."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..errors import VectorFormatError
from ..vector import VectorMeta


def foreign_meta(
    path: Path, kind: str, layers: Mapping[int, np.ndarray], model: str | None
) -> VectorMeta:
    """Return metadata for another project's file; the layer count is taken to be that of the file.

    Raises:
        VectorFormatError: no layers, several widths, or ``model`` is not given.
    """
    widths = sorted({array.shape[-1] if array.ndim else 0 for array in layers.values()})
    if len(widths) != 1:
        raise VectorFormatError(f"{path}: its layers have widths {widths}, expected one width.")
    if not model:
        raise VectorFormatError(
            f"{path}: does not say which model it was made for. Name it: --model (model=...)."
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return VectorMeta(
        model=model,
        hidden_size=widths[0],
        layer_count=max(layers) + 1,
        source=f"{path.name} ({kind}, sha256 {digest})",
    )
