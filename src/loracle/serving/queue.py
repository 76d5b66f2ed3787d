"""One worker thread owns the models and scores waiting requests in micro-batches.

torch is not re-entrant, so only the worker touches a model. New texts gather while a micro-batch is computed. A micro-batch
takes texts of one run, first come, first served. A request with texts left goes to the end of the line, so a large request
delays a small one by one micro-batch at most.

The queue is bounded in texts, in tokens and in expected waiting time, which is known once the worker has measured its speed. A
request that exceeds a bound is rejected at once. Time is estimated in rows that go through the model: a context counts once,
however many titles share it. A client that gives up cancels its future, which frees the slot.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

import numpy as np

from loracle.text.packing import micro_batches, rows
from loracle.text.tokenize import Encoded

SPEED_SMOOTHING = 0.3  # weight of the newest micro-batch in the speed
QUIET_SECONDS = 0.001  # a micro-batch starts after this long without a new request
MAX_GATHER_SECONDS = 0.01  # and after this long in any case
LARGE_FRACTION = 1 / 8  # of a full micro-batch: a smaller one only gives a lower bound of the speed

log = logging.getLogger(__name__)


class QueueFull(Exception):
    """The queue has no room now."""


class ScoringFailed(Exception):
    """The micro-batch failed, or the server is stopping."""


@dataclass(eq=False, slots=True)
class _Job:
    """One request. The worker has started on its first ``started`` texts; ``scores`` holds the rows that are done."""

    run: str
    texts: Sequence[Encoded]
    future: Future[np.ndarray]
    rows_left: int  # rows of the texts that are not started
    started: int = 0
    scores: list[np.ndarray] = field(default_factory=list)


class RequestQueue:
    """A queue and its worker, which runs between ``start`` and ``stop`` (or in a ``with`` block).

    Args:
        score: maps a run and texts to scores ``[E, C]`` in order. Only the worker thread calls it.
        tokens_per_micro_batch: rows of a micro-batch (``text.packing.micro_batches``). A longer text goes alone.
        max_texts, max_tokens: bounds on what waits or is being scored. A larger request is accepted when the queue is empty.
        max_wait: longest expected wait of a request in seconds, or the time of one full micro-batch if that is longer.
        drain_timeout: seconds that ``stop`` waits for unfinished requests.
    """

    def __init__(
        self,
        score: Callable[[str, list[Encoded]], np.ndarray],
        *,
        tokens_per_micro_batch: int,
        max_texts: int,
        max_tokens: int,
        max_wait: float,
        drain_timeout: float,
    ):
        self._score, self.tokens_per_micro_batch = score, tokens_per_micro_batch
        self._max_texts, self._max_tokens = max_texts, max_tokens
        self._max_wait, self._drain_timeout = max_wait, drain_timeout
        self._jobs: deque[_Job] = deque()  # with texts that are not started
        self._unanswered: set[_Job] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._work, name="loracle-scorer", daemon=True)
        self.texts = self.tokens = 0  # waiting or being scored
        self.batches = self.failed_batches = self._submitted = 0
        self._speed: float | None = None  # rows/s
        self._warm_runs: set[str] = set()  # runs past their first micro-batch, whose one-time work distorts the speed
        self._rows_in_progress = 0

    def __enter__(self) -> RequestQueue:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Reject new requests, finish the waiting ones within ``drain_timeout``, and fail the rest."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(self._drain_timeout)
        self._fail(list(self._unanswered))

    def submit(self, run: str, texts: Sequence[Encoded]) -> Future[np.ndarray]:
        """Return a future for the scores of the texts, ``[E, C]``. Cancel it to free the slot.

        Raises:
            QueueFull: the queue has no room for the texts.
            ScoringFailed: the queue is stopping.
            ValueError: there are no texts.
        """
        if not texts:
            raise ValueError("There are no texts to score.")
        tokens = sum(e.tokens for e in texts)
        job = _Job(run, texts, Future(), rows_left=rows(texts))
        with self._changed:
            if self._closed:
                raise ScoringFailed("The server is stopping.")
            if self.texts and (
                self.texts + len(texts) > self._max_texts
                or self.tokens + tokens > self._max_tokens
                or self._wait_exceeds_limit()
            ):
                raise QueueFull
            self.texts += len(texts)
            self.tokens += tokens
            self._jobs.append(job)
            self._unanswered.add(job)
            self._submitted += 1
            self._changed.notify_all()
        job.future.add_done_callback(lambda _: self._release(job, tokens))
        return job.future

    def has_room(self, texts: int) -> bool:
        """Return whether that many short texts would be accepted. Ask before you tokenize."""
        return not self.texts or (self.texts + texts <= self._max_texts and not self._wait_exceeds_limit())

    def expected_wait(self) -> float:
        """Seconds until a new request has its turn: each request before it takes one micro-batch at most."""
        if self._speed is None:
            return 0.0
        with self._changed:
            waiting = sum(min(job.rows_left, self.tokens_per_micro_batch) for job in self._jobs)
            return (self._rows_in_progress + waiting) / self._speed

    def _wait_exceeds_limit(self) -> bool:
        """Allow one full micro-batch even where it takes longer than ``max_wait``: a slow model's would stay nearly empty."""
        limit = self._max_wait
        return self._speed is not None and self.expected_wait() > max(limit, self.tokens_per_micro_batch / self._speed)

    def ready(self, within: float) -> bool:
        """Return whether the worker is alive and has spent less than ``within`` seconds on its current micro-batch."""
        since = self._busy_since
        return not self._closed and self._thread.is_alive() and (since is None or time.monotonic() - since < within)

    def _release(self, job: _Job, tokens: int) -> None:
        """Free the slot of a job that is done, failed or cancelled."""
        with self._changed:
            self.texts -= len(job.texts)
            self.tokens -= tokens
            self._unanswered.discard(job)
            if job in self._jobs:
                self._jobs.remove(job)

    def _work(self) -> None:
        while True:
            batch: list[tuple[_Job, Encoded]] = []
            jobs: list[_Job] | None = None
            try:
                if not (batch := self._next_micro_batch()):
                    return
                jobs = list(dict.fromkeys(job for job, _ in batch))
                self._busy_since = time.monotonic()
                self.batches += 1
                scores = self._score(jobs[0].run, [text for _, text in batch])
                if len(scores) != len(batch) or not np.isfinite(scores).all():
                    raise ValueError("The model did not return a finite score for each text.")
                self._update_speed(jobs[0].run, self._rows_in_progress, time.monotonic() - self._busy_since)
                self._deliver(batch, scores)
            except BaseException as e:  # clients must get an answer and the worker must go on, whatever the error
                self.failed_batches += 1
                # The error's own message may contain a text.
                log.error("a micro-batch of %d texts failed: %s", len(batch), type(e).__name__)
                self._fail(list(self._unanswered) if jobs is None else jobs)
            finally:
                self._busy_since, self._rows_in_progress = None, 0

    def _update_speed(self, run: str, computed_rows: int, seconds: float) -> None:
        speed, before = computed_rows / max(seconds, 1e-9), self._speed
        if run not in self._warm_runs:
            self._warm_runs.add(run)
        elif computed_rows < LARGE_FRACTION * self.tokens_per_micro_batch:
            # Without this, too low a speed would admit only small micro-batches and never be corrected.
            self._speed = before and max(before, speed)
        else:
            self._speed = speed if before is None else SPEED_SMOOTHING * speed + (1 - SPEED_SMOOTHING) * before

    def _next_micro_batch(self) -> list[tuple[_Job, Encoded]]:
        """Wait for texts of one run to score together. Empty once the queue is closed and nothing waits."""
        with self._changed:
            waiting: list[tuple[_Job, Encoded]] = []
            while not waiting:  # the only waiting job may be cancelled during _gather
                self._changed.wait_for(lambda: self._jobs or self._closed)
                self._gather()
                waiting = self._candidates()
                if not waiting and self._closed:
                    return []
            parts = micro_batches([[text] for _, text in waiting], self.tokens_per_micro_batch)
            batch = [waiting[i] for i in next(parts)]
            for job, _ in batch:
                job.started += 1
            first = self._jobs[0]
            for job in dict.fromkeys(job for job, _ in batch):
                if job.started == len(job.texts):
                    self._jobs.remove(job)
                else:
                    job.rows_left = rows(job.texts[job.started :])
            if self._jobs and self._jobs[0] is first:
                self._jobs.rotate(-1)
            self._rows_in_progress = rows([text for _, text in batch])
            return batch

    def _gather(self) -> None:
        """Wait briefly for simultaneous requests to share a micro-batch. Otherwise the first one alone delays the others."""
        until, submitted = time.monotonic() + MAX_GATHER_SECONDS, -1
        while submitted != self._submitted and not self._closed and time.monotonic() < until:
            submitted = self._submitted
            self._changed.wait(QUIET_SECONDS)

    def _candidates(self) -> list[tuple[_Job, Encoded]]:
        """The first texts of the first job's run, enough to fill a micro-batch."""
        waiting: list[tuple[_Job, Encoded]] = []
        tokens = 0
        for job in self._jobs:
            if job.run != self._jobs[0].run:
                continue
            for text in job.texts[job.started :]:
                if tokens > self.tokens_per_micro_batch:
                    return waiting
                waiting.append((job, text))
                tokens += text.tokens - sum(text.starts)  # a prefix may be shared, so it is left out of this estimate
        return waiting

    def _deliver(self, batch: list[tuple[_Job, Encoded]], scores: np.ndarray) -> None:
        for (job, _), row in zip(batch, scores, strict=True):
            job.scores.append(row)
            if len(job.scores) == len(job.texts):
                _resolve(job, np.stack(job.scores))

    def _fail(self, jobs: list[_Job]) -> None:
        for job in jobs:
            _resolve(job, ScoringFailed("The server is stopping." if self._closed else "Scoring failed."))


def _resolve(job: _Job, outcome: np.ndarray | ScoringFailed) -> None:
    """Set a job's outcome unless it has one or is cancelled."""
    try:
        if isinstance(outcome, ScoringFailed):
            job.future.set_exception(outcome)
        else:
            job.future.set_result(outcome)
    except InvalidStateError:
        pass
