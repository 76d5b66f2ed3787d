"""Training from the command line: every kind of data, with tiny models."""

from __future__ import annotations

import json
import re

import pytest
from cli_runner import CLICKS, FAST, loracle, rows_of, trained
from small import clicked, has_facts, integers, labelled, messages, pairs, several, write


@pytest.mark.slow
def test_classifier_trains_predicts_and_evaluates(tiny_model, tmp_path):
    run, output, metrics = trained(tmp_path, tiny_model("qwen2"), labelled())
    assert "text column: 'text'" in output
    assert "label column: 'label'" in output
    assert set(metrics["baselines"]) == {"majority", "tfidf", "linear-probe", "zero-shot"}
    assert re.search(r"note: .*linear probe.* layer [123], chosen on validation texts", output)
    assert metrics["test"]["accuracy"]["value"] > 0.9
    assert metrics["train"]["examples_per_s"] > 0
    assert metrics["train"]["tokens_per_s"] > metrics["train"]["examples_per_s"]

    new = write(tmp_path / "new.csv", [{"id": "a", "text": "good number 7"}, {"id": "b", "text": " "}])
    done = loracle("predict", run, new, "-o", tmp_path / "scored.csv")
    assert "1 rows without a text" in done.stderr
    first, second = rows_of(tmp_path / "scored.csv")
    assert first.keys() == {"id", "text", "predicted", "p(mid)", "p(neg)", "p(pos)"}
    assert (first["id"], first["predicted"]) == ("a", "pos")
    assert sum(float(first[f"p({n})"]) for n in ("mid", "neg", "pos")) == pytest.approx(1, abs=1e-5)
    assert (second["id"], second["predicted"]) == ("b", "")

    done = loracle("evaluate", run, tmp_path / "data.csv", "--json")
    assert json.loads(done.stdout)["accuracy"]["value"] > 0.9
    assert "ece_uncalibrated" in json.loads(done.stdout)


@pytest.mark.slow
def test_calibration_uses_validation_texts_only(tiny_model, tmp_path):
    """Other labels in the test file change the metrics and leave the calibration as it is."""
    results = []
    for name, shift in (("right", 0), ("wrong", 1)):
        (folder := tmp_path / name).mkdir()
        rows = [row | {"label": list("abc")[(i + shift) % 3]} for i, row in enumerate(labelled(30))]
        test = write(folder / "test.csv", [row | {"text": f"{row['text']} again"} for row in rows])
        data = [row | {"label": list("abc")[i % 3]} for i, row in enumerate(labelled())]
        run, _, metrics = trained(folder, tiny_model("qwen2"), data, "--no-baselines", "--test", test)
        results.append(((run / "calibration.json").read_text(), metrics["test"]["accuracy"]["value"]))
    (first, accuracy), (second, other) = results
    assert first == second
    assert accuracy > 0.9 > 0.1 > other


def test_target_precision_needs_multi_label(tiny_model, tmp_path):
    data = write(tmp_path / "single.csv", labelled())
    done = loracle("train", data, "--model", tiny_model("qwen2"), "--target-precision", "0.9", code=2)
    assert has_facts(done.stderr, "--target-precision")


@pytest.mark.slow
def test_chat_messages_in_json_files_train(tiny_model, tmp_path):
    rows = messages()
    (tmp_path / "train.json").write_text("".join(json.dumps(r) + "\n" for r in rows[:48]))
    (tmp_path / "test.json").write_text("".join(json.dumps(r) + "\n" for r in rows[48:]))
    loracle("train", tmp_path / "train.json", "--test", tmp_path / "test.json", "--model", tiny_model("llama"),
            "-o", tmp_path / "run", *FAST)  # fmt: skip
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["test"]["accuracy"]["value"] > 0.9
    assert len(rows_of(tmp_path / "run" / "predictions.csv")) == 12


@pytest.mark.slow
def test_integer_labels_are_predicted_unchanged(tiny_model, tmp_path):
    run, *_ = trained(tmp_path, tiny_model("qwen2"), integers())
    write(tmp_path / "new.jsonl", [{"text": "bad number 3"}])
    loracle("predict", run, tmp_path / "new.jsonl", "-o", tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text())["predicted"] == "10"


@pytest.mark.slow
def test_chinese_texts_and_labels(tiny_model, tmp_path):
    names = {"体育": "球队赢了比赛", "财经": "股市今天上涨"}
    rows = [{"text": f"{list(names.values())[i % 2]}{i}", "label": list(names)[i % 2]} for i in range(60)]
    run, *_ = trained(tmp_path, tiny_model("qwen3"), rows)
    write(tmp_path / "new.csv", [{"text": "股市今天上涨99"}, {"text": "球队赢了比赛99"}])
    loracle("predict", run, tmp_path / "new.csv", "-o", tmp_path / "out.csv")
    assert [r["predicted"] for r in rows_of(tmp_path / "out.csv")] == ["财经", "体育"]


