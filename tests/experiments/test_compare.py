"""``loracle compare``: one split for all, a table in pairs, and nothing trained twice."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from small import clicked, facts, labelled, several, write

from loracle import pipeline
from loracle.cli import main
from loracle.config import CompareConfig, RunConfig
from loracle.errors import Interrupted, UserError
from loracle.evaluation.significance import mcnemar
from loracle.examples import LabeledText
from loracle.experiments import compare as comparing
from loracle.runs.folder import read_info
from loracle.runs.recipes import find_recipe
from loracle.tasks import Task
from loracle.tasks.dataset import Data

FAST = ["--epochs", "2", "--batch", "8", "--lr", "0.01", "--test-share", "0.3", "--validation-share", "0.2"]


def compare(*args, code=0):
    done = CliRunner().invoke(main, ["compare", *map(str, args)])
    assert done.exit_code == code, (done.output, done.stderr, done.exception)
    return done


@pytest.mark.slow
def test_several_labels_are_tested_at_the_thresholds_of_the_table(tiny_model, tmp_path):
    """Each at its own, baselines too: the difference is that of the two figures that are shown."""
    data, out = write(tmp_path / "data.jsonl", several(120)), tmp_path / "table"
    compare(data, "--model", tiny_model("qwen2"), "--against", "tfidf,linear-probe", *FAST, "-o", out)
    first, *others = json.loads((out / "comparison.json").read_text())["rows"]
    for row in others:
        gap = row["test"]["subset_accuracy"]["value"] - first["test"]["subset_accuracy"]["value"]
        assert row["paired"]["value"] == pytest.approx(gap)
        assert len(row["calibration"]["thresholds"]) == 2
    assert any(t != 0.5 for row in others for t in row["calibration"]["thresholds"])


@pytest.mark.slow
def test_the_table_of_the_original_project_with_tiny_models_in_place(tiny_model, tmp_path):
    """The recipe n24news with tiny models in place of the hub's."""
    recipe_text = find_recipe("n24news").read_text(encoding="utf-8")
    names = {"Qwen/Qwen2.5-7B-Instruct": "qwen2", "bert-base-uncased": "bert", "roberta-base": "roberta"}
    for name, kind in names.items():
        assert f'"{name}"' in recipe_text
        recipe_text = recipe_text.replace(f'"{name}"', f'"{tiny_model(kind)}"')
    (tmp_path / "recipe.toml").write_text(recipe_text, encoding="utf-8")
    data, out = write(tmp_path / "abstracts.jsonl", labelled(60)), tmp_path / "table"
    flags = [data, "--recipe", tmp_path / "recipe.toml", *FAST, "-o", out, "--price-per-hour", "2"]
    said = compare(*flags).stdout

    found = json.loads((out / "comparison.json").read_text())
    assert [r["method"] for r in found["rows"]] == ["train", "train", "train", "tfidf", "linear-probe"]
    first, *others = found["rows"]
    qwen, bert, roberta = (read_info(out / r["folder"]) for r in found["rows"][:3])
    assert (qwen.config.lora.full, bert.config.lora.full, roberta.config.lora.full) == (False, True, True)
    assert (qwen.config.train.lr, bert.config.train.lr) == (0.01, None)  # an adapter's rate is no encoder's
    assert qwen.provenance["data"] == bert.provenance["data"]
    rows = [{line.split(",")[0] for line in (out / r["folder"] / "predictions.csv").read_text().splitlines()[1:]}
            for r in found["rows"][:3]]  # fmt: skip
    assert rows[0] == rows[1] == rows[2]

    # The paired test, from the predictions as people read them.
    right = []
    for row in found["rows"][:2]:
        lines = [line.split(",") for line in (out / row["folder"] / "predictions.csv").read_text().splitlines()[1:]]
        right.append([float(cells[2] == cells[3]) for cells in lines])
    assert others[0]["paired"]["p"] == pytest.approx(mcnemar(right[1], right[0]))
    assert others[0]["paired"]["value"] == pytest.approx(np.mean(right[1]) - np.mean(right[0]))
    assert all(r["paired"]["p"] <= r["paired"]["p_holm"] <= 1 for r in others)
    assert all(r["seconds"] > 0 and r["memory"] > 1e7 for r in found["rows"])
    sizes = {"model": tiny_model("bert")}
    bare = sum(t.numel() for t in _weights(sizes["model"]).values())
    assert (
        0 < found["rows"][1]["parameters"] - bare < 3_000
    )  # pooler and head come on top, the mask's head is not there

    table = (out / "comparison.md").read_text()
    assert table.splitlines()[0].split(" | ")[1:4] == ["accuracy", "Δ accuracy", "p"]
    assert "cost / M texts" in table
    cost = 2 * 1e6 / first["texts_per_s"] / 3600
    assert f"{cost:,.2f}" in next(line for line in said.splitlines() if line.startswith("qwen2"))

    # Once more: nothing is trained again, and the table is the same.
    again = compare(*flags).stdout
    assert again.count("finished before") == 3
    assert (out / "comparison.md").read_text() == table


