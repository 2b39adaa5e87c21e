"""Load the model and build the application that serves it."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from starlette.types import ASGIApp

from .. import demo
from ..model.model import load
from .answers import Completions
from .app import build
from .encoding import Encoder, opening_tokens
from .engine import Engine
from .overview import Overview
from .settings import Settings
from .vectors import NamedVector, Vectors
from .worker import Worker


class Service(NamedTuple):
    """A loaded server, ready to listen."""

    application: ASGIApp
    engine: Engine
    vectors: Vectors


def start(
    model: str,
    given: Sequence[NamedVector],
    settings: Settings,
    *,
    cache_bytes: int,
    exact: bool = False,
) -> Service:
    """Load the model on a thread of its own and return the service.

    ``cache_bytes`` and ``exact`` are those of ``Worker``.

    Raises:
        DenseSteerError: the model cannot be loaded, or a given vector does not fit it.
    """
    made: list[Vectors] = []

    def load_on_thread() -> Worker:
        loaded = load(model)
        vectors = Vectors(given, loaded, settings)
        _ = loaded.info, loaded.measured_norms  # computed here; other threads only read them
        made.append(vectors)
        first = next(iter(vectors.all()), None)
        return Worker(
            loaded,
            rows=settings.limits.rows,
            cache_bytes=cache_bytes,
            usual=first.request().steering(loaded) if first else None,
            opens=opening_tokens(loaded.tokenizer),
            exact=exact,
        )

    engine = Engine(load_on_thread, rows=settings.limits.rows, waiting=settings.limits.queue)
    engine.start()
    vectors = made[0]
    completions = Completions(settings, engine, Encoder(vectors.model), vectors)
    overview = Overview(settings, vectors, toy=model == demo.NAME)
    return Service(build(completions, overview), engine, vectors)


def model_id(model: str, name: str | None) -> str:
    """Return the model's name for clients: ``name``, or the last part of its folder or Hub id."""
    return name or Path(model).expanduser().absolute().name
