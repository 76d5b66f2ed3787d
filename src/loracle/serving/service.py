"""The served runs behind the routes: encode a request, queue it, return its scores.

One thread encodes texts, as a tokenizer is not re-entrant either; the event loop encodes short requests itself. The queue's
worker scores. A third thread draws the lifts of a ranker. So the event loop, which talks to clients, never waits for long.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import Depends, FastAPI, HTTPException, Request

from loracle.runs.predictor import Predictor, RankedTitle
from loracle.serving.limits import Limits
from loracle.serving.metrics import Metrics
from loracle.serving.queue import QueueFull, RequestQueue, ScoringFailed
from loracle.text.tokenize import Encoded

MAX_INLINE_TEXTS, MAX_INLINE_CHARS = 16, 4096  # what the event loop encodes itself: about a millisecond of work
T = TypeVar("T")


class InferenceService:
    """The predictors of an app by run name, with the queue and the threads that work for them."""

    def __init__(self, predictors: Mapping[str, Predictor], queue: RequestQueue, limits: Limits):
        self.predictors, self.queue, self.limits = predictors, queue, limits
        self.metrics = Metrics(
            queue,
            {name: p.reference for name, p in predictors.items() if p.reference},
            {name: p.task.label_names for name, p in predictors.items()},
        )
        self._encoding_in_thread = 0
        self._done: deque[tuple[Future[np.ndarray], asyncio.Future[np.ndarray]]] = deque()
        self._wake_up_scheduled = False
        self._encode_thread = ThreadPoolExecutor(1, "loracle-encoder")
        self._rank_thread = ThreadPoolExecutor(1, "loracle-lift")

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Run the threads while the server runs. Work in progress is finished at the end."""
        with self._encode_thread, self._rank_thread, self.queue:
            await self._in_thread(self._encode_thread, self._warm_up)
            yield

    def _warm_up(self) -> None:
        """Score two full micro-batches with each run, for one-time work and so that the queue knows its speed."""
        for name, predictor in self.predictors.items():
            texts = predictor.encoder([f"{n} " * 16 for n in range(2 + self.queue.tokens_per_micro_batch // 16)])
            with suppress(ScoringFailed):  # the queue logs it
                self.queue.submit(name, texts).result()

    def pick_run(self, name: str | None, command: str | None = None) -> str:
        """Return the name of the run to use. ``command``: "predict" or "rank", where only one of them has an answer.

        Raises:
            HTTPException: no such run is served, it answers another command, or the name is missing.
        """
        names = ", ".join(self.predictors)
        if name is None and len(self.predictors) > 1:
            raise HTTPException(422, f"Several runs are served. Name one of them: {names}.")
        name = next(iter(self.predictors)) if name is None else name
        if name not in self.predictors:
            raise HTTPException(404, f"No run of this name is served. The runs are: {names}.")
        answers = self.predictors[name].task.output.command
        if command not in (None, answers):
            raise HTTPException(422, f"The run {name} does not {command}. It can {answers}.")
        return name

    async def scores(
        self, run: str, texts: Sequence[str], contexts: Sequence[str | None] | None
    ) -> tuple[list[Encoded], np.ndarray]:
        """Encode and score texts. Returns the encoded texts and their scores ``[E, C]``.

        Raises:
            HTTPException: too many texts or characters. QueueFull, ScoringFailed: no scores now.
        """
        self._check_sizes(texts, contexts)
        if not self.queue.has_room(len(texts)):
            raise QueueFull
        encoded = await self._encode(run, texts, contexts)
        scores = await self._wait_for(self.queue.submit(run, encoded))
        self.metrics.count_texts(run, encoded)
        return encoded, scores

    async def classify(
        self, run: str, texts: Sequence[str], contexts: Sequence[str | None] | None = None
    ) -> tuple[list[Encoded], np.ndarray, list[list[str]]]:
        """Encoded texts, their probabilities ``[E, C]`` and their labels."""
        predictor = self.predictors[run]
        encoded, scores = await self.scores(run, texts, contexts)
        proba = predictor.values(scores)
        labels = predictor.names(proba)
        self.metrics.count_labels(run, proba, labels)
        return encoded, proba, labels

    async def rank(self, run: str, titles: Sequence[str], context: str | None) -> list[RankedTitle]:
        """Titles, best first, with lifts and win probabilities where the run learned from clicks."""
        _, scores = await self.scores(run, titles, [context] * len(titles))
        self.metrics.count_ranking(run, scores[:, 0])
        return await self._in_thread(self._rank_thread, self.predictors[run].ranked, titles, scores[:, 0])

    def _check_sizes(self, texts: Sequence[str], contexts: Sequence[str | None] | None) -> None:
        limits = self.limits
        if len(texts) > limits.max_texts:
            raise HTTPException(422, f"A request may have at most {limits.max_texts:,} texts. It has {len(texts):,}.")
        if contexts is not None and len(contexts) != len(texts):
            raise HTTPException(422, f"Each text needs a context: {len(texts):,} texts, {len(contexts):,} contexts.")
        lengths = [len(part) for part in (*texts, *(contexts or ())) if part is not None]
        if max(lengths) > limits.max_chars:
            raise HTTPException(
                422, f"A text may have at most {limits.max_chars:,} characters. One has {max(lengths):,}."
            )
        if sum(lengths) > limits.max_body:  # one context of many titles is sent once but encoded with each of them
            message = f"A request may have at most {limits.max_body:,} characters, its context counted with each text."
            raise HTTPException(422, f"{message} It has {sum(lengths):,}.")

    async def _encode(self, run: str, texts: Sequence[str], contexts: Sequence[str | None] | None) -> list[Encoded]:
        """Encode a few short texts here, as handing them to a thread would take longer; others in the thread."""
        encode = self.predictors[run].encode
        chars = sum(map(len, (*texts, *filter(None, contexts or ()))))
        if not self._encoding_in_thread and len(texts) <= MAX_INLINE_TEXTS and chars <= MAX_INLINE_CHARS:
            return encode(texts, contexts)
        loop, work = asyncio.get_running_loop(), self._encode_thread.submit(encode, texts, contexts)
        self._encoding_in_thread += 1  # the encoder is locked until then, and the event loop must not wait for it
        work.add_done_callback(lambda _: loop.call_soon_threadsafe(self._encoding_done))
        return await asyncio.wrap_future(work)

    def _encoding_done(self) -> None:
        self._encoding_in_thread -= 1

    def _wait_for(self, work: Future[np.ndarray]) -> asyncio.Future[np.ndarray]:
        """An asyncio future for scores. The loop is woken once for a micro-batch, not for each of its requests."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[np.ndarray] = loop.create_future()

        def done(_: Any) -> None:
            self._done.append((work, answer))
            if not self._wake_up_scheduled:
                self._wake_up_scheduled = True
                loop.call_soon_threadsafe(self._answer_done)

        answer.add_done_callback(lambda _: work.cancel())  # frees the slot of a request that was given up
        work.add_done_callback(done)
        return answer

    def _answer_done(self) -> None:
        self._wake_up_scheduled = False  # before the loop, so that work finished after it wakes the event loop again
        while self._done:
            work, answer = self._done.popleft()
            if answer.done():  # given up
                continue
            if (error := work.exception()) is None:
                answer.set_result(work.result())
            else:
                answer.set_exception(error)

    async def _in_thread(self, thread: ThreadPoolExecutor, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(thread, work, *args)


async def get_service(request: Request) -> InferenceService:
    """The app's service, for FastAPI's dependency injection."""
    return request.app.state.service


Service = Annotated[InferenceService, Depends(get_service)]
