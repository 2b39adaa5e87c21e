"""Steered small language models on Apple silicon.

Steering belongs to the KV cache, not to the model: load a model once, and every cache says
what is added to the residual stream while it is filled and read.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ._version import __version__ as __version__

if TYPE_CHECKING:
    from .batch import Batch as Batch
    from .batch import generate_batch as generate_batch
    from .brake import Brake as Brake
    from .conversion import convert as convert
    from .errors import DenseSteerError as DenseSteerError
    from .evaluation import evaluate as evaluate
    from .export.baking import bake as bake
    from .export.function import export_function as export_function
    from .extraction import extract as extract
    from .generation import Generation as Generation
    from .generation import Sampling as Sampling
    from .generation import generate as generate
    from .generation import stream as stream
    from .grid import sweep as sweep
    from .interop import export_vector as export_vector
    from .interop import import_vector as import_vector
    from .model import load as load
    from .model_thread import ModelThread as ModelThread
    from .pairs import Pair as Pair
    from .patch import make_cache as make_cache
    from .session import Session as Session
    from .speculation import Draft as Draft
    from .steering import Steering as Steering
    from .vector import SteeringVector as SteeringVector
    from .vector import VectorMeta as VectorMeta

# Imported on first use (PEP 562): mlx-lm takes seconds to import, a vector file needs numpy
# alone. No module has the name of a function here: importing it would hide the function.
_HOMES = {
    "Batch": "batch",
    "Brake": "brake",
    "DenseSteerError": "errors",
    "Draft": "speculation",
    "Generation": "generation",
    "ModelThread": "model_thread",
    "Pair": "pairs",
    "Sampling": "generation",
    "Session": "session",
    "Steering": "steering",
    "SteeringVector": "vector",
    "VectorMeta": "vector",
    "bake": "export.baking",
    "convert": "conversion",
    "evaluate": "evaluation",
    "export_function": "export.function",
    "export_vector": "interop",
    "extract": "extraction",
    "generate": "generation",
    "generate_batch": "batch",
    "import_vector": "interop",
    "load": "model",
    "make_cache": "patch",
    "stream": "generation",
    "sweep": "grid",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
