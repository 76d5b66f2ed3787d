"""The page to try a run, the health checks and the metrics."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

from fastapi import APIRouter, HTTPException, Response
from fastapi.responses import HTMLResponse
from prometheus_client import CONTENT_TYPE_LATEST

from loracle.serving.service import Service

router = APIRouter()


def _page() -> tuple[str, dict[str, str]]:
    """The page and its headers: a policy that allows its own script and no other."""
    page = resources.files("loracle.serving").joinpath("page.html").read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}


PAGE, HEADERS = _page()


@router.get("/", include_in_schema=False)
async def index() -> HTMLResponse:
    return HTMLResponse(PAGE, headers=HEADERS)


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Return 200 while the process answers."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(service: Service) -> dict[str, str]:
    """Return 200 while the worker scores requests, and 503 if it is stuck."""
    if not service.queue.ready(service.limits.deadline):
        raise HTTPException(503, "The worker is stuck or stopped.")
    return {"status": "ok"}


@router.get("/metrics", response_class=Response)
async def metrics(service: Service) -> Response:
    """Return the metrics in Prometheus' text format."""
    return Response(service.metrics.to_text(), media_type=CONTENT_TYPE_LATEST)
