"""The API's errors: OpenAI's shape, and no internals."""

import logging
import re
from dataclasses import dataclass, field

from ..errors import DenseSteerError

log = logging.getLogger(__name__)

# Of mlx: "[METAL] Command buffer execution failed: Insufficient Memory (...ErrorOutOfMemory)",
# "[metal::malloc] Attempting to allocate ...", "[malloc] Unable to allocate ...".
_OUT_OF_MEMORY = re.compile(r"insufficient memory|outofmemory|malloc\]", re.IGNORECASE)


@dataclass(eq=False)
class Fault(DenseSteerError):
    """A request that is refused, or an answer that cannot be finished.

    ``param`` names the field, ``code`` is for programs. The message holds no path and no prompt.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    @property
    def body(self) -> dict[str, object]:
        """OpenAI's error body."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def bad(message: str, param: str | None = None, code: str | None = None) -> Fault:
    """Return a 400."""
    return Fault(400, message, param, code)


def internal() -> Fault:
    """Return the 500 that a client gets for a bug in the server."""
    return Fault(500, "the server failed to answer; its log says more.", code="internal_error")


def failed(what: str, error: Exception) -> Fault:
    """Log an error of the model's thread, and return what clients get: a 503 if memory ran out, else a 500."""
    fault = internal()
    if out_of_memory(error):
        message = (
            "the server's memory ran out in the middle of this answer. Send a shorter prompt or ask for "
            "fewer answers at a time, or try again when less is running."
        )
        fault = Fault(503, message, code="out_of_memory")
    log.error("%s failed: %s (%s)", what, type(error).__name__, fault.code, exc_info=error)
    return fault


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)) is not None


def busy(answers: int, what: str, rows: int) -> Fault:
    """Return the 429 for a request that finds ``answers`` before it, as many as there is room for."""
    seconds = max(1, min(30, answers // max(1, rows) * 2))
    message = f"{answers} answers {what}, as many as this server has room for. Try again in {seconds} seconds."
    return Fault(429, message, code="queue_full", headers={"Retry-After": str(seconds)})


def ending() -> Fault:
    """Return the 503 that a client gets while the server shuts down."""
    return Fault(503, "the server is shutting down.", code="shutting_down")


def excerpt(text: object, length: int = 80) -> str:
    """Return a name from a request for use in a message: short, printable, quoted."""
    shown = "".join(c if c.isprintable() else "?" for c in str(text))
    return repr(shown if len(shown) <= length else f"{shown[:length]}...")