def _weights(folder):
    from safetensors.torch import load_file

    return {k: v for k, v in load_file(folder / "model.safetensors").items() if k.startswith("bert.")}


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on_where_it_stopped(tiny_model, tmp_path, monkeypatch):
    data = write(tmp_path / "data.jsonl", labelled(60))
    flat = {"data": str(data), "model": str(tiny_model("qwen2")), "epochs": 1, "batch": 8, "save_steps": 1, "lr": 0.01,
            "out": str(tmp_path / "table")}  # fmt: skip
    config, settings = RunConfig.from_flat(flat), CompareConfig(against=str(tiny_model("llama")))
    train_on, trained = pipeline.train_on, []

    def stopped_in_the_second(config, data, folder, **how):
        trained.append(folder.name.split("-")[0])
        if len(trained) == 2:
            raise Interrupted("stopped after step 3 of 6; go on with: loracle train --resume x")
        return train_on(config, data, folder, **how)

    monkeypatch.setattr(pipeline, "train_on", stopped_in_the_second)
    with pytest.raises(Interrupted, match=r"stopped after step 3 of 6 in .*the same command goes on"):
        comparing.run(config, settings, log=lambda line: None, quiet=True)
    comparing.run(config, settings, log=lambda line: None, quiet=True)
    assert [name.rstrip("0") for name in trained] == ["qwen2", "llama", "llama"]
    assert len(json.loads((tmp_path / "table" / "comparison.json").read_text())["rows"]) == 2


@pytest.mark.slow
def test_rankers_are_compared_by_pairs(tiny_model, tmp_path):
    data, out = write(tmp_path / "log.jsonl", clicked(30)), tmp_path / "table"
    columns = ["--group", "site,day", "--text", "headline", "--clicks", "clicks", "--impressions", "impressions"]
    compare(data, *columns, "--model", tiny_model("qwen2"), "--against", "tfidf,linear-probe", *FAST, "-o", out)
    rows = json.loads((out / "comparison.json").read_text())["rows"]
    assert [r["paired"]["metric"] for r in rows[1:]] == ["pair_accuracy"] * 2
    for row in rows[1:]:
        gap = row["test"]["pair_accuracy"]["value"] - rows[0]["test"]["pair_accuracy"]["value"]
        assert row["paired"]["value"] == pytest.approx(gap)
    assert "hours / M texts" in (out / "comparison.md").read_text()


def test_names_that_cannot_be_had_are_said_before_anything_is_trained(tiny_model, tmp_path, monkeypatch):
    data = write(tmp_path / "data.jsonl", labelled(60))
    monkeypatch.setattr(pipeline, "train_on", None)
    flags = ["--model", tiny_model("qwen2"), "-o", tmp_path / "table"]
    done = compare(data, *flags, "--against", f"tfidf,{tmp_path}/no-such", code=2)
    assert "no-such" in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2  # message and hint
    assert "tfidf is named twice" in compare(data, *flags, "--against", "tfidf,tfidf", code=2).stderr
    assert not (tmp_path / "table").exists()


