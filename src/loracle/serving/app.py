"""HTTP in front of trained runs: what ``predict`` and ``rank`` say, and the same in vLLM's words.

A request is encoded by one thread (a tokenizer is not re-entrant either) unless it is short, scored by the batcher's, and a
ranker's chances and lifts are drawn in a third, so that the loop that talks to clients never waits for long.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from importlib import resources
from typing import Any, TypeVar

import numpy as np
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException as StarletteHTTPException

import loracle
from loracle.config import ServeConfig
from loracle.errors import UserError
from loracle.models.scoring import score
from loracle.runs.predictor import Predictor
from loracle.serving import schemas
from loracle.serving.limits import RETRY, Guard, problem
from loracle.serving.metrics import Metrics
from loracle.serving.queue import Batcher, Failed, Full
from loracle.text.tokenize import Encoded

PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.Problem, "description": about}
    for status, about in {
        400: "not JSON",
        401: "no token, or a wrong one",
        403: "called by another name than a loopback one, without a token",
        404: "no such run",
        413: "too many bytes",
        422: "not what was expected",
        429: "too much to do",
        503: "not answered in time, or broken off",
    }.items()
}
ENCODED_HERE = 16, 4096  # texts and characters that the event loop encodes by itself: a millisecond
T = TypeVar("T")


class InferenceService:
    """The runs behind an app and the threads that work for it."""

    def __init__(self, predictors: dict[str, Predictor], settings: ServeConfig):
        self.predictors, self.settings = predictors, settings
        self.batcher = Batcher(
            lambda run, texts: score(predictors[run].scorer, texts, tokens_per_micro_batch=settings.round_tokens),
            round_tokens=settings.round_tokens,
            queue_texts=settings.queue_texts,
            queue_tokens=settings.queue_tokens,
            max_wait=settings.max_wait,
            patience=settings.deadline,
        )
        self.metrics = Metrics(
            self.batcher,
            {name: p.reference for name, p in predictors.items() if p.reference},
            {name: p.task.label_names for name, p in predictors.items()},
        )
        self._encoding_away = 0
        self._done: deque[tuple[Future[np.ndarray], asyncio.Future[np.ndarray]]] = deque()
        self._waking = False
        self.encoding, self.drawing = ThreadPoolExecutor(1, "loracle-encoder"), ThreadPoolExecutor(1, "loracle-lift")

    @asynccontextmanager
    async def open(self, app: FastAPI) -> AsyncIterator[None]:
        """While the server runs; what is at work when it ends is finished."""
        with self.encoding, self.drawing, self.batcher:
            await self.away(self.encoding, self._warm_up)
            yield

    def _warm_up(self) -> None:
        """Two full rounds of each run: the first request does not wait for what is done once, and the queue knows the speed."""
        for name, predictor in self.predictors.items():
            texts = predictor.encoder([f"{n} " * 16 for n in range(2 + self.settings.round_tokens // 16)])
            with suppress(Failed):  # which the log says
                self.batcher.submit(name, texts).result()

    def pick(self, name: str | None, command: str | None = None) -> str:
        """The run that is asked. ``command``: predict or rank, if only one of them has an answer.

        Raises:
            HTTPException: there is no such run, or it does something else.
        """
        known = ", ".join(self.predictors)
        if name is None and len(self.predictors) > 1:
            raise HTTPException(422, f"several runs are served; name one of {known}")
        name = next(iter(self.predictors)) if name is None else name
        if name not in self.predictors:
            raise HTTPException(404, f"no such run here; there is {known}")
        answers = self.predictors[name].task.output.command
        if command not in (None, answers):
            raise HTTPException(422, f"{name} does not {command}; it answers {answers}")
        return name

    async def scores(
        self, run: str, texts: Sequence[str], contexts: Sequence[str | None] | None
    ) -> tuple[list[Encoded], np.ndarray]:
        """Encoded texts and their scores ``[E, C]``.

        Raises:
            HTTPException: more texts or characters than a request may have. Full, Failed: not now.
        """
        self._check_sizes(texts, contexts)
        if not self.batcher.has_room(len(texts)):
            raise Full
        encoded = await self._encoded(run, texts, contexts)
        scores = await self._answer(self.batcher.submit(run, encoded))
        self.metrics.count(run, encoded)
        return encoded, scores

    async def _encoded(self, run: str, texts: Sequence[str], contexts: Sequence[str | None] | None) -> list[Encoded]:
        """Texts as the model sees them; a few short ones at once, as another thread would take longer to be asked."""
        encode = self.predictors[run].encode
        size = len(texts), sum(map(len, (*texts, *filter(None, contexts or ()))))
        if not self._encoding_away and all(n <= most for n, most in zip(size, ENCODED_HERE, strict=True)):
            return encode(texts, contexts)
        loop, work = asyncio.get_running_loop(), self.encoding.submit(encode, texts, contexts)
        self._encoding_away += 1  # an encoder does one thing at a time, and the loop must not wait for it
        work.add_done_callback(lambda _: loop.call_soon_threadsafe(self._came_back))
        return await asyncio.wrap_future(work)

    def _came_back(self) -> None:
        self._encoding_away -= 1

    def _answer(self, work: Future[np.ndarray]) -> asyncio.Future[np.ndarray]:
        """What the worker makes of something. The loop is woken once for a whole round, not for each request in it."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[np.ndarray] = loop.create_future()

        def done(_: Any) -> None:
            self._done.append((work, answer))
            if not self._waking:
                self._waking = True
                loop.call_soon_threadsafe(self._hand_over)

        answer.add_done_callback(lambda _: work.cancel())  # nothing, where the work is done
        work.add_done_callback(done)
        return answer

    def _hand_over(self) -> None:
        """Answer whoever waits for work that is done."""
        self._waking = False  # before the first look, so that what comes after the last one wakes the loop again
        while self._done:
            work, answer = self._done.popleft()
            if answer.done():  # given up
                continue
            if (error := work.exception()) is None:
                answer.set_result(work.result())
            else:
                answer.set_exception(error)

    def _check_sizes(self, texts: Sequence[str], contexts: Sequence[str | None] | None) -> None:
        limits = self.settings
        if len(texts) > limits.max_texts:
            raise HTTPException(422, f"at most {limits.max_texts:,} texts a request; there are {len(texts):,}")
        if contexts is not None and len(contexts) != len(texts):
            raise HTTPException(422, f"one context for each of {len(texts):,} texts; there are {len(contexts):,}")
        lengths = [len(part) for part in (*texts, *(contexts or ())) if part is not None]
        if max(lengths) > limits.max_chars:
            raise HTTPException(422, f"at most {limits.max_chars:,} characters a text; one has {max(lengths):,}")
        if sum(lengths) > limits.max_body:  # a context of many titles is sent once and encoded with each
            raise HTTPException(422, f"at most {limits.max_body:,} characters, the context counted with each text")

    async def classify(
        self, run: str, texts: Sequence[str], contexts: Sequence[str | None] | None = None
    ) -> tuple[list[Encoded], np.ndarray, list[list[str]]]:
        """Encoded texts, probabilities ``[E, C]`` and labels."""
        predictor = self.predictors[run]
        encoded, scores = await self.scores(run, texts, contexts)
        proba = predictor.values(scores)
        labels = predictor.names(proba)
        self.metrics.classified(run, proba, labels)
        return encoded, proba, labels

    async def away(self, where: Executor, work: Callable[..., T], *args: Any) -> T:
        """What ``work`` gives, done in another thread."""
        return await asyncio.get_running_loop().run_in_executor(where, work, *args)


