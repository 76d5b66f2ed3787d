"""uvicorn's HTTP on httptools, with bounds on the head of a request and on the framing of its body.

httptools keeps a header of any length and has no timeout. Here a head that is too long or too slow ends the connection.
The token cannot be checked before the head is complete (compare vLLM's CVE-2025-48956).
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024  # as in uvicorn with h11
HEAD_TIMEOUT = 20.0  # seconds
MAX_FRAMING = 8  # bytes on the wire for each byte of a body: chunks of one byte take six


class BoundedProtocol(HttpToolsProtocol):
    """One connection. ``max_body``: bytes of a body. ``LimitsMiddleware`` answers 413; this bounds the framing."""

    max_body = 0
    head_timer: asyncio.TimerHandle | None = None
    in_head = True
    received = 0  # bytes of the current request

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        super().data_received(data)  # may change in_head and received: one call can carry a head and a body (256 KiB)
        if self.received > MAX_HEAD_BYTES + (0 if self.in_head else MAX_FRAMING * self.max_body):
            self._end("431 Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        self.in_head, self.received = True, 0
        self._start_timer()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self.in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def _start_timer(self) -> None:
        if self.head_timer is None:
            self.head_timer = self.loop.call_later(HEAD_TIMEOUT, self._end, "408 Request Timeout")

    def _stop_timer(self) -> None:
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None

    def _end(self, status: str) -> None:
        self._stop_timer()
        if self.transport.is_closing():
            return
        if self.in_head:  # otherwise the app may have started an answer
            self.transport.write(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
        self.transport.close()


def bounded_protocol(max_body: int) -> type[BoundedProtocol]:
    """The protocol class for bodies of at most ``max_body`` bytes. uvicorn creates one instance for each connection."""
    return type("BoundedProtocol", (BoundedProtocol,), {"max_body": max_body})
