"""Draw ``docs/images/results.svg`` from the dated tables in ``benchmarks/results/``.

python benchmarks/make_chart.py
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from make_readme import parse

HERE = Path(__file__).parent
PICTURE = HERE.parent / "docs" / "images" / "results.svg"
OURS, OTHERS = "#2f6fb0", "#b9c0c8"


class Panel(NamedTuple):
    """One small chart: which rows of which table it shows, and in which column their figure is."""

    title: str
    file: str
    column: str
    rows: dict[str, str]  # first cell (or first two, joined by a comma) -> label; the first one is loracle's
    table: int = 0  # of the file's parts


PANELS = [
    Panel("Banking77, accuracy in %", "2026-11-26-banking77", "accuracy", {
        "loracle": "loracle", "tfidf": "TF-IDF", "linear-probe": "linear probe",
    }),
    Panel("N24News, accuracy in %", "2026-11-26-n24news_compare", "accuracy, mean", {
        "SmolLM2-135M, LoRA": "loracle", "MiniLM, linear probe": "MiniLM, probe", "MiniLM, fine-tuned": "MiniLM, tuned",
        "tfidf": "TF-IDF",
    }),
    Panel("THUCNews, accuracy in %", "2026-11-26-thucnews", "accuracy", {"loracle": "loracle", "tfidf": "TF-IDF"}),
    Panel("Upworthy, pairs in order in %", "2026-11-24-upworthy", "pair_accuracy", {
        "loracle, all weeks": "loracle", "linear-probe MiniLM, all weeks": "MiniLM, probe", "tfidf, all weeks": "TF-IDF",
        "noise ceiling, all weeks": "noise ceiling",
    }),
    Panel("training, examples/s", "2026-11-27-train_speed", "examples/s, median", {
        "loracle, batch 32": "loracle", "Trainer + PEFT, batch 16": "Trainer + PEFT",
    }),
    Panel("serving, 32 users, texts/s (AMD)", "2026-11-27-serve_load", "texts/s, median", {
        "loracle serve, 32": "loracle", "pipeline, queue in batches, 32": "pipeline, queue",
    }),
    Panel("serving, 32 users, texts/s (Intel)", "2026-11-27-serve_load", "texts/s, median", {
        "loracle serve, 32": "loracle", "pipeline, queue in batches, 32": "pipeline, queue",
    }, table=1),
    Panel("Bilibili, pairs in order in %", "2026-11-25-bilibili", "pair_accuracy", {
        "loracle": "loracle", "length": "length", "tfidf": "TF-IDF",
    }),
]  # fmt: skip


def figures(panel: Panel) -> list[tuple[str, float, float, float]]:
    """Label, value and interval of each row of a panel; without an interval both ends are the value."""
    section = parse((HERE / "results" / f"{panel.file}.md").read_text(encoding="utf-8"))[panel.table]
    header, _, *lines = (cells(line) for line in section.tables[0].split("\n"))
    at = header.index(panel.column)
    by_name = {name: row[at] for row in lines for name in (row[0], f"{row[0]}, {row[1]}")}
    found = []
    for name, label in panel.rows.items():
        value, *interval = (float(number) for number in re.findall(r"-?\d+\.?\d*", by_name[name]))
        found.append((label, value, *(interval or (value, value))))
    return found


def cells(line: str) -> list[str]:
    """Cells of a line of a Markdown table."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def main() -> None:
    """Draw all panels."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "loracle", "font.size": 8}
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(11, 3.6), layout="constrained")
    for panel, axis in zip(PANELS, axes.flat, strict=True):
        rows = figures(panel)[::-1]
        for y, (label, value, low, high) in enumerate(rows):
            axis.barh(y, value, color=OURS if label == "loracle" else OTHERS, height=0.7)
            axis.plot([low, high], [y, y], color="black", linewidth=1)
            axis.text(value * 0.03, y, f"{value:g}", va="center", color="white" if label == "loracle" else "black")
        axis.set_yticks(range(len(rows)), [row[0] for row in rows])
        axis.set_title(f"{panel.title}\n{panel.file[:10]}", loc="left", fontsize=8)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
