"""What `loracle demo` reaches and how long it takes.

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


def main() -> None:
    """Run it and write both tables as one."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        runs = demo.run(Path(scratch) / "demo")
        wall = time.perf_counter() - started
        topics, clicks = (json.loads((run / "metrics.json").read_text()) for run in runs)
    rows = result_rows(topics, "single")
    for name, *figures in result_rows(clicks, "rank"):
        rows.append([name or "clicks:", *figures])
    seconds = {name: m["train"] for name, m in (("topics", topics), ("clicks", clicks))}
    notes = [
        f"BBC headlines (research use). Model: {topics['base']}. One seed.",
        "Training and everything around it: "
        + ", ".join(f"{n} {s['seconds']:.0f} s of {s['wall_seconds']:.0f}" for n, s in seconds.items())
        + f"; the whole command {wall:.0f} s.",
    ]
    write_table("demo", rows, notes)


if __name__ == "__main__":
    main()
