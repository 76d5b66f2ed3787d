"""Where benchmarks find the shared data and leave their dated tables."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

from loracle.judge.report import markdown_table

HERE = Path(__file__).parent
SHARED = Path(os.environ.get("LORACLE_SHARED", HERE.parent.parent / "shared"))


def write_table(name: str, rows: list[list[str]], notes: list[str]) -> Path:
    """Write ``results/<date>-<name>.md`` with machine, versions and command; print it too."""
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "transformers", "peft"))
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    text = "\n".join([
        f"# {name}, {datetime.date.today()}", "", *(f"{n}\n" for n in notes), markdown_table(rows), "",
        f"{_processor()}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}.",
        f"Command: `python benchmarks/{command}`", "",
    ])  # fmt: skip
    path = HERE / "results" / f"{datetime.date.today()}-{name}.md"
    path.write_text(text, encoding="utf-8")
    print(text)
    return path


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
