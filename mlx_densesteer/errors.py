"""Every error this package raises on purpose.

    DenseSteerError
    ├── VectorError          a steering vector that cannot be used
    │   ├── VectorFormatError    the file is not there, or not what it claims to be
    │   └── VectorMismatchError  the vector does not fit the model or the request
    ├── SteeringError        a steering that cannot be applied (strength, layers, positions, cache)
    ├── ModelError           a model that cannot be loaded or patched
    │   └── UnsupportedModelError  not of the Qwen2 family
    ├── HubError             the model hub did not give us the files
    ├── ConversionError      a conversion that cannot start or did not pass its check
    ├── ExportError          an export that cannot say what was asked, or did not pass its check
    ├── DistributedError     several ranks that cannot work together
    ├── DiskError            not enough room
    ├── SessionError         a step that a conversation cannot take, or a file that is no session
    └── InputError           a prompt or pair that cannot be used
        └── ContextError         a conversation that does not fit the model's context

A message says what was found, what was expected and the remedy. Whatever is not a
``DenseSteerError`` is a bug and keeps its traceback.
"""

import json
import shlex
import sys
from pathlib import Path
from urllib.parse import unquote, urlparse


class DenseSteerError(Exception):
    """Base of every error that a user can do something about."""


class VectorError(DenseSteerError):
    """A steering vector that cannot be used."""


class VectorFormatError(VectorError):
    """A vector file that is missing, damaged, hostile, or of another format or version."""


class VectorMismatchError(VectorError):
    """A sound vector that does not fit the model, or lacks a layer that was asked for."""


class SteeringError(DenseSteerError):
    """A steering that cannot be applied."""


class ModelError(DenseSteerError):
    """A model that cannot be loaded or patched."""


class UnsupportedModelError(ModelError):
    """A model that is not of the Qwen2 family."""


class HubError(DenseSteerError):
    """The model hub did not give us the files."""


class ConversionError(DenseSteerError):
    """A conversion that cannot start, or whose result did not pass its check."""


class ExportError(DenseSteerError):
    """A steered model or vector that another program's format cannot hold, or a failed check."""


class DistributedError(DenseSteerError):
    """Ranks that cannot reach each other, or a model that cannot be cut into their number of parts."""


class DiskError(DenseSteerError):
    """Not enough room on the disk for what is to be written."""


class InputError(DenseSteerError):
    """A prompt or a contrastive pair that cannot be used."""


class ContextError(InputError):
    """A conversation that does not fit the model's context."""


class SessionError(DenseSteerError):
    """A step that a conversation cannot take, or a file that is no saved session."""


_PACKAGE = "mlx-densesteer"
_TOOLS = {  # who makes environments of their own, by what they leave in them
    "uv-receipt.toml": "uv tool install --force",
    "pipx_metadata.json": "pipx install --force",
}


def install_command(extra: str) -> str:
    """Return the command that adds ``extra``, such as ``pip install -e '/src/mlx-densesteer[serve]'``.

    An environment of uv or pipx is made anew, so the extras that it has must be named again; the
    command then says so.
    """
    place, editable = _origin()
    wanted = shlex.quote(f"{place}[{extra}]")
    for mark, tool in _TOOLS.items():
        if (Path(sys.prefix) / mark).is_file():
            option = "--editable " if editable else ""
            return f"{tool} {option}{wanted} (and name what other extras you use)"
    return f"pip install {'-e ' if editable else ''}{wanted}"


def _origin() -> tuple[str, bool]:
    """Return what was installed, a folder or a wheel or the name on an index, and whether it is editable."""
    from importlib.metadata import PackageNotFoundError, distribution  # slow to import

    try:
        found = json.loads(distribution(_PACKAGE).read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        found = {}
    address = urlparse(found.get("url", ""))
    if address.scheme != "file":
        return _PACKAGE, False
    return unquote(address.path), bool(found.get("dir_info", {}).get("editable"))