def test_dials_of_decoders_are_not_put_to_encoders_in_silence(tiny_model, tmp_path):
    flat = {"model": str(tiny_model("qwen2")), "depth": 2, "adapt_top": 1, "template": "chat", "head": "mlp"}
    said = []
    settings = CompareConfig(against=f"{tiny_model('bert')},linear-probe:{tiny_model('bert')}", encoder_lr=3e-5)
    _, bert, probe = comparing.line_up(RunConfig.from_flat(flat), settings, said.append)
    assert any("is an encoder, which takes no --template, --depth, --head" in line for line in said)
    assert (bert.config.model.depth, bert.config.model.head, bert.config.lora.full) == (None, "linear", True)
    assert (bert.config.lora.adapt_top, bert.config.train.lr) == (None, 3e-5)
    assert (probe.method, probe.config.model.model) == ("linear-probe", str(tiny_model("bert")))
    assert probe.name.startswith("linear-probe:bert")


@pytest.mark.slow
def test_contenders_have_depths_of_their_own(tiny_model, tmp_path):
    """The same model whole, cut, and cut where a probe says: three rows of one table."""
    model, data, out = tiny_model("qwen2"), write(tmp_path / "data.jsonl", labelled(60)), tmp_path / "table"
    against = f"{model}@depth=1,@depth=auto"
    compare(data, "--model", model, "--against", against, *FAST, "-o", out)
    rows = json.loads((out / "comparison.json").read_text())["rows"]
    assert [r["name"].partition("@")[2] for r in rows] == ["", "depth=1", "depth=auto"]
    depths = [read_info(out / r["folder"]).config.model.depth for r in rows]
    assert depths[:2] == [None, 1]
    assert depths[2] in (1, 2, 3)
    assert rows[1]["parameters"] < rows[0]["parameters"]
    assert f"@depth=auto ({depths[2]} layers)" in (out / "comparison.md").read_text()


@pytest.mark.parametrize(("name", "words"), [
    ("@depth=deep", "--depth | 'deep'"),
    ("linear-probe@depth=2", "linear-probe | trained"),
    ("tfidf@depth=2", "trained"),
])  # fmt: skip
def test_depths_that_make_no_sense(tiny_model, name, words):
    config = RunConfig.from_flat({"model": str(tiny_model("qwen2"))})
    with pytest.raises(UserError, match=facts(*words.split(" | "))):
        comparing.line_up(config, CompareConfig(against=name), lambda line: None)


def test_a_contender_is_whole_beside_a_cut_model(tiny_model):
    config = RunConfig.from_flat({"model": str(tiny_model("qwen2")), "depth": 2})
    cut, whole = comparing.line_up(config, CompareConfig(against="@depth=full"), lambda line: None)
    assert (cut.config.model.depth, whole.config.model.depth) == (2, None)


def test_a_quantised_model_is_compared_with_what_cannot_be_quantised(tiny_model, tmp_path):
    flat = {"model": str(tiny_model("qwen2")), "quantize": "nf4"}
    said = []
    settings = CompareConfig(against=f"{tiny_model('bert')},linear-probe")
    four_bit, bert, probe = comparing.line_up(RunConfig.from_flat(flat), settings, said.append)
    assert any("takes no --quantize" in line for line in said)
    assert four_bit.config.model.quantize == "nf4"
    assert (bert.config.model.quantize, bert.config.lora.full) == (None, True)
    texts = [
        LabeledText(text=f"{word} number {i}", labels=(c,), row=i) for i in range(12) for c, word in enumerate("ab")
    ]
    task = Task(name="single_label", label_names=("a", "b"))
    data = Data(task=task, train=texts[:12], validation=texts[12:18], test=texts[18:])
    baseline, more = comparing._probe_all(probe, data, said.append)
    assert np.concatenate(baseline.scores).shape == (6, 2)
    assert more["parameters"] > 0


def test_memory_is_the_most_that_was_in_use():
    with comparing.peak_memory() as peak:
        block = torch.ones(50_000_000)  # 200 MB
        comparing.time.sleep(0.3)
        del block
    with comparing.peak_memory() as calm:
        comparing.time.sleep(0.1)
    assert 150e6 < peak[0] - calm[0] < 400e6
