"""Steered small language models on Apple silicon.

Steering belongs to the KV cache, not to the model: load a model once, and every cache says
what is added to the residual stream while it is filled and read.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ._version import __version__ as __version__

if TYPE_CHECKING:
    from .errors import DenseSteerError as DenseSteerError
    from .evaluation.scoring import evaluate as evaluate
    from .evaluation.sweep import sweep as sweep
    from .export.bake import bake as bake
    from .export.function import export_function as export_function
    from .extraction.calibrate import calibrate as calibrate
    from .extraction.extract import extract as extract
    from .extraction.pairs import Pair as Pair
    from .generation.answer import Generation as Generation
    from .generation.batch import Batch as Batch
    from .generation.batch import generate_batch as generate_batch
    from .generation.brake import Brake as Brake
    from .generation.grammar import json_grammar as json_grammar
    from .generation.sampling import Sampling as Sampling
    from .generation.session import Session as Session
    from .generation.speculation import Draft as Draft
    from .generation.stream import generate as generate
    from .generation.stream import stream as stream
    from .generation.thread import ModelThread as ModelThread
    from .model.block import make_cache as make_cache
    from .model.convert import convert as convert
    from .model.model import Model as Model
    from .model.model import load as load
    from .steering.formats import export_vector as export_vector
    from .steering.formats import import_vector as import_vector
    from .steering.request import resolve as resolve
    from .steering.steering import Steering as Steering
    from .steering.steering import ThinkBudget as ThinkBudget
    from .steering.vector import SteeringVector as SteeringVector
    from .steering.vector import VectorMeta as VectorMeta

# Imported on first use (PEP 562): mlx-lm takes seconds to import, a vector file needs numpy
# alone. No room has the name of a function here: importing it would hide the function.
_HOMES = {
    "Batch": "generation.batch",
    "Brake": "generation.brake",
    "DenseSteerError": "errors",
    "Draft": "generation.speculation",
    "Generation": "generation.answer",
    "ModelThread": "generation.thread",
    "Pair": "extraction.pairs",
    "Sampling": "generation.sampling",
    "Session": "generation.session",
    "Steering": "steering.steering",
    "SteeringVector": "steering.vector",
    "ThinkBudget": "steering.steering",
    "VectorMeta": "steering.vector",
    "bake": "export.bake",
    "calibrate": "extraction.calibrate",
    "convert": "model.convert",
    "evaluate": "evaluation.scoring",
    "export_function": "export.function",
    "export_vector": "steering.formats",
    "extract": "extraction.extract",
    "generate": "generation.stream",
    "generate_batch": "generation.batch",
    "import_vector": "steering.formats",
    "json_grammar": "generation.grammar",
    "Model": "model.model",
    "load": "model.model",
    "make_cache": "model.block",
    "resolve": "steering.request",
    "stream": "generation.stream",
    "sweep": "evaluation.sweep",
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
