"""Shared by all benchmarks: the data folder, timing several methods in turn, and dated tables."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from loracle.formatting import markdown_table

HERE = Path(__file__).parent
SHARED = Path(os.environ.get("LORACLE_SHARED", HERE.parent.parent / "shared"))


ROUNDS = 3


def dtype_name() -> str:
    """The dtype that ``--dtype auto`` picks on this machine, for both sides."""
    from loracle.models.devices import pick_device, pick_dtype

    return str(pick_dtype("auto", False, pick_device("auto"))).removeprefix("torch.")


def last_json(command: list) -> dict[str, float]:
    """The last line that a command prints, as JSON. Every measurement has a process of its own."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def in_turn(methods: dict[str, Callable[[], float]], unit: str) -> dict[str, list[float]]:
    """Rates of each method, measured ``ROUNDS`` times in turn, because a machine has faster and slower minutes."""
    rates: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(ROUNDS):
        for name, measure in methods.items():
            rates[name].append(measure())
            print(f"{name}: {rates[name][-1]:.2f} {unit}", flush=True)
    return rates


def medians(rates: dict[str, list[float]]) -> dict[str, float]:
    """The median rate of each method."""
    return {name: statistics.median(values) for name, values in rates.items()}


def rate_rows(rates: dict[str, list[float]], unit: str, peer: float) -> list[list[str]]:
    """Table of rates, with ratios to the median of the best peer."""
    rows = [["method", f"{unit}, median", "all rounds", "ratio to the best peer"]]
    for name, median in medians(rates).items():
        rows.append([name, f"{median:.2f}", ", ".join(f"{v:.2f}" for v in rates[name]), f"{median / peer:.2f}×"])
    return rows


def write_table(name: str, rows: list[list[str]], notes: list[str], *more: list[list[str]]) -> Path:
    """Write ``results/<date>-<name>.md`` with machine, versions and command; print it too.

    ``more`` are further tables. Then run ``make_readme.py``.
    """
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "transformers", "peft"))
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    lines = [f"# {name}, {datetime.date.today()}", ""]
    lines += [f"{note}\n" for note in notes]
    lines += [f"{markdown_table(table)}\n" for table in (rows, *more)]
    lines += [f"{_processor()}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}."]
    lines += [f"Command: `python benchmarks/{command}`", ""]
    text = "\n".join(lines)
    path = HERE / "results" / f"{datetime.date.today()}-{name}.md"
    path.write_text(text, encoding="utf-8")
    print(text)
    return path


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
