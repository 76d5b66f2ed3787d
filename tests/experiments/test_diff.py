"""loracle diff on real runs: what it counts is recounted from what predict and rank say of the same rows."""

from __future__ import annotations

import csv
import json
import re
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file
from small import clicked, graded, has_facts, labelled, several, write

from loracle.cli import main
from loracle.config import RunConfig
from loracle.evaluation.significance import mcnemar
from loracle.pipeline import train
from loracle.runs.folder import write_manifest
from loracle.runs.predictor import Predictor

QUICK = {"batch": 8, "epochs": 6.0, "lr": 1e-2, "baselines": False, "test_share": 0.2, "validation_share": 0.2}


def loracle(*args, code=0):
    done = CliRunner().invoke(main, [str(a) for a in args])
    assert done.exit_code == code, (done.output, done.stderr, done.exception)
    return done


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory):
    """A trained classifier of each kind and a ranker (``b``), and another version of each (``a``), whose head is a worse
    one; ``single``, ``multi`` and ``grades`` are the data.
    """
    root = tmp_path_factory.mktemp("diff")
    found = {
        "single": write(root / "single.csv", labelled()),
        "multi": write(root / "multi.jsonl", several()),
        "grades": write(root / "grades.jsonl", graded()),
    }
    columns = {"grades": {"group": "query", "text": "title", "grade": "grade"}}
    for name in tuple(found):
        settings = {
            **QUICK,
            "data": str(found[name]),
            "model": str(tiny_model("qwen2")),
            "out": str(root / f"{name}-b"),
        }
        settings |= columns.get(name, {})
        found[f"{name}-b"] = train(RunConfig.from_flat(settings), log=lambda line: None, quiet=True)
        worse = blurred if name == "single" else np.negative
        found[f"{name}-a"] = with_head(found[f"{name}-b"], root / f"{name}-a", worse)
    return found


def blurred(w):
    return w + 3 * w.std() * np.random.default_rng(1).normal(size=w.shape)


def with_head(run, to, change):
    """A copy of a run with other weights in its head, as whole as the run."""
    shutil.copytree(run, to)
    weights = load_file(to / "adapter_model.safetensors")
    (head,) = (name for name in weights if "lora" not in name)
    weights[head] = change(weights[head]).astype(np.float32)
    save_file(weights, to / "adapter_model.safetensors", metadata={"format": "pt"})
    write_manifest(to)
    return to


@pytest.mark.slow
def test_classifiers(runs, tmp_path):
    a, b, data = runs["single-a"], runs["single-b"], runs["single"]
    said = loracle("diff", a, b, data, "-o", tmp_path / "rows.csv").stdout
    summary = json.loads(loracle("diff", a, b, data, "--json").stdout)
    truth = rows_of(data)
    texts = [row["text"] for row in truth]
    one, two = (np.array(Predictor(run).predict(texts)) for run in (a, b))
    right_one, right_two = (found == np.array([row["label"] for row in truth]) for found in (one, two))
    fixed, broken = int((right_two & ~right_one).sum()), int((right_one & ~right_two).sum())
    assert fixed > 5, "nothing was learnt: the test would be vacuous"
    both_wrong = int(((one != two) & ~right_one & ~right_two).sum())
    assert summary["changes"] == {
        "changed": int((one != two).sum()), "fixed": fixed, "broken": broken, "wrong_both_times": both_wrong,
    }  # fmt: skip
    assert summary["test"]["p"] == pytest.approx(mcnemar(right_two, right_one))
    assert summary["difference"]["accuracy"]["value"] == pytest.approx(right_two.mean() - right_one.mean())
    for run, side in ((a, "metrics_a"), (b, "metrics_b")):
        alone = json.loads(loracle("evaluate", run, data, "--json").stdout)
        assert summary[side] == {name: value for name, value in alone.items() if name != "base"}
    assert "B is better" in said
    assert f"{fixed} fixed, {broken} broken" in said

    changed = rows_of(tmp_path / "rows.csv")
    assert [row["text"] for row in changed] == [t for t, x, y in zip(texts, one, two, strict=True) if x != y]
    assert all(row["a"] != row["b"] for row in changed)
    assert {row["change"] for row in changed if row["b"] == row["label"]} == {"fixed"}
    assert changed[0].keys() == {"row", "change", "label", "a", "b", "p_a", "p_b", "text"}
    assert sum(c["fixed"] for c in summary["classes"]) == fixed


@pytest.mark.slow
def test_against_itself_nothing_changed(runs, tmp_path):
    done = loracle("diff", runs["single-b"], runs["single-b"], runs["single"], "-o", tmp_path / "rows.jsonl")
    assert "p = 1 (McNemar, exact): no significant difference" in done.stdout
    assert "0 of 60 texts changed" in done.stdout
    assert (tmp_path / "rows.jsonl").read_text() == ""


