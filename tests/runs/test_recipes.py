"""Recipe files: those of the repository load, what is misspelt is named, and flags win over file over defaults."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from small import QUICK, labelled, write

from loracle import pipeline
from loracle.cli import _settings, main
from loracle.config import CompareConfig, RunConfig
from loracle.errors import UserError
from loracle.runs.folder import read_info
from loracle.runs.recipes import read_recipe, write_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


def test_the_recipes_of_the_issue_are_there():
    assert [p.stem for p in RECIPES] == ["ad_titles", "banking77", "n24news", "original", "upworthy"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_says_what_it_gave(path):
    flat, extra = read_recipe(path)
    config = RunConfig.from_flat(flat)
    assert config != RunConfig()
    CompareConfig(**extra["compare"])
    text = path.read_text(encoding="utf-8")
    comments = " ".join(line[1:].strip() for line in text.splitlines() if line.startswith("#")).lower()
    tables = re.findall(r"benchmarks/results/[\w.-]+\.md", comments)
    assert "not run yet" in comments or tables
    assert all((path.parents[1] / table).is_file() for table in tables)


def test_the_original_recipe_is_the_research_projects():
    config = RunConfig.from_flat(read_recipe(next(p for p in RECIPES if p.stem == "original"))[0])
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
        ("[train]\nlearning_rat = 1", "a dial of loracle in [train] of "),
        ("[train]\nepoch = 1", "found epoch (did you mean 'epochs'?)"),
        ("[model]\nlr = 1", "It stands in [train]"),
        ("[trane]\nlr = 1", "found trane (did you mean 'train'?)"),
        ("baseline = true", "found baseline (did you mean 'baselines'?)"),
        ("lr = 1e-3", "It stands in [train]"),
        ("[train\n", "expected TOML in "),
        ('[train]\nepochs = "3"', "expected a number for epochs in "),
        ("[train]\nbatch = 1.5", "expected a whole number for batch in "),
        ("[lora]\nrslora = 1", "expected true or false for rslora in "),
        ("[train]\nlr = true", "expected a number for lr in "),
    ],
)
def test_what_means_nothing_is_named(tmp_path, text, words):
    path = tmp_path / "a.toml"
    path.write_text(text)
    done = CliRunner().invoke(main, ["train", "x.csv", "--recipe", str(path)])
    assert done.exit_code == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('[data]\ndata = "file.csv"\n[train]\nepochs = 7\nbatch = 5\n')
    config, _ = _settings(None, path, {"batch": 6, "lr": None}, "train")
    assert (config.data.data, config.train.epochs, config.train.batch) == ("file.csv", 7, 6)
    assert config.train.lr is RunConfig().train.lr
    assert _settings("other.csv", path, {}, "train")[0].data.data == "other.csv"
    with pytest.raises(UserError, match="expected data to train on; found none"):
        _settings(None, None, {}, "train")
    with pytest.raises(UserError, match=r"expected a recipe at .*nowhere.toml; found No such file"):
        read_recipe(tmp_path / "nowhere.toml")


def test_a_run_is_a_recipe_and_so_is_what_is_written(tiny_model, tmp_path):
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
