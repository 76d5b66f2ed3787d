"""Requests meet in batches: one worker thread owns the models and scores what waits, one round of tokens at a time.

torch is not re-entrant, so nobody else may touch a model. While a round is computed new texts gather; a round takes those of
one run, first come first served, and a request that a round could not finish goes to the end of the line, so that a large
one delays a small one by one round and no more. The queue is bounded in texts, in tokens and, as soon as a round of some size
has shown how fast the machine is, in the time until a new request's turn: who does not fit is refused at once rather than
answered late. Time is reckoned in rows that go through the model: a context counts once, however many titles stand behind it.
Who loses patience cancels the future, and the place is free again.
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

SMOOTHED = 0.3  # weight of the newest round in the speed
QUIET, GATHERED = 0.001, 0.01  # seconds without a new request after which a round begins, and with them
NOTED = 8  # a round with less than this part of its rows tells only what the machine can do at least

log = logging.getLogger(__name__)


class Full(Exception):
    """There is no room in the queue now."""


class Failed(Exception):
    """The worker broke down over the round, or is stopping."""


@dataclass(eq=False, slots=True)
class _Job:
    """A request. ``taken`` of its texts are with the worker or scored already, and ``rows`` are their scores."""

    run: str
    texts: Sequence[Encoded]
    future: Future[np.ndarray]
    rest: int  # rows that those texts make which are not taken yet
    taken: int = 0
    rows: list[np.ndarray] = field(default_factory=list)


class Batcher:
    """A queue and its worker, which runs between ``start`` and ``stop`` (or in a ``with`` block).

    Args:
        score: run and texts to scores ``[E, C]``, in order; called in the worker thread only.
        round_tokens: rows of a round (``text.packing.micro_batches``); a text with more goes alone.
        queue_texts, queue_tokens: what may wait or be at work at once. A request larger than that is taken when nothing
            else waits.
        max_wait: seconds that a request may be expected to wait for its turn, or a whole round where that takes longer.
        patience: seconds for what still waits at ``stop``.
    """

    def __init__(
        self,
        score: Callable[[str, list[Encoded]], np.ndarray],
        *,
        round_tokens: int,
        queue_texts: int,
        queue_tokens: int,
        max_wait: float,
        patience: float,
    ):
        self._score, self._round_tokens, self._patience = score, round_tokens, patience
        self._max_wait = max_wait
        self._limits = queue_texts, queue_tokens
        self._jobs: deque[_Job] = deque()  # with texts that no round has taken yet
        self._open: set[_Job] = set()  # unanswered
        self._changed = threading.Condition()
        self._closed = False
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._work, name="loracle-batcher", daemon=True)
        self.texts = self.tokens = 0  # waiting or at work
        self.rounds = self.failures = self._submitted = 0
        self._speed: float | None = None  # rows/s, of rounds that are large enough to tell
        self._known: set[str] = set()  # runs that have had their first round, in which things are done once
        self._at_work = 0  # rows of the round that is computed now

    def __enter__(self) -> Batcher:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Take nothing new, finish what waits if patience allows it, and fail the rest."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(self._patience)
        self._fail(list(self._open))

    def submit(self, run: str, texts: Sequence[Encoded]) -> Future[np.ndarray]:
        """A future for the scores of some texts, ``[E, C]``; cancel it to give up the place.

        Raises:
            Full: the queue has no room for them.
            Failed: the batcher is stopping.
            ValueError: there are none.
        """
        if not texts:
            raise ValueError("nothing to score")
        tokens = sum(e.tokens for e in texts)
        job = _Job(run, texts, Future(), rest=rows(texts))
        with self._changed:
            if self._closed:
                raise Failed("stopping")
            if self.texts and (
                self.texts + len(texts) > self._limits[0]
                or self.tokens + tokens > self._limits[1]
                or self._would_wait_too_long()
            ):
                raise Full
            self.texts += len(texts)
            self.tokens += tokens
            self._jobs.append(job)
            self._open.add(job)
            self._submitted += 1
            self._changed.notify_all()
        job.future.add_done_callback(lambda _: self._leave(job, tokens))
        return job.future

    def has_room(self, texts: int) -> bool:
        """Whether so many texts would be taken if they were short: asked before they are tokenised."""
        return not self.texts or (self.texts + texts <= self._limits[0] and not self._would_wait_too_long())

    def wait(self) -> float:
        """Seconds until a request that came now would have its turn: each one before it has at most a round first."""
        if self._speed is None:
            return 0.0
        with self._changed:
            return (self._at_work + sum(min(job.rest, self._round_tokens) for job in self._jobs)) / self._speed

    def _would_wait_too_long(self) -> bool:
        """Past the bound, or a whole round where that takes longer: else a slow model's rounds would stay nearly empty."""
        return self._speed is not None and self.wait() > max(self._max_wait, self._round_tokens / self._speed)

    def ready(self, within: float) -> bool:
        """Whether the worker lives and has not been at one round for longer than that many seconds."""
        since = self._busy_since
        return not self._closed and self._thread.is_alive() and (since is None or time.monotonic() - since < within)

    def _leave(self, job: _Job, tokens: int) -> None:
        """Free the place of a job that is done, failed or cancelled."""
        with self._changed:
            self.texts -= len(job.texts)
            self.tokens -= tokens
            self._open.discard(job)
            if job in self._jobs:
                self._jobs.remove(job)

    def _work(self) -> None:
        while True:
            round_: list[tuple[_Job, Encoded]] = []
            jobs: list[_Job] | None = None
            try:
                if not (round_ := self._next_round()):
                    return
                jobs = list(dict.fromkeys(job for job, _ in round_))
                self._busy_since = time.monotonic()
                self.rounds += 1
                scores = self._score(jobs[0].run, [text for _, text in round_])
                if len(scores) != len(round_) or not np.isfinite(scores).all():
                    raise ValueError("not a number for each text")
                self._note(jobs[0].run, self._at_work, time.monotonic() - self._busy_since)
                self._hand_out(round_, scores)
            except BaseException as e:  # whatever it was, those who wait must hear of it, and the next round is tried
                self.failures += 1
                # Its message may hold a text.
                log.error("a round of %d texts failed: %s", len(round_), type(e).__name__)
                self._fail(list(self._open) if jobs is None else jobs)
            finally:
                self._busy_since, self._at_work = None, 0

    def _note(self, run: str, made: int, seconds: float) -> None:
        """Learn from a round of so many rows what the machine can do."""
        now, before = made / max(seconds, 1e-9), self._speed
        if run not in self._known:
            self._known.add(run)
        elif made < self._round_tokens / NOTED:  # else a speed too low would admit small rounds only, and so stay
            self._speed = before and max(before, now)
        else:
            self._speed = now if before is None else SMOOTHED * now + (1 - SMOOTHED) * before

    def _next_round(self) -> list[tuple[_Job, Encoded]]:
        """Texts of one run that go through the model together; none once the batcher is stopped and nothing waits."""
        with self._changed:
            waiting: list[tuple[_Job, Encoded]] = []
            while not waiting:  # the only one that waits may be given up while others are let in
                self._changed.wait_for(lambda: self._jobs or self._closed)
                self._gather()
                waiting = self._read_ahead()
                if not waiting and self._closed:
                    return []
            round_ = [waiting[i] for i in next(micro_batches([[text] for _, text in waiting], self._round_tokens))]
            for job, _ in round_:
                job.taken += 1
            first = self._jobs[0]
            for job in dict.fromkeys(job for job, _ in round_):
                if job.taken == len(job.texts):
                    self._jobs.remove(job)
                else:
                    job.rest = rows(job.texts[job.taken :])
            if self._jobs and self._jobs[0] is first:
                self._jobs.rotate(-1)
            self._at_work = rows([text for _, text in round_])
            return round_

    def _gather(self) -> None:
        """Let those who ask at the same time come in: they share a round; the first one alone would hold up the others."""
        until, known = time.monotonic() + GATHERED, -1
        while known != self._submitted and not self._closed and time.monotonic() < until:
            known = self._submitted
            self._changed.wait(QUIET)

    def _read_ahead(self) -> list[tuple[_Job, Encoded]]:
        """The first texts of the first job's run, as many as could fill a round."""
        waiting: list[tuple[_Job, Encoded]] = []
        tokens = 0
        for job in self._jobs:
            if job.run != self._jobs[0].run:
                continue
            for text in job.texts[job.taken :]:
                if tokens > self._round_tokens:
                    return waiting
                waiting.append((job, text))
                tokens += text.tokens - sum(text.starts)  # what may be shared before a text counts in the round itself
        return waiting

    def _hand_out(self, round_: list[tuple[_Job, Encoded]], scores: np.ndarray) -> None:
        for (job, _), row in zip(round_, scores, strict=True):
            job.rows.append(row)
            if len(job.rows) == len(job.texts):
                _settle(job, np.stack(job.rows))

    def _fail(self, jobs: list[_Job]) -> None:
        for job in jobs:
            _settle(job, Failed("the round failed" if not self._closed else "stopping"))


def _settle(job: _Job, outcome: np.ndarray | Failed) -> None:
    """Answer a job, unless it was answered or given up already."""
    try:
        if isinstance(outcome, Failed):
            job.future.set_exception(outcome)
        else:
            job.future.set_result(outcome)
    except InvalidStateError:
        pass
