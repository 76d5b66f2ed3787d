"""Do 95 % intervals hold the truth 95 times in 100? Classifiers with known true figures are simulated.

    python benchmarks/coverage.py

Each run draws a test set, some of its texts several times, and computes the intervals as a report does. The truth is the
figure of a very large sample. Standard error of a coverage: 0.9 points at 600 runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import softmax

from loracle.evaluation.classification import (
    calibration_band,
    calibration_error,
    classification_differences,
    classification_metrics,
)
from loracle.evaluation.labels import OneLabel

PRIOR = np.array([0.5, 0.25, 0.15, 0.1])
LABELS = OneLabel()
MEASURED = ("accuracy", "macro_f1", "log_loss")
LARGE = 400_000
SIZES, RUNS = (50, 100, 200, 500, 2000), 600


def drawn(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits ``[n, 4]`` of two classifiers, the first one better and both often wrong together, and labels ``[n]``."""
    targets = rng.choice(4, size=n, p=PRIOR)
    true, common, own = np.eye(4)[targets], rng.normal(size=(n, 4)), rng.normal(size=(n, 4))
    return 1.8 * true + common, 1.5 * true + 0.8 * common + 0.6 * own, targets


def truth(large: int = LARGE) -> dict[str, float]:
    """The figures of a very large sample."""
    a, b, targets = drawn(large, np.random.default_rng(0))
    metrics = classification_metrics(a, targets, LABELS, replicates=1)
    gap = classification_differences((a, b), targets, LABELS, replicates=1)["accuracy"]
    return {name: metrics[name].value for name in MEASURED} | {"difference": gap.value}


def coverage(
    n: int, runs: int, true: dict[str, float], *, replicates: int = 1000, copies: int = 2, together: bool = True
) -> dict[str, float]:
    """How often intervals on ``n`` distinct texts hold the truth. A fifth of the texts occur ``copies`` times.

    ``together``: all copies of a text are resampled together, as in a report.
    """
    hits = dict.fromkeys((*true, "ece_band"), 0)
    rows = np.concatenate([np.arange(n), *[np.arange(n // 5)] * (copies - 1)])
    groups = rows.tolist() if together else None
    for run in range(runs):
        rng = np.random.default_rng([n, run])
        a, b, targets = (part[rows] for part in drawn(n, rng))
        how: dict[str, Any] = {"groups": groups, "seed": run, "replicates": replicates}
        metrics = classification_metrics(a, targets, LABELS, **how)
        gap = classification_differences((a, b), targets, LABELS, **how)["accuracy"]
        intervals = {name: metrics[name] for name in MEASURED} | {"difference": gap}
        for name, interval in intervals.items():
            hits[name] += interval.low <= true[name] <= interval.high
        # The band is for a calibrated classifier, so labels are drawn with its probabilities.
        sure = softmax(a, axis=1).max(axis=1, keepdims=True)
        right = (rng.random(n) < sure[:n, 0])[rows].astype(float)
        band = calibration_band(sure, **how)
        hits["ece_band"] += band.low <= calibration_error(sure[:, 0], right) <= band.high
    return {name: count / runs for name, count in hits.items()}


def main() -> None:
    from results import write_table

    true, names = truth(), (*MEASURED, "difference", "ece_band")
    rows = [["distinct texts", *(name.replace("_", " ") for name in names)]]
    for n in SIZES:
        found = coverage(n, RUNS, true)
        rows.append([f"{n:,}", *(f"{100 * found[name]:.1f} %" for name in names)])
        print(rows[-1], flush=True)
    naive = coverage(200, RUNS, true, copies=6, together=False)
    kept = coverage(200, RUNS, true, copies=6)
    for label, found in (("200, a fifth of them six times", kept), ("the same, copies resampled separately", naive)):
        rows.append([label, *(f"{100 * found[name]:.1f} %" for name in names)])
    write_table(
        "coverage",
        rows,
        [
            f"Share of {RUNS:,} simulated test sets whose 95 % interval holds the true figure. A fifth of the texts occur "
            "twice. Four labels of 50, 25, 15 and 10 %. True accuracy "
            f"{100 * true['accuracy']:.1f} %, macro F1 {100 * true['macro_f1']:.1f} %, log loss {true['log_loss']:.3f}, "
            f"difference of two classifiers {100 * true['difference']:.1f} points. "
            "The ECE band is for a calibrated classifier.",
        ],
    )


if __name__ == "__main__":
    main()
