"""predict on a local Ray cluster with two workers writes the same bytes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner
from small import has_facts, labelled, write

from loracle.cli import main

HAS_RAY = importlib.util.find_spec("ray") is not None


def loracle(*words):
    command = [sys.executable, "-m", "loracle", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


@pytest.mark.soak
@pytest.mark.skipif(not HAS_RAY, reason="no Ray: pip install 'loracle[ray]'; `make soak` does")
def test_two_workers_write_the_same_bytes(labelled_run, tmp_path):
    rows = [{"id": i, "text": f"good number {i}" if i % 7 else " "} for i in range(5000)]  # three windows
    data = write(tmp_path / "new.csv", rows)
    assert loracle("predict", labelled_run, data, "-o", tmp_path / "one.csv").returncode == 0
    done = loracle("predict", labelled_run, data, "-o", tmp_path / "two.csv", "--on", "ray", "--workers", 2)
    assert done.returncode == 0, done.stderr
    ours = [line for line in done.stderr.splitlines() if "RAY_BACKEND_LOG_LEVEL" not in line]  # a message of Ray itself
    assert ours == ["text column: 'text'", "note: 715 rows without a text have no label"]
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new.csv", "one.csv", "two.csv"]
    done = loracle("predict", labelled_run, data, "-o", tmp_path / "many.csv", "--on", "ray", "--workers", 1000)
    assert done.returncode == 2
    assert "--workers 1000" in done.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.skipif(HAS_RAY, reason="Ray is installed")
def test_missing_ray_names_the_extra(labelled_run, tmp_path):
    words = [labelled_run, write(tmp_path / "new.csv", labelled(3)), "-o", tmp_path / "x.csv", "--on", "ray"]
    done = CliRunner().invoke(main, ["predict", *map(str, words)])
    assert done.exit_code == 2
    assert has_facts(done.stderr, "--on ray", "pip install 'loracle[ray]'")
    assert [p.name for p in tmp_path.iterdir()] == ["new.csv"]


def test_workers_without_ray_raise(labelled_run, tmp_path):
    done = CliRunner().invoke(
        main, ["predict", str(labelled_run), str(write(tmp_path / "new.csv", labelled(3))), "--workers=2"]
    )
    assert done.exit_code == 2
    assert "--on ray" in done.stderr
