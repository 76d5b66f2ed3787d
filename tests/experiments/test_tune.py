"""``loracle tune``: on validation examples alone, goes on where it stopped, and leaves a recipe that train takes."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from small import facts, has_facts, labelled, write

from loracle.cli import main
from loracle.config import RunConfig, TuneConfig
from loracle.errors import Interrupted, UserError
from loracle.experiments import tune
from loracle.runs.recipes import read_recipe
from loracle.tasks.dataset import prepare_data
from loracle.training import fit as training_fit

FAST = ["--epochs", "2", "--batch", "8", "--lr", "0.003", "--validation-share", "0.3"]


def loracle(*args, code=0):
    done = CliRunner().invoke(main, list(map(str, args)))
    assert done.exit_code == code, (done.output, done.stderr, done.exception)
    return done


def config_of(folder, model, **more):
    data = write(folder / "data.jsonl", labelled(60))
    flat = {"data": str(data), "model": str(model), "epochs": 1, "batch": 8, "lr": 0.003, "out": str(folder / "tune")}
    return RunConfig.from_flat(flat | more)


@pytest.mark.slow
def test_a_recipe_is_found_and_trains(tiny_model, tmp_path, monkeypatch):
    data, out = write(tmp_path / "data.csv", labelled(60)), tmp_path / "tune"
    seen, validate = [], training_fit.validate

    def recording(scorer, encoder, examples, task, loss):
        seen.extend(e.text for e in examples)
        return validate(scorer, encoder, examples, task, loss)

    monkeypatch.setattr(training_fit, "validate", recording)
    flags = [data, "--model", tiny_model("qwen2"), *FAST, "-o", out]
    said = loracle("tune", *flags, "--trials", "6").stdout
    lines = [line for line in said.splitlines() if line.startswith("trial ") and ": lr" in line]
    assert len(lines) == 6
    assert float(lines[0].split(", epochs")[0].split("lr ")[1]) == 0.003  # a third of them: what is given
    assert "r 16" in lines[0]
    assert "targets all-linear" in lines[0]
    assert len({line.split("lr ")[1].partition(":")[0] for line in lines}) == 6

    config = RunConfig.from_flat({"data": str(data), "validation_share": 0.3})
    sides = prepare_data(config, lambda line: None)
    assert set(seen) == {e.text for e in sides.validation}  # and no test text

    flat, _ = read_recipe(out / "recipe.toml")
    best = max(float(line.rpartition(": ")[2]) for line in lines if "stopped" not in line)
    assert f"accuracy {best:.4f}" in (out / "recipe.toml").read_text().splitlines()[0]
    assert flat["alpha"] == 2 * flat["r"]
    loracle("train", "--recipe", out / "recipe.toml", "-o", tmp_path / "run", "--no-baselines")
    trained = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert trained["validation"]["accuracy"] == pytest.approx(best, abs=1e-4)

    # The study is text, nothing is trained again, and more trials search on.
    (journal,) = out.glob("study-*.jsonl")
    assert all(json.loads(line) for line in journal.read_text().splitlines())
    assert "lr " not in loracle("tune", *flags, "--trials", "6").stdout.partition("\ntrial ")[0]
    more = loracle("tune", *flags, "--trials", "9").stdout
    assert len(more := [line for line in more.splitlines() if line.startswith("trial ") and ": lr" in line]) == 3
    assert not any("lr 0.003," in line for line in more)  # the middle of a sweep of three
    assert not (out / "trial").exists()


@pytest.mark.slow
def test_an_interrupted_search_trains_the_trial_again(tiny_model, tmp_path, monkeypatch):
    config, fit_model, rates = config_of(tmp_path, tiny_model("qwen2")), tune.fit_model, []

    def stopped(config, model, *args, **how):
        rates.append(model.lr)
        if len(rates) == 2:
            raise Interrupted("stopped after step 1 of 6; go on with: loracle train --resume x")
        return fit_model(config, model, *args, **how)

    monkeypatch.setattr(tune, "fit_model", stopped)
    with pytest.raises(Interrupted, match="stopped after step 1 of 6 of a trial; the same command goes on"):
        tune.run(config, TuneConfig(trials=9), log=lambda line: None)
    assert len(rates) == 2
    tune.run(config, TuneConfig(trials=9), log=lambda line: None)
    assert len(rates) == 10  # nine, and the one that was broken off
    assert rates[:4] == pytest.approx([0.0003, 0.003, 0.03, 0.003])  # those that wait go before it


@pytest.mark.slow
def test_poor_trials_are_stopped_and_broken_ones_are_said(tiny_model, tmp_path, monkeypatch):
    """By looks as scripted: the fourth trial is below the others' median at its first look, the fifth diverges."""
    script = iter([0.5, 0.6, 0.6, 0.7, 0.7, 0.8, 0.1, np.nan, 0.9, 0.9])
    looks = []

    def scripted(*given):
        looks.append(next(script))
        return {"metric": -np.inf if np.isnan(looks[-1]) else looks[-1], "loss": looks[-1]}

    monkeypatch.setattr(training_fit, "validate", scripted)
    config = config_of(tmp_path, tiny_model("qwen2"), evals_per_epoch=2)
    monkeypatch.setattr(tune, "LENGTHS", (1.0,))
    said = []
    path = tune.run(config, TuneConfig(trials=6), log=said.append)
    lines = [line for line in said if line.startswith("trial ")]
    assert lines[3].endswith("stopped at validation 1, below the median")
    assert has_facts(lines[4], "stopped", "nan", "step")
    assert lines[5].endswith(": 0.9000")
    assert "validation accuracy 0.9000" in path.read_text()
    assert len(looks) == 10


def test_what_is_searched_depends_on_what_is_trained(tiny_model, tmp_path):
    def trials(kind, **more):
        config = config_of(tmp_path, tiny_model(kind), **more)
        data = prepare_data(config, lambda line: None)
        return tune.Trials(config, data, tmp_path / "trial", lambda line: None)

    assert trials("bert", full=True).given == {"epochs": 1.0}
    assert trials("bert").space["targets"] == ("all-linear", "query,value")
    qwen = trials("qwen2", r=12, targets="k_proj")
    assert qwen.space["r"] == (4, 8, 12, 16, 32, 64)
    assert qwen.space["targets"] == ("k_proj", "all-linear", "q_proj,v_proj")
    for count in (3, 4):  # what is given is among them
        assert qwen.sweep(count) == pytest.approx([0.0003, 0.003, 0.03])
    assert trials("qwen2", depth="auto").config.model.depth in (1, 2, 3)


@pytest.mark.slow
def test_the_lower_states_are_read_from_the_cache(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("LORACLE_CACHE", str(tmp_path / "cache"))
    tune.run(config_of(tmp_path, tiny_model("qwen2"), adapt_top=1), TuneConfig(trials=2), log=lambda line: None)
    assert "lower 2 layers" in loracle("cache").stdout


def test_without_optuna_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=facts("optuna", "pip install")):
        tune.run(config_of(tmp_path, "unused"), TuneConfig(), log=lambda line: None)
