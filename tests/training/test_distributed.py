"""Two processes give the losses, validation results and weights of one process."""

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
from small import QUICK, facts, has_facts, labelled, write

from loracle import pipeline
from loracle.cli import main
from loracle.config import RunConfig
from loracle.errors import UserError
from loracle.examples import LabeledText
from loracle.training import distributed
from loracle.training.distributed import on_main, partition, start

pytestmark = pytest.mark.slow  # a fixture runs whole trainings in two processes

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def launched(*arguments):
    return subprocess.run([*TORCHRUN, *map(str, arguments)], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def roots(tiny_model, tmp_path_factory):
    """Folders of all scenarios, run by one process and by two."""
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
    for expected, actual in zip(records(one), records(two), strict=True):
        assert actual == pytest.approx(expected, abs=1e-5, rel=1e-5)
    expected, actual = load_file(one / weights), load_file(two / weights)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():  # Adam divides by the gradient's size, and some gradients are rounding alone
        np.testing.assert_allclose(actual[name], value, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("name", ["ragged", "ranker", "resumed"])
def test_two_processes_equal_one(roots, name):
    one, two = (root / name for root in roots)
    assert_same(one, two, "left.safetensors")
    keys = {key for r in records(one) for key in r}
    assert {"loss", "validation_loss"} <= keys
    losses = [r["loss"] for r in records(one) if "loss" in r]
    assert max(losses) > 1.01 * min(losses)


def test_sharded_training_equals_one_process(roots):
    one, two = roots
    part, whole = map(int, (two / "parts").read_text().split(" of "))
    assert part == whole // 2
    assert_same(one / "ragged", two / "sharded", "left.safetensors")


@pytest.mark.parametrize("name", ["whole_run", "sharded_run"])
def test_whole_run_equals_that_of_one_process(roots, name):
    one, two = roots[0] / "whole_run/run", roots[1] / name / "run"
    assert_same(one, two, "adapter_model.safetensors")
    assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}
    for expected, actual in zip(predictions(one), predictions(two), strict=True):
        assert {**actual, "probability": 0} == {**expected, "probability": 0}
        assert float(actual["probability"]) == pytest.approx(float(expected["probability"]), abs=1e-4)
    of_one, of_two = (json.loads((run / "metrics.json").read_text()) for run in (one, two))
    assert of_one["baselines"].keys() == of_two["baselines"].keys() > {"majority", "tfidf", "linear-probe"}
    assert of_one["train"]["steps"] == of_two["train"]["steps"]


def test_out_of_memory_in_one_process_halves_micro_batches_of_all(roots):
    _, two = roots
    assert len(records(two / "short_of_memory")) == 4 + 2  # steps, validations
    counts = [list(map(int, (two / f"short_of_memory/tokens-{i}").read_text().split())) for i in (0, 1)]
    assert max(counts[0][:2]) > 10 >= max(counts[0][-4:])
    assert max(counts[1][-4:]) <= 10


def test_all_processes_raise_the_same_divergence(roots):
    messages = [(roots[1] / f"diverged/raised-{i}").read_text() for i in (0, 1)]
    assert messages[0] == messages[1]
    assert has_facts(messages[0], "loss is nan at step", "9")


def test_ctrl_c_in_one_process_stops_all_after_the_same_step(roots):
    messages = [(roots[1] / f"interrupted/raised-{i}").read_text() for i in (0, 1)]
    assert messages[0] == messages[1]
    assert "step 3 of 12" in messages[0]
    assert [p.name for p in (roots[1] / "interrupted/checkpoints").iterdir()] == ["step-00000003"]


def test_main_process_decides_when_to_stop(roots):
    validations = [r for r in records(roots[1] / "disagreeing") if "validation_metric" in r]
    assert [r["validation_metric"] for r in validations] == [0.5, 0.4, 0.3]


def test_error_ends_all_processes_and_is_printed_once(tmp_path):
    data = write(tmp_path / "data.csv", labelled())
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    done = launched("-m", "loracle", "train", data, "--model", "demo", "--out", tmp_path / "taken")
    assert done.returncode != 0
    assert len([line for line in done.stderr.splitlines() if line.startswith("Error: ")]) == 1
    assert has_facts(done.stderr, "--out", "taken")
    assert "[rank1]" not in done.stderr


def test_other_commands_need_one_process(monkeypatch):
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    done = CliRunner().invoke(main, ["check", "reviews.csv"])
    assert done.exit_code == 2
    assert has_facts(done.stderr, "process", "check", "torchrun")


def test_fsdp_of_accelerate_is_not_supported(monkeypatch):
    monkeypatch.setitem(os.environ, "ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=facts("FSDP", "torchrun", "--shard")):
        start(torch.device("cpu"))


@pytest.mark.parametrize(
    ("flags", "fact"),
    [
        ({}, "several processes"),
        ({"full": True}, "--full"),
        ({"quantize": "nf4"}, "--quantize"),
        ({"depth": "auto"}, "--depth auto"),
    ],
)
def test_shard_conflicts_with_other_flags(tiny_model, tmp_path, flags, fact):
    data = write(tmp_path / "data.csv", labelled())
    settings = QUICK | {
        "data": str(data),
        "model": str(tiny_model("qwen2")),
        "shard": True,
        "out": str(tmp_path / "run"),
    }
    with pytest.raises(UserError, match=facts("--shard", fact)):
        pipeline.train(RunConfig.from_flat(settings | flags), log=lambda line: None, quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sharded", "error", "messages"),
    [
        (True, torch.OutOfMemoryError("CUDA out of memory"), 0),  # the others wait for a part of a layer
        (True, RuntimeError("shapes differ"), 1),
        (False, torch.OutOfMemoryError("CUDA out of memory"), 1),
    ],
)
def test_error_in_the_main_process_reaches_the_others(monkeypatch, sharded, error, messages):
    sent, along = [], SimpleNamespace(sharded=sharded, announce=None)
    monkeypatch.setattr(distributed, "PartialState", lambda: SimpleNamespace(num_processes=2, is_main_process=True))
    monkeypatch.setattr(distributed, "broadcast_object_list", sent.append)
    with pytest.raises(type(error) if messages else UserError):
        on_main(lambda: (_ for _ in ()).throw(error), along=along)
    assert [status for _, status in sent] == ["failed"] * messages
    assert along.announce is None


def test_partition_is_disjoint_and_balanced():
    lengths = [50, 3, 40, 20, 30, 1, 2]
    examples = [LabeledText(text="x" * n, labels=(0,), row=i) for i, n in enumerate(lengths)]
    parts = partition(examples, 2)
    assert sorted(i for part in parts for i in part) == list(range(7))
    assert sorted(sum(lengths[i] for i in part) for part in parts) == [73, 73]
    assert partition(examples[:1], 3) == [[0], [], []]
    assert partition(examples, 1) == [list(range(7))]
