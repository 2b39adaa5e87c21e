"""From what the command line says to a server that can listen."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mlx_lm.tokenizer_utils import TokenizerWrapper

from .. import demo
from .._version import __version__
from ..model.model import ModelInfo, inspect, load
from ..steering.request import Default
from .answers import Answering
from .app import build
from .encoding import Encoder, opening_tokens
from .engine import Engine
from .guard import Application
from .job import ModelFacts
from .norms import Norms
from .overview import Overview
from .settings import Settings
from .vectors import Shelf
from .wanted import Wanted
from .worker import Worker


class Server(NamedTuple):
    """A server that can listen."""

    application: Application
    engine: Engine
    info: ModelInfo
    shelf: Shelf


class _Made(NamedTuple):
    """What the model's thread makes beside the worker."""

    tokenizer: TokenizerWrapper
    vocabulary: int
    info: ModelInfo
    facts: ModelFacts
    shelf: Shelf


def start(
    model: str, given: Mapping[str, Wanted], settings: Settings, *, cache_bytes: int
) -> Server:
    """Load the model on a thread of its own and return what serves it.

    ``given`` are vectors that requests may name, each with what it is by default.

    Raises:
        DenseSteerError: the model cannot be loaded, or a given vector does not fit it.
    """
    made: list[_Made] = []

    def on_the_thread() -> Worker:
        loaded, tokenizer = load(model)
        info = inspect(loaded, model)
        facts = ModelFacts(
            info.layer_count, info.hidden_size, loaded.args.max_position_embeddings, info.dtype,
            info.quantization, info.fingerprint,
        )  # fmt: skip
        norms = Norms(loaded, tokenizer)
        plain = {name: (one.vector, Default(one.layers, 1.0, one.positions, False))
                 for name, one in given.items()}  # fmt: skip
        size = {"hidden_size": facts.hidden_size, "layer_count": facts.layers}
        Shelf(plain, None, **size)  # refuses what does not fit, before anything is measured
        shelf = Shelf(
            {name: (one.vector, _default(one, norms)) for name, one in given.items()},
            settings.folder, **size,
        )  # fmt: skip
        made.append(_Made(tokenizer, loaded.args.vocab_size, info, facts, shelf))
        first = next(iter(shelf.all()), None)
        return Worker(
            loaded, tokenizer, norms, rows=settings.limits.rows, cache_bytes=cache_bytes,
            usual=first.steering if first else None, opens=opening_tokens(tokenizer),
        )  # fmt: skip

    engine = Engine(on_the_thread, rows=settings.limits.rows, queue=settings.limits.queue)
    engine.start()
    tokenizer, vocabulary, info, facts, shelf = made[0]
    encoder = Encoder(tokenizer, vocabulary=vocabulary, limit=facts.context - 1)
    fingerprint = f"mlx-densesteer-{__version__}-{facts.fingerprint[:8]}"
    answering = Answering(settings, engine, encoder, shelf, facts.context, fingerprint)
    overview = Overview(settings, facts, shelf, engine.norms, model == demo.NAME)
    return Server(build(answering, overview), engine, info, shelf)


def model_id(model: str, name: str | None) -> str:
    """Return the name under which clients ask for the model: the last part of a folder or a Hub id."""
    return name or Path(model).expanduser().absolute().name


def _default(given: Wanted, norms: Norms) -> Default:
    """Return what a vector is by default, its dose measured; a relative strength is rounded."""
    here = norms.of(given.vector, given.layers)
    strength = given.steering(here).strength
    if given.relative:
        strength = float(f"{strength:.3g}")  # as the preset's name says it
    return Default(given.layers, strength, given.positions, False)
