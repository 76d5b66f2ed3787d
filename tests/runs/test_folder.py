"""A run folder is complete, tells what it is, and shows every damage."""

from __future__ import annotations

import dataclasses
import json
import shutil
import typing

import pytest
from small import QUICK, labelled, write

from loracle import pipeline
from loracle.config import RunConfig
from loracle.errors import UserError
from loracle.runs.folder import RunInfo, read_info, verify, write_info, write_manifest
from loracle.tasks import Task

FILES = (
    "README.md", "adapter_config.json", "adapter_model.safetensors", "calibration.json", "log.jsonl", "metrics.json",
    "predictions.csv", "reference.json", "report.html", "report.json", "run.toml", "tokenizer.json", "tokenizer_config.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    data = write(folder / "a.csv", labelled())
    config = RunConfig.from_flat(
        QUICK | {"data": str(data), "model": str(tiny_model("qwen2")), "out": str(folder / "run")}
    )
    return pipeline.train(config, log=lambda line: None, quiet=True)


@pytest.fixture
def run(trained, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(trained, tmp_path / "run")


def refusal(function, *args) -> str:
    with pytest.raises(UserError) as refused:
        function(*args)
    return str(refused.value)


@pytest.mark.slow
def test_everything_is_there_and_in_the_manifest(trained):
    assert {p.name for p in trained.iterdir()} == {*FILES, "manifest.json", "tensorboard"}
    assert sorted(json.loads((trained / "manifest.json").read_text())) == sorted(FILES)
    verify(trained)


@pytest.mark.slow
def test_metrics_hold_speed_and_accuracy(trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["train"]["examples_per_s"] > 0
    assert metrics["train"]["tokens_per_s"] > 0
    assert 0 <= metrics["test"]["accuracy"]["value"] <= 1


def test_provenance_says_where_it_came_from(trained):
    info = read_info(trained)
    assert len(info.base["sha256"]) == len(info.provenance["data"]["train"]) == 64
    assert info.provenance["counts"] == {"train": 38, "validation": 10, "test": 12}
    assert {"torch", "transformers", "peft", "loracle"} <= info.provenance["versions"].keys()
    assert info.load_kwargs == {"num_labels": 3, "pad_token_id": info.load_kwargs["pad_token_id"], "dtype": "float32"}
    assert info.task == Task(name="single_label", label_names=("mid", "neg", "pos"))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_a_damaged_file_is_named(run, name, damage):
    data = bytearray((run / name).read_bytes())
    if damage == "missing":
        (run / name).unlink()
    elif damage == "cut":
        (run / name).write_bytes(data[:-1])
    else:
        data[len(data) // 2] ^= 1
        (run / name).write_bytes(data)
    assert name in refusal(verify, run)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "not finished"), ("{", "manifest.json is damaged"), ("[1]", "manifest.json is damaged")],
)
def test_a_damaged_or_missing_manifest_is_refused(run, content, words):
    (run / "manifest.json").unlink() if content is None else (run / "manifest.json").write_text(content)
    assert words in refusal(verify, run)


@pytest.mark.parametrize("content", ["", "[config", "x = 1", "\0", "[config]\n[task]\nkind = 'x'\nwrong = 1\n"])
def test_a_broken_run_toml_is_refused(run, content):
    (run / "run.toml").write_text(content)
    assert "run.toml is damaged" in refusal(read_info, run)


def test_bytes_that_are_no_text_in_run_toml_are_refused(run):
    (run / "run.toml").write_bytes(b"\xff\xfe")
    assert "run.toml is damaged" in refusal(read_info, run)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    assert "no run.toml" in refusal(read_info, tmp_path)
    assert "no such folder" in refusal(read_info, tmp_path / "none")


# --- run.toml ---------------------------------------------------------------------------------------------------------

OTHER = {
    "template": "Topic of {text}:", "long": "chunk", "pooling": "mean", "head": "mlp", "dtype": "float32",
    "loss": "dirichlet", "class_weights": "balanced", "device": "cpu", "quantize": "nf4", "test_share": 0.25,
    "validation_share": 0.35, "head_init": "names", "track": "wandb",
}  # fmt: skip


def another(kind: type, f: dataclasses.Field) -> typing.Any:
    """A value of a field that is not its default."""
    hint = typing.get_type_hints(kind)[f.name]
    base = next(k for k in (*typing.get_args(hint), hint) if k is not type(None))
    if f.name in OTHER:
        return OTHER[f.name]
    if base is bool:
        return not f.default
    return (f.default or 0) + (7 if base is int else 0.5) if base in (int, float) else f'{f.name}, "quoted" \\ ö 标\n'


@pytest.mark.parametrize(
    "left_out",  # some exclude each other
    [("full", "head", "shard"), ("adapt_top", "quantize", "head_init", "shard"), ("full", "quantize", "head")],
)
def test_run_toml_gives_every_field_back(tmp_path, left_out):
    sections = {
        name: type(section)(
            **{f.name: another(type(section), f) for f in dataclasses.fields(section) if f.name not in left_out}
        )
        for name, section in ((n, getattr(RunConfig(), n)) for n in RunConfig.SECTIONS)
    }
    config = RunConfig(**sections, out=str(tmp_path), baselines=False)
    for section in sections.values():
        for f in dataclasses.fields(section):
            assert getattr(section, f.name) != f.default or f.name in left_out, f"{f.name} is not tried"
    task = Task(name="single_label", label_names=("1", "ö 标", "", 'a"b'))
    info = RunInfo(
        config=config,
        task=task,
        base={"source": "x", "sha256": "y"},
        load_kwargs={"num_labels": 4},
        provenance={"lr": 1e-5},
    )
    write_info(tmp_path, info)
    assert read_info(tmp_path) == info


def test_the_defaults_come_back_too(tmp_path):
    config = RunConfig(out=str(tmp_path))
    task = Task(name="click_ranking")
    write_info(tmp_path, RunInfo(config=config, task=task, base={}, load_kwargs={}, provenance={}))
    assert read_info(tmp_path).config == config
    assert read_info(tmp_path).task == task


def test_caches_and_boards_are_not_in_the_manifest(run):
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "x").write_text("x")
    write_manifest(run)
    assert sorted(json.loads((run / "manifest.json").read_text())) == sorted(FILES)
