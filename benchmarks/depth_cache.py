"""What does the hidden-state cache save and cost? Three epochs of all layers beside three of the top third, fill included.

    python benchmarks/depth_cache.py           # a dated table in benchmarks/results/

For each of three seeds, in turn: every layer adapted; the top third adapted, with lower states computed in the first epoch;
one more epoch from the warm cache. Times are of the steps only. Accuracy is on the 1,000 test texts of n24news.py; its
difference is paired, resampled by text and averaged over seeds.
"""

from __future__ import annotations

import csv
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from n24news import write_split
from results import write_table

TEXTS, BATCH, LR, SEEDS, LAYERS, TOP = 900, 32, 1e-3, 3, 30, 10  # 810 for training, 90 for validation
WAYS: dict[str, dict[str, Any]] = {
    "full": {"epochs": 3.0}, "cached": {"epochs": 3.0, "adapt_top": TOP}, "warm": {"epochs": 1.0, "adapt_top": TOP},
}  # fmt: skip


def main() -> None:
    """All runs, then the table."""
    from loracle.evaluation.intervals import bootstrap
    from loracle.models import hidden_state_cache
    from loracle.models.gguf import demo_model_folder

    base = str(demo_model_folder())
    right: dict[str, list[np.ndarray]] = {name: [] for name in WAYS}
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["LORACLE_CACHE"] = scratch  # only the states of this benchmark
        train, test = write_split(Path(scratch))
        train.write_text("".join(train.open(encoding="utf-8").readlines()[:TEXTS]), encoding="utf-8")
        for seed in range(SEEDS):
            hidden_state_cache.clear()
            for name, settings in WAYS.items():
                found = _train(train, test, Path(scratch) / f"{name}-{seed}", base, seed=seed, **settings)
                seconds[name].append(found["seconds"])
                right[name].append(found["right"])
                print(f"{name}, seed {seed}: {found['seconds']:.1f} s, {found['right'].mean():.3f} right", flush=True)
    difference = np.mean(right["cached"], axis=0) - np.mean(right["full"], axis=0)
    cost = bootstrap(lambda w: {"cost": w @ difference / w.sum(1)}, len(difference))["cost"]
    full_s, cached_s, warm_s = (statistics.median(seconds[name]) for name in WAYS)
    rows = [["", "seconds, median", "all rounds", "times faster than all layers", "accuracy, three seeds"]]
    names = {
        "full": "three epochs, all layers", "cached": "three epochs, top third, cache filled in epoch one",
        "warm": "one epoch, top third, warm cache",
    }  # fmt: skip
    for name, faster in (("full", 1.0), ("cached", full_s / cached_s), ("warm", full_s / 3 / warm_s)):
        shown = f"{100 * np.mean(right[name]):.1f}"
        every = ", ".join(f"{s:.1f}" for s in seconds[name])
        rows.append([names[name], f"{statistics.median(seconds[name]):.1f}", every, f"{faster:.2f}×", shown])
    notes = [
        f"SmolLM2-135M-Instruct (dequantized from a 4-bit GGUF file), {TEXTS} N24News abstracts, a tenth of them "
        f"for validation, batch {BATCH}, learning rate {LR:g}, {SEEDS} seeds in turn. Adapters are on the top {TOP} of "
        f"{LAYERS} layers. Theoretical limits: 2.25× and 3×.",
        f"Accuracy with the cache minus without: **{100 * cost.value:+.1f} points** "
        f"[{100 * cost.low:+.1f}, {100 * cost.high:+.1f}].",
    ]
    write_table("depth_cache", rows, notes)


def _train(train: Path, test: Path, out: Path, base: str, **settings: Any) -> dict[str, Any]:
    """Seconds of the steps, and which test texts are right."""
    from loracle import pipeline
    from loracle.config import RunConfig

    fixed = {"batch": BATCH, "lr": LR, "baselines": False, "model": base, "patience": 0}
    config = RunConfig.from_flat({"data": str(train), "test": str(test), "out": str(out), **fixed, **settings})
    run = pipeline.train(config, log=lambda line: None, quiet=True)
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    with (run / "predictions.csv").open(encoding="utf-8", newline="") as f:
        right = np.array([row["label"] == row["predicted"] for row in csv.DictReader(f)], dtype=float)
    return {"seconds": metrics["train"]["seconds"], "right": right}


if __name__ == "__main__":
    main()
