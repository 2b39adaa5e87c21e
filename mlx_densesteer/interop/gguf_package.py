"""The ``gguf`` package of the llama.cpp project: an extra, and careless with damaged files."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ConversionError, DenseSteerError


def gguf_package(path: Path, kind: type[DenseSteerError] = ConversionError) -> Any:
    """Return the package, or raise ``kind`` where the extra is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise kind(
            f"{path}: GGUF files need the extra: pip install 'mlx-densesteer[gguf]'."
        ) from error
    return gguf


@contextlib.contextmanager
def damage(path: Path, kind: type[DenseSteerError] = ConversionError) -> Iterator[None]:
    """What foreign, truncated or corrupt files raise; gguf has no class of its own for it."""
    try:
        yield
    except (
        ValueError, KeyError, IndexError, TypeError, OverflowError, ZeroDivisionError
    ) as error:  # fmt: skip
        raise kind(f"{path}: no complete GGUF file ({error}). Download it again.") from error
