"""Which loss learns most from a click log? All losses on Upworthy: same features, same five rotations, paired differences.

    python benchmarks/losses.py

The ranker is linear in frozen all-MiniLM-L6-v2 features. So only the loss differs, and five rotations take minutes.
Rotations, splits and m0 are those of ``upworthy.py``.
"""

from __future__ import annotations

import numpy as np
from results import write_table
from upworthy import figures, folds, minilm, read_groups, three_splits

from loracle.evaluation.linear_models import feature_ranker
from loracle.evaluation.ranking import rank_metrics, ranking_differences
from loracle.training.losses import LOSSES, LossSettings, fit_saturation, numpy_objective

NEVER = 1e9  # an m0 at which nothing saturates
SHOWN = ("pair_accuracy", "significant_pair_accuracy", "ctr_lift", "regret")


def main() -> None:
    """Fit every loss on every rotation and write the table."""
    splits = [three_splits(fold) for fold in folds(read_groups())]
    test = [group for data in splits for group in data.test]
    scores: dict[str, list[np.ndarray]] = {}
    saturations = []
    for data in splits:
        train_x, validation_x, test_x = (minilm(part) for part in (data.train, data.validation, data.test))

        def fitted(name: str, m0: float, features: list[np.ndarray], data=data, train_x=train_x) -> list[np.ndarray]:
            objective = numpy_objective(LOSSES[name].make(LossSettings(saturation=m0)))
            return feature_ranker(train_x, data.train, features, objective)

        m0 = fit_saturation(fitted("list", 200.0, validation_x), data.validation)
        saturations.append(m0)
        for label, name, value in (
            ("list, m0 fitted", "list", m0),
            ("list, no saturation", "list", NEVER),
            ("list, every group weighs the same", "list", 1e-3),
            ("Dirichlet-multinomial", "dirichlet", m0),
            ("binomial, m0 fitted", "binomial", m0),
            ("Bradley-Terry, hard pairs", "bradley-terry", m0),
            ("Bradley-Terry, soft pairs", "soft-bradley-terry", m0),
            ("margin ranking", "margin", m0),
        ):
            scores.setdefault(label, []).extend(fitted(name, value, test_x))
            print(label, flush=True)
    first = next(iter(scores))
    rows = [["loss", *SHOWN, f"pairs minus {first}"]]
    for label, of_groups in scores.items():
        gap = (
            "" if label == first else figures(ranking_differences(of_groups, scores[first], test), ["pair_accuracy"])[0]
        )
        rows.append([label, *figures(rank_metrics(of_groups, test), SHOWN), gap])
    notes = [
        f"Linear rankers on frozen all-MiniLM-L6-v2 features, tested on {len(test):,} Upworthy groups in five rotations. m0 is "
        f"{', '.join(f'{m:.0f}' for m in saturations)}. Intervals are group bootstraps, differences are paired.",
    ]
    write_table("losses", rows, notes)


if __name__ == "__main__":
    main()
