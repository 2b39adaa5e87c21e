"""Run the application on uvicorn, with limits on connections and on the time to shut down."""

import asyncio
import errno
import json
import logging
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

import h11
from starlette.types import ASGIApp
from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import DenseSteerError, InputError
from .faults import Fault
from .guard import HEADERS
from .settings import ServerLimits

if TYPE_CHECKING:  # mlx takes a second to import, and a port in use is told before
    from .models import Models

log = logging.getLogger(__name__)

BACKLOG = 128  # connections that wait to be accepted
LINGER = 1.0  # seconds for a client that was refused to read why


def open_socket(host: str, port: int) -> socket.socket:
    """Return a listening socket; clients that connect before the server runs wait.

    Raises:
        InputError: the address cannot be used, with the reason.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        _check_free(family, address)
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        reason = "another program uses it; choose another --port (0: any free one)"
        if error.errno != errno.EADDRINUSE:
            reason = f"{error.strerror}; choose another --host or --port"
        raise InputError(f"cannot listen on {host} port {port}: {reason}.") from error
    return listener


def _check_free(family: int, address: tuple) -> None:
    """Raise ``OSError`` if a program answers there: macOS lets 127.0.0.1 bind beside another's ``*``."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        probe.bind((address[0], 0, *address[2:]))  # fails for an address of another machine
        # a connection to a free port may meet itself
        if probe.connect_ex(address) == 0 and probe.getsockname() != probe.getpeername():
            raise OSError(errno.EADDRINUSE, "another program answers")


def listen(
    application: ASGIApp,
    listener: socket.socket,
    models: "Models",
    limits: ServerLimits,
    *,
    on_start: Callable[[Server], None] = lambda server: None,
) -> None:
    """Serve until SIGINT or SIGTERM; then running answers have ``limits.grace`` seconds to end.

    ``on_start`` gets uvicorn's server. Signals reach only the main thread: elsewhere set the
    server's ``should_exit`` to end it.

    Raises:
        DenseSteerError: the model's thread could not go on after an error; its clients were told.
    """
    config = Config(
        application,
        http=_bounded(limits),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=int(limits.idle),
        timeout_graceful_shutdown=int(limits.grace) + 5,
        backlog=BACKLOG,
    )
    server = _EndingServer(config, models, limits.grace)
    on_start(server)
    server.run(sockets=[listener])
    if models.broken:
        raise DenseSteerError(
            "the model could not go on after an error. Start the server again; its log, with --verbose, "
            "says what failed."
        )


class _EndingServer(Server):
    """Tells clients of the shutdown before uvicorn closes their connections.

    It ends by itself when a model's thread has ended: launchd then starts it again.
    """

    def __init__(self, config: Config, models: "Models", grace: float):
        super().__init__(config)
        self._models, self._grace = models, grace

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end; uvicorn asks ten times a second."""
        return await super().on_tick(counter) or not self._models.alive

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._models.promised:
            log.info("ending; running answers have %g seconds to end", self._grace)
        asyncio.get_running_loop().call_later(self._grace, self._end_rest)
        await super().shutdown(sockets)

    def _end_rest(self) -> None:
        """End running answers, and requests whose bodies are incomplete."""
        self._models.end_all()
        for connection in list(self.server_state.connections):
            cycle = connection.cycle
            if cycle is not None and cycle.more_body and not cycle.response_started:
                connection.transport.abort()


class _Connection(h11.Connection):
    """Limit the bytes of headers; h11 alone counts only those that come in several parts.

    ``refusal`` is the status for what could not be read.
    """

    def __init__(self, most: int):
        super().__init__(h11.SERVER, most)
        self._most, self.refusal = most, 400

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        try:
            event = super().next_event()
            if isinstance(event, h11.Request | h11.EndOfMessage):
                size = len(getattr(event, "target", b""))
                if size + sum(len(name) + len(value) for name, value in event.headers) > self._most:
                    raise h11.RemoteProtocolError("headers too large", 431)
        except h11.RemoteProtocolError as error:
            self.refusal = error.error_status_hint
            raise
        return event


def _bounded(limits: ServerLimits) -> type[H11Protocol]:
    """Return a protocol that limits connections, and the seconds for a request's headers."""

    class Bounded(H11Protocol):
        def __init__(self, *arguments: object, **options: object):
            super().__init__(*arguments, **options)
            self.conn = _Connection(limits.header)
            self._refused = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._patience: asyncio.TimerHandle | None = None
            if len(self.connections) > limits.connections:
                transport.abort()
                return
            self._await_headers()

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing() or self._refused:
                return
            super().data_received(data)
            if self.cycle is None or self.cycle.response_complete:
                self._await_headers()
            else:
                self._stop_waiting()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            # a pipelined request may have begun by now
            if not self.transport.is_closing() and self.cycle.response_complete:
                self._await_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            answering = self.cycle is not None and not self.cycle.response_complete
            if answering or self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
                self.transport.abort()  # garbage behind a request that is being answered
                return
            if self.conn.refusal != 431:
                super().send_400_response(msg)
                return
            fault = Fault(
                431, f"the headers are too large: this server takes {limits.header} bytes."
            )
            body = json.dumps(fault.body).encode()
            headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
            headers |= HEADERS | {"Connection": "close"}
            for event in (
                h11.Response(
                    status_code=431,
                    headers=[*headers.items()],
                    reason=b"Request Header Fields Too Large",
                ),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event))
            # A connection that is closed while headers still come is broken for the client: it would not
            # see the answer.
            self._refused = True
            self.loop.call_later(LINGER, self.transport.close)

        def _await_headers(self) -> None:
            """Start one timer for all headers of a request: further bytes do not extend it."""
            if self._patience is None:
                self._patience = self.loop.call_later(limits.idle, self.transport.abort)

        def _stop_waiting(self) -> None:
            if self._patience is not None:
                self._patience.cancel()
                self._patience = None

    return Bounded
