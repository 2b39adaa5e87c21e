"""A chat-completions endpoint on this machine, with the faults that real ones have."""

import json
import threading
import time
from collections.abc import Callable
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ChatServer:
    """Answer ``POST /v1/chat/completions``; a context manager.

    ``plan`` holds what happens to the next requests, one entry each: a status, "hang", "drop",
    "garbage" or "redirect", or ``(status, headers)`` with a body or without. Then every request is answered
    with ``reply(user message)``. An error asks to be tried again after a millisecond.
    """

    def __init__(self, reply: Callable[[str], str] = lambda text: "One step."):
        self.reply = reply
        self.plan: list[object] = []
        self.bodies: list[dict] = []
        self.headers: list[Message] = []
        self.times: list[float] = []
        self.finish_reason = "stop"
        self.running = self.most = 0
        self.slow = 0.0
        self.ending = threading.Event()
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.chat = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "ChatServer":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ending.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        chat: ChatServer = self.server.chat  # type: ignore[attr-defined]
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with chat.lock:
            chat.bodies.append(body)
            chat.headers.append(self.headers)
            chat.times.append(time.monotonic())
            fate = chat.plan.pop(0) if chat.plan else 200
            chat.running += 1
            chat.most = max(chat.most, chat.running)
        try:
            self._answer(chat, body, fate)
        finally:
            with chat.lock:
                chat.running -= 1

    def _answer(self, chat: ChatServer, body: dict, fate) -> None:
        if chat.slow:
            time.sleep(chat.slow)
        status, headers, *said = fate if isinstance(fate, tuple) else (fate, {})
        if self.path.partition("?")[0] != "/v1/chat/completions":
            status = 404
        if status == "hang":
            chat.ending.wait(30)
        elif status == "drop":
            self.connection.close()
        elif status == "garbage":
            self._send(200, b'{"choices": [', {})
        elif status == "redirect":
            self._send(307, b"", {"Location": "http://127.0.0.1:1/v1/chat/completions"})
        elif status == 200 and not said:
            message = {"role": "assistant", "content": chat.reply(body["messages"][-1]["content"])}
            choice = {"index": 0, "message": message, "finish_reason": chat.finish_reason}
            self._send(200, json.dumps({"choices": [choice]}).encode(), {})
        else:
            key = self.headers.get("Authorization", "")
            error = {"error": {"message": f"no luck, {key}", "type": "test"}}
            body = said[0] if said else json.dumps(error).encode()
            self._send(status, body, headers or {"Retry-After-Ms": "1"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
