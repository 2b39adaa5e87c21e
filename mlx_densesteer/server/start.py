"""From what the command line says to a server that can listen."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from .. import demo
from .._version import __version__
from ..model.model import Model, load
from ..steering.request import Request
from .answers import Answerer
from .app import build
from .encoding import Encoder, opening_tokens
from .engine import Engine
from .guard import Application
from .overview import Overview
from .settings import Settings
from .vectors import Vectors
from .worker import Worker


class Started(NamedTuple):
    """A server that can listen."""

    application: Application
    engine: Engine
    model: Model
    vectors: Vectors


def start(
    name: str, given: Mapping[str, Request], settings: Settings, *, cache_bytes: int
) -> Started:
    """Load the model on a thread of its own and return what serves it.

    ``given`` are vectors that requests may name, each with what is asked for by default.

    Raises:
        DenseSteerError: the model cannot be loaded, or a given vector does not fit it.
    """
    made: list[tuple[Model, Vectors]] = []

    def on_the_thread() -> Worker:
        model = load(name)
        info = model.info
        vectors = Vectors(
            given, settings.folder, hidden_size=info.hidden_size, layer_count=info.layer_count
        )
        if given or settings.folder:
            _ = model.measured_norms  # other threads read it: mlx arrays belong to this one
        made.append((model, vectors))
        first = next(iter(vectors.all()), None)
        return Worker(
            model, rows=settings.limits.rows, cache_bytes=cache_bytes,
            usual=first.default.steering(model) if first else None, opens=opening_tokens(model),
        )  # fmt: skip

    engine = Engine(on_the_thread, rows=settings.limits.rows, queue=settings.limits.queue)
    engine.start()
    model, vectors = made[0]
    fingerprint = f"mlx-densesteer-{__version__}-{model.fingerprint[:8]}"
    answerer = Answerer(settings, engine, Encoder(model), vectors, model, fingerprint)
    overview = Overview(settings, model, vectors, name == demo.NAME)
    return Started(build(answerer, overview), engine, model, vectors)


def model_id(model: str, name: str | None) -> str:
    """Return the name under which clients ask for the model: the last part of a folder or a Hub id."""
    return name or Path(model).expanduser().absolute().name
