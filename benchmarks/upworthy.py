"""A ranker learnt from a part of the Upworthy archive, and its pair accuracy on held-out tests.

    python benchmarks/upworthy.py [tests to train on]

Headlines of one test and one image compete; no headline stands on both sides. Cite Matias et al. 2021 (CC BY 4.0).
"""

from __future__ import annotations

import csv
import gzip
import json
import sys
import tempfile
from pathlib import Path

from results import SHARED, write_table

from loracle import recipe
from loracle.config import RunConfig
from loracle.judge.report import result_rows

GROUP = "clickability_test_id,eyecatcher_id"


def write_part(folder: Path, tests: int) -> Path:
    """The rows of the first ``tests`` A/B tests."""
    chosen: set[str] = set()
    path = folder / "upworthy.csv"
    with gzip.open(SHARED / "data" / "upworthy" / "packages.csv.gz", "rt", encoding="utf-8") as source:
        rows = csv.DictReader(source)
        with path.open("w", encoding="utf-8", newline="") as target:
            out = csv.DictWriter(target, rows.fieldnames or [])
            out.writeheader()
            for row in rows:
                if len(chosen) < tests:
                    chosen.add(row["clickability_test_id"])
                if row["clickability_test_id"] in chosen:
                    out.writerow(row)
    return path


def main() -> None:
    """Train with the defaults and write the table."""
    tests = int(sys.argv[1]) if len(sys.argv) > 1 else 1500
    with tempfile.TemporaryDirectory() as scratch:
        run = recipe.train(
            RunConfig.from_flat(
                {
                    "data": str(write_part(Path(scratch), tests)), "group": GROUP, "text": "headline", "test_share": 0.25,
                    "epochs": 2.0, "batch": 8, "lr": 3e-4, "pooling": "mean", "out": str(Path(scratch) / "run"),
                }
            )
        )  # fmt: skip
        metrics = json.loads((run / "metrics.json").read_text())
    test, speed = metrics["test"], metrics["train"]
    notes = [
        f"The first {tests:,} tests of the file, a quarter of their groups held out ({test['groups']} groups, "
        f"{test['pairs']:,} pairs, {test['significant_pairs']} significant). Conditional click likelihood, LoRA r 16, mean "
        f"pooling, 2 epochs of batch 8, learning rate 3e-4 (INDEX.md's sketch), seed 0. Model: {metrics['base']}.",
        f"Trained at {speed['examples_per_s']:.2f} groups/s, {speed['tokens_per_s']:.0f} useful tokens/s.",
    ]
    write_table("upworthy", result_rows(metrics, "rank"), notes)


if __name__ == "__main__":
    main()
