"""The real server in this process, on a free port, for tests."""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from urllib.parse import urlsplit


class Serving:
    """A running server: its ``url``, its ``engine`` (all of its models), and ways to ask it; the ``error`` that ended it."""

    error: Exception | None = None
    thread: threading.Thread | None = None

    def __init__(self, service, url: str):
        self.service, self.engine, self.url = service, service and service.models, url

    def connect(self) -> http.client.HTTPConnection:
        assert self.thread is None or self.thread.is_alive(), (
            f"the server has ended: {self.error!r}"
        )
        return http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=60)

    def ask(self, path: str, body=None, headers=None, method=None):
        """Return status, headers and the JSON that came back."""
        connection = self.connect()
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(
            method or ("GET" if body is None else "POST"), path, raw, sent | (headers or {})
        )
        response = connection.getresponse()
        text = response.read()
        connection.close()
        return response.status, response.headers, json.loads(text) if text else None

    def chat(self, content, **fields):
        """Return the body of the answer to one question, or to a list of messages."""
        messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
        status, _, body = self.ask("/v1/chat/completions", {"messages": messages} | fields)
        assert status == 200, body
        return body

    def refusal(self, fields, path="/v1/chat/completions") -> tuple[int, str]:
        """Return the status and the message of a request that must be refused."""
        question = {} if "messages" in fields or "prompt" in fields else {"messages": [{"role": "user", "content": "Hi"}]}  # fmt: skip
        status, _, body = self.ask(path, question | fields)
        assert set(body) == {"error"}, body
        assert set(body["error"]) == {"message", "type", "param", "code"}
        return status, body["error"]["message"]

    def stream(self, content, **fields) -> list[dict]:
        """Return the events of a streamed answer; the last must be [DONE]."""
        connection = self.connect()
        messages = [{"role": "user", "content": content}]
        body = {"messages": messages, "stream": True} | fields
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})  # fmt: skip
        response = connection.getresponse()
        assert response.status == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.read().decode().split("\n") if line.startswith("data: ")]
        connection.close()
        assert lines.pop() == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    def settle(self) -> None:
        """Wait until nothing runs."""
        deadline = time.monotonic() + 20
        while self.ask("/health")[2]["running"]:
            assert time.monotonic() < deadline, "rows still run that no client waits for"
            time.sleep(0.005)


RUNNING: list[Serving] = []


def rest() -> None:
    """Wait until the servers of other tests compute nothing, not even what they do when no request comes."""
    deadline = time.monotonic() + 30
    for one in RUNNING:
        for slot in one.service.models._slots.values():
            worker = slot.served.engine._loaded.result()
            while worker._batch is not None and one.thread.is_alive():
                assert time.monotonic() < deadline, "a server of another test does not come to rest"
                time.sleep(0.05)


@contextlib.contextmanager
def serving(
    model="demo",
    given=None,
    *,
    folder=None,
    access=None,
    strict=False,
    send_buffer=None,
    models=None,
    keep=1,
    unload=None,
    **limits,
) -> Iterator[Serving]:
    """Serve ``model`` on a thread; ``given`` are ``NamedVector``s, by default the demo's at 20 %, layer 5.

    ``models``, ``keep`` and ``unload`` are as in ``Settings``; ``model=None`` loads none at the start.

    ``send_buffer`` is the size of the sockets' buffers in bytes: small, a reader that stalls is soon seen.
    """
    from mlx_densesteer.server.listening import listen, open_socket
    from mlx_densesteer.server.settings import Access, ServerLimits, Settings
    from mlx_densesteer.server.start import model_id, start

    name, bounds = model and model_id(str(model), None), replace(ServerLimits(grace=2.0), **limits)
    settings = Settings(
        name,
        bounds,
        access or Access(),
        folder,
        strict=strict,
        models=models,
        keep=keep,
        unload=unload,
        cache_bytes=256 * 2**20,
    )
    if given is None:
        given = demo_vector() if model else []
    service = start(model and str(model), given, settings)
    listener = open_socket("127.0.0.1", 0)
    if send_buffer:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    uvicorn = []
    running = Serving(service, url)

    def run() -> None:
        try:
            listen(
                service.application,
                listener,
                service.models,
                settings.limits,
                on_start=uvicorn.append,
            )
        except Exception as error:
            running.error = error

    running.thread = thread = threading.Thread(target=run, daemon=True)
    thread.start()
    running.ask("/health")  # the socket listens: this waits for the server
    running.uvicorn = uvicorn[0]
    RUNNING.append(running)
    try:
        yield running
    finally:
        RUNNING.remove(running)
        running.uvicorn.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not end in time"
        assert not service.models.alive, "the model's thread did not end in time"
        _free(service.models)


def _free(models) -> None:
    """End the threads of a server that has ended, as the end of its process would."""
    for slot in models._slots.values():
        if slot.state != "ending":
            slot.served.close()


def demo_vector():
    from mlx_densesteer import SteeringVector
    from mlx_densesteer.server.vectors import NamedVector
    from mlx_densesteer.steering.request import Amount

    return [NamedVector(SteeringVector.load("demo"), Amount.parse("20%"), (5,))]
