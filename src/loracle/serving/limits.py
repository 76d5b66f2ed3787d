"""What every request passes before anything else looks at it: who asks, how much there is to do already, how large it is.

A body is read here, and refused at the byte that makes it too large, whether its length was announced or not; JSON is parsed
only after that. Whatever goes wrong behind the guard, no text and no stack trace leaves: not to the client, not to the log.
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
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loracle.serving.metrics import Metrics

log = logging.getLogger(__name__)

OPEN = ("/", "/healthz", "/readyz")  # for anybody: they say nothing of a run
RETRY = {"Retry-After": "1"}


def problem(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """The one shape of every answer that is none."""
    return JSONResponse({"error": {"code": status, "message": message}}, status, headers)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host of that name."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Refused(Exception):
    """A request that goes no further."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.response = problem(status, message, headers)


class Gone(Exception):
    """The client left before it had said everything."""


class Guard:
    """ASGI middleware.

    Args:
        token: what ``Authorization: Bearer …`` must hold. Without one, only requests that address this machine by a loopback
            name are answered, so that no page in a browser here can talk to the server under a name of its own (DNS
            rebinding).
        paths: those that metrics name; all others are one.
        has_room: whether so many texts would be taken now.
        max_body: bytes. queue: requests at work at once. deadline: seconds for an answer, reading the request included.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | None,
        paths: Collection[str],
        max_body: int,
        queue: int,
        has_room: Callable[[int], bool],
        deadline: float,
        metrics: Metrics,
    ):
        self.app, self.metrics, self.paths = app, metrics, paths
        self.token = None if token is None else token.encode()
        self.max_body, self.queue, self.has_room, self.deadline = max_body, queue, has_room, deadline
        self.at_work = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 0

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        route = scope["path"] if scope["path"] in self.paths else "other"
        try:
            await self._pass(scope, receive, note)
        except Gone:
            pass
        except Refused as e:
            if not status:
                await e.response(scope, receive, note)
        except Exception as e:
            at = traceback.extract_tb(e.__traceback__)[-1]
            log.error("%s failed: %s in %s:%s", route, type(e).__name__, at.filename, at.lineno)
            if not status:
                await problem(500, "a bug in the server; its log says where")(scope, receive, note)
        finally:
            labels = route, str(status or "none")
            self.metrics.requests.labels(*labels).inc()
            self.metrics.latency.labels(*labels).observe(time.perf_counter() - begun)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._check_caller(scope)
        if scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if self.at_work >= self.queue:
            raise Refused(429, f"{self.queue} requests are at work already; try again", RETRY)
        if not self.has_room(1):  # as the batcher would say: under overload most of the work is to refuse
            raise Refused(429, "too much to do; try again", RETRY)
        self.at_work += 1
        try:
            async with asyncio.timeout(self.deadline):
                body = await self._read(scope, receive)
                await self.app(scope, _replayed(body, receive), send)
        except TimeoutError:
            raise Refused(503, f"no answer within {self.deadline:g} seconds; try again", RETRY) from None
        finally:
            self.at_work -= 1

    def _check_caller(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if self.token is None:
            if not _addresses_loopback(headers.get(b"host", b"localhost")):
                raise Refused(403, "without a token this server is only called by a loopback name, such as localhost")
        elif scope["path"] not in OPEN:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            # Bytes, since compare_digest refuses text that is not ASCII; both sides always compared.
            if not hmac.compare_digest(given.strip(), self.token) or scheme.lower() != b"bearer":
                raise Refused(401, "send the token: Authorization: Bearer …", {"WWW-Authenticate": "Bearer"})

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and (len(announced) > 15 or int(announced) > self.max_body):  # int() minds 4,300 digits
            raise self._too_large()
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Gone
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.max_body:
                raise self._too_large()
        return bytes(body)

    def _too_large(self) -> Refused:
        return Refused(413, f"a request has at most {self.max_body:,} bytes", {"Connection": "close"})


@functools.lru_cache(256)
def _addresses_loopback(host: bytes) -> bool:
    try:
        return is_loopback(urlsplit(f"//{host.decode('latin-1')}").hostname or "")
    except ValueError:
        return False


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body once, then whatever the connection says."""
    unread = True

    async def replay() -> Message:
        nonlocal unread
        if unread:
            unread = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay
