"""The checks that every request passes first: caller, load and size of the body.

The middleware reads the body and rejects it at the byte that exceeds the limit, whether or not its length was announced.
JSON is parsed only afterwards. Whatever fails behind it, neither texts nor stack traces reach the client or the log.
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import ipaddress
import logging
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loracle.serving.metrics import Metrics

log = logging.getLogger(__name__)

PUBLIC_PATHS = ("/", "/healthz", "/readyz")  # need no token, as they show nothing of a run
RETRY_HEADERS = {"Retry-After": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request may contain and how much work the server accepts."""

    max_body: int  # bytes of a body; also characters, with the context counted once for each text
    max_texts: int
    max_chars: int  # of a text or a context
    max_requests: int  # in progress at once
    deadline: float  # seconds until the answer, reading the request included


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """The body of every error."""
    return JSONResponse({"error": {"code": status, "message": message}}, status, headers)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a host of that name."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class RequestRejected(Exception):
    """A request that gets an error response here."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.response = error_response(status, message, headers)


class ClientDisconnected(Exception):
    """The client left before its body was complete."""


class LimitsMiddleware:
    """ASGI middleware that enforces ``Limits``, checks the caller and counts requests.

    Args:
        token: expected in ``Authorization: Bearer …``. Without a token, only requests to a loopback name are answered.
            Otherwise a web page in a local browser could reach the server under its own host name (DNS rebinding).
        paths: paths that get their own metrics; all others count as "other".
        has_room: whether the queue accepts that many texts now.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        token: str | None,
        paths: Collection[str],
        has_room: Callable[[int], bool],
        metrics: Metrics,
    ):
        self.app, self.limits, self.paths, self.has_room, self.metrics = app, limits, paths, has_room, metrics
        self.token = None if token is None else token.encode()
        self.in_progress = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        route = scope["path"] if scope["path"] in self.paths else "other"
        try:
            await self._handle(scope, receive, send_and_note)
        except ClientDisconnected:
            pass
        except RequestRejected as e:
            if not status:
                await e.response(scope, receive, send_and_note)
        except Exception as e:
            at = traceback.extract_tb(e.__traceback__)[-1]
            log.error("%s failed: %s in %s:%s", route, type(e).__name__, at.filename, at.lineno)
            if not status:
                response = error_response(500, "This is a bug in the server. Its log names the place.")
                await response(scope, receive, send_and_note)
        finally:
            labels = route, str(status or "none")
            self.metrics.requests.labels(*labels).inc()
            self.metrics.latency.labels(*labels).observe(time.perf_counter() - start)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._check_caller(scope)
        if scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        limits = self.limits
        if self.in_progress >= limits.max_requests:
            raise RequestRejected(
                429, f"The server already works on {limits.max_requests} requests. Try again.", RETRY_HEADERS
            )
        if not self.has_room(1):  # before the body is read: under overload most of the work is to reject requests
            raise RequestRejected(429, "The server is overloaded. Try again.", RETRY_HEADERS)
        self.in_progress += 1
        try:
            async with asyncio.timeout(limits.deadline):
                body = await self._read(scope, receive)
                await self.app(scope, _replayed(body, receive), send)
        except TimeoutError:
            message = f"There was no answer within {limits.deadline:g} seconds. Try again."
            raise RequestRejected(503, message, RETRY_HEADERS) from None
        finally:
            self.in_progress -= 1

    def _check_caller(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if self.token is None:
            if not _addresses_loopback(headers.get(b"host", b"localhost")):
                raise RequestRejected(
                    403, "Without a token, this server only answers requests to a loopback name such as localhost."
                )
        elif scope["path"] not in PUBLIC_PATHS:
            scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
            # Bytes, as compare_digest rejects text that is not ASCII. Both sides are always compared.
            if not hmac.compare_digest(token.strip(), self.token) or scheme.lower() != b"bearer":
                message = "The token is missing or wrong. Send the header Authorization: Bearer <token>."
                raise RequestRejected(401, message, {"WWW-Authenticate": "Bearer"})

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        announced, max_body = dict(scope["headers"]).get(b"content-length", b"0"), self.limits.max_body
        if announced.isdigit() and (len(announced) > 15 or int(announced) > max_body):  # int() fails from 4,300 digits
            raise self._too_large()
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnected
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > max_body:
                raise self._too_large()
        return bytes(body)

    def _too_large(self) -> RequestRejected:
        message = f"The body is too large: at most {self.limits.max_body:,} bytes are accepted."
        return RequestRejected(413, message, {"Connection": "close"})


@functools.lru_cache(256)
def _addresses_loopback(host: bytes) -> bool:
    try:
        return is_loopback(urlsplit(f"//{host.decode('latin-1')}").hostname or "")
    except ValueError:
        return False


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that returns the body once, then passes on the connection's messages."""
    unread = True

    async def replay() -> Message:
        nonlocal unread
        if unread:
            unread = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay
