"""How many label errors planted in Banking77 does a report find?

    python benchmarks/label_errors.py      # a dated table in benchmarks/results/; no model, a minute a seed

5 % of the training labels are replaced at random. TF-IDF in five folds and confident learning, as in every report, then
rank all texts by how doubtful their label is.
"""

from __future__ import annotations

import csv

import numpy as np
from results import SHARED, write_table

from loracle.evaluation.label_errors import label_errors, margins, out_of_fold
from loracle.evaluation.labels import OneLabel
from loracle.examples import LabeledText

SHARE, SEEDS = 0.05, 3


def main() -> None:
    with (SHARED / "data" / "banking77" / "train.csv").open(encoding="utf-8", newline="") as f:
        texts, names = zip(*((row["text"], row["category"]) for row in csv.DictReader(f)), strict=True)
    label_names = sorted(set(names))
    true = np.array([label_names.index(name) for name in names])
    rows = [["seed", "planted", "in top 5 %", "of the first 100", "flagged", "flagged and planted"]]
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        wrong = rng.permutation(len(true))[: round(SHARE * len(true))]
        given = true.copy()
        given[wrong] = (given[wrong] + rng.integers(1, len(label_names), size=len(wrong))) % len(label_names)
        examples = [
            LabeledText(text=t, labels=(int(c),), row=i) for i, (t, c) in enumerate(zip(texts, given, strict=True))
        ]
        proba = out_of_fold(examples, OneLabel(), len(label_names), seed=seed)
        doubtful = np.argsort(margins(proba, given), kind="stable")
        flagged = label_errors(proba, given)
        found = [np.isin(part, wrong) for part in (doubtful[: len(wrong)], doubtful[:100], flagged)]
        rows.append(
            [
                str(seed),
                str(len(wrong)),
                f"{found[0].mean():.1%}",
                str(found[1].sum()),
                str(len(flagged)),
                f"{found[2].mean():.1%}",
            ]
        )
        print(rows[-1], flush=True)
    write_table("label_errors", rows, ["Banking77's 10,003 training texts, 77 intents, labels replaced at random."])


if __name__ == "__main__":
    main()
