"""``loracle validate``: folds in which all is held out once, and seeds that differ by nothing else."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from click.testing import CliRunner
from small import clicked, has_facts, labelled, several, write

from loracle.cli import main
from loracle.examples import RankGroup
from loracle.runs.folder import read_info
from loracle.training import scoring

FAST = ["--epochs", "2", "--batch", "8", "--lr", "0.01"]
CLICKS = ["--group", "site,day", "--text", "headline", "--clicks", "clicks", "--impressions", "impressions"]


def validate(*args, code=0):
    done = CliRunner().invoke(main, ["validate", *map(str, args)])
    assert done.exit_code == code, (done.output, done.stderr, done.exception)
    return done


def predictions(folder):
    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


@pytest.mark.slow
def test_every_text_is_held_out_once_and_all_are_measured_together(tiny_model, tmp_path):
    rows = [*labelled(60), *labelled(6)]  # six texts twice
    data, out = write(tmp_path / "data.csv", rows), tmp_path / "folds"
    flags = [data, "--model", tiny_model("qwen2"), *FAST, "--folds", "3", "-o", out]
    said = validate(*flags).stdout
    found = json.loads((out / "validation.json").read_text())
    folds = [predictions(out / r["folder"]) for r in found["runs"].values()]
    held = [row for fold in folds for row in fold]
    assert sorted(int(row["row"]) for row in held) == list(range(2, 68))
    assert not {r["text"] for r in folds[0]} & {r["text"] for fold in folds[1:] for r in fold}
    for fold in folds:
        assert {label: len({r["text"] for r in fold if r["label"] == label}) for label in ("neg", "pos", "mid")} == (
            pytest.approx({"neg": 20 / 3, "pos": 20 / 3, "mid": 20 / 3}, abs=0.7)
        )
    accuracy = np.mean([row["label"] == row["predicted"] for row in held])
    assert found["pooled"]["accuracy"]["value"] == pytest.approx(accuracy)
    each = [np.mean([row["label"] == row["predicted"] for row in fold]) for fold in folds]
    assert (found["mean"], found["standard_deviation"]) == pytest.approx((np.mean(each), np.std(each, ddof=1)))
    assert "all, held out once" in said
    assert "standard deviation" in said
    again = validate(*flags).stdout
    assert again.count("finished before") == 3
    assert validate(*flags, "--r", "4").stdout.count("finished before") == 0  # other settings are other runs


@pytest.mark.slow
def test_several_labels_are_pooled_at_the_thresholds_of_their_folds(tiny_model, tmp_path):
    data, out = write(tmp_path / "data.jsonl", several(90)), tmp_path / "folds"
    validate(data, "--model", tiny_model("qwen2"), *FAST, "--folds", "3", "-o", out)
    found = json.loads((out / "validation.json").read_text())
    held = [row for r in found["runs"].values() for row in predictions(out / r["folder"])]
    sets = [[set(filter(None, row[name].split("|"))) for name in ("label", "predicted")] for row in held]
    hits, both = sum(len(a & b) for a, b in sets), sum(len(a) + len(b) for a, b in sets)
    assert found["pooled"]["micro_f1"]["value"] == pytest.approx(2 * hits / both)
    assert found["pooled"]["subset_accuracy"]["value"] == pytest.approx(np.mean([a == b for a, b in sets]))


@pytest.mark.slow
def test_a_rankers_groups_are_held_out_once(tiny_model, tmp_path):
    data, out = write(tmp_path / "log.jsonl", clicked(24)), tmp_path / "folds"
    validate(data, *CLICKS, "--model", tiny_model("qwen2"), *FAST, "--folds", "2", "-o", out)
    found = json.loads((out / "validation.json").read_text())
    assert found["pooled"]["groups"] == 24
    assert found["metric"] == "pair_accuracy"


@pytest.mark.slow
def test_seeds_share_the_split_and_nothing_else(tiny_model, tmp_path):
    data, out = write(tmp_path / "data.csv", labelled(60)), tmp_path / "seeds"
    said = validate(data, "--model", tiny_model("qwen2"), *FAST, "--seeds", "2", "--seed", "5", "-o", out).stdout
    found = json.loads((out / "validation.json").read_text())
    runs = [out / r["folder"] for r in found["runs"].values()]
    assert [read_info(r).config.train.seed for r in runs] == [5, 6]
    assert [r["row"] for r in predictions(runs[0])] == [r["row"] for r in predictions(runs[1])]
    adapters = [(r / "adapter_model.safetensors").read_bytes() for r in runs]
    assert adapters[0] != adapters[1]
    assert "pooled" not in found
    assert f"from {100 * found['minimum']:.1f} to {100 * found['maximum']:.1f}" in said

    # Seed 6 on the split that seed 6 draws is another run than seed 6 on that of 5.
    said = validate(data, "--model", tiny_model("qwen2"), *FAST, "--seeds", "2", "--seed", "6", "-o", out).stdout
    assert "finished before" not in said

    # The first of them is the plain run, bit for bit.
    done = CliRunner().invoke(main, ["train", str(data), "--model", str(tiny_model("qwen2")), *FAST, "--seed", "5",
                                     "-o", str(tmp_path / "run"), "--no-baselines"])  # fmt: skip
    assert done.exit_code == 0
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() == adapters[0]


@pytest.mark.slow
def test_several_labels_a_text_go_the_same_way(tiny_model, tmp_path):
    data, out = write(tmp_path / "data.jsonl", several(40)), tmp_path / "folds"
    validate(data, "--model", tiny_model("qwen2"), *FAST, "--max-steps", "1", "--folds", "2", "-o", out)
    found = json.loads((out / "validation.json").read_text())
    assert found["metric"] == "map"
    assert len([r for f in found["runs"].values() for r in predictions(out / f["folder"])]) == 40


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--folds | --seeds"),
        (["--folds", "2", "--seeds", "2"], "--folds | --seeds"),
        (["--folds", "1"], "--folds | 2 or more"),
        (["--folds", "99"], "99 | 60"),
        (["--folds", "2", "--test", "x.csv"], "--folds | --test"),
    ],
)
def test_what_cannot_be_repeated_is_said_in_a_line(tmp_path, flags, words):
    data = write(tmp_path / "data.csv", labelled(60))
    done = validate(data, *flags, "-o", tmp_path / "out", code=2)
    assert has_facts(done.stderr, *words.split(" | "))
    assert len(done.stderr.strip().splitlines()) <= 2  # message and hint


def test_read_scores_are_those_that_were_written(tmp_path):
    groups = [RankGroup(group=str(n), texts=("a",) * n, rows=(1,) * n) for n in (2, 3)]
    scores = [np.arange(n, dtype=np.float32)[:, None] for n in (2, 3)]
    scoring.write_scores(tmp_path, scores)
    for own, read in zip(scores, scoring.read_scores(tmp_path, groups), strict=True):
        np.testing.assert_array_equal(own, read)
