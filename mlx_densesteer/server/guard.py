"""Checks that every request passes before the application sees it.

The check of ``Host`` stops DNS rebinding. Those of ``Origin`` and ``Sec-Fetch-Site`` stop requests
from other sites' pages; Starlette's CORS answers the allowed origins. Faults become OpenAI's
errors. A client that stops reading its answer is cut off. Each request is logged in one line,
without query or content.

Sources: OWASP cheat sheets on cross-site request forgery and on HTTP headers; Fetch Metadata (W3C).
"""

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .faults import Fault, bad, internal
from .settings import Access

log = logging.getLogger(__name__)

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
}
ONCE = ("host", "origin", "authorization", "content-type")  # headers that may not come twice
LOGGED = {  # paths that the log names; any other may hold private text
    "/",
    "/health",
    "/openapi.json",
    "/v1/models",
    "/v1/steering",
    "/v1/completions",
    "/v1/chat/completions",
}


def guarded(application: ASGIApp, access: Access, *, stall: float) -> ASGIApp:
    """Return the application behind the guard, with CORS if other origins are allowed.

    ``stall``: seconds that a client may leave a part of its answer unread.
    """
    guard = Guard(application, access, stall)
    if not access.origins:
        return guard
    return CORSMiddleware(
        guard,
        allow_origins=sorted(access.origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],  # OpenAI's client sends many headers of its own
        expose_headers=["X-DenseSteer-Ignored", "Retry-After"],
    )


class Guard:
    """ASGI middleware; see ``guarded``."""

    def __init__(self, application: ASGIApp, access: Access, stall: float):
        self._application, self._access, self._stall = application, access, stall

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._application(scope, receive, send)
            return
        exchange = _Exchange(send, self._stall)
        try:
            try:
                self._check(scope["path"], Headers(scope=scope))
                await self._application(scope, receive, exchange.send)
            except Fault as fault:
                await exchange.fail(fault, scope, receive)
        # the last place to keep an unexpected error from the client
        except Exception as error:
            if not exchange.gone:
                log.error("a request failed: %s", type(error).__name__, exc_info=error)
                await exchange.fail(internal(), scope, receive)
        finally:
            exchange.log(scope)

    def _check(self, path: str, headers: Headers) -> None:
        for name in ONCE:
            if len(headers.getlist(name)) > 1:
                raise bad(f"the header {name} comes twice: expected it once.")
        self._check_host(headers.get("host"))
        self._check_origin(path, headers)
        self._check_key(path, headers.get("authorization"))

    def _check_host(self, host: str | None) -> None:
        """Raise 403 unless ``Host`` names this machine; under DNS rebinding it names another."""
        try:
            plain = host is not None and not set(host) & set("@/?#\\")
            name = (urlsplit(f"//{host}").hostname or "") if plain else ""
        except ValueError:
            name = ""
        if name in self._access.hosts or (self._access.any_address and _is_address(name)):
            return
        message = (
            "this server does not answer to the name in the Host header. Use its address, or name the "
            "host when it is started (--allow-host)."
        )
        raise Fault(403, message, code="host_not_allowed")

    def _check_origin(self, path: str, headers: Headers) -> None:
        """Raise 403 for a request from a web page, but for the server's own and allowed origins."""
        origin = headers.get("origin")
        # https: a proxy with TLS may stand in front
        own = {f"{scheme}://{headers.get('host')}" for scheme in ("http", "https")}
        if origin is not None and origin in own | self._access.origins:
            return
        site = headers.get("sec-fetch-site", "none")
        visit = path == "/" and headers.get("sec-fetch-mode") == "navigate"
        if origin is not None or (site not in ("none", "same-origin") and not visit):
            message = (
                "a page of another site may not ask. Name its origin when the server is started "
                "(--allow-origin)."
            )
            raise Fault(403, message, code="origin_not_allowed")

    def _check_key(self, path: str, authorization: str | None) -> None:
        """Raise 401 for a missing or wrong API key, if one is needed."""
        if self._access.key is None or not path.startswith("/v1/"):
            return
        kind, _, key = (authorization or "").partition(" ")
        found = hashlib.sha256(key.strip().encode()).digest()
        expected = hashlib.sha256(self._access.key).digest()
        if hmac.compare_digest(found, expected) and kind.casefold() == "bearer":
            return
        message = "no valid API key: send it as `Authorization: Bearer KEY`."
        raise Fault(401, message, None, "invalid_api_key", {"WWW-Authenticate": "Bearer"})


class _Exchange:
    """One response: adds headers, limits how long a client may stall, and logs."""

    def __init__(self, send: Send, stall: float):
        self._send, self._stall = send, stall
        self._began = time.perf_counter()
        self.status = 0
        self.gone = False  # nothing more can be sent

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        try:
            async with asyncio.timeout(self._stall):
                await self._send(message)
        except (TimeoutError, OSError) as error:
            self.gone = True
            raise ConnectionError("the client does not read its answer") from error

    async def fail(self, fault: Fault, scope: Scope, receive: Receive) -> None:
        """Send the fault, unless the answer has begun."""
        if self.status or self.gone:
            return
        response = JSONResponse(fault.body, fault.status, headers=fault.headers)
        await response(scope, receive, self.send)

    def log(self, scope: Scope) -> None:
        path = scope["path"] if scope["path"] in LOGGED else "(another path)"
        seconds = time.perf_counter() - self._began
        log.info("%s %s %s %.2f s", scope["method"][:8], path, self.status or "gone", seconds)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
