"""One visible loop: batches counted in examples, rounds in tokens, gradients summed and divided once.

Everything that a resumed run must repeat is derived from ``(seed, epoch, step)`` and not carried in hidden state: the order
of the examples, the dropout masks, the learning rate. So a checkpoint is weights, the optimizer's moments and one number.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from loracle.errors import Interrupted, UserError
from loracle.examples import Example, RankGroup
from loracle.models.memory import out_of_memory, release
from loracle.models.scorer import Scorer
from loracle.text.packing import PackedBatch, micro_batches
from loracle.text.tokenize import Encoded
from loracle.training import distributed
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

NOTHING = Encoded(chunks=((0,),), starts=(0,))
FEWEST_TOKENS = 64  # a round that does not fit with so few will not fit at all

Encode = Callable[[Sequence[Example]], list[list[Encoded]]]
Look = Callable[[], dict[str, float]]  # validation: {"metric": higher is better, "loss": ties are broken by less of it}


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long and how fast. Steps and examples are those of all processes together."""

    epochs: float
    batch: int
    lr: float
    max_steps: int | None = None
    warmup: float = 0.06
    weight_decay: float = 0.0
    clip: float = 1.0
    evals_per_epoch: int = 1
    patience: int = 3
    save_steps: int = 50
    tokens_per_micro_batch: int = 4096
    seed: int = 0

    def steps_per_epoch(self, examples: int) -> int:
        """Optimizer steps of one pass; the last batch may be smaller."""
        return math.ceil(examples / self.batch)

    def total_steps(self, examples: int) -> int:
        """Optimizer steps of the whole run."""
        steps = max(1, math.ceil(self.epochs * self.steps_per_epoch(examples)))
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def looks(self, examples: int) -> set[int]:
        """Numbers of steps taken after which the validation examples are looked at; the end is always one."""
        total, epoch = self.total_steps(examples), self.steps_per_epoch(examples)
        every = epoch / self.evals_per_epoch
        return {total, *(s for i in range(1, 1 + int(total / every)) if 0 < (s := round(i * every)) <= total)}


@dataclass(slots=True, kw_only=True)
class Progress:
    """Where a run stands; all of it is in the checkpoint."""

    step: int = 0
    best_metric: float = -math.inf
    best_loss: float = math.inf
    best_step: int = 0
    stale: int = 0  # looks since the best one
    done: bool = False


@dataclass(slots=True, kw_only=True)
class Fit:
    """What ``fit`` reports: progress, and speed since it was called, of all processes (looks and checkpoints left out)."""

    progress: Progress
    steps: int
    examples: int = 0
    tokens: int = 0  # as if each text were computed alone, without padding
    computed: int = 0  # rows that went through the model
    seconds: float = 0.0


