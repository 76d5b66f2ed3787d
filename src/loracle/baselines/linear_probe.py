"""In which layer is a task solved? A linear probe on every layer's states, and the depth that the evidence allows.

Alain and Bengio 2016 (arXiv:1610.01644) for the probes; the rule of one standard error is Breiman's (CART, 1984): of all depths
that are not told apart from the best one, the lowest is taken, since layers above it cost and buy nothing that can be seen.

Shapes: N training texts, M held-out texts, L layers, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import RidgeCV

from loracle.errors import UserError
from loracle.evaluation.classification import Array
from loracle.evaluation.linear_models import one_thread, standardised
from loracle.examples import Task
from loracle.reporting import plots
from loracle.reporting.terminal import plain_table

RIDGE = tuple(10.0**k for k in range(-1, 6))  # penalties for standardised features, chosen by leave-one-out


@dataclass(frozen=True, slots=True)
class Depth:
    """What a linear probe reaches on the states after ``layers`` layers, with the 95 % interval of the held-out side."""

    layers: int
    value: float
    low: float
    high: float

    @property
    def error(self) -> float:
        """One standard error."""
        return (self.high - self.low) / (2 * 1.96)


def by_depth(
    seen: np.ndarray,
    unseen: np.ndarray,
    fit: Callable[[np.ndarray, np.ndarray], Any],
    judge: Callable[[Any], dict[str, float]],
) -> list[Depth]:
    """Probe each depth: ``fit(seen [N, H], unseen [M, H])`` gives held-out scores, ``judge`` their value and interval.

    ``seen`` is ``[N, L, H]``, ``unseen`` ``[M, L, H]``.

    Raises:
        UserError: so few held-out examples that nothing can be said of them.
    """
    found = []
    for layer in range(seen.shape[1]):
        metric = judge(fit(seen[:, layer], unseen[:, layer]))
        if None in (metric["value"], metric["low"], metric["high"]):
            raise UserError(
                "held-out examples that tell depths apart", f"{len(unseen):,} texts, too few", "give more data"
            )
        found.append(Depth(layer + 1, metric["value"], metric["low"], metric["high"]))
    return found


def ridge(seen: np.ndarray, targets: np.ndarray, unseen: np.ndarray, task: Task) -> Array:
    """Scores ``[M, C]`` of a ridge regression on the labels as ±1: a closed form, so that thirty layers take seconds."""
    train, test = standardised(seen, unseen)
    labels = np.eye(len(task.label_names), dtype=bool)[targets] if task.kind == "single" else targets
    with one_thread():
        return RidgeCV(RIDGE).fit(train, np.where(labels, 1.0, -1.0)).predict(test).reshape(len(test), -1)


def best_of(depths: Sequence[Depth]) -> Depth:
    """The depth at which the probe reaches most."""
    return max(depths, key=lambda d: d.value)


def choose(depths: Sequence[Depth]) -> Depth:
    """The lowest depth within one standard error of the best."""
    best = best_of(depths)
    return next(d for d in depths if d.value >= best.value - best.error)


def lines(depths: Sequence[Depth], metric: str) -> list[str]:
    """Accuracy by depth for the terminal, and what dropping the layers above the chosen one costs and saves."""
    chosen, best = choose(depths), best_of(depths)
    rows = [["layers", metric, ""]]
    for d in depths:
        mark = " best" * (d is best) + " auto" * (d is chosen)
        rows.append([f"{d.layers:>6}", f"{100 * d.value:.1f} [{100 * d.low:.1f}, {100 * d.high:.1f}]", mark.strip()])
    return [plain_table(rows), verdict(depths)]


def verdict(depths: Sequence[Depth]) -> str:
    """One line: the depth, what the probe loses by it, what training and serving save."""
    chosen, best = choose(depths), best_of(depths)
    saved = 100 * (1 - chosen.layers / len(depths))
    return (
        f"depth {chosen.layers} of {len(depths)}: a linear probe reaches {100 * chosen.value:.1f} % there and "
        f"{100 * best.value:.1f} % at its best, after {best.layers} (one standard error is {100 * best.error:.1f}); "
        f"{saved:.0f} % of the layers' work is saved in training and in serving"
    )


def plot(depths: Sequence[Depth], metric: str, path: Path) -> None:
    """Accuracy by depth as a picture (PNG, SVG or PDF by the suffix).

    Raises:
        UserError: matplotlib cannot write such a file.
    """
    figure, chosen = plots.new_figure(7, 3.6), choose(depths)
    axes, at = figure.subplots(), [d.layers for d in depths]
    axes.fill_between(at, [100 * d.low for d in depths], [100 * d.high for d in depths], alpha=0.2)
    axes.plot(at, [100 * d.value for d in depths], "o-", label="linear probe, 95 % interval")
    axes.axvline(chosen.layers, ls="--", color="grey", label=f"--depth auto: {chosen.layers}")
    axes.set(xlabel="layers kept", ylabel=f"{metric.replace('_', ' ')}, % of held-out examples")
    plots.save(figure, path)
