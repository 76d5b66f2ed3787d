"""The HTTP application: routes, limits and error responses around an ``InferenceService``."""

from __future__ import annotations

from typing import Any

import numpy as np
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

import loracle
from loracle.config import ServeConfig
from loracle.errors import UserError
from loracle.models.scoring import score
from loracle.runs.predictor import Predictor
from loracle.serving.limits import RETRY_HEADERS, Limits, LimitsMiddleware, error_response
from loracle.serving.queue import QueueFull, RequestQueue, ScoringFailed
from loracle.serving.routes import ROUTERS
from loracle.serving.schemas import ErrorResponse
from loracle.serving.service import InferenceService
from loracle.text.tokenize import Encoded

ERRORS = {
    400: "The body is not JSON.",
    401: "The token is missing or wrong.",
    403: "The server has no token and the request does not use a loopback name.",
    404: "No such run is served.",
    413: "The body is too large.",
    422: "The request is invalid.",
    429: "The server is overloaded.",
    503: "There was no answer in time, or scoring failed.",
}


def create_app(predictors: dict[str, Predictor], settings: ServeConfig, *, token: str | None = None) -> FastAPI:
    """Build the application, with one worker for all runs.

    Args:
        predictors: by the names that requests use. token: required from every request, unless None.
    """

    def score_texts(run: str, texts: list[Encoded]) -> np.ndarray:
        return score(predictors[run].scorer, texts, tokens_per_micro_batch=settings.tokens_per_micro_batch)

    queue = RequestQueue(
        score_texts,
        tokens_per_micro_batch=settings.tokens_per_micro_batch,
        max_texts=settings.queue_texts,
        max_tokens=settings.queue_tokens,
        max_wait=settings.max_wait,
        drain_timeout=settings.deadline,
    )
    limits = Limits(
        max_body=settings.max_body,
        max_texts=settings.max_texts,
        max_chars=settings.max_chars,
        max_requests=settings.queue,
        deadline=settings.deadline,
    )
    service = InferenceService(predictors, queue, limits)
    responses: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse, "description": description} for status, description in ERRORS.items()
    }
    app = FastAPI(
        title="loracle",
        version=loracle.__version__,
        description=f"Classifies and ranks texts with these runs: {', '.join(predictors)}.",
        lifespan=service.lifespan,
        docs_url=None,  # that page would load scripts from another site
        redoc_url=None,
        responses=responses,
        dependencies=[] if token is None else [Depends(HTTPBearer(auto_error=False))],  # for the OpenAPI document
    )
    app.state.service = service
    for router in ROUTERS:
        app.include_router(router)
    _add_error_handlers(app)
    app.add_middleware(
        LimitsMiddleware,
        limits=limits,
        token=token,
        paths={*app.openapi()["paths"], "/", "/openapi.json"},
        has_room=queue.has_room,
        metrics=service.metrics,
    )
    return app


def _add_error_handlers(app: FastAPI) -> None:
    """Give every error the same body, which never repeats a request."""

    @app.exception_handler(QueueFull)
    async def queue_full(_: Request, error: QueueFull) -> Response:
        return error_response(429, "The queue is full. Try again.", RETRY_HEADERS)

    @app.exception_handler(ScoringFailed)
    async def scoring_failed(_: Request, error: ScoringFailed) -> Response:
        return error_response(503, f"{error} Try again.", RETRY_HEADERS)

    @app.exception_handler(UserError)
    async def user_error(_: Request, error: UserError) -> Response:
        return error_response(422, str(error))

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        return error_response(error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return error_response(422, "; ".join(dict.fromkeys(map(_describe, error.errors()))))


def _describe(error: dict[str, Any]) -> str:
    """Where a request is wrong and how, without its values: pydantic's messages name only types and limits."""
    if error["type"] == "extra_forbidden":  # its location is the client's own word
        return "Unknown field."
    place = ".".join(str(part) for part in error["loc"][1:])
    return f"{place}: {error['msg']}" if place else error["msg"]
