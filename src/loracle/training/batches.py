"""Batches of one process: which examples a step takes, cut into micro-batches and packed ahead of time."""

from __future__ import annotations

import functools
import math
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from accelerate import Accelerator

from loracle.config import TrainConfig
from loracle.errors import UserError
from loracle.examples import Example
from loracle.models.scorer import Scorer
from loracle.text.packing import PackedBatch, micro_batches
from loracle.text.tokenize import Encoded
from loracle.training import distributed

if TYPE_CHECKING:
    from loracle.training.loop import FitJob

MIN_TOKENS_PER_MICRO_BATCH = 64  # training that does not fit with so few tokens will not fit at all


def steps_per_epoch(settings: TrainConfig, examples: int) -> int:
    """Optimizer steps of one epoch over ``examples`` examples; the last batch may be smaller."""
    return math.ceil(examples / settings.batch)


def total_steps(settings: TrainConfig, examples: int) -> int:
    """Optimizer steps of the whole training."""
    steps = max(1, math.ceil(settings.epochs * steps_per_epoch(settings, examples)))
    return steps if settings.max_steps is None else min(steps, settings.max_steps)


def validation_steps(settings: TrainConfig, examples: int) -> set[int]:
    """Steps (1-based) after which the model is validated; the last step is always one."""
    total = total_steps(settings, examples)
    every = steps_per_epoch(settings, examples) / settings.evals_per_epoch
    return {total, *(s for i in range(1, 1 + int(total / every)) if 0 < (s := round(i * every)) <= total)}


def batch_indices(settings: TrainConfig, examples: int, step: int) -> np.ndarray:
    """Indices of the examples of a step (0-based); each epoch has its own seeded order."""
    epoch, within = divmod(step, steps_per_epoch(settings, examples))
    return _order(settings.seed, epoch, examples)[within * settings.batch : (within + 1) * settings.batch]


@functools.lru_cache(maxsize=1)  # every step of an epoch asks for it
def _order(seed: int, epoch: int, examples: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(examples)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The part of a batch that one process trains on."""

    examples: list[Example]
    micro_batches: list[tuple[list[Example], PackedBatch]]
    global_size: int  # examples of all processes
    tokens_per_micro_batch: int


class Prefetcher:
    """Batches of this process. While the model trains on one, a thread encodes and packs the next."""

    def __init__(self, job: FitJob, accelerator: Accelerator):
        self.job, self.tokens_per_micro_batch = job, job.settings.tokens_per_micro_batch
        self.total = total_steps(job.settings, len(job.examples))
        self.rank, self.processes = accelerator.process_index, accelerator.num_processes
        self.pool = ThreadPoolExecutor(1, "loracle-encode")
        self.next: tuple[int, Future[Batch]] | None = None

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_) -> None:
        self.pool.shutdown(cancel_futures=True)

    def get(self, step: int) -> Batch:
        """The batch of a step (0-based), cut by the current ``tokens_per_micro_batch``."""
        next_step, future = self.next or (None, None)
        batch = future.result() if future is not None and next_step == step else None
        if batch is None or batch.tokens_per_micro_batch != self.tokens_per_micro_batch:
            batch = self.pool.submit(self._prepare, step).result()
        self.next = (step + 1, self.pool.submit(self._prepare, step + 1)) if step + 1 < self.total else None
        return batch

    def halve_micro_batches(self, step: int) -> None:
        """Halve the tokens per micro-batch. Steps and results stay the same, since gradients are sums.

        Raises:
            UserError: a micro-batch is as small as it gets.
        """
        if self.tokens_per_micro_batch < 2 * MIN_TOKENS_PER_MICRO_BATCH:
            raise too_little_memory(self.tokens_per_micro_batch, step)
        self.tokens_per_micro_batch //= 2

    def _prepare(self, step: int) -> Batch:
        job, tokens = self.job, self.tokens_per_micro_batch
        batch = [job.examples[i] for i in batch_indices(job.settings, len(job.examples), step)]
        examples = [batch[i] for i in distributed.partition(batch, self.processes)[self.rank]]
        parts = _cut(job.scorer, examples, job.encode(examples), tokens) if examples else []
        return Batch(examples=examples, micro_batches=parts, global_size=len(batch), tokens_per_micro_batch=tokens)


def _cut(
    scorer: Scorer, examples: list[Example], encoded: list[list[Encoded]], tokens: int
) -> list[tuple[list[Example], PackedBatch]]:
    """Cut examples into micro-batches of at most ``tokens`` tokens and pack each."""
    sizes = [sum(e.tokens for e in texts) for texts in encoded]
    # Padding is cheapest among texts of equal length. A packed batch has no padding and keeps its order.
    order = list(range(len(sizes))) if scorer.packed else sorted(range(len(sizes)), key=sizes.__getitem__)
    parts = micro_batches([encoded[i] for i in order], tokens, share_from=scorer.share_from)
    indices = [[order[i] for i in part] for part in parts]
    return [([examples[i] for i in part], scorer.pack([e for i in part for e in encoded[i]])) for part in indices]


def too_little_memory(tokens: int, step: int) -> UserError:
    """The error for a micro-batch of ``tokens`` tokens that does not fit at ``step`` (0-based)."""
    return UserError(
        f"Out of memory at step {step + 1}: a micro-batch of {tokens:,} tokens does not fit.",
        "Pass a smaller --max-length or --model, or split large groups of titles.",
    )