def fit(
    scorer: Scorer,
    examples: Sequence[Example],
    encode: Encode,
    loss: Loss,
    look: Look,
    *,
    schedule: Schedule,
    folder: Path,
    accelerator: Accelerator | None = None,
    quiet: bool = False,
) -> Fit:
    """Train ``scorer`` in place and leave it with the weights of its best look at the validation examples.

    ``folder/checkpoints`` is resumed from where it holds a checkpoint. Ctrl-C finishes the step, saves and raises.

    Raises:
        UserError: a loss or gradient that is not a number, with the step and the rows; the last checkpoint stays.
        Interrupted: Ctrl-C.
    """
    distributed.start(scorer.device)
    accelerator = accelerator or Accelerator(cpu=scorer.device.type == "cpu")
    optimizer = make_optimizer(scorer, lr=schedule.lr, weight_decay=schedule.weight_decay)
    distributed.broadcast_parameters([p for p in scorer.parameters() if p.requires_grad])
    progress, best = Progress(), trainable_state(scorer)
    if (saved := distributed.on_main(lambda: load_checkpoint(folder / "checkpoints"))) is not None:
        progress, best = Progress(**saved.progress), saved.best
        set_trainable_state(scorer, saved.weights)
        set_optimizer_tensors(optimizer, saved.optimizer)
    total, looks = schedule.total_steps(len(examples)), schedule.looks(len(examples))
    result = Fit(progress=progress, steps=total)
    scorer.train()  # all of it, whatever it says of itself: transformers hands its models over in eval mode

    def save() -> None:
        if accelerator.is_main_process:
            state = {name: getattr(progress, name) for name in Progress.__slots__}
            moments = optimizer_tensors(optimizer)
            whole = Checkpoint(progress=state, weights=trainable_state(scorer), optimizer=moments, best=best)
            save_checkpoint(folder / "checkpoints", whole)

    with (
        _Log(folder, total, progress.step, accelerator, quiet) as log,
        _deferred_interrupt() as interrupted,
        Prefetcher(scorer, examples, encode, schedule, total, accelerator) as batches,
    ):
        while progress.step < total and not progress.done:
            started = time.perf_counter()
            batch = batches.of(progress.step)
            taken = _step(scorer, optimizer, batch, loss, schedule, progress.step, total, accelerator)
            if taken is None:  # outside of the handler, whose traceback held the tensors of the step that failed
                schedule = batches.schedule = _smaller_rounds(schedule, progress.step)
                log.note(
                    f"out of memory at step {progress.step + 1}: rounds of {schedule.tokens_per_micro_batch:,} tokens from here"
                )
                optimizer.zero_grad()
                release(scorer)
                continue
            progress.step += 1
            result.seconds += time.perf_counter() - started
            result.examples += taken.examples
            result.tokens += taken.tokens
            result.computed += taken.computed
            log.step(progress.step, taken.loss, optimizer.param_groups[0]["lr"], result)
            if progress.step in looks:
                scorer.eval()
                (seen,) = distributed.gathered([look()])[:1]  # the main one's, so that all go on or stop together
                if not math.isfinite(seen["loss"]):
                    last = [examples[i] for i in _batch_indices(len(examples), schedule, progress.step - 1)]
                    raise _diverged(progress.step, last, f"a validation loss of {seen['loss']}")
                log.look(progress.step, seen)
                if _better(seen, progress):
                    best = trainable_state(scorer)
                    progress.best_metric, progress.best_loss = seen["metric"], seen["loss"]
                    progress.best_step, progress.stale = progress.step, 0
                else:
                    progress.stale += 1
                progress.done = progress.step == total or 0 < schedule.patience <= progress.stale
            # Asked once: what is raised below has been saved. Whoever was told to stop tells the others.
            (stop,) = distributed.summed([interrupted()])
            if progress.step in looks or progress.step % schedule.save_steps == 0 or stop:
                save()
            if stop and not progress.done:
                accelerator.wait_for_everyone()  # the first that ends ends all, so not before all is saved
                raise Interrupted(
                    f"stopped after step {progress.step} of {total}; go on with: loracle train --resume {folder}"
                )
    set_trainable_state(scorer, best)
    scorer.eval()
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """What one process takes of a batch, cut into rounds: the examples of each and how they go through the model."""

    examples: list[Example]
    rounds: list[tuple[list[Example], PackedBatch]]
    whole: int  # examples of all processes
    tokens_per_micro_batch: int  # of a round


