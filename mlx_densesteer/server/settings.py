"""The settings of a server."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .effort import EFFORTS, Effort

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServerLimits:
    """Limits on what clients may ask for and occupy.

    Args:
        rows: answers that are generated together.
        queue: answers that may wait.
        max_tokens: most tokens of an answer.
        body: bytes of a request's body.
        header: bytes of all headers together.
        connections: connections at a time.
        idle: seconds for headers, for a body, for a reader that stalls, and for an idle connection.
        grace: seconds for running answers when the server ends.
        ping: seconds without a token after which a stream sends a comment.
    """

    rows: int = 16
    queue: int = 64
    max_tokens: int = 2048
    body: int = 2**20
    header: int = 2**15
    connections: int = 256
    idle: float = 30.0
    grace: float = 10.0
    ping: float = 10.0


@dataclass(frozen=True)
class Access:
    """Which clients are answered.

    Args:
        key: the API key, needed for ``/v1/`` if it is set.
        hosts: allowed names in the ``Host`` header.
        any_address: any IP address is allowed there too.
        origins: allowed origins of other web pages.
    """

    key: bytes | None = None
    hosts: frozenset[str] = frozenset(LOOPBACK)
    any_address: bool = False
    origins: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Settings:
    """All settings.

    Args:
        name: the model's name for clients.
        folder: holds further vectors.
        strict: those that were made for another model cannot be used.
        efforts: what levels of ``reasoning_effort`` mean.
        models: holds further models, each in a folder of its name.
        keep: models in memory at a time.
        unload: seconds without a request after which a model is unloaded; ``None``: never.
        own: holds vectors of this model alone; they come before those of ``folder``.
        cache_bytes: most bytes of a model's prompt cache.
        exact: answer as if every prompt were read anew, bit for bit.
    """

    name: str
    limits: ServerLimits = ServerLimits()
    access: Access = Access()
    folder: Path | None = None
    strict: bool = False
    efforts: Mapping[str, Effort] = field(default_factory=lambda: EFFORTS)
    models: Path | None = None
    keep: int = 1
    unload: float | None = None
    own: Path | None = None
    cache_bytes: int = 2**30
    exact: bool = False
