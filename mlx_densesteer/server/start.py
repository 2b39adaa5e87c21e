"""Load models and build the application that serves them."""

import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
from starlette.types import ASGIApp

from ..model.model import check_memory, find, load
from ..model.prompt import opening_tokens
from .answers import Completions
from .app import build
from .encoding import Encoder
from .engine import Engine, Turns
from .faults import ending
from .models import Models
from .settings import Settings
from .vectors import NamedVector, Vectors
from .worker import Worker


class Service(NamedTuple):
    """A server, ready to listen; ``vectors`` are those of the model that is loaded, if one is."""

    application: ASGIApp
    models: Models
    vectors: Vectors | None


class Served:
    """A model and what answers with it; the engine loads it, and all is there after that.

    Args:
        place: the model's folder or Hub id.
        given: as for ``Vectors``.
        turns: as for ``Engine``.
    """

    vectors: Vectors
    completions: Completions

    def __init__(self, place: str, given: Sequence[NamedVector], settings: Settings, turns: Turns):
        self.place, self._given, self._settings, self._turns = place, given, settings, turns
        limits = settings.limits
        self.engine = Engine(self._load, rows=limits.rows, waiting=limits.queue, turns=turns)

    def end(self) -> None:
        """End the answers, in a process that ends."""
        self.engine.end()
        self.completions.encoder.close()

    def close(self) -> None:
        """End the thread and free the memory, in a process that goes on."""
        self.engine.close()
        turns = self._turns
        vars(self).clear()  # the network must go even while something refers to this
        with turns:
            gc.collect()
            mx.clear_cache()

    def _load(self) -> Worker:
        """Load the model, on the engine's thread."""
        settings = self._settings
        if settings.models is not None:
            check_memory(find(self.place), in_use=mx.get_active_memory())
        loaded = load(self.place)
        if self.engine.ending:
            raise ending()
        self.vectors = Vectors(self._given, loaded, settings)
        _ = loaded.info, loaded.measured_norms  # computed here; other threads only read them
        first = next(iter(self.vectors.all()), None)
        worker = Worker(
            loaded,
            rows=settings.limits.rows,
            cache_bytes=settings.cache_bytes,
            usual=first.request().steering(loaded) if first else None,
            opens=opening_tokens(loaded.tokenizer),
            exact=settings.exact,
        )
        self.completions = Completions(settings, self.engine, Encoder(loaded), self.vectors)
        return worker


def start(model: str | None, given: Sequence[NamedVector], settings: Settings) -> Service:
    """Load the model, if one is given, on a thread of its own and return the service.

    ``given`` are vectors of this model.

    Raises:
        DenseSteerError: the model cannot be loaded, or a given vector does not fit it.
    """
    turns = Turns()

    def made(name: str) -> Served:
        """Return what serves the model of this name, to be loaded."""
        if settings.models is None:
            return Served(model or "", given, settings, turns)
        own = replace(settings, name=name, own=settings.folder and settings.folder / name)
        if model is not None and name == settings.name:
            return Served(str(Path(model).expanduser()), given, own, turns)
        return Served(str(settings.models.absolute() / name), (), own, turns)

    models = Models(settings, made, has_first=model is not None)
    first = models.load_first() if model is not None else None
    return Service(build(settings, models), models, first and first.vectors)


def model_id(model: str, name: str | None) -> str:
    """Return the model's name for clients: ``name``, or the last part of its folder or Hub id."""
    return name or Path(model).expanduser().absolute().name
