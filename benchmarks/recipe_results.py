"""What do the recipes for rankers give with the embedded model instead of the 7B one, on little data?

    python benchmarks/recipe_results.py ad_titles    # a simulated log: four headlines of one topic answer a brief
    python benchmarks/recipe_results.py original     # chosen and rejected titles of Upworthy's tests, in the original's format

The learning rate is the recipe's, or else the default for the embedded model's width.
"""

from __future__ import annotations

import csv
import itertools
import json
import sys
import tempfile
from pathlib import Path

from rank_speed import arms
from results import write_table

from loracle import pipeline
from loracle.config import RunConfig
from loracle.data.demo import bbc_headlines, simulate_clicks
from loracle.reporting.terminal import result_rows
from loracle.runs.folder import read_info
from loracle.runs.recipes import read_recipe

TESTS = 100  # of Upworthy


def ad_titles(folder: Path) -> tuple[Path, str]:
    """Every BBC headline once, in groups of four of one topic; clicks are drawn as for the demo."""
    path = folder / "log.csv"
    by_topic: dict[str, list[str]] = {}
    for headline, topic in bbc_headlines():
        by_topic.setdefault(topic, []).append(headline)
    with path.open("w", encoding="utf-8", newline="") as f:
        out = csv.writer(f)
        out.writerow(["ad_group", "brief", "title", "impressions", "clicks"])
        for seed, (topic, headlines) in enumerate(by_topic.items()):
            log = simulate_clicks(headlines, [topic] * len(headlines), seed, tests=len(headlines) // 4)
            for number, test in enumerate(zip(log.headlines, log.impressions, log.clicks, strict=True)):
                brief = f"News of {topic}, for readers who come back"
                out.writerows((f"{topic} {number}", brief, *row) for row in zip(*test, strict=True))
    return path, "a simulated log over BBC headlines, four of one topic per group, clicks drawn from known rates"


def original(folder: Path) -> tuple[Path, str]:
    """Pairs of titles of one test and image, the one with the higher click rate chosen."""
    path = folder / "pairs.jsonl"
    with path.open("w", encoding="utf-8") as f:
        for group in arms(TESTS):
            for (a, (ca, na)), (b, (cb, nb)) in itertools.combinations(group.items(), 2):
                if ca * nb != cb * na:
                    best, other = (a, b) if ca * nb > cb * na else (b, a)
                    pair = {"chosen": f"<title>{best}</title>", "rejected": f"<title>{other}</title>"}
                    f.write(json.dumps(pair, ensure_ascii=False) + "\n")
    return path, f"all pairs of {TESTS} Upworthy tests, including differences by chance"


SETS = {one.__name__: one for one in (ad_titles, original)}


def main(name: str) -> None:
    """Train by the recipe, write the table."""
    with tempfile.TemporaryDirectory() as scratch:
        data, about = SETS[name](Path(scratch))
        flat, _ = read_recipe(name)
        more = {"data": str(data), "model": "demo", "out": str(Path(scratch) / "run")}
        run = pipeline.train(RunConfig.from_flat(flat | more))
        metrics, task = json.loads((run / "metrics.json").read_text()), read_info(run).task
    notes = [
        f"Recipe {name} with {metrics['base']} instead of its model; seed 0, {metrics['train']['steps']:,} steps "
        f"in {metrics['train']['seconds']:,.0f} s. Data: {about}."
    ]
    write_table(f"recipe_{name}", result_rows(metrics, task), notes)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in SETS:
        sys.exit(f"Name one of: {', '.join(SETS)}.")
    main(sys.argv[1])
