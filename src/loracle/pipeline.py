"""One training from file to run folder, top to bottom."""

from __future__ import annotations

import dataclasses
import glob
from pathlib import Path

from loracle.baselines import fit_baselines
from loracle.config import RunConfig
from loracle.errors import Log, UserError
from loracle.models.devices import pick_device
from loracle.models.loading import resolve_base
from loracle.reporting.results import evaluate
from loracle.runs import folder as run_folder
from loracle.runs.save import begin_run, new_folder, save_run
from loracle.tasks.dataset import Data, prepare_data
from loracle.training import distributed
from loracle.training.fit import fit_model
from loracle.training.preflight import estimate_cost
from loracle.training.prepare import cached_lower_layers, prepare_model


def train(config: RunConfig, *, log: Log = print, quiet: bool = False) -> Path:
    """Train, measure and save what ``config`` describes. Returns the run folder.

    Raises:
        UserError: data, model or settings that cannot be used. Interrupted: Ctrl-C; ``resume`` continues.
    """
    log = distributed.log_on_main(log, pick_device(config.model.device))
    config = with_absolute_paths(config)
    folder = distributed.on_main(lambda: new_folder(config))
    data = distributed.on_main(lambda: prepare_data(config, log))
    return train_on(config, data, folder, log=log, quiet=quiet)


def train_on(
    config: RunConfig, data: Data, folder: Path, *, log: Log = print, quiet: bool = False, keep_scores: bool = False
) -> Path:
    """Train on prepared data. With ``keep_scores`` the folder also holds the test scores, for paired tests.

    Every process calls this. Processes beyond the first are handled inside the steps.
    """
    model = prepare_model(config, data, log)  # base, tokenizer with template, scorer, loss
    with cached_lower_layers(config, model, log):
        plan = estimate_cost(config, model, data, log)  # tokens, memory, time; smaller micro-batches if needed
        run = begin_run(config, folder, model, plan, data)
        baselines = fit_baselines(config, model, data, log)  # before training, as some ask the untrained model
        fitted = fit_model(run.config, model, data, folder, quiet=quiet)
    results = evaluate(run.config, model, fitted, data, baselines, log)  # calibrate on validation, score test once
    save_run(run, model, results, data, log, keep_scores=keep_scores)  # and check that a reloaded run scores the same
    return folder


def resume(folder: Path, *, log: Log = print, quiet: bool = False) -> Path:
    """Continue an interrupted run. On one machine's CPU the result equals an unbroken run bit for bit.

    Raises:
        UserError: the run is finished, or its data or its base model have changed.
    """
    info = run_folder.read_info(folder)
    if (folder / run_folder.MANIFEST).exists():
        raise UserError(f"The run in {folder} is finished.", "Start a new one, or use it as it is.")
    if not info.config.data.data:
        raise UserError(f"The run in {folder} was trained on data in memory, which are gone.", "Train it again.")
    config = info.config
    if revision := info.base.get("revision"):  # a branch may have moved; the commit is still there
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, revision=revision))
    log = distributed.log_on_main(log, pick_device(config.model.device))
    data = distributed.on_main(lambda: prepare_data(config, log))
    if data.checksums != info.provenance["data"]:
        raise UserError(f"The data of {folder} have changed since it began.", "Restore the file or start a new run.")
    base = resolve_base(config.model.model, config.model.revision)
    if base.checksum() != info.base["sha256"]:
        raise UserError(f"The base model of {folder} has changed since it began.", "Restore it or start a new run.")
    return train_on(config, data, folder, log=log, quiet=quiet)


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The same with absolute paths, so that ``--resume`` finds the files from anywhere."""

    def absolute(path: str | None) -> str | None:
        is_local = path and path != "demo" and (Path(path).exists() or glob.has_magic(path))
        return str(Path(path).resolve()) if path and is_local else path

    data = dataclasses.replace(config.data, data=absolute(config.data.data) or "", test=absolute(config.data.test))
    model = dataclasses.replace(config.model, model=absolute(config.model.model) or "")
    return dataclasses.replace(config, data=data, model=model)
