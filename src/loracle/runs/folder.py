"""A run folder: everything that predict, rank, evaluate and export need, except the base model, which it names.

adapter_model.safetensors, adapter_config.json   PEFT's own format, the head included (model.safetensors with --full)
tokenizer.json, tokenizer_config.json            with the template installed
run.toml                                         format, configuration, task, base model, how plain PEFT opens it
metrics.json, predictions.csv, log.jsonl         results
report.html, report.json                         the same as a page, and every figure on it
calibration.json                                 temperature and thresholds, or the click model of a click log
reference.json                                   lengths, scores and labels in training, to detect drift
scores.safetensors                               test scores of runs that compare and validate pair with others
README.md                                        model card
manifest.json                                    SHA-256 of every file above
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

import loracle
from loracle.config import RunConfig
from loracle.data.issues import Issue
from loracle.errors import UserError
from loracle.evaluation.drift import Reference
from loracle.hubs import checksum
from loracle.tasks import Task

RUN, METRICS, MANIFEST, CARD = "run.toml", "metrics.json", "manifest.json", "README.md"
CALIBRATION, REPORT, PAGE = "calibration.json", "report.json", "report.html"
REFERENCE, PREDICTIONS = "reference.json", "predictions.csv"
FORMAT = 1  # of a run folder; raised when its contents change
IGNORED = ("checkpoints", "tensorboard", MANIFEST)
LOCAL = "./"  # before the name of a base model that only the machine of the training had, in a run that was pushed
PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """What ``run.toml`` says."""

    config: RunConfig
    task: Task
    base: dict[str, Any]  # source, revision, sha256, note
    load_kwargs: dict[str, Any]  # for AutoPeftModelForSequenceClassification.from_pretrained
    provenance: dict[str, Any]  # versions, data checksums, counts


def free(folder: Path, fix: str) -> Path:
    """The folder, if it is empty or new.

    Raises:
        UserError: it is not; ``fix`` is the hint.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty.", fix)
    return folder


def write_info(folder: Path, info: RunInfo, *, out: str | None = None) -> None:
    """Write ``run.toml``; TOML has no null, so what is None is left out. ``out``: the folder as it is to be named in it."""
    document = {
        "format": FORMAT,
        "task": dataclasses.asdict(info.task),
        "base": info.base,
        "load_kwargs": info.load_kwargs,
        "config": {"out": out or str(folder.resolve()), "baselines": info.config.baselines}
        | {name: dataclasses.asdict(getattr(info.config, name)) for name in RunConfig.SECTIONS},
        "provenance": info.provenance,
    }
    write_text(folder / RUN, tomli_w.dumps(_without_none(document)))


def write_calibration(folder: Path, calibration: Any) -> None:
    """Write the fields of a calibration. NaN becomes null."""
    fields = dataclasses.asdict(calibration).items()
    values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields}
    write_text(folder / CALIBRATION, json.dumps(values, indent=1))


def read_calibration(folder: Path, task: Task) -> Any:
    """The calibration that ``write_calibration`` wrote, or None where the task has none."""
    path = folder / CALIBRATION
    if not path.exists():
        return None
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    plain = {k: math.nan if v is None else tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return task.evaluation.read_calibration(plain)


def write_reference(folder: Path, reference: Reference) -> None:
    """Write the distributions of the training data, for drift."""
    write_text(folder / REFERENCE, json.dumps(dataclasses.asdict(reference), indent=1))


def read_reference(folder: Path) -> Reference | None:
    """What ``write_reference`` wrote, or None without such a file."""
    path = folder / REFERENCE
    return Reference.from_json(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def facts(folder: Path, info: RunInfo, issues: Iterable[Issue]) -> dict[str, Any]:
    """What a report says of the run itself: its data, its model and its settings."""
    config, known = info.config, info.provenance
    counts, unit = known["counts"], info.task.unit
    shown = {
        "task": info.task.output.describe(info.task),
        "base model": info.base.get("note") or info.base["source"],
        "data": config.data.data or "in memory",
        "test data": config.data.test or "held out",
        "columns": ", ".join(f"{role}: {column}" for role, column in known["columns"].items()),
        unit: ", ".join(f"{counts[side]:,} {side}" for side in ("train", "validation", "test")),
        "training": f"{config.train.epochs:g} epochs at most, {config.train.batch} {unit} a step, "
        f"learning rate {known['lr']:g}, loss {known['loss']['name']}, seed {config.train.seed}",
        "adapter": "none, every weight trained" if config.lora.full else f"LoRA, rank {config.lora.r}",
    }
    return {
        "name": folder.name,
        "unit": unit,
        "counts": counts,
        "facts": [[name, value] for name, value in shown.items() if value],
        "issues": [str(issue) for issue in issues],
        "settings": {
            name: value
            for section in RunConfig.SECTIONS
            for name, value in dataclasses.asdict(getattr(config, section)).items()
            if value is not None
        },
        "versions": known["versions"],
    }


def read_info(folder: Path) -> RunInfo:
    """Read ``run.toml``.

    Raises:
        UserError: the folder is no run, or its run.toml is broken.
    """
    path = folder / RUN
    if not path.is_file():
        why = "there is no such folder" if not folder.is_dir() else f"it has no {RUN}"
        raise UserError(f"{folder} is no run folder: {why}.", "Give the folder that `loracle train` printed.")
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        if (version := document["format"]) != FORMAT:
            raise UserError(
                f"{path} has format {version!r}; this version of loracle reads format {FORMAT}.",
                "Install the version that trained the run (provenance.versions in run.toml), or train again.",
            )
        sections, task = document["config"], document["task"]
        flat = {k: v for name in RunConfig.SECTIONS for k, v in sections.get(name, {}).items()}
        flat |= {k: v for k, v in sections.items() if k not in RunConfig.SECTIONS}
        return RunInfo(
            config=RunConfig.from_flat(flat),
            task=Task(**{**task, "label_names": tuple(task.get("label_names", ()))}),
            base=document["base"],
            load_kwargs=document["load_kwargs"],
            provenance=document["provenance"],
        )
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is damaged ({type(e).__name__}: {e}).", "Restore the file or train again.") from e


def write_manifest(folder: Path) -> None:
    """Record the checksum of every file, the last thing a run does."""
    sums = {str(p.relative_to(folder)): checksum(p) for p in _files(folder)}
    write_text(folder / MANIFEST, json.dumps(sums, indent=1))


def verify(folder: Path) -> None:
    """Check every file of a finished run against its manifest.

    Raises:
        UserError: no manifest (the run is not finished), or a file is missing or not what it was.
    """
    try:
        sums = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UserError(
            f"The run in {folder} is not finished: it has no {MANIFEST}.",
            f"Finish it with: loracle train --resume {folder}",
        ) from e
    except ValueError as e:
        raise UserError(f"{folder / MANIFEST} is damaged: {e}.", "Restore the file or train again.") from e
    if not isinstance(sums, dict):
        raise UserError(f"{folder / MANIFEST} is damaged: it holds no object.", "Restore the file or train again.")
    for name, digest in sums.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"The file {name} is missing in {folder}.", "Restore it or train again.")
        if checksum(path) != digest:
            raise UserError(f"{path} has changed since it was saved.", "Restore the file or train again.")


def provenance() -> dict[str, Any]:
    """Versions of what can change a figure."""
    return {"loracle": loracle.__version__} | {name: importlib.metadata.version(name) for name in PACKAGES}


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, whatever stops the process or the machine."""
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def _files(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.rglob("*")) if p.is_file() and p.relative_to(folder).parts[0] not in IGNORED]


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return list(value) if isinstance(value, tuple) else value