def create_app(predictors: dict[str, Predictor], settings: ServeConfig, *, token: str | None = None) -> FastAPI:
    """The application: routes, limits and one worker for all runs.

    Args:
        predictors: by the names that requests call them. token: what every request must bear, if any.
    """
    desk = InferenceService(predictors, settings)
    app = FastAPI(
        title="loracle",
        version=loracle.__version__,
        description=f"Classifies and ranks texts; it serves {', '.join(predictors)}.",
        lifespan=desk.open,
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        responses=PROBLEMS,
        dependencies=[] if token is None else [Depends(HTTPBearer(auto_error=False))],  # for the OpenAPI document
    )
    _add_problems(app)
    _add_routes(app, desk)
    _add_vllm_routes(app, desk)
    _add_pages(app, desk)
    app.add_middleware(
        Guard,
        token=token,
        paths={*app.openapi()["paths"], "/", "/openapi.json"},
        max_body=settings.max_body,
        queue=settings.queue,
        has_room=desk.batcher.has_room,
        deadline=settings.deadline,
        metrics=desk.metrics,
    )
    return app


def _add_routes(app: FastAPI, desk: InferenceService) -> None:
    @app.post("/v1/classify")
    async def classify(asked: schemas.Texts) -> schemas.Classified:
        """Label and probabilities of each text, as `loracle predict`."""
        run = desk.pick(asked.run, "predict")
        encoded, proba, labels = await desk.classify(run, asked.texts, asked.contexts)
        names = desk.predictors[run].task.label_names
        results = [
            schemas.Label(labels=given, probabilities=dict(zip(names, p.tolist(), strict=True)), cut=e.cut)
            for e, p, given in zip(encoded, proba, labels, strict=True)
        ]
        return schemas.Classified(run=run, results=results)

    @app.post("/v1/rank")
    async def rank(asked: schemas.Titles) -> schemas.Ranking:
        """Titles best first with what their scores mean, as `loracle rank`."""
        run = desk.pick(asked.run, "rank")
        _, scores = await desk.scores(run, asked.titles, [asked.context] * len(asked.titles))
        desk.metrics.ranked(run, scores[:, 0])
        best_first = await desk.away(desk.drawing, desk.predictors[run].ranked, asked.titles, scores[:, 0])
        results = [
            schemas.Ranked(
                rank=place,
                index=r.index,
                title=r.text,
                score=r.score,
                lift=r.lift,
                lift_low=r.lift_low,
                lift_high=r.lift_high,
                beats=None if r.beats is None else list(r.beats),
            )
            for place, r in enumerate(best_first, 1)
        ]
        return schemas.Ranking(run=run, results=results)

    @app.post("/v1/score")
    async def score_texts(asked: schemas.Texts) -> schemas.Scores:
        """Scores before any softmax, of a classifier or a ranker."""
        run = desk.pick(asked.run)
        _, scores = await desk.scores(run, asked.texts, asked.contexts)
        return schemas.Scores(run=run, labels=list(desk.predictors[run].task.label_names), scores=scores.tolist())

    @app.get("/v1/models")
    async def models() -> schemas.Models:
        """The runs that are served."""
        return schemas.Models(
            data=[
                schemas.Model(id=name, task=p.task.name, labels=list(p.task.label_names), base=p.info.base["source"])
                for name, p in desk.predictors.items()
            ]
        )