class Prefetcher:
    """Batches of this process; while one is computed, the next one is encoded and packed in a thread."""

    def __init__(
        self,
        scorer: Scorer,
        examples: Sequence[Example],
        encode: Encode,
        schedule: Schedule,
        total: int,
        accelerator: Accelerator,
    ):
        self.scorer, self.examples, self.encode = scorer, examples, encode
        self.schedule, self.total = schedule, total  # the schedule may be given smaller rounds at any time
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.pool = ThreadPoolExecutor(1, "loracle-encode")
        self.next: tuple[int, Future[_Batch]] | None = None

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_) -> None:
        self.pool.shutdown(cancel_futures=True)

    def of(self, step: int) -> _Batch:
        """The batch of a step, in rounds as the schedule now wants them."""
        known, batch = self.next or (None, None)
        found = batch.result() if batch is not None and known == step else None
        if found is None or found.tokens_per_micro_batch != self.schedule.tokens_per_micro_batch:
            found = self.pool.submit(self._take, step).result()
        self.next = (step + 1, self.pool.submit(self._take, step + 1)) if step + 1 < self.total else None
        return found

    def _take(self, step: int) -> _Batch:
        schedule = self.schedule
        whole = [self.examples[i] for i in _batch_indices(len(self.examples), schedule, step)]
        own = distributed.partition(whole, self.world)[self.rank]
        examples = [whole[i] for i in own]
        rounds = _rounds(self.scorer, examples, self.encode(examples), schedule) if examples else []
        limit = schedule.tokens_per_micro_batch
        return _Batch(examples=examples, rounds=rounds, whole=len(whole), tokens_per_micro_batch=limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """A step that was taken: the mean loss; examples, useful tokens and computed rows of all processes."""

    loss: float
    examples: int
    tokens: int
    computed: int


def _step(
    scorer: Scorer,
    optimizer: torch.optim.Optimizer,
    batch: _Batch,
    loss: Loss,
    schedule: Schedule,
    step: int,
    total: int,
    accelerator: Accelerator,
) -> StepResult | None:
    """One optimizer step, or None where memory ran out in any process: gradients are then unfinished, weights untouched."""
    if not scorer.training:  # since the last look; going through thousands of modules costs a step of a GPU 3 %
        scorer.train()
    torch.manual_seed(_derived_seed(schedule.seed, step, accelerator.process_index))
    losses: list[torch.Tensor] = []
    count = tokens = computed = short = alone = 0.0
    more = distributed.most(len(batch.rounds)) - len(batch.rounds) if scorer.sharded else 0  # that only others have
    try:
        for examples, packed in batch.rounds:
            summed, counted = loss(examples)(scorer(packed))
            summed.backward()
            losses.append(summed.detach())
            count += counted
            tokens, computed = tokens + packed.useful_tokens, computed + packed.tokens
        for _ in range(more):  # the others need this one's weights
            (0 * scorer(scorer.pack([NOTHING])).sum()).backward()
    except (RuntimeError, MemoryError) as e:
        if not out_of_memory(e):
            raise
        if scorer.sharded:
            raise _too_little_memory(
                schedule.tokens_per_micro_batch, step
            ) from e  # the others wait in the midst of a layer
        short = 1.0
        alone = packed.tokens if len(examples) == 1 else 0  # smaller rounds would have it in one piece again
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    known = [p.grad is not None for p in parameters]
    if accelerator.num_processes > 1:
        shared = [count, tokens, computed, short, alone, *known]
        count, tokens, computed, short, alone, *having = distributed.summed(shared)
        known = [bool(n) for n in having]
    if alone:
        raise _too_little_memory(int(alone), step)
    if short:
        return None
    if accelerator.num_processes > 1:
        distributed.sum_gradients(parameters, known)
    trained = [p for p, has in zip(parameters, known, strict=True) if has]
    torch._foreach_mul_([p.grad for p in trained], 1 / max(count, 1e-12))  # of sums, the one division
    norm = torch.nn.utils.clip_grad_norm_(trained, schedule.clip)
    # Asked once a step, before the weights are touched: each question makes the processor wait for the GPU.
    *values, size = torch.stack([x.to(norm.device, torch.float32) for x in (*losses, norm)]).tolist()
    each = zip(batch.rounds, values, strict=True)
    found = [(examples, f"a loss of {value}") for (examples, _), value in each if not math.isfinite(value)]
    if not found and not math.isfinite(size):
        found = [(batch.examples, f"a gradient norm of {size}")]
    (value,) = distributed.summed([sum(values)])
    if not math.isfinite(size) or not math.isfinite(value):
        # Where one process has a loss that is no number, all have such gradients: the loss says more.
        rows, what = min(distributed.gathered(found), key=lambda known: "norm" in known[1])
        raise _diverged(step + 1, rows, what)
    for group in optimizer.param_groups:
        group["lr"] = schedule.lr * lr_factor(step, total, schedule.warmup)
    optimizer.step()
    optimizer.zero_grad()
    return StepResult(loss=value / max(count, 1e-12), examples=batch.whole, tokens=int(tokens), computed=int(computed))


def _rounds(
    scorer: Scorer, examples: list[Example], encoded: list[list[Encoded]], schedule: Schedule
) -> list[tuple[list[Example], PackedBatch]]:
    """Examples cut into rounds, each packed as the scorer takes it."""
    sizes = [sum(e.tokens for e in unit) for unit in encoded]
    # Padding costs least among equals; a packed batch has none, and keeps its order.
    order = list(range(len(sizes))) if scorer.packed else sorted(range(len(sizes)), key=sizes.__getitem__)
    parts = micro_batches([encoded[i] for i in order], schedule.tokens_per_micro_batch, share_from=scorer.share_from)
    of_round = [[order[i] for i in part] for part in parts]
    return [([examples[i] for i in part], scorer.pack([e for i in part for e in encoded[i]])) for part in of_round]


def _smaller_rounds(schedule: Schedule, step: int) -> Schedule:
    """The same steps in rounds of half as many tokens: gradients are sums, so nothing else changes."""
    if schedule.tokens_per_micro_batch < 2 * FEWEST_TOKENS:
        raise _too_little_memory(schedule.tokens_per_micro_batch, step)
    return dataclasses.replace(schedule, tokens_per_micro_batch=schedule.tokens_per_micro_batch // 2)


def _too_little_memory(tokens: int, step: int) -> UserError:
    return UserError(
        f"memory for a round of {tokens:,} tokens",
        f"too little, at step {step + 1}",
        "pass a smaller --max-length or --model, or split groups of many titles",
    )


def _batch_indices(examples: int, schedule: Schedule, step: int) -> np.ndarray:
    """Which examples a step sees: every epoch has its own seeded order."""
    epoch, within = divmod(step, schedule.steps_per_epoch(examples))
    return _order(schedule.seed, epoch, examples)[within * schedule.batch : (within + 1) * schedule.batch]


@functools.lru_cache(maxsize=1)  # an epoch asks for it at every step
def _order(seed: int, epoch: int, examples: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(examples)


def _derived_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def _better(seen: dict[str, float], progress: Progress) -> bool:
    return (seen["metric"], -seen["loss"]) > (progress.best_metric, -progress.best_loss)


def _diverged(step: int, examples: Sequence[Example], what: str) -> UserError:
    rows = [row for e in examples for row in (e.rows if isinstance(e, RankGroup) else (e.row,))]
    shown = ", ".join(map(str, rows[:8])) + (", …" if len(rows) > 8 else "")
    return UserError(
        "finite numbers",
        f"{what} at step {step} (rows {shown})",
        "look at these rows, or start a new run with a lower --lr; the last checkpoint is kept",
    )


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Hold Ctrl-C back until the step is over; a second one breaks at once."""
    pressed = False

    def press(*_) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    try:
        before = signal.signal(signal.SIGINT, press)
    except ValueError:  # not in the main thread: whoever runs us there handles signals
        yield lambda: False
        return
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


class _Log:
    """A progress bar for people, ``log.jsonl``, TensorBoard and the accelerator's trackers for tools."""

    def __init__(self, folder: Path, total: int, step: int, accelerator: Accelerator, quiet: bool):
        self.path, self.main, self.accelerator = folder / "log.jsonl", accelerator.is_main_process, accelerator
        self.bar = tqdm(
            total=total,
            initial=step,
            unit="step",
            disable=quiet or not self.main,
            dynamic_ncols=True,
            mininterval=0.5,
            desc="train",
        )
        if self.main:
            from torch.utils.tensorboard import SummaryWriter

            _forget_after(self.path, step)
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
        if self.main:
            self.board.close()
        for tracker in getattr(self.accelerator, "trackers", ()):
            tracker.finish()

    def step(self, step: int, loss: float, lr: float, so_far: Fit) -> None:
        rates = {"examples_per_s": so_far.examples / so_far.seconds, "tokens_per_s": so_far.tokens / so_far.seconds}
        self.bar.update()
        self.bar.set_postfix(
            loss=f"{loss:.3f}", **{"ex/s": f"{rates['examples_per_s']:.1f}", "tok/s": f"{rates['tokens_per_s']:.0f}"}
        )
        self._write({"step": step, "loss": loss, "lr": lr, **rates})

    def look(self, step: int, seen: dict[str, float]) -> None:
        record = {"step": step, **{f"validation_{k}": v for k, v in seen.items()}}
        if not self.bar.disable:
            self.bar.write(f"step {step}: validation " + ", ".join(f"{k} {v:.4f}" for k, v in seen.items()))
        self._write(record)

    def note(self, line: str) -> None:
        if not self.bar.disable:
            self.bar.write(f"note: {line}")

    def _write(self, record: dict[str, Any]) -> None:
        if not self.main:
            return
        with self.path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")
        values = {name: value for name, value in record.items() if name != "step"}
        for name, value in values.items():
            self.board.add_scalar(name, value, record["step"])
        if getattr(self.accelerator, "trackers", ()):  # of --track; there are none before they are begun
            self.accelerator.log(values, step=record["step"])


def _forget_after(path: Path, step: int) -> None:
    """Drop log lines of steps that a resumed run takes again."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:  # a line that a crash cut short
            continue
    path.write_text("".join(kept), encoding="utf-8")