@pytest.mark.slow
def test_multi_label_trains_and_predicts(tiny_model, tmp_path):
    run, output, metrics = trained(tmp_path, tiny_model("qwen2"), several(), name="data.jsonl")
    assert "any number of labels a text" in output
    assert metrics["test"]["accuracy"] == metrics["test"]["subset_accuracy"]
    write(tmp_path / "new.csv", [{"text": "good and cheap 8"}])
    loracle("predict", run, tmp_path / "new.csv", "-o", tmp_path / "out.csv")
    (row,) = rows_of(tmp_path / "out.csv")
    assert set(row["predicted"].split("|")) <= {"price", "quality", ""}
    assert 0 < float(row["p(price)"]) < 1


@pytest.mark.slow
def test_adapt_top_reloads_and_cache_lists_it(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("LORACLE_CACHE", str(tmp_path / "cache"))
    flags = ["--depth", "2", "--adapt-top", "1", "--pooling", "mean"]
    run, output, metrics = trained(tmp_path, tiny_model("qwen2"), clicked(), *CLICKS, *flags, name="data.jsonl")
    assert "states of the lower 1 layers" in output
    assert metrics["test"]["pair_accuracy"]["value"] > 0.8
    assert set(metrics["baselines"]) == {"length", "tfidf", "linear-probe", "zero-shot"}
    listed = loracle("cache").stdout
    assert "lower 1 layers" in listed
    assert "MB freed" in loracle("cache", "--clear").stdout
    assert "lower" not in loracle("cache").stdout
    assert loracle("rank", run, "bad headline 1", "good headline 1").stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--full", "--adapt-top", "1"], "--full | --adapt-top"),
        (["--loss", "margin", "--saturation", "9"], "--saturation"),
    ],
)
def test_flags_that_exclude_each_other(tmp_path, flags, words):
    assert has_facts(loracle("train", write(tmp_path / "a.jsonl", pairs()), *flags, code=2).stderr, *words.split(" | "))


@pytest.mark.slow
def test_mean_pooling_mlp_head_and_margin_loss(tiny_model, tmp_path):
    flags = ["--pooling", "mean", "--head", "mlp", "--loss", "margin", "--targets", "q_proj,v_proj", "--epochs", "1"]
    run, *_ = trained(tmp_path, tiny_model("qwen2"), pairs(), *flags, name="data.jsonl")
    adapted = json.loads((run / "adapter_config.json").read_text())["target_modules"]
    assert "q_proj" in adapted
    assert "k_proj" not in adapted


@pytest.mark.slow
@pytest.mark.parametrize("how", ["--full", "--no-full"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_encoders_train_with_and_without_adapters(tiny_model, tmp_path, kind, how):
    run, output, _ = trained(tmp_path, tiny_model(kind), labelled(), how, "--epochs", "1")
    assert "float32 on" in output
    assert ("padded, sorted by length" in output) == (kind == "distilbert")
    assert loracle("evaluate", run, tmp_path / "data.csv").exit_code == 0


@pytest.mark.slow
def test_run_remembers_columns_and_delimiter(tiny_model, tmp_path):
    rows = [{"t": r["text"], "y": ", ".join(r["labels"]) or "none"} for r in several()]
    run, *_ = trained(tmp_path, tiny_model("qwen2"), rows, "--text", "t", "--label", "y", "--label-delimiter", ", ",
                      "--epochs", "1")  # fmt: skip
    metrics = json.loads(loracle("evaluate", run, tmp_path / "data.csv", "--json").stdout)
    assert 0 <= metrics["accuracy"]["value"] <= 1
    assert metrics["base"] == str(tiny_model("qwen2").resolve())
    write(tmp_path / "new.csv", [{"text": "good and cheap"}])
    assert "predicted" in loracle("predict", run, tmp_path / "new.csv").stdout


@pytest.mark.slow
def test_null_in_pair_is_skipped_and_counted(tiny_model, tmp_path):
    rows = [*pairs(), {"chosen": None, "rejected": "bad"}]
    _, output, metrics = trained(tmp_path, tiny_model("qwen2"), rows, "--epochs", "1", name="data.jsonl")
    assert "41" in "".join(line for line in output.splitlines() if line.startswith("note:"))
    assert sum(metrics["issues"].values()) >= 1
