"""Peak memory of a training with ever more data, and the time of one prediction with warm files.

python benchmarks/memory.py           # a dated table in benchmarks/results/
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import ROUNDS, SHARED, write_table

SIZES = (500, 5_000, 50_000)
DATA = SHARED / "data" / "n24news" / "abstracts.json"
LORACLE = Path(sys.executable).with_name("loracle")


def write_rows(path: Path, count: int) -> Path:
    """Abstracts with numbers, so that all texts differ."""
    rows = [json.loads(line) for line in DATA.open(encoding="utf-8")]
    with path.open("w", encoding="utf-8") as f:
        for i in range(count):
            row = rows[i % len(rows)]
            f.write(
                json.dumps({"text": f"{row['messages'][0]['content']} {i}", "label": f"topic {row['label']}"}) + "\n"
            )
    return path


def peak(command: list) -> tuple[float, float]:
    """Peak memory of a process in GB, and its seconds."""
    started = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {command}")
    return used.ru_maxrss / 1e6, time.perf_counter() - started


def main() -> None:
    """Train on each size for a few steps; then predict one line, several times."""
    rows = [["rows to train on", "peak memory, GB", "file, MB"]]
    with tempfile.TemporaryDirectory() as scratch:
        test = write_rows(Path(scratch) / "test.jsonl", 60)
        for size in SIZES:
            data, out = write_rows(Path(scratch) / f"{size}.jsonl", size), Path(scratch) / f"run-{size}"
            command = [LORACLE, "train", data, "--test", test, "-o", out, "--max-steps", 5, "--no-baselines"]
            gigabytes, _ = peak([*command, "--validation-share", 60 / size])
            rows.append([f"{size:,}", f"{gigabytes:.2f}", f"{data.stat().st_size / 1e6:.1f}"])
            print(rows[-1], flush=True)
        one = Path(scratch) / "one.csv"
        one.write_text("text\nA storm is on its way to the coast\n", encoding="utf-8")
        command = [LORACLE, "predict", Path(scratch) / f"run-{SIZES[0]}", one, "-o", Path(scratch) / "out.csv"]
        walls = [peak(command)[1] for _ in range(1 + ROUNDS)][1:]
        imports = [peak([sys.executable, "-c", "import loracle.runs.predictor"])[1] for _ in range(ROUNDS)]
    notes = [
        "SmolLM2-135M-Instruct (dequantized from a 4-bit GGUF file), five steps of 16 N24News abstracts, LoRA on every layer. "
        "The examples are in memory.",
        f"`loracle predict` of one line, whole process: **{statistics.median(walls):.1f} s** "
        f"({', '.join(f'{w:.1f}' for w in walls)}). Imports take {statistics.median(imports):.1f} s.",
    ]
    write_table("memory", rows, notes)


if __name__ == "__main__":
    main()