@pytest.mark.slow
def test_labels_in_another_order_are_the_same_labels(runs, tmp_path):
    """A trap for whoever compares columns and not names: head and names turned together change nothing."""
    turned = with_head(runs["single-b"], tmp_path / "turned", lambda w: w[[2, 0, 1]])
    text = (turned / "run.toml").read_text()
    found = re.search(r"label_names = \[\s*(.*?),?\s*\]", text, re.DOTALL)
    one, two, three = (name.strip() for name in found[1].split(","))
    (turned / "run.toml").write_text(text.replace(found[0], f"label_names = [{three}, {one}, {two}]"))
    write_manifest(turned)
    summary = json.loads(loracle("diff", runs["single-b"], turned, runs["single"], "--json").stdout)
    assert summary["changes"]["changed"] == 0
    assert summary["metrics_b"]["log_loss"]["value"] == pytest.approx(summary["metrics_a"]["log_loss"]["value"])


@pytest.mark.slow
def test_rows_without_labels_show_what_changed_and_no_more(runs, tmp_path):
    new = write(
        tmp_path / "new.csv",
        [*({"id": i % 2, "text": r["text"]} for i, r in enumerate(labelled())), {"id": 3, "text": " "}],
    )
    done = loracle("diff", runs["single-a"], runs["single-b"], new, "-o", tmp_path / "rows.csv")
    assert "no label column" in done.stderr
    assert "note: 1 rows without a text, skipped" in done.stderr
    assert "accuracy" not in done.stdout
    changed = rows_of(tmp_path / "rows.csv")
    assert f"{len(changed)} of 60 texts changed" in done.stdout
    assert changed[0].keys() == {"row", "change", "a", "b", "p_a", "p_b", "text"}


@pytest.mark.slow
def test_several_labels_by_their_own_thresholds(runs, tmp_path):
    summary = json.loads(loracle("diff", runs["multi-a"], runs["multi-b"], runs["multi"], "--json").stdout)
    rows = several()
    said = [Predictor(runs[run]).predict([r["text"] for r in rows]) for run in ("multi-a", "multi-b")]
    right = [np.array([set(x) == set(r["labels"]) for x, r in zip(one, rows, strict=True)]) for one in said]
    assert summary["changes"]["fixed"] == (right[1] & ~right[0]).sum() > 0
    assert summary["changes"]["changed"] == sum(set(x) != set(y) for x, y in zip(*said, strict=True))
    assert summary["metrics_b"]["subset_accuracy"]["value"] == pytest.approx(right[1].mean())
    assert "map" in loracle("diff", runs["multi-a"], runs["multi-b"], runs["multi"]).stdout


@pytest.mark.slow
def test_rankers(runs, tmp_path):
    a, b = runs["grades-a"], runs["grades-b"]
    done = loracle("diff", a, b, runs["grades"], "-o", tmp_path / "groups.jsonl")
    summary = json.loads(loracle("diff", a, b, runs["grades"], "--json").stdout)
    groups = {}
    for row in graded():
        groups.setdefault(row["query"], []).append(row["title"])
    rankers = [Predictor(run) for run in (a, b)]
    best = [[[t.text for t in ranker.rank(titles)] for titles in groups.values()] for ranker in rankers]
    picks = sum(x[0] != y[0] for x, y in zip(*best, strict=True))
    assert summary["changes"]["pick_changed"] == picks > 0
    assert summary["changes"]["order_changed"] == sum(x != y for x, y in zip(*best, strict=True))
    changed = [json.loads(line) for line in (tmp_path / "groups.jsonl").read_text().splitlines()]
    assert len(changed) == summary["changes"]["order_changed"]
    assert [row["order_b"] for row in changed] == [y for x, y in zip(*best, strict=True) if x != y]
    assert summary["changes"]["decided"] == 60
    assert "bootstrap over groups" in done.stdout
    assert "another pick" in done.stdout
    gap = (summary["changes"]["fixed"] - summary["changes"]["broken"]) / 60
    assert summary["difference"]["pair_accuracy"]["value"] == pytest.approx(gap)

    plain = write(tmp_path / "titles.csv", [{"query": r["query"], "title": r["title"]} for r in graded()])
    again = loracle("diff", a, b, plain)
    assert "only changes are shown" in again.stderr
    assert f"{picks} with another pick" in again.stdout


@pytest.mark.slow
def test_runs_that_cannot_be_compared_get_one_clear_line(runs, tiny_model, tmp_path):
    error = loracle("diff", runs["single-a"], runs["grades-a"], runs["single"], code=2).stderr
    assert has_facts(error, str(runs["single-a"]), "one label a text", str(runs["grades-a"]), "ranking")
    other = tmp_path / "other"
    shutil.copytree(runs["single-b"], other)
    (other / "run.toml").write_text((other / "run.toml").read_text().replace('"mid"', '"so-so"'))
    error = loracle("diff", runs["single-a"], other, runs["single"], code=2).stderr
    assert has_facts(error, "2 differ", "'mid'", str(runs["single-a"]))
    unknown = write(tmp_path / "unknown.csv", [{"text": "good", "label": "new"}, {"text": "bad", "label": "neg"}])
    assert "'new'" in loracle("diff", runs["single-a"], runs["single-b"], unknown, code=2).stderr
    clicks = write(tmp_path / "clicks.csv", clicked(2))
    assert "--clicks" not in loracle("diff", runs["grades-a"], runs["grades-b"], clicks, "--label", "x", code=2).stdout
