"""Processes for tests to kill. They fork from one that has imported everything, so each starts in a tenth of a second.

``LORACLE_KILLS`` is the number of kills per test; ``make soak`` sets 50.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path

import torch

KILLS = int(os.environ.get("LORACLE_KILLS", 5))
WINDOW = 16
_forked = multiprocessing.get_context("forkserver")
_forked.set_forkserver_preload(["loracle.runs.batch", "loracle.training.checkpoint"])


def start(target, *args):
    """Start a process that calls ``target(*args)``."""
    process = _forked.Process(target=target, args=args)
    process.start()
    return process


def pipe() -> tuple[Connection, Connection]:
    return _forked.Pipe(duplex=False)


def job_of(run: Path, data: Path | str, table=None):
    """The job of ``loracle predict run data``, in windows of 16 rows."""
    from loracle.config import DataConfig
    from loracle.data.columns import infer_text_column
    from loracle.data.sources import open_table
    from loracle.runs.batch import Job
    from loracle.runs.folder import read_info

    table = table or open_table(str(data))
    columns = infer_text_column(table, DataConfig(text="text"))
    return Job(run=run, info=read_info(run), data=str(data), table=table, columns=columns, window=WINDOW)


def label(run: Path, data: Path, out: Path) -> None:
    from loracle.runs.batch import predict

    predict(job_of(run, data), out, 0.0, log=lambda line: None)


def checkpoint_at(step: int):
    """A checkpoint in which every number equals its step."""
    from loracle.training.checkpoint import Checkpoint

    def tensors():
        return {"w": torch.full((128, 256), float(step))}

    return Checkpoint(progress={"step": step}, weights=tensors(), optimizer=tensors(), best=tensors())


def save_without_end(folder: Path, first: int, saved: Connection) -> None:
    from loracle.training.checkpoint import save_checkpoint

    for step in itertools.count(first):
        save_checkpoint(folder, checkpoint_at(step))
        saved.send(step)
