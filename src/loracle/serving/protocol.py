"""HTTP as uvicorn speaks it with httptools, with bounds on what stands before and around a request's body.

httptools keeps a header until it is over, however long it gets, and knows no clock. Here a head that is too long or too slow
ends the connection, since no token can be looked at before it (vLLM's CVE-2025-48956).
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST = 64 * 1024  # bytes of a head, as uvicorn has it with h11
PATIENCE = 20.0  # seconds for it
FRAMING = 8  # bytes on the wire for each that a body may have: chunks of one byte take six


class BoundedProtocol(HttpToolsProtocol):
    """One connection. ``max_body``: bytes of a request's body, which others refuse by a word; here its framing is bounded."""

    max_body = 0
    waiting: asyncio.TimerHandle | None = None  # until a head is over
    in_head = True
    received = 0  # bytes of the request that is read now

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._heard()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        super().data_received(data)  # which may set both: what came at once, 256 KiB at most, may hold head and body
        if self.received > MOST + (0 if self.in_head else FRAMING * self.max_body):
            self._end("431 Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        self.in_head, self.received = True, 0
        self._wait()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self.in_head = False
        self._heard()
        super().on_headers_complete()

    def _wait(self) -> None:
        if self.waiting is None:
            self.waiting = self.loop.call_later(PATIENCE, self._end, "408 Request Timeout")

    def _heard(self) -> None:
        if self.waiting is not None:
            self.waiting.cancel()
            self.waiting = None

    def _end(self, status: str) -> None:
        self._heard()
        if self.transport.is_closing():
            return
        if self.in_head:  # else an answer may be under way already
            self.transport.write(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
        self.transport.close()


def bounded(max_body: int) -> type[BoundedProtocol]:
    """The protocol for bodies of so many bytes at most: uvicorn makes one of it for each connection."""
    return type("Bounded", (BoundedProtocol,), {"max_body": max_body})
