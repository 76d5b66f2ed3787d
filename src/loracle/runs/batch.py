"""Label tables of any size, window by window. An interrupted job continues from its partial results.

    scored.scores/                     while a job with ``-o scored.csv`` runs
      job.json                         what must not change: run, data, columns, device, version
      0000000.safetensors, ...         values of one window each, float64 [rows, K], NaN where there is no text
      lock                             one process at a time

A window is ``WINDOW`` rows of the table; the last one may have fewer. Each file is complete or absent, so their number is
the progress. When all exist, the table is read again and written with them, and the folder is deleted.
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

import loracle
from loracle.data.columns import Columns
from loracle.data.reader import iter_texts
from loracle.data.table import Table
from loracle.errors import Interrupted, Log, UserError
from loracle.hubs import checksum
from loracle.runs.folder import MANIFEST, RunInfo, read_calibration, verify, write_bytes, write_text
from loracle.runs.output import Write, check_output, open_output
from loracle.runs.predictor import Predictor, score_window
from loracle.text.template import check_contexts
from loracle.training.progress import ProgressDisplay

WINDOW = 2048  # rows in memory at once, and the most that a kill loses

Row = tuple[int, dict[str, Any], str | None, str | None]  # number, cells, text, context


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A table to label with a classifier.

    ``workers``: number of workers in a Ray cluster (0: as many as fit). None: this process scores.
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
        """What must not change while a job runs, named as errors name it."""
        files = [(str(file.path.resolve()), file.path.stat()) for file in self.table.files]
        return {
            "run": checksum(self.run / MANIFEST),
            "data": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in files],
            "columns": [self.columns.messages, self.columns.text, self.columns.context],
            "device": self.device,
            "version": [loracle.__version__, self.window],
        }


def predict(job: Job, out: Path | None, abstain_below: float, log: Log, *, quiet: bool = False) -> None:
    """Write every row of a table with its label and probabilities, to a file or, without ``out``, to the terminal.

    The file appears when it is complete. A stopped job, started again, continues and gives the same bytes.
    ``quiet`` shows no progress.

    Raises:
        UserError: input or output cannot be read or written, or partial results belong to another run, data or columns.
        Interrupted: Ctrl-C.
    """
    verify(job.run)
    if out is None:
        with open_output(None) as write:
            counts = _write(job, zip(job.windows(), job.values(), strict=True), write, abstain_below)
    else:
        check_output(out)
        with _full_disk_as_user_error(out):
            counts = _predict_to_file(job, out, abstain_below, log, quiet)
    textless, abstained = counts
    if textless:
        log(f"note: {textless:,} rows without a text have no label")
    if abstain_below:
        log(f"note: {abstained:,} rows with a confidence below {abstain_below:g} have no label")


@contextmanager
def _full_disk_as_user_error(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"No space to write {out}: {error.strerror}.", "Free some and repeat the command; it continues."
        ) from error


def _predict_to_file(job: Job, out: Path, abstain_below: float, log: Log, quiet: bool) -> tuple[int, int]:
    if any(out.resolve() == file.path.resolve() for file in job.table.files):
        raise UserError(f"--out {out} is also an input file.", "Pick another name.")
    pins = job.pins()
    with _open_partial_results(out.with_suffix(".scores"), pins) as partial:
        rows = _check_rows(job)  # finds errors in the file now, not after hours of scoring
        try:
            _score(job, partial, rows, log, quiet)
            if job.pins() != pins:
                raise UserError(
                    f"{job.table.name} changed during the job.", f"Delete {partial.folder} and repeat the command."
                )
            with open_output(out, scratch=partial.folder) as write:
                counts = _write(job, zip(job.windows(), partial, strict=True), write, abstain_below)
        except KeyboardInterrupt:
            done = min(len(partial) * job.window, rows)
            raise Interrupted(f"stopped after {done:,} of {rows:,} rows; the same command continues") from None
    return counts


def _check_rows(job: Job) -> int:
    """Check that all rows can be read and have the context that the template needs. Return their number."""
    rows = 0
    for window in job.windows():
        rows += len(window)
        check_contexts(job.info.config.model.template, [context for *_, text, context in window if text is not None])
    return rows


def _score(job: Job, partial: PartialResults, rows: int, log: Log, quiet: bool) -> None:
    done = min(len(partial) * job.window, rows)
    if done:
        log(f"note: continuing after {done:,} of {rows:,} rows in {partial.folder}")
    if done == rows:
        return
    with ProgressDisplay(rows, done, unit="row", quiet=quiet) as display:
        for values in job.values(len(partial)):
            partial.append(values)
            display.update(len(values))


def _write(
    job: Job, scored: Iterable[tuple[list[Row], np.ndarray]], write: Write, abstain_below: float
) -> tuple[int, int]:
    """Write rows with their labels. Return the number of rows without a text and of rows where the model abstains."""
    columns, task, calibration = job.table.columns, job.info.task, read_calibration(job.run, job.info.task)
    names = [_unused_name(name, columns) for name in task.output.columns(task)]
    textless = abstained = 0
    for window, values in scored:
        answers = task.output.cells(values, task, calibration, abstain_below=abstain_below)
        for (_, row, text, _), answer in zip(window, answers, strict=True):
            cells = answer.cells if text is not None else [None] * len(names)
            textless += text is None
            abstained += text is not None and answer.abstains
            write({**dict.fromkeys(columns), **row, **dict(zip(names, cells, strict=True))})
    return textless, abstained


def _unused_name(name: str, columns: tuple[str, ...]) -> str:
    """The name, or the name with a number where the table has a column of this name."""
    return next(n for n in (name, *(f"{name}_{i}" for i in range(2, 10_000))) if n not in columns)


# ---------------------------------------------------------------------------------------------------------------------
# Partial results


class PartialResults:
    """Values of the first windows of a job, one file each."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._count = next(i for i in itertools.count() if not self._file(i).exists())

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[np.ndarray]:
        """Values of each window, in order.

        Raises:
            UserError: a file is damaged.
        """
        for path in map(self._file, range(self._count)):
            try:
                yield load(path.read_bytes())["values"]
            except (SafetensorError, KeyError) as error:
                raise UserError(f"{path} is damaged: {error}.", "Delete it and repeat the command.") from None

    def append(self, values: np.ndarray) -> None:
        """Save the values of the next window."""
        write_bytes(self._file(self._count), save({"values": values}))
        self._count += 1

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:07d}.safetensors"


