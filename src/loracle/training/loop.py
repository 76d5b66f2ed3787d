"""The training loop: read ``fit`` downward.

A batch is counted in examples and cut into micro-batches by tokens. Gradients are summed and divided once by the global count.

The order of examples, the dropout masks and the learning rate derive from ``(seed, epoch, step)``. So a checkpoint holds
weights, optimizer moments and progress, and no random state.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from loracle.config import TrainConfig
from loracle.errors import Interrupted, UserError
from loracle.examples import Example
from loracle.models.memory import out_of_memory, release
from loracle.models.scorer import Scorer
from loracle.text.tokenize import Encoded
from loracle.training import distributed
from loracle.training.batches import (
    Batch,
    Prefetcher,
    batch_indices,
    too_little_memory,
    total_steps,
    validation_steps,
)
from loracle.training.checkpoint import (
    Checkpoint,
    load_checkpoint,
    optimizer_tensors,
    save_checkpoint,
    set_optimizer_tensors,
    set_trainable_state,
    trainable_state,
)
from loracle.training.losses import Loss
from loracle.training.optimizer import lr_factor, make_optimizer
from loracle.training.tracking import TrainingLog

EMPTY_TEXT = Encoded(chunks=((0,),), starts=(0,))

Encode = Callable[[Sequence[Example]], list[list[Encoded]]]
Validate = Callable[[], dict[str, float]]  # {"metric": higher is better, "loss": lower is better, breaks ties}


@dataclass(frozen=True, slots=True, kw_only=True)
class FitJob:
    """One training.

    Args:
        scorer: the model; ``fit`` trains it in place.
        examples: training examples. Steps and batch sizes count those of all processes together.
        encode: token ids of each example's texts.
        loss: sum and count of the loss over examples; see ``losses.Loss``.
        validate: metric and loss of the current weights on the validation examples.
        settings: length, batch size, clipping and the like.
        lr: peak learning rate, as ``settings.lr`` may be unset.
        folder: run folder. A checkpoint in ``folder/checkpoints`` is resumed.
        accelerator: where trackers are set up; by default a plain one.
        metric: name under which the validation metric is shown.
        quiet: show no progress.
    """

    scorer: Scorer
    examples: Sequence[Example]
    encode: Encode
    loss: Loss
    validate: Validate
    settings: TrainConfig
    lr: float
    folder: Path
    accelerator: Accelerator | None = None
    metric: str = "metric"
    quiet: bool = False


@dataclass(slots=True, kw_only=True)
class Progress:
    """The state of a training beside weights and optimizer; checkpoints hold all of it."""

    step: int = 0
    best_metric: float = -math.inf
    best_loss: float = math.inf
    best_step: int = 0
    stale: int = 0  # validations since the best one
    done: bool = False


@dataclass(slots=True, kw_only=True)
class Fit:
    """Progress, and the work of this call in all processes; time excludes validation and checkpoints."""

    progress: Progress
    steps: int  # of the whole training
    examples: int = 0
    tokens: int = 0  # without padding, each text counted alone
    computed: int = 0  # tokens that the model computed
    seconds: float = 0.0

    def add(self, result: StepResult, seconds: float) -> None:
        """Count a step."""
        self.examples += result.examples
        self.tokens += result.tokens
        self.computed += result.computed
        self.seconds += seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Mean loss of an optimizer step; examples, useful tokens and computed tokens of all processes."""

    loss: float
    lr: float
    examples: int
    tokens: int
    computed: int


def fit(job: FitJob) -> Fit:
    """Train ``job.scorer`` in place and leave it with the weights of its best validation.

    Ctrl-C finishes the step, saves a checkpoint and raises.

    Raises:
        UserError: a loss or gradient is not finite (names step and rows), or memory does not suffice. The last checkpoint
            stays.
        Interrupted: Ctrl-C.
    """
    distributed.start(job.scorer.device)
    accelerator = job.accelerator or Accelerator(cpu=job.scorer.device.type == "cpu")
    trainer = Trainer(job, accelerator)
    trainer.resume()
    progress, total = trainer.progress, trainer.total
    validated = validation_steps(job.settings, len(job.examples))
    result = Fit(progress=progress, steps=total)
    with (
        TrainingLog(
            job.folder, accelerator, total=total, step=progress.step, metric=job.metric, quiet=job.quiet
        ) as log,
        _deferred_interrupt() as interrupted,
        Prefetcher(job, accelerator) as batches,
    ):
        while progress.step < total and not progress.done:
            started = time.perf_counter()
            step = trainer.step(batches.get(progress.step))
            if step is None:
                batches.halve_micro_batches(progress.step)
                log.note(
                    f"out of memory at step {progress.step + 1}; micro-batches have {batches.tokens_per_micro_batch:,} "
                    "tokens from here on"
                )
                trainer.free_memory()
                continue
            progress.step += 1
            result.add(step, time.perf_counter() - started)
            log.step(progress.step, _record(step, result))
            if progress.step in validated:
                trainer.validate(log)
            # Asked once a step, and shared, so that all processes save and stop after the same step.
            (stop,) = distributed.all_reduce_sum([interrupted()])
            if progress.step in validated or progress.step % job.settings.save_steps == 0 or stop:
                trainer.save()
            if stop and not progress.done:
                accelerator.wait_for_everyone()  # the first process to end ends all, so wait until the checkpoint is saved
                raise Interrupted(
                    f"stopped after step {progress.step} of {total}; continue with: loracle train --resume {job.folder}"
                )
    set_trainable_state(job.scorer, trainer.best)
    job.scorer.eval()
    return result


