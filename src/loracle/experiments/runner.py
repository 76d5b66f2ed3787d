"""Several runs on the same data, each in a folder of its own, so that an interrupted series goes on where it stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from loracle import pipeline
from loracle.config import RunConfig
from loracle.errors import Interrupted, Log
from loracle.runs import folder as run_folder
from loracle.tasks.dataset import Data


def root_of(config: RunConfig, experiment: str) -> Path:
    """Where a series goes: ``--out``, or ``runs/<name of the data>-<kind>``, the same when asked again."""
    return Path(config.out or f"runs/{Path(config.data.data).name.split('.')[0] or 'run'}-{experiment}")


def place(root: Path, name: str, config: RunConfig, data: Data) -> Path:
    """A folder named by the settings and the data too, so that no result of other ones is taken for theirs."""
    settings = dataclasses.asdict(dataclasses.replace(config, out=None)) | {"checksums": data.checksums}
    return root / f"{name}-{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]}"


def train_once(config: RunConfig, data: Data, folder: Path, *, log: Log, quiet: bool) -> Path:
    """``pipeline.learn``, unless the folder holds the finished run; one that was interrupted is gone on with.

    Raises:
        Interrupted: Ctrl-C; what is finished stays.
    """
    if (folder / run_folder.MANIFEST).exists():
        log(f"finished before: {folder}")
        return folder
    config = dataclasses.replace(config, out=str(folder))
    try:
        return pipeline.train_on(config, data, folder, log=log, quiet=quiet, keep_scores=True)
    except Interrupted as e:
        raise Interrupted(f"{str(e).partition(';')[0]} in {folder}; the same command goes on from there") from None
