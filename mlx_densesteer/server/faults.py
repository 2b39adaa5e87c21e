"""The API's errors: OpenAI's shape, and no internals."""

from dataclasses import dataclass, field

from ..errors import DenseSteerError


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


def ending() -> Fault:
    """Return the 503 that a client gets while the server shuts down."""
    return Fault(503, "the server is shutting down.", code="shutting_down")


def excerpt(text: object, length: int = 80) -> str:
    """Return a name from a request for use in a message: short, printable, quoted."""
    shown = "".join(c if c.isprintable() else "?" for c in str(text))
    return repr(shown if len(shown) <= length else f"{shown[:length]}...")
