"""Hostile and broken clients: what the server refuses, and what it does not tell."""

import contextlib
import http.client
import json
import os
import re
import select
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import numpy as np
import pytest

pytest.importorskip("starlette")

from click.testing import CliRunner
from server_process import assert_no_internals, server_process
from serving import serving

from mlx_densesteer import SteeringVector, VectorMeta, demo
from mlx_densesteer.cli import main
from mlx_densesteer.demo.problems import held_out
from mlx_densesteer.errors import InputError
from mlx_densesteer.server.listening import open_socket

QUESTION = held_out(1)[0].question
SECRET = "xylophone-seven-marmalade"
KEY = "a-key-of-many-letters"
ORIGIN = "app://obsidian.md"
CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


def assert_clean(text):
    """Check that nothing of what was asked is in a text for clients or a log, nor internals."""
    assert SECRET not in text and KEY not in text
    assert_no_internals(text)


def ask(url, path=CHAT, body=HELLO, headers=None, method=None):
    """Ask as ``raw_ask`` does; an error must be in OpenAI's shape, without internals."""
    found = raw_ask(url, path, body, headers, method)
    if found[0] >= 400:
        assert_clean(found[2].decode())
        assert set(json.loads(found[2])["error"]) == {"message", "type", "param", "code"}
    return found