class Trainer:
    """Optimizer, progress and best weights of a training, and its steps."""

    def __init__(self, job: FitJob, accelerator: Accelerator):
        self.job, self.accelerator = job, accelerator
        self.optimizer = make_optimizer(job.scorer, lr=job.lr, weight_decay=job.settings.weight_decay)
        self.total = total_steps(job.settings, len(job.examples))
        self.progress = Progress()
        distributed.broadcast_parameters([p for p in job.scorer.parameters() if p.requires_grad])
        self.best = trainable_state(job.scorer)
        job.scorer.train()  # in every module: transformers returns models in eval mode

    def resume(self) -> None:
        """Continue from the last checkpoint, if there is one."""
        folder = self.job.folder / "checkpoints"
        if (saved := distributed.on_main(lambda: load_checkpoint(folder))) is not None:
            self.progress, self.best = Progress(**saved.progress), saved.best
            set_trainable_state(self.job.scorer, saved.weights)
            set_optimizer_tensors(self.optimizer, saved.optimizer)

    def save(self) -> None:
        """Write a checkpoint, in the main process."""
        if self.accelerator.is_main_process:
            checkpoint = Checkpoint(
                progress=dataclasses.asdict(self.progress),
                weights=trainable_state(self.job.scorer),
                optimizer=optimizer_tensors(self.optimizer),
                best=self.best,
            )
            save_checkpoint(self.job.folder / "checkpoints", checkpoint)

    def step(self, batch: Batch) -> StepResult | None:
        """Take one optimizer step.

        Returns None when any process ran out of memory. Weights are then untouched and gradients incomplete.
        """
        job, step = self.job, self.progress.step
        if not job.scorer.training:  # after a validation. Walking thousands of modules each step costs a GPU 3 %
            job.scorer.train()
        torch.manual_seed(_derived_seed(job.settings.seed, step, self.accelerator.process_index))
        losses, sums = self._backward(batch)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        sums, has_gradient = _sum_over_processes(sums, [p.grad is not None for p in parameters])
        if sums.unsplittable:
            raise too_little_memory(int(sums.unsplittable), step)
        if sums.out_of_memory:
            return None
        distributed.sum_gradients(parameters, has_gradient)
        trained = [p for p, has in zip(parameters, has_gradient, strict=True) if has]
        torch._foreach_mul_([p.grad for p in trained], 1 / max(sums.count, 1e-12))  # the one division
        norm = torch.nn.utils.clip_grad_norm_(trained, job.settings.clip)
        total_loss = self._finite_loss(batch, losses, norm)
        lr = job.lr * lr_factor(step, self.total, job.settings.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return StepResult(
            loss=total_loss / max(sums.count, 1e-12),
            lr=lr,
            examples=batch.global_size,
            tokens=int(sums.tokens),
            computed=int(sums.computed),
        )

    def _backward(self, batch: Batch) -> tuple[list[torch.Tensor], _Sums]:
        """Forward and backward of each micro-batch; returns their losses and this process's sums."""
        scorer, losses, sums = self.job.scorer, list[torch.Tensor](), _Sums()
        # A sharded model gathers its weights from all processes, so all compute the same number of micro-batches.
        count = len(batch.micro_batches)
        missing = distributed.all_reduce_max(count) - count if scorer.sharded else 0
        try:
            for examples, packed in batch.micro_batches:
                loss, terms = self.job.loss(examples)(scorer(packed))
                loss.backward()
                losses.append(loss.detach())
                sums.count += terms
                sums.tokens, sums.computed = sums.tokens + packed.useful_tokens, sums.computed + packed.tokens
            for _ in range(missing):
                (0 * scorer(scorer.pack([EMPTY_TEXT])).sum()).backward()
        except (RuntimeError, MemoryError) as e:
            if not out_of_memory(e):
                raise
            if scorer.sharded:  # the other processes wait inside a layer and cannot be reached
                raise too_little_memory(batch.tokens_per_micro_batch, self.progress.step) from e
            sums.out_of_memory = 1.0
            sums.unsplittable = packed.tokens if len(examples) == 1 else 0.0
        return losses, sums

    def _finite_loss(self, batch: Batch, losses: list[torch.Tensor], norm: torch.Tensor) -> float:
        """Sum of the losses over all processes, read before weights change.

        Raises:
            UserError: a loss or the gradient norm is not finite.
        """
        # One transfer a step, since each makes the processor wait for the GPU.
        *values, size = torch.stack([x.to(norm.device, torch.float32) for x in (*losses, norm)]).tolist()
        pairs = zip(batch.micro_batches, values, strict=True)
        bad = [(examples, "loss", value) for (examples, _), value in pairs if not math.isfinite(value)]
        if not bad and not math.isfinite(size):
            bad = [(batch.examples, "gradient norm", size)]
        (value,) = distributed.all_reduce_sum([sum(values)])
        if not math.isfinite(size) or not math.isfinite(value):
            # A loss that is not finite in one process spoils the gradients of all, and says more.
            raise _diverged(self.progress.step + 1, *min(distributed.all_gather(bad), key=lambda b: b[1] != "loss"))
        return value

    def validate(self, log: TrainingLog) -> None:
        """Validate the current weights, keep them if they are the best so far, and decide whether training is done.

        Raises:
            UserError: the validation loss is not finite.
        """
        job, progress = self.job, self.progress
        job.scorer.eval()
        values = distributed.all_gather([job.validate()])[0]  # the main process's, so that all decide alike
        if not math.isfinite(values["loss"]):
            indices = batch_indices(job.settings, len(job.examples), progress.step - 1)
            raise _diverged(progress.step, [job.examples[i] for i in indices], "validation loss", values["loss"])
        best = (values["metric"], -values["loss"]) > (progress.best_metric, -progress.best_loss)
        log.validation(progress.step, values, best=best)
        if best:
            self.best = trainable_state(job.scorer)
            progress.best_metric, progress.best_loss = values["metric"], values["loss"]
            progress.best_step, progress.stale = progress.step, 0
        else:
            progress.stale += 1
        progress.done = progress.step == self.total or 0 < job.settings.patience <= progress.stale

    def free_memory(self) -> None:
        """Drop incomplete gradients and cached memory.

        Call it outside the handler of the error, whose traceback holds the tensors of the failed step.
        """
        self.optimizer.zero_grad()
        release(self.job.scorer)


@dataclass(slots=True)
class _Sums:
    """Sums over micro-batches, then over processes; floats, as they are exchanged in one tensor."""

    count: float = 0.0  # loss terms, by which gradients are divided
    tokens: float = 0.0
    computed: float = 0.0
    out_of_memory: float = 0.0  # processes that ran out of memory
    unsplittable: float = 0.0  # tokens of single examples that did not fit; smaller micro-batches would not help


def _sum_over_processes(sums: _Sums, has_gradient: list[bool]) -> tuple[_Sums, list[bool]]:
    """Sums of all processes, and for each parameter whether any process has its gradient; in one exchange."""
    own = dataclasses.astuple(sums)
    total = distributed.all_reduce_sum([*own, *has_gradient])
    return _Sums(*total[: len(own)]), [bool(n) for n in total[len(own) :]]


def _record(step: StepResult, so_far: Fit) -> dict[str, float]:
    """A step as ``log.jsonl`` has it; speeds are means since the call."""
    return {
        "loss": step.loss,
        "lr": step.lr,
        "examples_per_s": so_far.examples / so_far.seconds,
        "tokens_per_s": so_far.tokens / so_far.seconds,
    }


def _derived_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def _diverged(step: int, examples: Sequence[Example], quantity: str, value: float) -> UserError:
    rows = [row for e in examples for row in e.rows]
    shown = ", ".join(map(str, rows[:8])) + (", …" if len(rows) > 8 else "")
    return UserError(
        f"Training diverged: the {quantity} is {value} at step {step} (rows {shown}).",
        "Check these rows, or start a new run with a lower --lr. The last checkpoint is kept.",
    )


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Defer Ctrl-C to the end of the step; a second one interrupts at once."""
    pressed = False

    def press(*_) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    try:
        before = signal.signal(signal.SIGINT, press)
    except ValueError:  # only the main thread may handle signals
        yield lambda: False
        return
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
