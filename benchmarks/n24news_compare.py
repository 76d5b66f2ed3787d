"""N24News abstracts, one split, three seeds: the embedded model with LoRA beside TF-IDF and MiniLM, probed and fine-tuned.

    python benchmarks/n24news_compare.py           # finished trainings in LORACLE_SCRATCH are reused

The table of the original research project, with small models. n24news.py found learning rate and batch on validation texts;
the template was chosen on training texts (dev/LOG.md). MiniLM's rate is found on validation texts here. Seeds draw the
validation part, heads, dropout and order; the test texts are the same. The depth from the probe is trained with one seed.
Accuracies are means over the seeds. Differences to SmolLM2 are paired, resampled by text, and averaged over seeds.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import tempfile
from pathlib import Path

import numpy as np
from n24news import BATCH, EPOCHS, minilm_folder, write_split
from results import write_table

from loracle.config import CompareConfig, RunConfig
from loracle.evaluation.intervals import bootstrap
from loracle.experiments import compare
from loracle.experiments.runner import place, train_once
from loracle.runs.folder import METRICS
from loracle.tasks.dataset import Data, prepare_data
from loracle.tasks.single_label import LABELS
from loracle.training import scoring

SCRATCH = Path(os.environ.get("LORACLE_SCRATCH", Path(tempfile.gettempdir()) / "loracle-n24news"))
LR, SEEDS = 1e-3, 3
ENCODER_RATES = (6.1e-5, 2e-4, 5e-4)  # the first is the default
TEMPLATE = "Article: {text}\nSection:"
NAMES = {
    "demo": "SmolLM2-135M, LoRA",
    "demo@depth=auto": "SmolLM2-135M, LoRA, depth from its probe",
    "model": "MiniLM, fine-tuned",
    "linear-probe:model": "MiniLM, linear probe",
    "tfidf": "tfidf",
}


def main() -> None:
    """Train what is missing. The table is rewritten after each seed, so a stopped benchmark keeps its results."""
    SCRATCH.mkdir(parents=True, exist_ok=True)
    train, test = write_split(SCRATCH)
    minilm, found = minilm_folder(), []
    others = f"{minilm},linear-probe:{minilm},tfidf"
    plain = RunConfig.from_flat(
        {"data": str(train), "test": str(test), "batch": BATCH, "epochs": EPOCHS, "lr": LR, "template": TEMPLATE}
    )
    data = prepare_data(plain, print)  # for its test texts
    accuracy = {lr: encoder_accuracy(plain, data, minilm, lr) for lr in ENCODER_RATES}
    encoder_lr = max(accuracy, key=lambda lr: accuracy[lr])
    for seed in range(SEEDS):
        config = dataclasses.replace(
            plain, train=dataclasses.replace(plain.train, seed=seed), out=str(SCRATCH / f"seed-{seed}")
        )
        against = others if seed else f"demo@depth=auto,{others}"
        root = compare.run(config, CompareConfig(against=against, encoder_lr=encoder_lr))
        rows = json.loads((root / compare.JSON).read_text(encoding="utf-8"))["rows"]
        targets = LABELS.targets(data.test, len(data.task.label_names))
        found.append([
            row | {"right": LABELS.credit(np.concatenate(scoring.read_scores(root / row["folder"], data.test)), targets)}
            for row in rows
        ])  # fmt: skip
        write(found, accuracy)


def encoder_accuracy(plain: RunConfig, data: Data, minilm: Path, lr: float) -> float:
    """Validation accuracy of MiniLM, every weight trained at a rate."""
    config = dataclasses.replace(
        plain,
        model=dataclasses.replace(plain.model, model=str(minilm)),
        lora=dataclasses.replace(plain.lora, full=True),
        train=dataclasses.replace(plain.train, lr=lr),
        baselines=False,
    )
    folder = train_once(config, data, place(SCRATCH, "minilm", config, data), log=print, quiet=False)
    return json.loads((folder / METRICS).read_text(encoding="utf-8"))["validation"]["accuracy"]


def write(found: list[list[dict]], accuracy: dict[float, float]) -> None:
    """One table of the finished seeds. Each row says which test texts are ``right``."""
    table = [
        ["", "accuracy, mean", "each seed", "Δ to SmolLM2, points", "log loss", "ECE", "training, s", "weights, M"]
    ]
    for name in [row["name"] for row in found[0]]:
        pairs = [(rows[0], row) for rows in found for row in rows if row["name"] == name]
        same = [row for _, row in pairs]
        first, right = (np.mean([row["right"] for row in side], axis=0) for side in zip(*pairs, strict=True))
        mean, gap = (shown(values) for values in (right, right - first))
        test, row = [row["test"] for row in same], same[0]
        table.append([
            NAMES.get(name.partition(" (")[0], name), mean, ", ".join(f"{100 * r['right'].mean():.1f}" for r in same),
            "" if row is found[0][0] else gap,
            *(f"{statistics.mean(t[metric]['value'] for t in test):.3f}" for metric in ("log_loss", "ece")),
            f"{statistics.median(r['seconds'] for r in same):,.0f}",
            "–" if not row.get("parameters") else f"{row['parameters'] / 1e6:,.1f}",
        ])  # fmt: skip
    after = [row[0]["test"] for row in found]
    notes = [
        f"3,627 training, 403 validation and 1,000 test texts. {EPOCHS:g} epochs, batch {BATCH}, {len(found)} seeds. "
        f"SmolLM2 is dequantized from a 4-bit GGUF file; LoRA r 16 on every layer, {LR:g}, template {TEMPLATE!r}. "
        f"MiniLM on validation texts by rate: {', '.join(f'{lr:g}: {100 * value:.1f}' for lr, value in accuracy.items())}. "
        "Linear probes use all training texts. Other jobs ran at the same time; for speed see train_speed.",
        "SmolLM2's calibration by seed, ECE before → after (range of a perfectly calibrated model), log loss before → after: "
        + "; ".join(
            f"{t['ece_uncalibrated']['value']:.3f} → {t['ece']['value']:.3f} ({t['ece_if_calibrated']['low']:.3f} to "
            f"{t['ece_if_calibrated']['high']:.3f}), {t['log_loss_uncalibrated']['value']:.3f} → {t['log_loss']['value']:.3f}"
            for t in after
        ) + ".",
    ]  # fmt: skip
    write_table("n24news_compare", table, notes)


def shown(values: np.ndarray) -> str:
    """Mean over texts in percent, with its interval."""
    mean = bootstrap(lambda w: {"mean": w @ values / w.sum(1)}, len(values))["mean"]
    return f"{100 * mean.value:.1f} [{100 * mean.low:.1f}, {100 * mean.high:.1f}]"


if __name__ == "__main__":
    main()