def _add_vllm_routes(app: FastAPI, desk: InferenceService) -> None:
    @app.post("/classify")
    async def classify(asked: schemas.VllmClassify) -> schemas.VllmClassified:
        """As vLLM's, for texts."""
        run = desk.pick(asked.model, "predict")
        texts = [asked.input] if isinstance(asked.input, str) else asked.input
        encoded, proba, _ = await desk.classify(run, texts)
        names, tokens = desk.predictors[run].task.label_names, sum(e.tokens for e in encoded)
        return schemas.VllmClassified(
            id=f"classify-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=run,
            data=[
                schemas.VllmClass(index=i, label=names[p.argmax()], probs=p.tolist(), num_classes=len(names))
                for i, p in enumerate(proba)
            ],
            usage=schemas.VllmClassifyUsage(prompt_tokens=tokens, total_tokens=tokens),
        )

    @app.post("/rerank")
    @app.post("/v1/rerank")
    @app.post("/v2/rerank")
    async def rerank(asked: schemas.VllmRerank) -> schemas.VllmReranking:
        """As vLLM's, for texts; a relevance score is the ranker's score as it is."""
        run = desk.pick(asked.model, "rank")
        encoded, scores = await desk.scores(run, asked.documents, [asked.query or None] * len(asked.documents))
        desk.metrics.ranked(run, scores[:, 0])
        best_first = np.argsort(-scores[:, 0], kind="stable")[: asked.top_n or None]
        tokens = sum(e.tokens for e in encoded)
        return schemas.VllmReranking(
            id=f"rerank-{uuid.uuid4().hex}",
            model=run,
            usage=schemas.VllmUsage(prompt_tokens=tokens, total_tokens=tokens),
            results=[
                schemas.VllmReranked(
                    index=i, document=schemas.VllmDocument(text=asked.documents[i]), relevance_score=scores[i, 0]
                )
                for i in best_first.tolist()
            ],
        )


def _add_pages(app: FastAPI, desk: InferenceService) -> None:
    page = resources.files("loracle.serving").joinpath("page.html").read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}

    @app.get("/", include_in_schema=False)
    async def try_it() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)

    @app.get("/healthz")
    async def alive() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def ready() -> dict[str, str]:
        """The worker takes requests and gets on with them; 503 otherwise."""
        if not desk.batcher.ready(desk.settings.deadline):
            raise HTTPException(503, "the worker does not get on")
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(desk.metrics.page(), media_type=CONTENT_TYPE_LATEST)


def _add_problems(app: FastAPI) -> None:
    """Every error in one shape, and none that repeats what was sent."""

    @app.exception_handler(Full)
    async def full(_: Request, error: Full) -> Response:
        return problem(429, "the queue is full; try again", RETRY)

    @app.exception_handler(Failed)
    async def failed(_: Request, error: Failed) -> Response:
        return problem(503, f"not scored: {error}; try again", RETRY)

    @app.exception_handler(UserError)
    async def unusable(_: Request, error: UserError) -> Response:
        return problem(422, str(error))

    @app.exception_handler(StarletteHTTPException)
    async def other(_: Request, error: StarletteHTTPException) -> Response:
        return problem(error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return problem(422, "; ".join(dict.fromkeys(map(_said, error.errors()))))


def _said(error: dict[str, Any]) -> str:
    """Where a request is wrong and how, without what stood there: pydantic's messages name types and limits only."""
    if error["type"] == "extra_forbidden":  # its place is the client's own word
        return "a field that is not known"
    place = ".".join(str(part) for part in error["loc"][1:])
    return f"{place}: {error['msg']}" if place else error["msg"]