@contextmanager
def _open_partial_results(folder: Path, pins: dict[str, Any]) -> Iterator[PartialResults]:
    """Open the partial results of a job for one process, and delete them once the job is done.

    Raises:
        UserError: they belong to another job, another process uses them, or the folder holds other files.
    """
    lock = folder / "lock"  # created first and deleted last: a folder with files and without a lock is the user's
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not lock.exists())):
        raise UserError(f"{folder}, where partial results would go, holds other files.", "Pick another --out.")
    folder.mkdir(exist_ok=True)
    done = False
    try:
        with FileLock(lock, timeout=0):
            partial, about = PartialResults(folder), folder / "job.json"
            try:
                if len(partial):
                    _check_same(folder, json.loads(about.read_text(encoding="utf-8")), pins)
                else:
                    for left in folder.glob("*.safetensors"):  # of a process that was killed while deleting them
                        left.unlink()
                    write_text(about, json.dumps(pins))
                yield partial
                done = True
            finally:
                if done or not len(partial):
                    _remove(folder)
    except Timeout:
        raise UserError(f"Another process is writing to {folder}.", "Wait for it to end.") from None


def _remove(folder: Path) -> None:
    """Delete partial results: windows in order, then ``job.json``, the lock last. A kill leaves a folder that still works."""
    with suppress(OSError):
        for path in sorted(folder.iterdir()):
            if path.is_dir():  # part files of an unfinished Parquet output
                shutil.rmtree(path)
            else:
                path.unlink()
        folder.rmdir()


def _check_same(folder: Path, saved: dict[str, Any], pins: dict[str, Any]) -> None:
    if changed := [name for name in pins if saved.get(name) != pins[name]]:
        raise UserError(
            f"The partial results in {folder} come from another {' and '.join(changed)}.",
            "Use the same again, pick another --out, or delete that folder to start over.",
        )
