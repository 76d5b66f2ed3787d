"""Recipes: the packaged ones load by name, errors name file and key, and flags win over file over defaults."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from small import QUICK, facts, has_facts, labelled, write

from loracle import pipeline
from loracle.cli import main
from loracle.cli.options import run_settings
from loracle.config import CompareConfig, RunConfig
from loracle.errors import UserError
from loracle.runs.folder import read_info
from loracle.runs.recipes import PACKAGED, find_recipe, read_recipe, recipe_names, write_recipe

ROOT = Path(__file__).parents[2]


def test_packaged_recipes_are_listed():
    assert recipe_names() == ["ad_titles", "banking77", "n24news", "original", "upworthy"]


def test_names_and_paths_find_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("original") == find_recipe(Path("original")) == PACKAGED / "original.toml"
    Path("mine.toml").write_text("baselines = false\n")
    assert find_recipe("mine.toml") == Path("mine.toml")
    assert read_recipe("mine.toml")[0] == {"baselines": False}


def test_unknown_recipe_name_gets_a_suggestion(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["train", "x.csv", "--recipe", "orignal"])
    assert done.exit_code == 2
    assert has_facts(done.stderr, "orignal", "did you mean 'original'?", "ad_titles, banking77, n24news")


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipe_loads_and_states_its_result(name):
    path = PACKAGED / f"{name}.toml"
    flat, extra = read_recipe(name)
    config = RunConfig.from_flat(flat)
    assert config != RunConfig()
    CompareConfig(**extra["compare"])
    text = path.read_text(encoding="utf-8")
    comments = " ".join(line[1:].strip() for line in text.splitlines() if line.startswith("#")).lower()
    tables = re.findall(r"benchmarks/results/[\w.-]+\.md", comments)
    assert "not run yet" in comments or tables
    assert all((ROOT / table).is_file() for table in tables)


def test_original_recipe_has_the_settings_of_the_research_project():
    config = RunConfig.from_flat(read_recipe("original")[0])
    assert (config.model.pooling, config.model.head) == ("mean", "mlp")
    assert (config.lora.targets, config.train.loss, config.train.lr) == ("q_proj,v_proj", "margin", 5e-5)


def test_lists_are_joined(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('[lora]\ntargets = ["q_proj", "v_proj"]\n[compare]\nagainst = ["tfidf", "a/b"]\n')
    flat, extra = read_recipe(path)
    assert (flat["targets"], extra["compare"]["against"]) == ("q_proj,v_proj", "tfidf,a/b")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[train]\nlearning_rat = 1", ("learning_rat", "[train]")),
        ("[train]\nepoch = 1", ("epoch", "did you mean 'epochs'?")),
        ("[model]\nlr = 1", ("lr", "[model]", "[train]")),
        ("[trane]\nlr = 1", ("trane", "did you mean 'train'?")),
        ("baseline = true", ("baseline", "did you mean 'baselines'?")),
        ("lr = 1e-3", ("lr", "[train]")),
        ("[train\n", ("TOML", "line 1")),
        ('[train]\nepochs = "3"', ("epochs", "a number", "'3'")),
        ("[train]\nbatch = 1.5", ("batch", "a whole number", "1.5")),
        ("[lora]\nrslora = 1", ("rslora", "true or false", "not 1")),
        ("[train]\nlr = true", ("lr", "a number", "True")),
    ],
)
def test_recipe_errors_name_file_key_and_value(tmp_path, text, words):
    path = tmp_path / "a.toml"
    path.write_text(text)
    done = CliRunner().invoke(main, ["train", "x.csv", "--recipe", str(path)])
    assert done.exit_code == 2
    assert has_facts(done.stderr, "a.toml", *words)
    assert len(done.stderr.strip().splitlines()) <= 2  # message and hint


def test_flags_win_over_file_over_defaults(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('[data]\ndata = "file.csv"\n[train]\nepochs = 7\nbatch = 5\n')
    config, _ = run_settings(None, path, {"batch": 6, "lr": None}, "train")
    assert (config.data.data, config.train.epochs, config.train.batch) == ("file.csv", 7, 6)
    assert config.train.lr is RunConfig().train.lr
    assert run_settings("other.csv", path, {}, "train")[0].data.data == "other.csv"
    with pytest.raises(UserError, match="train"):
        run_settings(None, None, {}, "train")
    with pytest.raises(UserError, match=facts("nowhere.toml", "no such file")):
        read_recipe(tmp_path / "nowhere.toml")


@pytest.mark.slow
def test_run_toml_and_written_recipes_are_recipes(tiny_model, tmp_path):
    data = write(tmp_path / "data.jsonl", labelled())
    flat = QUICK | {"data": str(data), "model": str(tiny_model("qwen2")), "out": str(tmp_path / "run"), "max_steps": 1}
    config = RunConfig.from_flat(flat)
    run = pipeline.train(config, log=lambda line: None, quiet=True)
    again, _ = read_recipe(run / "run.toml")
    assert "out" not in again
    assert RunConfig.from_flat(again | {"out": config.out}) == dataclasses.replace(
        config, train=read_info(run).config.train
    )
    write_recipe(tmp_path / "found.toml", config, ("accuracy 1.0",))
    assert RunConfig.from_flat(read_recipe(tmp_path / "found.toml")[0]) == dataclasses.replace(config, out=None)
    done = CliRunner().invoke(main, ["train", "--recipe", str(run / "run.toml"), "-o", str(tmp_path / "second")])
    assert done.exit_code == 0, done.output
    adapters = [(folder / "adapter_model.safetensors").read_bytes() for folder in (run, tmp_path / "second")]
    assert adapters[0] == adapters[1]  # a seed is a seed
