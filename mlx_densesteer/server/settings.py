"""What a server is told when it starts."""

from dataclasses import dataclass
from pathlib import Path

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServerLimits:
    """Bounds on what clients may ask for and hold.

    Args:
        rows: answers that are generated together.
        queue: answers that may wait.
        max_tokens: tokens of an answer.
        body: bytes of a request's body.
        header: bytes of all its headers together.
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
    """Who may ask.

    Args:
        key: the API key, needed for ``/v1/`` if it is set.
        hosts: names that the ``Host`` header may have.
        any_address: it may be any IP address too.
        origins: other web pages that may ask.
    """

    key: bytes | None = None
    hosts: frozenset[str] = frozenset(LOOPBACK)
    any_address: bool = False
    origins: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Settings:
    """What is served, and to whom; ``name`` is what clients call the model."""

    name: str
    limits: ServerLimits = ServerLimits()
    access: Access = Access()
    folder: Path | None = None
