"""Listen, serve, and end in time: uvicorn with bounds on what a connection may hold."""

import asyncio
import errno
import logging
import socket
from collections.abc import Callable

import h11
from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import InputError
from .engine import Engine
from .guard import Application
from .settings import Limits

log = logging.getLogger(__name__)


def open_socket(host: str, port: int) -> socket.socket:
    """Return a socket that is bound.

    Raises:
        InputError: the address cannot be used, with the reason.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        reason = "another program uses it; choose another --port (0: any free one)"
        if error.errno != errno.EADDRINUSE:
            reason = f"{error.strerror}; choose another --host or --port"
        raise InputError(f"cannot listen on {host} port {port}: {reason}.") from error
    return listener


def listen(
    application: Application,
    listener: socket.socket,
    engine: Engine,
    limits: Limits,
    *,
    on_start: Callable[[Server], None] = lambda server: None,
) -> None:
    """Serve until SIGINT or SIGTERM. Answers that run are given ``limits.grace`` seconds.

    On another thread than the main one, what ``on_start`` gets ends it (``should_exit``).
    """
    config = Config(
        application, http=_bounded(limits), ws="none", lifespan="on", log_config=None,
        access_log=False, server_header=False, proxy_headers=False, timeout_keep_alive=int(limits.idle),
        timeout_graceful_shutdown=int(limits.grace) + 5, h11_max_incomplete_event_size=limits.header,
        backlog=128,
    )  # fmt: skip
    server = _Server(config, engine, limits.grace)
    on_start(server)
    server.run(sockets=[listener])


class _Server(Server):
    """Ends the answers itself, so that their clients are told, before uvicorn cuts them off."""

    def __init__(self, config: Config, engine: Engine, grace: float):
        super().__init__(config)
        self._engine, self._grace = engine, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._engine.promised:
            log.info("ending; what runs is given %g seconds", self._grace)
        asyncio.get_running_loop().call_later(self._grace, self._end_rest)
        await super().shutdown(sockets)

    def _end_rest(self) -> None:
        """End the answers that run, and the requests that have not come whole by now."""
        self._engine.end_all()
        for connection in list(self.server_state.connections):
            cycle = connection.cycle
            if cycle is not None and cycle.more_body and not cycle.response_started:
                connection.transport.abort()


def _bounded(limits: Limits) -> type[H11Protocol]:
    """Return a protocol with bounds: connections at a time, and seconds for a request's headers."""

    class Bounded(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._patience: asyncio.TimerHandle | None = None
            if len(self.connections) > limits.connections:
                transport.abort()
                return
            self._await_headers()

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            super().data_received(data)
            if self.cycle is None or self.cycle.response_complete:
                self._await_headers()
            else:
                self._stop_waiting()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            # a request that was sent behind this one may have begun by now
            if not self.transport.is_closing() and self.cycle.response_complete:
                self._await_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            if self.conn.our_state is not h11.IDLE and self.conn.our_state is not h11.SEND_RESPONSE:
                self.transport.abort()  # garbage behind a request that is being answered
                return
            if self.cycle is not None and not self.cycle.response_complete:
                self.transport.abort()
                return
            super().send_400_response(msg)

        def _await_headers(self) -> None:
            """One bound for all of a request's headers: bytes that drip do not extend it."""
            if self._patience is None:
                self._patience = self.loop.call_later(limits.idle, self.transport.abort)

        def _stop_waiting(self) -> None:
            if self._patience is not None:
                self._patience.cancel()
                self._patience = None

    return Bounded
