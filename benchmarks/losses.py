"""Which loss learns most from a click log: all of them on Upworthy, same features, same five rotations, paired differences.

    python benchmarks/losses.py

The ranker is linear in frozen all-MiniLM-L6-v2 features, so that a loss is compared with a loss and nothing else, and five
rotations take minutes. Rotations, sides and m0 are those of ``upworthy.py``.
"""

from __future__ import annotations

import numpy as np
from results import write_table
from upworthy import divided, figures, folds, minilm, read_groups

from loracle.evaluation.linear_models import frozen_ranker
from loracle.evaluation.ranking import rank_metrics, ranking_differences
from loracle.training.losses import fit_saturation, make_loss, numpy_objective

NEVER = 1e9  # an m0 at which nothing saturates
SHOWN = ("pair_accuracy", "significant_pair_accuracy", "ctr_lift", "regret")


def main() -> None:
    """Fit every loss on every rotation and write the table."""
    sides = [divided(side) for side in folds(read_groups())]
    held = [g for side in sides for g in side.test]
    scores: dict[str, list[np.ndarray]] = {}
    saturations = []
    for side in sides:
        groups, watched, tested = (minilm(part) for part in (side.train, side.validation, side.test))

        def fitted(name: str, m0: float, features: list[np.ndarray], part=side, seen=groups) -> list[np.ndarray]:
            objective = numpy_objective(make_loss(part.task, name=name, saturation=m0))
            return frozen_ranker(seen, part.train, features, objective)

        m0 = fit_saturation(fitted("list", 200.0, watched), side.validation)
        saturations.append(m0)
        for label, name, value in (
            ("list, m0 fitted", "list", m0),
            ("list, never saturated", "list", NEVER),
            ("list, a group is a group", "list", 1e-3),
            ("Dirichlet-multinomial", "dirichlet", m0),
            ("binomial, m0 fitted", "binomial", m0),
            ("Bradley-Terry, hard pairs", "bradley-terry", m0),
            ("Bradley-Terry, soft pairs", "soft-bradley-terry", m0),
            ("margin ranking", "margin", m0),
        ):
            scores.setdefault(label, []).extend(fitted(name, value, tested))
            print(label, flush=True)
    first = next(iter(scores))
    rows = [["loss", *SHOWN, f"pairs, less {first}"]]
    for label, of_groups in scores.items():
        found = rank_metrics(of_groups, held)
        lead = (
            "" if label == first else figures(ranking_differences(of_groups, scores[first], held), ["pair_accuracy"])[0]
        )
        rows.append([label, *figures(found, SHOWN), lead])
    notes = [
        f"Linear rankers on frozen all-MiniLM-L6-v2 features, {len(held):,} Upworthy groups held out in five rotations; m0 "
        f"{', '.join(f'{m:.0f}' for m in saturations)}. Group-bootstrap intervals, differences in pairs.",
    ]
    write_table("losses", rows, notes)


if __name__ == "__main__":
    main()
