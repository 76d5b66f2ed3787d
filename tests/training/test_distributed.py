"""Two processes train what one trains: the same losses, looks and weights, whatever each of them has to do."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import scenarios
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file
from small import QUICK, labelled, write

from loracle import pipeline
from loracle.cli import main
from loracle.config import RunConfig
from loracle.errors import UserError
from loracle.examples import LabeledText
from loracle.training import distributed
from loracle.training.distributed import on_main, partition, start

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def launched(*arguments):
    return subprocess.run([*TORCHRUN, *map(str, arguments)], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def roots(tiny_model, tmp_path_factory):
    """Folders of all scenarios: by one process, by two."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    for root in (one, two):
        scenarios.begin(root / "resumed")
    scenarios.MODEL = str(tiny_model("qwen2"))
    for each in (scenarios.ragged, scenarios.ranker, scenarios.resumed, scenarios.whole_run):
        scenarios.run(each, one)
    done = launched(scenarios.__file__, two, scenarios.MODEL)
    assert done.returncode == 0, done.stderr[-3000:]
    raised = {p.parent.name for root in (one, two) for p in root.glob("*/raised-*")}
    assert raised == {"diverged", "interrupted"}
    return one, two


def records(folder):
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{name: value for name, value in r.items() if not name.endswith("_per_s")} for r in lines]


def predictions(run):
    with (run / "predictions.csv").open() as f:
        return list(csv.DictReader(f))


def assert_same(one, two, weights):
    for expected, found in zip(records(one), records(two), strict=True):
        assert found == pytest.approx(expected, abs=1e-5, rel=1e-5)
    expected, found = load_file(one / weights), load_file(two / weights)
    assert expected.keys() == found.keys()
    for name, value in expected.items():  # Adam divides by the gradients' size, where rounding is all there is of some
        np.testing.assert_allclose(found[name], value, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("name", ["ragged", "ranker", "resumed"])
def test_two_processes_train_what_one_trains(roots, name):
    one, two = (root / name for root in roots)
    assert_same(one, two, "left.safetensors")
    known = records(one)
    assert {"loss", "validation_loss"} <= {key for r in known for key in r}
    assert max(r["loss"] for r in known if "loss" in r) > 1.01 * min(r["loss"] for r in known if "loss" in r)


def test_processes_with_parts_of_the_frozen_weights_train_what_one_trains(roots):
    one, two = roots
    held, whole = map(int, (two / "parts").read_text().split(" of "))
    assert held == whole // 2
    assert_same(one / "ragged", two / "sharded", "left.safetensors")


@pytest.mark.parametrize("name", ["whole_run", "sharded_run"])
def test_a_whole_run_is_that_of_one_process(roots, name):
    one, two = roots[0] / "whole_run/run", roots[1] / name / "run"
    assert_same(one, two, "adapter_model.safetensors")
    assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}
    known, seen = (predictions(run) for run in (one, two))
    for expected, found in zip(known, seen, strict=True):
        assert {**found, "probability": 0} == {**expected, "probability": 0}
        assert float(found["probability"]) == pytest.approx(float(expected["probability"]), abs=1e-4)
    of_one, of_two = (json.loads((run / "metrics.json").read_text()) for run in (one, two))
    assert of_one["baselines"].keys() == of_two["baselines"].keys() > {"majority", "tfidf", "linear-probe"}
    assert of_one["train"]["steps"] == of_two["train"]["steps"]


def test_too_little_memory_in_one_process_makes_the_rounds_of_all_smaller(roots):
    _, two = roots
    assert len(records(two / "short_of_memory")) == 4 + 2  # steps, looks
    counts = [list(map(int, (two / f"short_of_memory/rounds-{i}").read_text().split())) for i in (0, 1)]
    assert max(counts[0][:2]) > 10 >= max(counts[0][-4:])
    assert max(counts[1][-4:]) <= 10


def test_a_loss_that_is_no_number_is_told_by_all(roots):
    said = [(roots[1] / f"diverged/raised-{i}").read_text() for i in (0, 1)]
    assert said[0] == said[1]
    assert "a loss of nan at step" in said[0]
    assert "9" in said[0]


def test_all_stop_after_the_step_in_which_one_is_told_to(roots):
    said = [(roots[1] / f"interrupted/raised-{i}").read_text() for i in (0, 1)]
    assert said[0] == said[1]
    assert said[0].startswith("stopped after step 3 of 12")
    assert [p.name for p in (roots[1] / "interrupted/checkpoints").iterdir()] == ["step-00000003"]


def test_the_main_process_decides_when_to_stop(roots):
    looks = [r for r in records(roots[1] / "disagreeing") if "validation_metric" in r]
    assert [r["validation_metric"] for r in looks] == [0.5, 0.4, 0.3]


def test_an_error_ends_all_processes_and_is_said_once(tmp_path):
    data = write(tmp_path / "data.csv", labelled())
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    done = launched("-m", "loracle", "train", data, "--model", "demo", "--out", tmp_path / "taken")
    assert done.returncode != 0
    assert done.stderr.count("loracle: expected an empty or new folder for --out") == 1
    assert "[rank1]" not in done.stderr


def test_other_commands_want_one_process(monkeypatch):
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    done = CliRunner().invoke(main, ["check", "reviews.csv"])
    assert done.exit_code == 2
    assert "expected one process to check; found several" in done.stderr


def test_a_model_in_pieces_is_refused(monkeypatch):
    monkeypatch.setitem(os.environ, "ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="expected processes that cut no model by themselves; found FSDP"):
        start(torch.device("cpu"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "expected several processes for --shard; found one"),
        ({"full": True}, "found --full with it"),
        ({"quantize": "nf4"}, "found --quantize with it"),
        ({"depth": "auto"}, "found --depth auto with it"),
    ],
)
def test_what_parts_of_weights_cannot_go_with(tiny_model, tmp_path, flags, message):
    data = write(tmp_path / "data.csv", labelled())
    settings = QUICK | {
        "data": str(data),
        "model": str(tiny_model("qwen2")),
        "shard": True,
        "out": str(tmp_path / "run"),
    }
    with pytest.raises(UserError, match=message):
        pipeline.train(RunConfig.from_flat(settings | flags), log=lambda line: None, quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sharded", "error", "told"),
    [
        (True, torch.OutOfMemoryError("CUDA out of memory"), 0),  # the others would take the word for a part of a layer
        (True, RuntimeError("shapes differ"), 1),
        (False, torch.OutOfMemoryError("CUDA out of memory"), 1),
    ],
)
def test_what_the_others_hear_of_an_error_in_the_main_process(monkeypatch, sharded, error, told):
    said, along = [], SimpleNamespace(sharded=sharded, announce=None)
    monkeypatch.setattr(distributed, "PartialState", lambda: SimpleNamespace(num_processes=2, is_main_process=True))
    monkeypatch.setattr(distributed, "broadcast_object_list", said.append)
    with pytest.raises(UserError if not told else type(error)):
        on_main(lambda: (_ for _ in ()).throw(error), along=along)
    assert [held[1] for held in said] == ["failed"] * told
    assert along.announce is None


def test_shares_are_disjoint_and_about_as_long():
    lengths = [50, 3, 40, 20, 30, 1, 2]
    examples = [LabeledText(text="x" * n, labels=(0,), row=i) for i, n in enumerate(lengths)]
    parts = partition(examples, 2)
    assert sorted(i for part in parts for i in part) == list(range(7))
    assert sorted(sum(lengths[i] for i in part) for part in parts) == [73, 73]
    assert partition(examples[:1], 3) == [[0], [], []]
    assert partition(examples, 1) == [list(range(7))]
