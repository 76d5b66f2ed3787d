"""The command line in this process, and a training on a small file."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from small import write

from loracle.cli import main

FAST = ["--epochs", "8", "--batch", "8", "--lr", "0.01", "--test-share", "0.2", "--validation-share", "0.2"]
CLICKS = ["--group", "site,day", "--text", "headline", "--clicks", "clicks", "--impressions", "impressions"]


def loracle(*args: Any, code: int = 0, **more: Any) -> Result:
    """Run a command and check its exit code."""
    done = CliRunner().invoke(main, [str(a) for a in args], catch_exceptions=True, **more)
    assert done.exit_code == code, (done.output, done.stderr, done.exception)
    return done


def error_of(*args: Any) -> str:
    """The error of a command as one line: a message, perhaps a hint, and no traceback."""
    done = loracle(*args, code=2)
    lines = done.stderr.strip().splitlines()
    assert lines[0].startswith("Error: ")
    assert len(lines) <= 2, done.stderr
    assert "Traceback" not in done.stdout
    return " ".join(lines)


def trained(
    folder: Path, model: Path, rows: list[dict[str, Any]], *more: str, name: str = "data.csv"
) -> tuple[Path, str, dict[str, Any]]:
    """Train on rows; returns the run folder, the output and the metrics."""
    data = write(folder / name, rows)
    done = loracle("train", data, "--model", model, "-o", folder / "run", *FAST, *more)
    return folder / "run", done.output, json.loads((folder / "run" / "metrics.json").read_text())


def rows_of(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file."""
    with path.open(encoding="utf-8") as f:
        return list(csv.DictReader(f))
