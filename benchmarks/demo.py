"""What does `loracle demo` reach, and how long does it take?

python benchmarks/demo.py
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

from results import write_table

from loracle.experiments import demo
from loracle.reporting.terminal import result_rows
from loracle.runs.folder import read_info


def main() -> None:
    """Run it and write both tables."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        runs = demo.run(Path(scratch) / "demo")
        wall = time.perf_counter() - started
        topics, clicks = (json.loads((run / "metrics.json").read_text()) for run in runs)
    tables = []
    for name, run, metrics in zip(("topics", "clicks"), runs, (topics, clicks), strict=True):
        (_, *header), *rows = result_rows(metrics, read_info(run).task)
        tables.append([[name, *header], *rows])
    seconds = {name: m["train"] for name, m in (("topics", topics), ("clicks", clicks))}
    notes = [
        f"BBC headlines (research use). Model: {topics['base']}. One seed.",
        ", ".join(
            f"{n} trained in {s['seconds']:.0f} s of {s['wall_seconds']:.0f} s in all" for n, s in seconds.items()
        )
        + f". The whole command took {wall:.0f} s.",
    ]
    write_table("demo", tables[0], notes, *tables[1:])


if __name__ == "__main__":
    main()
