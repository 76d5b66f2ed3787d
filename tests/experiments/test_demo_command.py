"""`loracle demo` itself, on the embedded data and model, cut to two steps a task."""

from __future__ import annotations

import json
import re

import pytest
from click.testing import CliRunner

from loracle.cli import main
from loracle.training import probe


@pytest.mark.slow
def test_the_demo_trains_measures_and_uses_both(tmp_path, monkeypatch):
    monkeypatch.setattr(probe.subsample, "__defaults__", (256,))  # two cores, one thread: fewer texts will do
    done = CliRunner().invoke(main, ["demo", "-o", str(tmp_path / "demo"), "--max-steps", "2"])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "dequantised from a 4-bit GGUF file" in done.output
    said = done.output.splitlines()
    for who in ("majority", "tfidf", "linear-probe", "loracle", "length", "perfect knower"):
        assert any(line.startswith(who + " ") for line in said), who
    figures = [next(x for x in said if x.startswith(who)) for who in ("perfect knower", "length")]
    knower, length = (float(re.search(r"[\d.]+", line)[0]) for line in figures)
    assert knower > 85 > 60 > length
    for task, metric in (("topics", "accuracy"), ("clicks", "pair_accuracy")):
        metrics = json.loads((tmp_path / "demo" / task / "metrics.json").read_text())
        assert 0 < metrics["test"][metric]["value"] < 1
        assert "4-bit" in metrics["base"]
