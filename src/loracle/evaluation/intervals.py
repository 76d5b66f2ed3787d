"""Figures with 95 % bootstrap intervals. Pure NumPy.

Legend of shapes: N rows, U units that are resampled (distinct texts, group ids), B bootstrap replicates.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from loracle.errors import UserError

Array = npt.NDArray[np.float64]
Statistics = Callable[[Array], Mapping[str, Array]]

REPLICATES = 1000
LEVEL = 0.95
CHUNK = 1 << 20  # resampling weights in memory at once: 8 MB, which fits a processor's cache


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and its 95 % bootstrap interval. All three are NaN (``null`` in JSON) where the figure is undefined."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        """``{"value", "low", "high"}``. NaN becomes None, as JSON has no NaN."""
        bounds = {"value": self.value, "low": self.low, "high": self.high}
        return {name: bound if np.isfinite(bound) else None for name, bound in bounds.items()}


Metrics = Mapping[str, Interval | float]


def as_json(metrics: Metrics) -> dict[str, Any]:
    """Metrics as plain JSON: intervals become ``{"value", "low", "high"}``, counts stay numbers."""
    return {name: m.to_json() if isinstance(m, Interval) else m for name, m in metrics.items()}


def bootstrap(
    statistics: Statistics, units: int, *, seed: int = 0, replicates: int = REPLICATES
) -> dict[str, Interval]:
    """Values and 95 % percentile intervals of statistics over resampled units (Efron 1979).

    ``statistics`` maps weights ``[B, U]``, how often each replicate drew each unit, to ``{name: [B]}``. All statistics
    use the same draws, so a difference of two is a paired bootstrap. Replicates where a statistic is NaN do not enter its
    interval.

    Raises:
        UserError: there is no unit.
    """
    if units < 1:
        raise UserError("There are no test examples.", "Give a larger test file or a larger --test-share.")
    values = {name: float(value[0]) for name, value in statistics(np.ones((1, units))).items()}
    rng = np.random.default_rng(seed)
    chunk = max(1, CHUNK // units)
    parts = [statistics(_resample(rng, min(chunk, replicates - start), units)) for start in range(0, replicates, chunk)]
    return {name: interval_of(value, np.concatenate([part[name] for part in parts])) for name, value in values.items()}


def interval_of(value: float, replicates: Array) -> Interval:
    """The value with the percentile interval of its finite replicates ``[B]``."""
    finite = replicates[np.isfinite(replicates)]
    if not len(finite):
        return Interval(value, np.nan, np.nan)
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def ratio(numerator: Array, denominator: Array) -> Array:
    """``numerator / denominator``, NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=denominator != 0)


def units_of(groups: Sequence[Hashable] | None, rows: int) -> tuple[npt.NDArray[np.intp], int]:
    """The unit of each row ``[N]``, numbered by first appearance, and the number of units. None: each row is a unit."""
    if groups is None:
        return np.arange(rows), rows
    if len(groups) != rows:
        raise ValueError(f"{len(groups)} groups for {rows} rows")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.intp), len(numbers)


def sum_by_unit(values: np.ndarray, unit: npt.NDArray[np.intp], units: int) -> Array:
    """Sums ``[U, …]`` of rows ``[N, …]`` over each unit."""
    sums = np.zeros((units, *values.shape[1:]))
    np.add.at(sums, unit, values)
    return sums


def _resample(rng: np.random.Generator, replicates: int, units: int) -> Array:
    """How often each unit was drawn, ``[B, U]``: U draws with replacement in each replicate."""
    drawn = rng.integers(units, size=(replicates, units)) + units * np.arange(replicates)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=replicates * units)
    return counts.reshape(replicates, units).astype(np.float64)
