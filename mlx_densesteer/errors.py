"""Every error that this package raises on purpose.

    DenseSteerError
    ├── VectorError
    │   ├── VectorFormatError
    │   └── VectorMismatchError
    ├── SteeringError
    ├── ModelError
    │   ├── UnsupportedModelError
    │   └── ModelTooLargeError
    ├── HubError
    ├── ConversionError
    ├── ExportError
    ├── DistributedError
    ├── DiskError
    ├── SessionError
    └── InputError
        └── ContextError

A message says what was found, what was expected and the remedy. Any other exception is a bug and
keeps its traceback.
"""

import json
import shlex
import sys
from pathlib import Path
from urllib.parse import unquote, urlparse

_LONGEST = 1200  # characters of a message


class DenseSteerError(Exception):
    """Base class: what a user can do something about.

    A message that quotes more than can be read loses its middle; its end, the remedy, stays.
    """

    def __str__(self) -> str:
        message = super().__str__()
        if len(message) <= _LONGEST:
            return message
        return f"{message[: _LONGEST // 2]} [...] {message[-_LONGEST // 3 :]}"


class VectorError(DenseSteerError):
    """A steering vector that cannot be used."""


class VectorFormatError(VectorError):
    """A vector file that is missing, damaged, hostile, or of another format or version."""


class VectorMismatchError(VectorError):
    """A vector that does not fit the model, or lacks a requested layer."""


class SteeringError(DenseSteerError):
    """A steering that cannot be applied: strength, layers, positions or KV cache."""


class ModelError(DenseSteerError):
    """A model that cannot be loaded or patched."""


class UnsupportedModelError(ModelError):
    """A model that cannot be steered, or that mlx-lm computes otherwise than transformers."""


class ModelTooLargeError(ModelError):
    """A model that does not fit in the machine's memory."""


class HubError(DenseSteerError):
    """Files that the Hugging Face Hub did not deliver."""


class ConversionError(DenseSteerError):
    """A conversion that cannot start, or whose result did not pass its check."""


class ExportError(DenseSteerError):
    """An export that the other program's format cannot hold, or that did not pass its check."""


class DistributedError(DenseSteerError):
    """Ranks that cannot reach each other, or a model that cannot be cut into their number of parts."""


class DiskError(DenseSteerError):
    """A file or folder that cannot be written, or a disk without room for it."""


class InputError(DenseSteerError):
    """A prompt or a contrastive pair that cannot be used."""


class ContextError(InputError):
    """A conversation that does not fit the model's context."""


class SessionError(DenseSteerError):
    """A step that a conversation cannot take, or a file that is no saved session."""


_PACKAGE = "mlx-densesteer"
_TOOLS = {  # the file that marks a tool's environment, and its command
    "uv-receipt.toml": "uv tool install --force",
    "pipx_metadata.json": "pipx install --force",
}


def install_command(extra: str) -> str:
    """Return the command that adds ``extra``, such as ``pip install -e '/src/mlx-densesteer[serve]'``.

    uv and pipx make their environment anew, so the user must name the installed extras again.
    """
    place, editable = _origin()
    wanted = shlex.quote(f"{place}[{extra}]")
    for mark, tool in _TOOLS.items():
        if (Path(sys.prefix) / mark).is_file():
            option = "--editable " if editable else ""
            return f"{tool} {option}{wanted} (and name what other extras you use)"
    return f"pip install {'-e ' if editable else ''}{wanted}"


def _origin() -> tuple[str, bool]:
    """Return where pip installed the package from (a path or its name), and whether it is editable."""
    from importlib.metadata import PackageNotFoundError, distribution  # slow to import

    try:
        found = json.loads(distribution(_PACKAGE).read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        found = {}
    address = urlparse(found.get("url", ""))
    if address.scheme != "file":
        return _PACKAGE, False
    return unquote(address.path), bool(found.get("dir_info", {}).get("editable"))
