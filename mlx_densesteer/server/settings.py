"""What a server is told when it starts."""

from dataclasses import dataclass
from pathlib import Path

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Limits:
    """Bounds on what clients may ask for and hold.

    ``body`` in bytes, ``header`` in bytes of all headers together; times in seconds: ``idle`` for
    headers, body, a stalled reader and a kept connection; ``grace`` for answers that run at the end.
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
    """Who may ask.

    ``hosts`` are the names under which the server may be addressed; ``any_address``: IP addresses
    too. ``origins`` are other web pages that may ask. ``key`` is needed for ``/v1/`` if it is set.
    """

    key: bytes | None = None
    hosts: frozenset[str] = frozenset(LOOPBACK)
    any_address: bool = False
    origins: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Settings:
    """What is served, and to whom."""

    name: str
    limits: Limits = Limits()
    access: Access = Access()
    folder: Path | None = None
