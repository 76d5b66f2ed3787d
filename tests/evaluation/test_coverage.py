"""Intervals hold the truth as often as they say: a small part of what benchmarks/coverage.py measures."""

import runpy
from pathlib import Path

import numpy as np
import pytest

RUNS = 200
SPREAD = 3 * np.sqrt(0.95 * 0.05 / RUNS)  # 4.6 points, three standard errors of a coverage


@pytest.mark.slow
def test_intervals_of_every_kind_hold_the_truth_at_their_rate():
    script = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "coverage.py"))
    true = script["truth"](100_000)
    found = script["coverage"](200, RUNS, true, replicates=200)
    assert set(found) == {"accuracy", "macro_f1", "log_loss", "difference", "ece_band"}
    for name, share in found.items():
        assert 0.95 - SPREAD <= share <= min(1, 0.95 + SPREAD), name

    # And they would not, were copies of a text taken for further evidence.
    naive = script["coverage"](60, 40, true, replicates=200, copies=12, together=False)
    assert naive["accuracy"] < 0.6