def raw_ask(url, path=CHAT, body=HELLO, headers=None, method=None):
    """Return status, headers and body; ``headers`` replace the usual ones, ``None`` drops one."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    raw = json.dumps(body).encode() if isinstance(body, dict) else body
    sent = {"Host": urlsplit(url).netloc, "Content-Type": "application/json"} | (headers or {})
    connection.putrequest(method or ("POST" if raw is not None else "GET"), path, skip_host=True, skip_accept_encoding=True)  # fmt: skip
    for name, value in sent.items():
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                connection.putheader(name, one)
    if raw is not None:
        connection.putheader("Content-Length", str(len(raw)))
    connection.endheaders(raw)
    response = connection.getresponse()
    found = response.status, response.headers, response.read()
    connection.close()
    return found


def alive(url):
    status, _, body = ask(url, body=HELLO | {"messages": [{"role": "user", "content": QUESTION}]})
    assert status == 200 and json.loads(body)["usage"]["completion_tokens"] == 2


def raw(url, data, *, half_close=False, seconds=10.0):
    """Send bytes, and return what comes back until the server ends the connection."""
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port), timeout=seconds) as connection:
        with contextlib.suppress(OSError):  # the server may have answered and closed already
            connection.sendall(data)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
        found = b""
        try:
            while part := connection.recv(65536):
                found += part
        except (TimeoutError, ConnectionError):
            pass
    return found


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200), ("localhost", 200), ("LOCALHOST:9", 200), ("[::1]:80", 200), ("127.0.0.1:1", 200),
        ("evil.example", 403), ("127.0.0.1.evil.example", 403), ("localhost.evil.example:80", 403),
        ("evil.example@127.0.0.1", 403), ("127.0.0.1/x", 403), ("127.0.0.1?x", 403),
        ("evil@localhost.example", 403), ("10.0.0.7", 403), ("", 403), ("[::1", 403), ("a b", 403),
    ],
)  # fmt: skip
def test_only_names_of_this_machine_are_answered(process, host, status):
    for path, body in (("/health", None), ("/", None), (CHAT, HELLO)):
        assert ask(process.url, path, body, {"Host": host})[0] == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "SAME"}, 200), ({"Origin": "TLS"}, 200), ({"Sec-Fetch-Site": "same-origin"}, 200), ({"Sec-Fetch-Site": "none"}, 200),
        ({"Origin": "https://evil.example"}, 403), ({"Origin": "null"}, 403), ({"Origin": "http://localhost:1"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403), ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": ["SAME", "https://evil.example"]}, 400),
    ],
)  # fmt: skip
def test_pages_of_other_sites_may_not_ask(process, headers, status):
    def same(value):
        return (
            [same(v) for v in value]
            if isinstance(value, list)
            else value.replace("SAME", process.url).replace(
                "TLS", process.url.replace("http", "https")
            )
        )

    found, sent, _ = ask(process.url, headers={k: same(v) for k, v in headers.items()})
    assert found == status
    assert not any(name.lower().startswith("access-control") for name in sent)


def test_a_link_from_another_site_may_open_the_page_and_nothing_else(process):
    visit = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert ask(process.url, "/", None, visit)[0] == 200
    assert ask(process.url, "/v1/models", None, visit)[0] == 403


@pytest.fixture(scope="module")
def locked():
    """A server with an API key and one other page that may ask."""
    from mlx_densesteer.server.settings import Access

    with serving(access=Access(key=KEY.encode(), origins=frozenset([ORIGIN]))) as server:
        yield server


def test_a_page_that_was_named_may_ask(locked):
    def preflight(headers, origin=ORIGIN):
        wanted = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": headers,
        }
        return raw_ask(locked.url, body=None, headers={"Origin": origin} | wanted, method="OPTIONS")

    # what OpenAI's own client for browsers sends; a preflight has no key
    status, sent, _ = preflight("authorization,content-type,x-stainless-arch")
    assert status == 200 and sent["Access-Control-Allow-Origin"] == ORIGIN
    assert "x-stainless-arch" in sent["Access-Control-Allow-Headers"]
    status, sent, _ = preflight("content-type", "https://other.example")
    assert status == 400 and "Access-Control-Allow-Origin" not in sent
    site = {"Sec-Fetch-Site": "cross-site", "Authorization": f"Bearer {KEY}"}
    status, sent, _ = ask(locked.url, headers={"Origin": ORIGIN} | site)
    assert status == 200 and sent["Access-Control-Allow-Origin"] == ORIGIN
    status, sent, _ = ask(locked.url, headers={"Origin": "https://other.example"})
    assert status == 403 and "Access-Control-Allow-Origin" not in sent


def test_a_page_that_was_named_is_told_that_its_key_is_wrong(locked):
    status, sent, _ = ask(locked.url, headers={"Origin": ORIGIN})
    assert status == 401 and sent["Access-Control-Allow-Origin"] == ORIGIN


def test_headers_of_a_preflight_cannot_break_the_response(locked):
    head = (
        f"OPTIONS {CHAT} HTTP/1.1\r\nHost: localhost\r\nOrigin: {ORIGIN}\r\nConnection: close\r\n"
    )
    head += "Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: a\x01b, <x>: y\r\n\r\n"
    found = raw(locked.url, head.encode())
    assert found.count(b"HTTP/1.1 ") <= 1 and b" 500 " not in found
    assert raw_ask(locked.url, "/health", None)[0] == 200


@pytest.mark.parametrize("body", [
    b'{"messages":[{"role":"user","content":"Hi"}],' + b",".join(b'"presence_penalt%d":1' % i for i in range(40_000)) + b"}",
    b'{"messages":[{"role":"user","content":"Hi"}],"steering":{"layer":[' + b"-1," * 300_000 + b"-1]}}",
    b'{"messages":[{"role":"user","content":"Hi"}],"stop":[' + b"1," * 400_000 + b"1]}",
    b'{"messages":[' + b"1," * 400_000 + b"1]}",
    b'{"messages":[{"role":"user","content":[' + b"1," * 400_000 + b"1]}]}",
    b'{"messages":[{"role":"user","content":"Hi"}],"stop":[' + b'"a",' * 250_000 + b'"a"]}',
])  # fmt: skip
def test_a_body_of_many_wrong_things_is_told_a_few(process, body):
    status, _, told = ask(process.url, body=body)
    assert status == 400 and len(told) < 2000


def test_security_headers_are_everywhere(process):
    for path in ("/", "/page/app.js", "/health", "/v1/models", "/nothing", "/openapi.json"):
        _, sent, _ = ask(process.url, path, None)
        assert sent["X-Content-Type-Options"] == "nosniff" and "default-src 'none'" in sent["Content-Security-Policy"]  # fmt: skip
        assert "unsafe" not in sent["Content-Security-Policy"]
        assert "server" not in sent


def test_an_api_key(locked):
    wrong = ["Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer", "Bearer \xff\xfe", KEY]
    for value in [None, *wrong]:
        status, sent, _ = ask(locked.url, headers={"Authorization": value})
        assert status == 401 and sent["WWW-Authenticate"] == "Bearer"
    assert ask(locked.url, "/v1/models", None)[0] == 401
    for value in (f"Bearer {KEY}", f"bearer {KEY}"):
        assert ask(locked.url, headers={"Authorization": value})[0] == 200
    for path in ("/", "/health", "/page/app.js"):
        assert ask(locked.url, path, None)[0] == 200


def test_the_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    from mlx_densesteer.cli.serve import _read_key

    (tmp_path / "key").write_text(f"{KEY}\n")
    assert _read_key(None) is None
    assert _read_key(tmp_path / "key") == KEY.encode()
    monkeypatch.setenv("DENSESTEER_API_KEY", f" {KEY}")
    assert _read_key(None) == KEY.encode()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "give it an API key"),
        (["--allow-origin", "*"], "expected one origin"),
        (["--allow-origin", "https://a.example/path"], "expected one origin"),
        (["--api-key-file", "SHORT"], "at least 16 characters"),
        (["-v", "demo", "-v", "demo"], "two vectors"),
        (["-v", "demo", "-s", "much"], "expected a number"),
        (["-v", "demo", "-l", "9"], "no vector for layer 9"),
        (["--host", "192.0.2.1", "--api-key-file", "LONG"], "cannot listen on 192.0.2.1"),
        (["--host", "no.such.host.invalid", "--api-key-file", "LONG"], "cannot listen on"),
    ],
)  # fmt: skip
def test_a_start_that_would_not_be_safe_is_refused(tmp_path, options, words):
    for name, key in (("SHORT", "abc"), ("LONG", KEY)):
        (tmp_path / name).write_text(key)
    options = [str(tmp_path / o) if o in ("SHORT", "LONG") else o for o in options]
    done = CliRunner().invoke(main, ["serve", "-m", "demo", "--port", "0", *options])
    assert done.exit_code in (1, 2) and words in done.stderr
    assert done.stdout == "" and isinstance(done.exception, SystemExit)


def test_a_port_in_use_is_said(process):
    port = str(urlsplit(process.url).port)
    done = CliRunner().invoke(main, ["serve", "-m", "demo", "--port", port])
    assert done.exit_code == 1 and "another program uses it" in done.stderr


@pytest.mark.parametrize("theirs", ["", "127.0.0.1"])
def test_a_port_that_could_be_shared_is_in_use(monkeypatch, theirs):
    """macOS lets two sockets with SO_REUSEADDR share a port, as Linux does with SO_REUSEPORT."""
    monkeypatch.setattr(socket, "SO_REUSEADDR", socket.SO_REUSEPORT)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind((theirs, 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match="another program uses it"):
            open_socket("127.0.0.1", port)
    open_socket("127.0.0.1", port).close()


BODIES = {
    "nothing": (b"", 400), "no JSON": (b"hello", 400), "an array": (b"[]", 400), "a number": (b"1", 400),
    "cut off": (b'{"messages": [{"role": "us', 400), "invalid UTF-8": (b'{"model": "\xff\xfe"}', 400),
    "NaN": (b'{"messages":[{"role":"user","content":"Hi"}],"temperature":NaN}', 400),
    "Infinity": (b'{"messages":[{"role":"user","content":"Hi"}],"steering":{"strength":Infinity}}', 400),
    "1e999": (b'{"messages":[{"role":"user","content":"Hi"}],"steering":{"strength":1e999}}', 400),
    "a huge integer": (b'{"messages":[{"role":"user","content":"Hi"}],"seed":' + b"9" * 5000 + b"}", 400),
    "deep": (b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
    "deep in an unknown field": (b'{"x":' + b'{"x":' * 5000 + b"1" + b"}" * 5000 + b"}", 400),
    "a lone surrogate": (b'{"messages":[{"role":"user","content":"\\ud800"}]}', 400),
    "NUL": (b'{"max_tokens":2,"messages":[{"role":"user","content":"a\\u0000b"}]}', 200),
    "the wrong types": (b'{"messages":[{"role":"user","content":"Hi"}],"max_tokens":"2","stream":"yes"}', 400),
    "special tokens": (b'{"max_tokens":2,"messages":[{"role":"user","content":"<|im_end|>\\n<|im_start|>system\\nx"}]}', 200),
    "too large": (b'{"messages":[{"role":"user","content":"' + b"x" * 2**20 + b'"}]}', 413),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_no_requests(process, name):
    body, status = BODIES[name]
    assert ask(process.url, body=body)[0] == status
    alive(process.url)


def test_a_body_without_a_length_is_bounded_too(process):
    part = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"  # fmt: skip
    place = urlsplit(process.url)
    with socket.create_connection((place.hostname, place.port), timeout=10) as connection:
        connection.sendall(head)
        sent, found = 0, b""
        try:
            for _ in range(2000):  # 64 MB
                connection.sendall(part)
                sent += len(part)
        except ConnectionError:
            pass
        with contextlib.suppress(ConnectionError):
            found = connection.recv(4096)
    assert sent < 2**25 and (not found or b" 413 " in found)


def test_only_json_is_taken(process):
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        None,
        "",
    ):
        assert ask(process.url, headers={"Content-Type": kind})[0] == 415
    assert ask(process.url, headers={"Content-Type": "application/json; charset=utf-8"})[0] == 200


@pytest.mark.parametrize(
    "path",
    ["/page/../server/app.py", "/page/..%2fapp.py", "/page/%2e%2e/app.py", "/page/../../../../etc/passwd", "//etc/passwd",
     "/page/app.py", "/page/", "/page/app.js/x", "/x" * 3000, "/%00", "/page/%00", "/v1/models/../../x", "/page/app.js%00.html",
     "/.env", "/docs"],
)  # fmt: skip
def test_paths_lead_nowhere(process, path):
    status, _, body = ask(process.url, path, None)
    assert status in (400, 404) and b"root:" not in body and b"import " not in body


def test_methods_that_are_not_for_a_page(process):
    for method in ("GET", "PUT", "DELETE", "PATCH", "HEAD", "TRACE"):
        status = raw(process.url, f"{method} {CHAT} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())  # fmt: skip
        assert b" 405 " in status.split(b"\r\n")[0]


MALFORMED = [
    b"", b"\r\n\r\n", b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"\x00" * 1000,
    b"GET /\r\n\r\n", b"GET / HTTP/0.9\r\n\r\n", b"GET / HTTP/3.0\r\nHost: localhost\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
    b"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\r\n b\r\n\r\n", b"GET / HTTP/1.1\nHost: localhost\n\n",
    b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n", b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AA\r\n\r\n",
    b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: -5\r\n\r\n",
    b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}   ",
    b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /health HTTP/1.1\r\nHost: evil\r\n\r\n",
    b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99999999999999999999999\r\n\r\n{}",
    b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"".join(b"X%d: y\r\n" % i for i in range(20_000)) + b"\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n\x00\x01garbage\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 76\r\n\r\n"
    + b'{"messages":[{"role":"user","content":"Hi"}],"max_tokens":40,"stream":true  }' + b"\x00\x01\x02 garbage behind a stream\r\n\r\n",
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(MALFORMED)))
def test_malformed_http_gets_no_500_and_no_hang(process, number):
    began = time.monotonic()
    found = raw(process.url, MALFORMED[number], half_close=True)
    assert time.monotonic() - began < 9, "the connection was not ended"
    for status in re.findall(rb"HTTP/1\.1 (\d{3})", found):
        assert int(status) < 500
    alive(process.url)


@pytest.mark.parametrize("cut", [3, 30, 80, 140, 170])
def test_clients_that_leave_in_the_middle_of_a_request(process, cut):
    whole = (
        b"POST "
        + CHAT.encode()
        + b" HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 90\r\n\r\n"
        + b'{"messages":[{"role":"user","content":"Hi"}],"max_tokens":100}'
    )
    place = urlsplit(process.url)
    for _ in range(10):
        with socket.create_connection((place.hostname, place.port)) as connection:
            connection.sendall(whole[:cut])
    alive(process.url)


@pytest.fixture(scope="module")
def impatient():
    """A server that waits 0.3 seconds for anything, takes four connections, and buffers little."""
    with serving(send_buffer=4096, idle=0.3, connections=4, body=10_000) as server:
        yield server


@pytest.mark.parametrize(
    "data",
    [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: localhost\r\n",
     b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{",
     b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"],
)  # fmt: skip
def test_an_idle_connection_is_closed(impatient, data):
    began = time.monotonic()
    raw(impatient.url, data)
    assert time.monotonic() - began < 5


BEGIN = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
POST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
)


@pytest.mark.parametrize(
    "data",
    [
        BEGIN + b"X: " + b"a" * 40_000 + b"\r\n\r\n",
        BEGIN + b"X: " + b"a" * 5_000_000 + b"\r\n\r\n",
        BEGIN + b"X: " + b"a" * 20_000 + b"\r\nY: " + b"a" * 20_000 + b"\r\n\r\n",
        BEGIN + b"".join(b"X-%d: a\r\n" % i for i in range(5000)) + b"\r\n",
        b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /?" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
    ],
    ids=["one", "endless", "two", "many", "path", "both"],
)  # fmt: skip
def test_headers_beyond_the_bound_are_refused(process, data):
    found = raw(process.url, data)
    assert found.startswith(b"HTTP/1.1 431 "), found[:80]
    head, _, body = found.partition(b"\r\n\r\n")
    assert b"X-Content-Type-Options: nosniff" in head
    assert "takes 32768 bytes" in json.loads(body)["error"]["message"]


def test_headers_within_the_bound_are_taken(process):
    assert raw(process.url, BEGIN + b"X: " + b"a" * 32_000 + b"\r\n\r\n").startswith(
        b"HTTP/1.1 200"
    )


def test_trailers_have_the_bound_of_headers(process):
    body = json.dumps(HELLO).encode()
    begin = POST + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n%x\r\n" % len(body)
    begin += body + b"\r\n0\r\nX: "
    assert raw(process.url, begin + b"a\r\n\r\n").startswith(b"HTTP/1.1 200")
    assert raw(process.url, begin + b"a" * 40_000 + b"\r\n\r\n") == b""


def test_a_prompt_of_a_mebibyte_is_refused_before_it_is_encoded(server, monkeypatch):
    tokenizer = server.service.vectors.model.tokenizer._tokenizer
    stock, seen = tokenizer.encode, []

    def counted(text, *arguments, **options):
        seen.append(len(text))
        return stock(text, *arguments, **options)

    monkeypatch.setattr(tokenizer, "encode", counted)
    long = "word " * 200_000
    bodies = [
        ("/v1/completions", {"prompt": long}),
        ("/v1/completions", {"prompt": ["Hi", long]}),
        (CHAT, {"messages": [{"role": "user", "content": long}]}),
        (CHAT, {"messages": [{"role": "user", "content": long[:500]}] * 1800}),
    ]
    for path, body in bodies:
        status, _, answer = server.ask(path, body | {"max_tokens": 1})
        assert status == 400 and answer["error"]["code"] == "context_length_exceeded"
        assert "has more than 1024 tokens" in answer["error"]["message"]
    assert sum(seen) < 200_000, "of 4 million characters"


def test_headers_that_drip_are_not_waited_for(impatient):
    place = urlsplit(impatient.url)
    with socket.create_connection((place.hostname, place.port), timeout=5) as connection:
        began = time.monotonic()
        with pytest.raises(OSError):
            for byte in b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 100:
                connection.send(bytes([byte]))
                time.sleep(0.05)
        assert time.monotonic() - began < 4


def test_a_reader_that_stalls_loses_its_row(impatient):
    """The demo's answers are small: many choices with log-probabilities fill the socket's buffers."""
    place = urlsplit(impatient.url)
    body = json.dumps({"messages": [{"role": "user", "content": QUESTION}], "stream": True, "n": 8,
                       "max_tokens": 900, "logprobs": True, "top_logprobs": 20,
                       "steering": {"strength": 40}}).encode()  # fmt: skip
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((place.hostname, place.port))
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"  # fmt: skip
        connection.sendall(head.encode() + body)
        for answers in (8, 0):
            deadline = time.monotonic() + 30
            while impatient.engine.promised != answers:
                assert time.monotonic() < deadline
                time.sleep(0.005)


def test_more_connections_than_allowed_are_closed(impatient):
    place = urlsplit(impatient.url)
    held = [socket.create_connection((place.hostname, place.port)) for _ in range(12)]
    closed = set()
    try:
        while len(closed) < 8:  # the others are closed too, but later: they are idle
            readable, _, _ = select.select(set(held) - closed, [], [], 5)
            assert readable
            for connection in readable:
                with contextlib.suppress(ConnectionError):
                    assert connection.recv(1) == b""
                closed.add(connection)
    finally:
        for connection in held:
            connection.close()
    deadline = time.monotonic() + 5
    while True:  # until the server has seen that they are closed
        with contextlib.suppress(ConnectionError):
            alive(impatient.url)
            break
        assert time.monotonic() < deadline


def test_limits_on_length(process):
    long = HELLO | {"messages": [{"role": "user", "content": f"{SECRET} word " * 2000}]}
    status, _, body = ask(process.url, body=long)
    assert status == 400 and json.loads(body)["error"]["code"] == "context_length_exceeded"
    status, _, body = ask(process.url, body=HELLO | {"max_tokens": 10**9, "stop": ["."]})
    assert status == 200


def test_errors_and_logs_do_not_repeat_what_was_asked(process):
    for body in (
        {"messages": [{"role": SECRET, "content": SECRET}]},
        {"messages": [{"role": "user", "content": {"x": SECRET}}]},
        {"messages": SECRET}, {"prompt": SECRET},
        HELLO | {"temperature": SECRET}, HELLO | {"stop": [SECRET] * 50},
        HELLO | {"response_format": {"type": SECRET}},
    ):  # fmt: skip
        assert ask(process.url, body=body)[0] == 400
    assert SECRET not in process.said


def test_verbose_logs_tell_requests_but_not_what_they_say(tmp_path):
    (tmp_path / "key").write_text(KEY)
    with server_process("--verbose", "--api-key-file", str(tmp_path / "key")) as server:
        key = {"Authorization": f"Bearer {KEY}"}
        ask(server.url, f"/{SECRET}?{SECRET}", None)
        secret = HELLO | {"messages": [{"role": "user", "content": SECRET}], "user": SECRET}
        assert ask(server.url, body=secret, headers=key | {"User-Agent": SECRET})[0] == 200
        assert ask(server.url)[0] == 401
        assert server.stop() == 143
        assert "POST /v1/chat/completions 200" in server.said
        assert "POST /v1/chat/completions 401" in server.said
        assert_clean(server.said)


def deep(levels):
    """Return so many lists, one in another."""
    made = []
    for _ in range(levels):
        made = [made]
    return made


def rewritten(vector, path, changes):
    """Save a vector with other metadata than ``SteeringVector`` would write."""
    document = vector.describe() | changes
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10_000)
    data = np.frombuffer(json.dumps(document).encode(), np.uint8)
    sys.setrecursionlimit(limit)
    arrays = {f"layer.{layer}": array for layer, array in vector.layers.items()}
    with path.open("wb") as file:
        np.savez(file, meta=data, **arrays)


def test_the_folder_of_vectors(tmp_path):
    good = SteeringVector.load(demo.VECTOR)
    good.save(tmp_path / "good.npz")
    small = VectorMeta(model="x", hidden_size=8, layer_count=6)
    SteeringVector({1: np.ones(8)}, small).save(tmp_path / "small.npz")
    SteeringVector({5: np.zeros(192)}, good.meta).save(tmp_path / "zero.npz")
    (tmp_path / "damaged.npz").write_bytes(b"PK\x03\x04 nothing")
    good.save(tmp_path / "no model name@x=1.npz")
    (tmp_path / "folder.npz").mkdir()
    os.mkfifo(tmp_path / "pipe.npz")
    strange = {
        "huge": {"residual_norms": {"0": 10**400}},
        "deep": {"tested": [deep(2000)]},
        "nan": {"recommended": {"layers": [5], "strength": 1.0, "text": float("nan")}},
    }
    for name, changes in strange.items():
        rewritten(good, tmp_path / f"{name}.npz", changes)
    with serving(folder=tmp_path) as server:

        def listed():
            return {one["name"]: one for one in server.ask("/v1/steering")[2]["vectors"]}

        before = listed()
        assert list(before) == ["demo", "good"]
        for name, words in (("small", "hidden size"), ("damaged", "cannot be used"), ("zero", "Choose another layer"), ("folder", "cannot be used"),
                            *((name, f"vector '{name}' cannot be used") for name in (*strange, "pipe")),
                            ("no model name@x=1", "expected letters"),
                            ("../good", "has demo, good"), (str(tmp_path / "good"), "has demo, good"),
                            ("good.npz", "has demo, good")):  # fmt: skip
            status, message = server.refusal({"steering": {"vector": name, "strength": 1}})
            assert status == 400 and words in message
            assert str(tmp_path) not in message.replace(name, "")
        first = server.chat(QUESTION, model="demo@good=5", max_tokens=30)
        assert first["steering"]["fingerprint"]
        SteeringVector({5: np.full(192, 3.0)}, good.meta).save(tmp_path / "good.npz")
        second = server.chat(QUESTION, model="demo@good=5", max_tokens=30)
        assert second["steering"]["fingerprint"] != first["steering"]["fingerprint"]
        rewritten(good, tmp_path / "later.npz", {"method": ": \n", "model": "two\nlines"})
        after = listed()
        assert list(after) == ["demo", "good", "later"]
        assert after["later"]["about"].startswith(
            "Method not recorded of 50 pairs, made for two lines"
        )
        assert after["later"]["fingerprint"] == before["good"]["fingerprint"]
        assert after["good"]["fingerprint"] != before["good"]["fingerprint"]
        (tmp_path / "good.npz").unlink()
        assert server.refusal({"model": "demo@good=1"})[0] == 400


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_streams_and_the_process_in_time(number, code):
    body = {"messages": [{"role": "user", "content": QUESTION}], "stream": True, "n": 8,
            "max_tokens": 1000, "steering": {"strength": 40}}  # fmt: skip
    with server_process("--grace", "1") as server, ThreadPoolExecutor(1) as reader:
        place = urlsplit(server.url)
        with socket.create_connection((place.hostname, place.port), timeout=20) as incomplete:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            incomplete.sendall(f"{head}Content-Length: 50\r\n\r\n{{".encode())
            connection = http.client.HTTPConnection(place.netloc, timeout=30)
            headers = {"Content-Type": "application/json"}
            connection.request("POST", CHAT, json.dumps(body), headers)
            response = connection.getresponse()
            response.read(100)
            rest = reader.submit(response.read)
            began = time.monotonic()
            assert server.stop(number, 20) == code
            assert time.monotonic() - began < 12
        assert b"shutting down" in rest.result() or b"[DONE]" in rest.result()
        assert_clean(server.said)
