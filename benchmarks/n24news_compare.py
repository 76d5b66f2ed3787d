"""N24News abstracts, one split, one table: the embedded model with LoRA beside TF-IDF and MiniLM, frozen and fine-tuned.

    python benchmarks/n24news_compare.py           # what is finished in LORACLE_SCRATCH is not trained again

The table of the original research project, with the models at hand. Learning rate and batch are those that n24news.py found on
validation texts; MiniLM has the encoder's own default rate.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from n24news import BATCH, EPOCHS, minilm_folder, write_split
from results import write_table

from loracle import comparison
from loracle.config import CompareConfig, RunConfig
from loracle.data.examples import Task

SCRATCH = Path(os.environ.get("LORACLE_SCRATCH", Path(tempfile.gettempdir()) / "loracle-n24news"))
LR = 1e-3


def main() -> None:
    """Train what is missing, write the table."""
    SCRATCH.mkdir(parents=True, exist_ok=True)
    train, test = write_split(SCRATCH)
    settings = {"batch": BATCH, "epochs": EPOCHS, "lr": LR, "out": str(SCRATCH / "compare")}
    config = RunConfig.from_flat({"data": str(train), "test": str(test), **settings})
    minilm = minilm_folder()
    root = comparison.run(config, CompareConfig(against=f"tfidf,frozen:{minilm},{minilm}"))
    found = json.loads((root / comparison.JSON).read_text(encoding="utf-8"))
    names = {
        "demo": "SmolLM2-135M, LoRA",
        "model": "MiniLM, fine-tuned",
        "frozen:model": "MiniLM, frozen",
        "tfidf": "TF-IDF",
    }
    rows = [row | {"name": names.get(row["name"], row["name"])} for row in found["rows"]]
    notes = [
        f"4,030 training texts, 403 of them validation, 1,000 test texts; {EPOCHS:g} epochs, batch {BATCH}, seed 0. "
        f"SmolLM2 is dequantised from a 4-bit GGUF file; LoRA r 16 on every layer, {LR:g}. Δ: less SmolLM2, exact McNemar, "
        "p by Holm. Frozen features learn from all training texts."
    ]
    write_table("n24news_compare", comparison.table_of(rows, Task(kind="single"), None), notes)


if __name__ == "__main__":
    main()
