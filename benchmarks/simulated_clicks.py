"""How well does each loss recover known click rates from simulated clicks? Several seeds.

    python benchmarks/simulated_clicks.py

A title has 20 features. Its true log-odds are ``logit(0.015) + x·w + 0.2 z``. The features' part has a spread of 0.25 within
a group; no ranker can see the rest. Groups have 2 to 6 titles of 200 to 6,000 impressions each. A linear ranker learns
from 300 groups with each loss. Its scores on 2,000 new titles are compared with the features' part of the log-odds
(correlation within groups) and by pairs of true rates.
"""

from __future__ import annotations

import numpy as np
from results import write_table
from scipy.special import expit, logit

from loracle.evaluation.linear_models import feature_ranker
from loracle.examples import RankGroup
from loracle.training import losses
from loracle.training.losses import LossSettings, fit_saturation, numpy_objective

SEEDS, GROUPS, FRESH, FEATURES = 20, 300, 500, 20
EXPLAINED, UNSEEN, RATE = 0.25, 0.2, 0.015
LOSSES = {
    "list, m0 fitted": "list", "binomial": "binomial", "Dirichlet-multinomial": "dirichlet",
    "Bradley-Terry, hard pairs": "bradley-terry", "Bradley-Terry, soft pairs": "soft-bradley-terry",
    "margin ranking": "margin",
}  # fmt: skip


def draw(seed: int, count: int, weights: np.ndarray) -> tuple[list[RankGroup], list[np.ndarray], list[np.ndarray]]:
    """Groups with clicks, the features of their titles, and the features' part of the log-odds."""
    rng = np.random.default_rng(seed)
    groups, features, truth = [], [], []
    for i in range(count):
        n = int(rng.integers(2, 7))
        x = rng.normal(size=(n, FEATURES))
        seen = x @ weights
        shown = rng.integers(200, 6000, n)
        clicks = rng.binomial(shown, expit(logit(RATE) + seen + UNSEEN * rng.normal(size=n)))
        groups.append(
            RankGroup(
                group=str(i), texts=tuple(f"title {i} {j}" for j in range(n)), rows=(i + 1,) * n,
                clicks=tuple(clicks.tolist()), impressions=tuple(shown.tolist()),
            )
        )  # fmt: skip
        features.append(x)
        truth.append(seen)
    return groups, features, truth


def recovered(seed: int) -> dict[str, tuple[float, float]]:
    """``{loss: (correlation within groups, share of true pairs in order)}``."""
    weights = np.random.default_rng([seed, 1]).normal(size=FEATURES)
    weights *= EXPLAINED / np.linalg.norm(weights)
    (groups, features, _), (_, fresh, truth) = draw(2 * seed, GROUPS, weights), draw(2 * seed + 1, FRESH, weights)
    fifth = GROUPS // 5
    plain = numpy_objective(losses.LOSSES["list"].make(LossSettings()))
    m0 = fit_saturation(feature_ranker(features[fifth:], groups[fifth:], features[:fifth], plain), groups[:fifth])
    found = {}
    for label, name in LOSSES.items():
        objective = numpy_objective(losses.LOSSES[name].make(LossSettings(saturation=m0)))
        scores = feature_ranker(features, groups, fresh, objective)
        centred = [np.concatenate([v - v.mean() for v in values]) for values in (scores, truth)]
        right = [np.sign(s[:, None] - s)[np.triu_indices(len(s), 1)] == np.sign(t[:, None] - t)[np.triu_indices(len(t), 1)]
                 for s, t in zip(scores, truth, strict=True)]  # fmt: skip
        found[label] = float(np.corrcoef(*centred)[0, 1]), float(np.concatenate(right).mean())
    return found


def main() -> None:
    """All seeds, means, and differences to the default with their standard errors."""
    seeds = [recovered(seed) for seed in range(SEEDS)]
    first = next(iter(LOSSES))
    rows = [["loss", "correlation with the truth", "true pairs in order", f"pairs minus {first} (± standard error)"]]
    for label in LOSSES:
        correlation, pairs = (np.array([s[label][k] for s in seeds]) for k in (0, 1))
        lead = pairs - np.array([s[first][1] for s in seeds])
        differs = "" if label == first else f"{100 * lead.mean():+.2f} ± {100 * lead.std(ddof=1) / np.sqrt(SEEDS):.2f}"
        rows.append([label, f"{correlation.mean():.3f}", f"{100 * pairs.mean():.2f} %", differs])
    notes = [
        f"{SEEDS} seeds, {GROUPS} training groups and {FRESH} test groups. The script defines the simulated process."
    ]
    write_table("simulated_clicks", rows, notes)


if __name__ == "__main__":
    main()
