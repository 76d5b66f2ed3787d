"""The head of a request is bounded in bytes and in time."""

from __future__ import annotations

import asyncio
import socket
import time

import httpx2
import pytest
from serving_client import serve_on_port

from loracle.serving import protocol

HEAD = b"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\n"


async def app(scope, receive, send):
    """Answer with the length of the body."""
    if scope["type"] == "lifespan":
        for event in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{event}.complete"})
        return
    total, more = 0, True
    while more:
        message = await receive()
        total, more = total + len(message.get("body", b"")), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"7")]})
    await send({"type": "http.response.body", "body": b"%7d" % total})


@pytest.fixture(scope="module")
def address():
    with serve_on_port(app) as address:
        yield address


def send_until_closed(address, first, again=b"", times=0):
    """Send ``first``, then ``again`` until the server closes. Returns its answer and how many times ``again`` was sent."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as raw:
        sent = 0
        try:
            raw.sendall(first)
            while sent < times:
                raw.sendall(again)
                sent += 1
        except OSError:
            pass
        try:
            return raw.recv(100), sent
        except ConnectionResetError:
            return b"", sent


@pytest.mark.parametrize(
    ("first", "again"),
    [
        (HEAD, b"X-Filler: " + b"a" * 8000 + b"\r\n"),
        (HEAD + b"X-Filler: ", b"a" * 8000),
        (b"GET /", b"a" * 8000),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX-Trailer: ", b"a" * 8000),
    ],
    ids=["headers", "one header", "an address", "a trailer"],
)
def test_endless_head_closes_the_connection(address, first, again):
    answer, sent = send_until_closed(address, first, again, times=20_000)  # 160 MB
    assert sent < 4_000
    assert answer == b"" or answer.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400")), answer
    assert httpx2.post(address, content=b"abc").text == "      3"


@pytest.mark.slow
def test_large_bodies_and_heads_within_bounds_pass(address):
    headers = {f"X-Filler-{i}": "a" * 4000 for i in range(15)}
    assert httpx2.post(address, content=b"a" * 900_000, headers=headers).text == " 900000"
    with httpx2.Client() as client:  # one connection: the count restarts with each request
        for _ in range(8):
            assert client.post(address, content=b"a" * 300_000, headers=headers).text == " 300000"
    chunks = (b"a" for _ in range(50_000))  # six bytes on the wire for one
    assert httpx2.post(address, content=chunks).text == "  50000"


@pytest.mark.parametrize("first", [b"", HEAD + b"X-Slow"], ids=["nothing", "half a header"])
def test_slow_head_gets_408(monkeypatch, first):
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT", 0.3)
    with serve_on_port(app) as address:
        begun = time.monotonic()
        answer, _ = send_until_closed(address, first)
        assert 0.2 < time.monotonic() - begun < 10
        assert answer.startswith(b"HTTP/1.1 408")
        assert httpx2.post(address, content=b"abc").text == "      3"


@pytest.mark.slow
def test_head_timeout_does_not_cut_slow_answers(monkeypatch):
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT", 0.2)

    async def slow(scope, receive, send):
        if scope["type"] == "http":
            await asyncio.sleep(0.6)
        await app(scope, receive, send)

    with serve_on_port(slow) as address, httpx2.Client() as client:
        for _ in range(2):
            assert client.post(address, content=b"abc").text == "      3"
