"""--track: what is logged reaches the service, through Accelerate; a missing package is one line."""

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
    """A stand-in for the package: what Accelerate's tracker calls of it."""
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


def test_the_service_gets_what_the_log_has(tiny_model, tmp_path, wandb):
    run = train(config_of(tmp_path, tiny_model("qwen2")))
    assert wandb.begun == [{"project": "loracle", "name": "run"}]
    assert wandb.settings["train.max_steps"] == 3
    assert wandb.settings["lora.r"] == 16
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert wandb.run.logged == [(line.pop("step"), line) for line in lines]
    assert [step for step, values in wandb.run.logged if "loss" in values] == [1, 2, 3]
    assert wandb.run.logged[-1][1].keys() == {"validation_metric", "validation_loss"}
    assert wandb.run.finished == 1


def test_a_missing_package_is_said_before_anything_is_made(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    with pytest.raises(UserError, match=r"expected mlflow for --track mlflow; found none installed\. Run: pip install"):
        train(config_of(tmp_path, tiny_model("qwen2"), track="mlflow"))
    assert not (tmp_path / "run").exists()


def test_a_service_that_refuses_is_one_line(tiny_model, tmp_path, wandb):
    def init(**how):
        raise RuntimeError("not logged in\nmore of it")

    wandb.init = init
    with pytest.raises(UserError, match=r"expected wandb to begin a run; found not logged in\. Log in there"):
        train(config_of(tmp_path, tiny_model("qwen2")))


def test_without_track_nothing_is_begun(tiny_model, tmp_path, wandb):
    train(config_of(tmp_path, tiny_model("qwen2"), track=None))
    assert wandb.begun == wandb.run.logged == []
