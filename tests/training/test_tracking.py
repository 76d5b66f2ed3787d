"""--track: records reach the service through Accelerate; a missing package is a one-line error."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types

import accelerate.tracking
import pytest
from accelerate.utils import LoggerType
from small import QUICK, labelled, write

from loracle import pipeline
from loracle.config import RunConfig
from loracle.errors import UserError


class FakeRun:
    def __init__(self):
        self.logged, self.finished = [], 0

    def log(self, values, step=None):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    """A fake package with the functions that Accelerate's tracker calls."""
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.run, module.begun, module.config = FakeRun(), [], types.SimpleNamespace()
    module.settings = {}
    module.config.update = lambda values, allow_val_change: module.settings.update(values)

    def init(**how):
        module.begun.append(how)
        return module.run

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.WANDB])
    return module


def config_of(folder, model, **more):
    data = write(folder / "data.jsonl", labelled())
    flat = QUICK | {
        "data": str(data),
        "model": str(model),
        "out": str(folder / "run"),
        "max_steps": 3,
        "track": "wandb",
    }
    return RunConfig.from_flat(flat | more)


def train(config):
    return pipeline.train(config, log=lambda line: None, quiet=True)


@pytest.mark.slow
def test_service_gets_the_records_of_the_log(tiny_model, tmp_path, wandb):
    run = train(config_of(tmp_path, tiny_model("qwen2")))
    assert wandb.begun == [{"project": "loracle", "name": "run"}]
    assert wandb.settings["train.max_steps"] == 3
    assert wandb.settings["lora.r"] == 16
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert wandb.run.logged == [(line.pop("step"), line) for line in lines]
    assert [step for step, values in wandb.run.logged if "loss" in values] == [1, 2, 3]
    assert wandb.run.logged[-1][1].keys() == {"validation_metric", "validation_loss"}
    assert wandb.run.finished == 1


def test_missing_package_raises_before_the_run_folder(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    with pytest.raises(UserError, match=r"(?s)--track mlflow.*pip install mlflow"):
        train(config_of(tmp_path, tiny_model("qwen2"), track="mlflow"))
    assert not (tmp_path / "run").exists()


def test_error_of_the_service_is_one_line(tiny_model, tmp_path, wandb):
    def init(**how):
        raise RuntimeError("not logged in\nmore of it")

    wandb.init = init
    with pytest.raises(UserError, match=r"wandb.*not logged in\. .*--track") as e:
        train(config_of(tmp_path, tiny_model("qwen2")))
    assert "more of it" not in str(e.value)


@pytest.mark.slow
def test_no_tracking_without_the_flag(tiny_model, tmp_path, wandb):
    train(config_of(tmp_path, tiny_model("qwen2"), track=None))
    assert wandb.begun == wandb.run.logged == []
