"""What stands between the network and the application.

Every request passes here. Faults become OpenAI's errors. A page of another site cannot ask (Host against
DNS rebinding, Origin and Sec-Fetch-Site against cross-site requests); ``guarded`` adds Starlette's CORS
for the origins that may. A stalled reader is let go. One line is logged, without query or content.

Sources: OWASP cheat sheets on cross-site request forgery and on HTTP headers; Fetch Metadata (W3C).
"""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.middleware.cors import CORSMiddleware

from .faults import Fault, bad, internal
from .settings import Access

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

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


def guarded(application: Application, access: Access, *, stall: float) -> Application:
    """Return the application behind the guard, and Starlette's CORS for the origins that may ask."""
    guard = Guard(application, access, stall=stall)
    if not access.origins:
        return guard
    return CORSMiddleware(
        guard, allow_origins=sorted(access.origins), allow_methods=["GET", "POST"], allow_headers=["*"],
        expose_headers=["X-DenseSteer-Ignored", "Retry-After"],
    )  # fmt: skip


class Guard:
    """ASGI middleware; ``stall`` is how long a client may leave a part of its answer unread."""

    def __init__(self, application: Application, access: Access, *, stall: float):
        self._application, self._access, self._stall = application, access, stall

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._application(scope, receive, send)
            return
        exchange = _Exchange(send, self._stall)
        try:
            headers = _headers(scope)
            self._check_host(headers.get("host"))
            exchange.origin = self._check_origin(scope, headers)
            self._check_key(scope, headers)
            await self._application(scope, receive, exchange.send)
        except Fault as fault:
            await exchange.fail(fault)
        except (asyncio.CancelledError, GeneratorExit):
            raise
        # The last place where an unexpected error can be kept from the client.
        except Exception as error:
            if not exchange.gone:
                log.error("a request failed: %s", type(error).__name__, exc_info=error)
                await exchange.fail(internal())
        finally:
            exchange.log(scope)

    def _check_key(self, scope: Scope, headers: dict[str, str]) -> None:
        """Raise 401 without the key."""
        asks = scope["path"].startswith("/v1/")
        if (
            asks
            and self._access.key is not None
            and not self._has_key(headers.get("authorization"))
        ):
            raise Fault(
                401, "no valid API key: send it as `Authorization: Bearer KEY`.", None,
                "invalid_api_key", {"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    def _check_host(self, host: str | None) -> None:
        """Raise 403 unless the server may be addressed so: DNS rebinding brings another name."""
        try:
            plain = host is not None and not set(host) & set("@/?#\\")
            name = (urlsplit(f"//{host}").hostname or "") if plain else ""
        except ValueError:
            name = ""
        if name in self._access.hosts or (self._access.any_address and _is_address(name)):
            return
        raise Fault(
            403, "this server does not answer to the name in the Host header. Use its address, or name "
            "the host when it is started (--allow-host).", code="host_not_allowed",
        )  # fmt: skip

    def _check_origin(self, scope: Scope, headers: dict[str, str]) -> str | None:
        """Return the origin of another page that may ask, if it is one; raise 403 for the rest."""
        origin = headers.get("origin")
        if origin in self._access.origins:
            return origin
        # our own page; https where a proxy with TLS stands in front
        if origin is not None and origin in (
            f"{s}://{headers.get('host')}" for s in ("http", "https")
        ):
            return None
        site = headers.get("sec-fetch-site", "none")
        visit = scope["path"] == "/" and headers.get("sec-fetch-mode") == "navigate"
        if origin is not None or (site not in ("none", "same-origin") and not visit):
            raise Fault(
                403, "a page of another site may not ask. Name its origin when the server is started "
                "(--allow-origin).", code="origin_not_allowed",
            )  # fmt: skip
        return None

    def _has_key(self, authorization: str | None) -> bool:
        kind, _, key = (authorization or "").partition(" ")
        digests = [
            hashlib.sha256(k).digest() for k in (key.strip().encode(), self._access.key or b"")
        ]
        return hmac.compare_digest(*digests) and kind.casefold() == "bearer"


class _Exchange:
    """One request's way out: headers, the time a reader may take, and what to log."""

    def __init__(self, send: Send, stall: float):
        self._send, self._stall = send, stall
        self._began = time.perf_counter()
        self.origin: str | None = None
        self.status = 0
        self.gone = False  # the client cannot be told anything more

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            present = {name.lower() for name, _ in message["headers"]}
            extra = dict(HEADERS)
            if self.origin is not None:
                extra["Cross-Origin-Resource-Policy"] = "cross-origin"
            message["headers"] = [*message["headers"]] + [
                (name.lower().encode(), value.encode())
                for name, value in extra.items()
                if name.lower().encode() not in present
            ]
        try:
            async with asyncio.timeout(self._stall):
                await self._send(message)
        except (TimeoutError, OSError) as error:
            self.gone = True
            raise ConnectionError("the client does not read its answer") from error

    async def send_whole(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        start = {
            "type": "http.response.start", "status": status,
            "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()],
        }  # fmt: skip
        if status != 204:
            start["headers"].append((b"content-length", str(len(body)).encode()))
        await self.send(start)
        await self.send({"type": "http.response.body", "body": body})

    async def fail(self, fault: Fault) -> None:
        """Tell the fault, unless the answer has begun."""
        if self.status or self.gone:
            return
        headers = {"Content-Type": "application/json"} | fault.headers
        await self.send_whole(fault.status, json.dumps(fault.body).encode(), headers)

    def log(self, scope: Scope) -> None:
        known = scope["path"] if scope["path"] in _PATHS else "(another path)"
        seconds = time.perf_counter() - self._began
        log.info("%s %s %s %.2f s", scope["method"][:8], known, self.status or "gone", seconds)


_PATHS = {
    "/", "/health", "/openapi.json", "/v1/models", "/v1/steering", "/v1/completions",
    "/v1/chat/completions",
}  # fmt: skip


def _headers(scope: Scope) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        key = name.decode("latin-1").lower()
        if key in ("host", "origin", "authorization", "content-type") and key in found:
            raise bad(f"the header {key} stands there twice.")
        found[key] = value.decode("latin-1")
    return found


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
