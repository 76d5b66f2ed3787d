"""Labels for tables of any size, window by window; what is scored is kept, and an interrupted job goes on from there.

    scored.scores/                     while a job with ``-o scored.csv`` is under way
      job.json                         what must not change: run, data, columns, device, version
      0000000.safetensors, ...         probabilities of a window each, float64 [rows, C], NaN where there is no text
      lock                             one process at a time

A window is ``WINDOW`` rows of the table, the last one fewer. Each file is whole or absent, so their number is how far the job
is. When all are there the table is read once more and written with them, and the folder goes.
"""

from __future__ import annotations

import errno
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.numpy import load, save
from tqdm import tqdm

import loracle
from loracle.data.columns import Columns
from loracle.data.reader import iter_texts
from loracle.data.table import Table
from loracle.errors import Interrupted, UserError
from loracle.hubs import checksum
from loracle.runs.folder import MANIFEST, RunInfo, read_calibration, verify, write_bytes, write_text
from loracle.runs.output import Write, check_output, open_output
from loracle.runs.predictor import Predictor, score_window
from loracle.text.template import check_contexts

WINDOW = 2048  # rows held at once, and lost at most by a kill

Row = tuple[int, dict[str, Any], str | None, str | None]  # number, cells, text, context


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A table to be labelled with a classifier.

    ``workers`` of a Ray cluster score it where that is not None (0: as many as the cluster can take), else this process does.
    """

    run: Path
    info: RunInfo
    data: str
    table: Table
    columns: Columns
    base: str | None = None
    device: str = "auto"
    workers: int | None = None
    window: int = WINDOW

    def windows(self) -> Iterator[list[Row]]:
        """The table's rows, ``window`` at a time."""
        rows = iter_texts(self.table, self.columns)
        while window := list(itertools.islice(rows, self.window)):
            yield window

    def values(self, first: int = 0) -> Iterator[np.ndarray]:
        """``Predictor.values`` of each window from the ``first`` on, ``float64 [rows, K]``, NaN where there is no text.

        Raises:
            UserError: the run is damaged, or the base model is not the one that was trained on.
        """
        if self.workers is not None:
            from loracle.runs.ray import score_windows

            yield from score_windows(self, first)
            return
        predictor = Predictor(self.run, base=self.base, device=self.device)
        for window in itertools.islice(self.windows(), first, None):
            yield score_window(predictor, [text for *_, text, _ in window], [context for *_, context in window])

    def pins(self) -> dict[str, Any]:
        """What one output must be made of from the first row to the last, in the words of an error."""
        files = [(str(file.path.resolve()), file.path.stat()) for file in self.table.files]
        return {
            "run": checksum(self.run / MANIFEST),
            "data": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in files],
            "columns": [self.columns.messages, self.columns.text, self.columns.context],
            "device": self.device,
            "version": [loracle.__version__, self.window],
        }


def predict(job: Job, out: Path | None, abstain_below: float, log: Any) -> None:
    """Every row of a table with its label and probabilities, into a file or, without ``out``, to the terminal.

    A file appears when it is whole. A job that is stopped in whatever way, and started again, goes on where it was and ends in
    the same bytes.

    Raises:
        UserError: what cannot be read or written, or what was begun with another run, data or columns.
        Interrupted: by Ctrl-C.
    """
    verify(job.run)
    if out is None:
        with open_output(None) as write:
            counts = _write(job, zip(job.windows(), job.values(), strict=True), write, abstain_below)
    else:
        check_output(out)
        with _room_for(out):
            counts = _predict_to_file(job, out, abstain_below, log)
    unread, unsure = counts
    if unread:
        log(f"note: {unread:,} rows without a text have no label")
    if abstain_below:
        log(f"note: {unsure:,} rows of which the model is less sure than {abstain_below:g} have no label")


