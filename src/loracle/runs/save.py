"""Writing a run folder, and checking that it reproduces its scores."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np

from loracle.config import RunConfig
from loracle.errors import Log, UserError
from loracle.evaluation import drift
from loracle.examples import texts_of
from loracle.models import scoring
from loracle.models.lora import save_adapter
from loracle.models.quiet import quiet_transformers
from loracle.reporting.html import render
from loracle.reporting.report import build_report, curves, without_texts
from loracle.reporting.results import Results
from loracle.reporting.terminal import summary
from loracle.runs import folder as run_folder
from loracle.runs.model_card import model_card
from loracle.runs.predictor import Predictor
from loracle.tasks.dataset import Data
from loracle.training import distributed
from loracle.training.preflight import TrainingPlan
from loracle.training.prepare import PreparedModel, save_tokenizer
from loracle.training.scoring import write_scores

SAMPLE = 64  # test texts whose scores the reloaded run must reproduce
TOLERANCE = 1e-6
OTHER_DEVICE = 0.1  # the same, where a bfloat16 model is scored on another device than it was trained on


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """A run folder and the configuration that it was trained with: depth and micro-batches are settled."""

    folder: Path
    config: RunConfig


def new_folder(config: RunConfig) -> Path:
    """The folder of a new run: ``--out``, or the next free ``runs/<name>``. It is made once data and model are fine.

    Raises:
        UserError: ``--out`` is not empty.
    """
    if config.out:
        return run_folder.free(Path(config.out), "Pick another --out, or finish it with --resume.")
    name = Path(config.data.data).name.split(".")[0] or "run"
    candidates = (Path("runs") / (name if i == 1 else f"{name}-{i}") for i in range(1, 10_000))
    return next(p for p in candidates if not p.exists())


def begin_run(config: RunConfig, folder: Path, model: PreparedModel, plan: TrainingPlan, data: Data) -> Run:
    """Make the folder and write what ``--resume`` needs: run.toml and the tokenizer.

    Raises:
        UserError: the folder cannot be made.
    """
    settled = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, depth=model.depth),
        train=dataclasses.replace(config.train, tokens_per_micro_batch=plan.tokens_per_micro_batch),
    )
    if distributed.start(model.scorer.device).is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"Cannot make the run folder {folder}: {e.strerror or e}.", "Pick another --out.") from e
        run_folder.write_info(folder, _info(settled, model, data))
        save_tokenizer(model.base.tokenizer, folder)
    return Run(folder, settled)


def save_run(
    run: Run, model: PreparedModel, results: Results | None, data: Data, log: Log, *, keep_scores: bool
) -> None:
    """Write weights, results, report and model card; the manifest last, which marks the run as finished.

    The main process writes. Raises RuntimeError where the saved run does not reproduce its scores.
    """
    distributed.on_main(
        lambda: _save(run, model, results, data, log, keep_scores) if results else None, along=model.scorer
    )


def _save(run: Run, model: PreparedModel, results: Results, data: Data, log: Log, keep_scores: bool) -> None:
    folder, config = run.folder, run.config
    info = run_folder.read_info(folder)
    if results.calibration is not None:
        run_folder.write_calibration(folder, results.calibration)
    run_folder.write_reference(folder, _reference(model, results, data))
    if keep_scores:
        write_scores(folder, results.test_scores)
    report = build_report(results, data)
    if not config.train.texts:
        report = without_texts(report)
    report |= {"run": run_folder.facts(folder, info, data.issues), "curves": curves(folder / "log.jsonl")}
    run_folder.write_text(folder / run_folder.REPORT, json.dumps(report, indent=1, ensure_ascii=False))
    run_folder.write_text(folder / run_folder.PAGE, render(report))
    if config.lora.full:
        with quiet_transformers():
            model.scorer.inner.save_pretrained(folder)
    else:
        source = model.base.source
        save_adapter(model.scorer.model, folder, base=source.peft_name, revision=source.revision)
    run_folder.write_text(folder / run_folder.METRICS, json.dumps(results.metrics, indent=1))
    write_predictions(folder, results, data, texts=config.train.texts)
    run_folder.write_text(folder / run_folder.CARD, model_card(folder.name, info, results.metrics))
    run_folder.write_manifest(folder)
    verify_reload(run, model, data)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    log(f"\n{report['verdict']['text']}\n")
    log(summary(results.metrics, data.task, model.base.source.note))
    log(f"\nrun folder: {folder}; report: {folder / run_folder.PAGE}")


def _reference(model: PreparedModel, results: Results, data: Data) -> drift.Reference:
    evaluation = data.task.evaluation
    return evaluation.reference(model.tokens.train, results.validation_scores, data.task, results.calibration)


def write_predictions(folder: Path, results: Results, data: Data, *, texts: bool) -> None:
    """Write predictions.csv: every test text with the model's answer. Without ``texts``, rows of the data instead."""
    output, task = data.task.output, data.task
    rows = output.prediction_table(results.test_scores, data.test, task, results.calibration, texts=texts)
    with (folder / run_folder.PREDICTIONS).open("w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows(rows)


def verify_reload(run: Run, model: PreparedModel, data: Data) -> None:
    """Load the folder anew and fail if the scores differ.

    A base that is too large for a GPU is loaded into the CPU's memory, which rounds differently.
    """
    sample = [(text, e.context) for e in data.test for text in texts_of(e)][:SAMPLE]
    texts, contexts = [t for t, _ in sample], [c for _, c in sample]
    scorer = model.scorer
    own = scoring.score(scorer, model.encoder(texts, contexts))
    device = "cpu" if scorer.sharded else str(scorer.device)
    reloaded = Predictor(run.folder, base=str(model.base.source.folder), device=device).scores(texts, contexts)
    worst = float(np.max(np.abs(own - reloaded) / np.maximum(1, np.abs(own))))
    if not worst <= (TOLERANCE if device == str(scorer.device) else OTHER_DEVICE):
        (run.folder / run_folder.MANIFEST).unlink()
        raise RuntimeError(
            f"{run.folder} does not reproduce its scores: they differ by {worst:.2g}. This is a bug in loracle."
        )


def _info(config: RunConfig, model: PreparedModel, data: Data) -> run_folder.RunInfo:
    source, task = model.base.source, data.task
    return run_folder.RunInfo(
        config=config,
        task=task,
        base={"source": source.source, "revision": source.revision, "sha256": source.checksum(), "note": source.note},
        load_kwargs={
            "num_labels": task.learning.outputs(task),
            "pad_token_id": model.base.tokenizer.pad_token_id,
            "dtype": "float32",
        },
        provenance={
            "versions": run_folder.provenance(),
            "data": data.checksums,
            "columns": data.columns,
            "counts": {name: len(items) for name, items in data.splits.items()},
            "lr": model.lr,
            "loss": model.loss_settings,
        },
    )
