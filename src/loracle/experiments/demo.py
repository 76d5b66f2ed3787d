"""``loracle demo``: both jobs on embedded data, from a fresh machine to two tables, with nothing but the package index."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from loracle import pipeline
from loracle.config import RunConfig
from loracle.data.demo import DemoFiles, write_demo
from loracle.data.sources import open_table
from loracle.errors import UserError
from loracle.formatting import plain_table
from loracle.reporting.terminal import result_rows
from loracle.runs.folder import METRICS, RUN
from loracle.runs.predictor import Predictor
from loracle.tasks import Task
from loracle.tasks.dataset import read_examples
from loracle.training import scoring

# Chosen on validation examples (dev/LOG.md). The cue asks the model for what it knows about topics already.
CUE = "BBC News headline: {text}\nTopic (business, entertainment, politics, sports or tech):"
TOPICS = {"epochs": 2.0, "batch": 16, "template": CUE}
CLICKS = {"epochs": 3.0, "batch": 8}

NEW_TEXTS = ("Striker signs for rivals after record bid", "Chip maker unveils faster phone processor")
NEW_TITLES = ("Bank profits rise on 'strong' demand", "Star wins film award", "Minister quits over tax plan")


def run(folder: Path, *, max_steps: int | None = None, log: Callable[[str], None] = print) -> tuple[Path, Path]:
    """Train a topic classifier and a title ranker under ``folder``, show what they are worth, and use both.

    Raises:
        UserError: the embedded data or model cannot be downloaded, or ``folder`` holds something else.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "data").is_dir():
        raise UserError(f"{folder} holds files that are not of a demo.", "Pick another --out.")
    files = write_demo(folder / "data")

    def train(name: str, data: Path, test: Path, settings: dict[str, Any]) -> Path:
        where = {"data": str(data), "test": str(test), "out": str(_fresh(folder / name)), "max_steps": max_steps}
        return pipeline.train(RunConfig.from_flat(where | settings), log=log)

    log("== 1 of 2: topics of BBC News headlines (2004-05, research use) ==")
    topics = train("topics", files.topics_train, files.topics_test, TOPICS)
    log("\n== 2 of 2: which headline is clicked, from a simulated click log over real headlines ==")
    clicks = train("clicks", files.clicks_train, files.clicks_test, CLICKS)
    _show(files, topics, clicks, log)
    return topics, clicks


def perfect_knower(files: DemoFiles) -> dict[str, Any]:
    """Test metrics of the true log-odds behind the simulated clicks: the noise ceiling."""
    truth = json.loads(files.truth.read_text(encoding="utf-8"))["log_odds"]
    table = open_table(str(files.clicks_test))
    examples = read_examples(table, RunConfig().data)
    scores = [np.array([[truth[text]] for text in group.texts]) for group in examples.items]
    return scoring.measure(scores, examples.items, examples.task)


def _show(files: DemoFiles, topics: Path, clicks: Path, log: Callable[[str], None]) -> None:
    topic_metrics, click_metrics = (json.loads((r / METRICS).read_text(encoding="utf-8")) for r in (topics, clicks))
    log(f"\nTopics, 500 test headlines ({topic_metrics['base']})")
    log(plain_table(result_rows(topic_metrics, Task(name="single_label"))))
    ranking = Task(name="click_ranking")
    log(f"\nClicks, 120 simulated test groups ({click_metrics['base']})")
    knower = result_rows({"test": perfect_knower(files)}, ranking)[1][1:]
    log(plain_table([*result_rows(click_metrics, ranking), ["perfect knower", *knower]]))

    log("\nNew texts:")
    classifier = Predictor(topics)
    for text, p in zip(NEW_TEXTS, classifier.predict_proba(NEW_TEXTS), strict=True):
        log(f"  {classifier.task.label_names[p.argmax()]:<14} {p.max():.0%}  {text}")
    log("New titles, best first:")
    for ranked in Predictor(clicks).rank(NEW_TITLES):
        log(f"  {ranked.score:+.2f}  {ranked.text}")
    log(f"\nrun folders: {topics}, {clicks}")
    program = _program()
    log(f"next:  {program} predict {topics} {files.topics_test} -o scored.csv")
    log(f'       {program} rank {clicks} "Title A" "Title B"')


def _program() -> str:
    """What to type for loracle: its name where the shell finds it, else where it is (`make demo` activates nothing)."""
    return "loracle" if shutil.which("loracle") else os.path.relpath(sys.argv[0])


def _fresh(run_folder: Path) -> Path:
    """The folder, without what an earlier demo left in it."""
    if (run_folder / RUN).exists():
        shutil.rmtree(run_folder)
    return run_folder