@contextmanager
def _room_for(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        fix = "make room, and give the same command again: it goes on where it was"
        raise UserError(f"room for {out}", str(error.strerror), fix) from error


def _predict_to_file(job: Job, out: Path, abstain_below: float, log: Any) -> tuple[int, int]:
    if any(out.resolve() == file.path.resolve() for file in job.table.files):
        raise UserError("an --out that is not itself read", str(out), "pick another name")
    pins = job.pins()
    with _kept(out.with_suffix(".scores"), pins) as kept:
        rows = _look_through(job)  # what is broken in a file shows now and not after hours
        try:
            _score(job, kept, rows, log)
            if job.pins() != pins:
                fix = f"remove {kept.folder} and give the command again"
                raise UserError("data that stay as they are", f"other bytes in {job.table.name} by now", fix)
            with open_output(out, scratch=kept.folder) as write:
                counts = _write(job, zip(job.windows(), kept, strict=True), write, abstain_below)
        except KeyboardInterrupt:
            done = min(len(kept) * job.window, rows)
            raise Interrupted(f"stopped; the same command goes on after {done:,} of {rows:,} rows") from None
    return counts


def _look_through(job: Job) -> int:
    """Number of rows, all of which can be read and have the context that the template wants."""
    rows = 0
    for window in job.windows():
        rows += len(window)
        check_contexts(job.info.config.model.template, [context for *_, text, context in window if text is not None])
    return rows


def _score(job: Job, kept: PartialResults, rows: int, log: Any) -> None:
    done = min(len(kept) * job.window, rows)
    if done:
        log(f"note: going on after {done:,} of {rows:,} rows, kept in {kept.folder}")
    if done == rows:
        return
    with tqdm(total=rows, initial=done, unit=" rows", disable=None) as bar:  # to stderr, and only if that is a terminal
        for proba in job.values(len(kept)):
            kept.append(proba)
            bar.update(len(proba))


def _write(
    job: Job, scored: Iterable[tuple[list[Row], np.ndarray]], write: Write, abstain_below: float
) -> tuple[int, int]:
    """Rows with their labels; returns how many had no text, and of how many the model was not sure enough."""
    columns, task, calibration = job.table.columns, job.info.task, read_calibration(job.run, job.info.task)
    names = [_free(name, columns) for name in task.output.columns(task)]
    unread = unsure = 0
    for window, values in scored:
        answers = task.output.cells(values, task, calibration, abstain_below=abstain_below)
        for (_, row, text, _), answer in zip(window, answers, strict=True):
            cells = answer.cells if text is not None else [None] * len(names)
            unread += text is None
            unsure += text is not None and answer.abstains
            write({**dict.fromkeys(columns), **row, **dict(zip(names, cells, strict=True))})
    return unread, unsure


def _free(name: str, taken: tuple[str, ...]) -> str:
    """The name, or one with a number behind it where the user's own column is called so."""
    return next(n for n in (name, *(f"{name}_{i}" for i in range(2, 10_000))) if n not in taken)


# ---------------------------------------------------------------------------------------------------------------------
# What is kept until the output is whole


class PartialResults:
    """Probabilities of the first windows of a job, a file each."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._count = next(i for i in itertools.count() if not self._file(i).exists())

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[np.ndarray]:
        """Probabilities of each window, in order.

        Raises:
            UserError: a file is damaged.
        """
        for path in map(self._file, range(self._count)):
            try:
                yield load(path.read_bytes())["values"]
            except (SafetensorError, KeyError) as error:
                raise UserError(f"scores in {path}", str(error), "remove it and give the command again") from None

    def append(self, proba: np.ndarray) -> None:
        """Keep those of the next window."""
        write_bytes(self._file(self._count), save({"values": proba}))
        self._count += 1

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:07d}.safetensors"


@contextmanager
def _kept(folder: Path, pins: dict[str, Any]) -> Iterator[PartialResults]:
    """What an earlier start of the job left, for one process at a time; gone once the job is done.

    Raises:
        UserError: it is another job's, another process is at it, or it is something else of the user's.
    """
    lock = folder / "lock"  # made first and removed last: a folder with files and without it is none of ours
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not lock.exists())):
        raise UserError(f"{folder} free for the scores of this job", "other files there", "pick another --out")
    folder.mkdir(exist_ok=True)
    done = False
    try:
        with FileLock(lock, timeout=0):
            kept, about = PartialResults(folder), folder / "job.json"
            try:
                if len(kept):
                    _check_same(folder, json.loads(about.read_text(encoding="utf-8")), pins)
                else:
                    for left in folder.glob("*.safetensors"):  # by a start that was killed over taking them away
                        left.unlink()
                    write_text(about, json.dumps(pins))
                yield kept
                done = True
            finally:
                if done or not len(kept):
                    _remove(folder)
    except Timeout:
        raise UserError("one process for an output", f"another at work in {folder}", "wait for it") from None


def _remove(folder: Path) -> None:
    """Take away what was kept: windows from the first one on, then what they belong to, the lock last.

    Whoever is killed over it leaves a folder that the next start understands.
    """
    with suppress(OSError):
        for path in sorted(folder.iterdir()):
            if path.is_dir():  # in which a Parquet file was being written
                shutil.rmtree(path)
            else:
                path.unlink()
        folder.rmdir()


def _check_same(folder: Path, known: dict[str, Any], pins: dict[str, Any]) -> None:
    if changed := [name for name in pins if known.get(name) != pins[name]]:
        raise UserError(
            f"what the scores in {folder} were begun with",
            f"another {' and '.join(changed)}",
            "give the same again or another --out; or remove that folder, to start anew",
        )
