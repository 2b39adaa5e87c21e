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
