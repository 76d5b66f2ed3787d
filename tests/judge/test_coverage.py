"""Intervals hold the truth as often as they say: a small part of what benchmarks/coverage.py measures."""

import importlib
from pathlib import Path

import numpy as np
import pytest

RUNS = 250
SPREAD = 3 * np.sqrt(0.95 * 0.05 / RUNS)  # 4 points, three standard errors of a coverage


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("coverage")


def test_intervals_of_every_kind_hold_the_truth_at_their_rate(measured, monkeypatch):
    monkeypatch.setattr(measured, "LARGE", 100_000)
    true = measured.truth()
    found = measured.coverage(150, RUNS, true, replicates=300)
    assert set(found) == {"accuracy", "macro_f1", "log_loss", "difference", "ece_band"}
    for name, share in found.items():
        assert 0.95 - SPREAD <= share <= min(1, 0.95 + SPREAD), name

    # And they would not, were copies of a text taken for further evidence.
    naive = measured.coverage(60, 100, true, replicates=200, copies=12, together=False)
    kept = measured.coverage(60, 100, true, replicates=200, copies=12)
    assert naive["accuracy"] < 0.85
    assert naive["accuracy"] < kept["accuracy"] - 0.1
