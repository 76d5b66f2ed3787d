"""What leaves loracle scores as the run does, of every family and head; test_parity.py sets all ways side by side."""

from __future__ import annotations

import csv
import json
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
from click.testing import CliRunner
from small import QUICK, labelled, pairs, several, write

from loracle import pipeline
from loracle.cli import main
from loracle.config import RunConfig
from loracle.errors import UserError
from loracle.runs import export as exporting
from loracle.runs.export import export
from loracle.runs.predictor import Predictor

TEXTS = ["good day", "bad " * 300, "so — naïve 标题", "<|im_end|> good"]
KINDS = {"single": labelled, "multi": several, "rank": pairs}


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """Runs by kind of task, base model and further settings, each trained once."""
    known = {}

    def train(kind, base="qwen2", **more):
        key = (kind, base, *sorted(more.items()))
        if key not in known:
            folder = tmp_path_factory.mktemp(f"{kind}-{base}")
            config = QUICK | {"data": str(write(folder / "a.jsonl", KINDS[kind]())), "model": str(tiny_model(base))}
            known[key] = pipeline.train(
                RunConfig.from_flat(config | {"out": str(folder / "run"), "max_length": 64} | more),
                log=lambda line: None,
                quiet=True,
            )
        return known[key]

    return train


@pytest.mark.parametrize("base", ["llama", "gemma3_text", "bert", "roberta"])
def test_every_family_goes_through_plain_transformers(trained, tmp_path, base):
    more = {"full": True} if base in ("bert", "roberta") else {}
    out = export(trained("single", base, **more), tmp_path / "plain", "transformers", log=lambda line: None)
    assert (out / "model.safetensors").exists()  # and it was compared: see the next test


def behind(kind, **more):
    """Rows with a context each; in some of them it is most of what there is."""
    return [{**row, "context": f"Brief {i}" if i % 2 else f"Money {i} " * 20} for i, row in enumerate(KINDS[kind]())]


@pytest.mark.parametrize("kind", ["single", "rank"])
@pytest.mark.parametrize("template", [None, "About {context}: {text}"], ids=["no template", "template"])
def test_what_was_learnt_behind_a_context_is_tried_behind_one(tiny_model, tmp_path, monkeypatch, kind, template):
    """Over-long texts and contexts among them, by both formats, and with the accuracy that the run has."""
    pytest.importorskip("openvino", reason="the extra int8 is not installed")
    config = QUICK | {"data": str(write(tmp_path / "a.jsonl", behind(kind))), "model": str(tiny_model("qwen2"))}
    config |= {"out": str(tmp_path / "run"), "max_length": 48, "template": template, "context": "context"}
    run = pipeline.train(RunConfig.from_flat(config), log=lambda line: None, quiet=True)
    with (run / "predictions.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert {row["context"] for row in rows} <= {row["context"] for row in behind(kind)}
    assert {row["context"][:5] for row in rows} == {"Brief", "Money"}
    asked = []
    scores = Predictor.scores
    monkeypatch.setattr(Predictor, "scores", lambda self, *given: asked.append(given) or scores(self, *given))
    export(run, tmp_path / "plain", "transformers", log=lambda line: None)
    texts, contexts = asked[0]
    assert contexts[:-1] == [row["context"] for row in rows[:64]]
    assert len(texts[-1]) > 48
    said = []
    export(run, tmp_path / "eight", "openvino", log=said.append)
    if kind == "single":
        monkeypatch.undo()
        known = Predictor(run).predict([row["text"] for row in rows], [row["context"] for row in rows])
        right = np.mean([label == row["label"] for label, row in zip(known, rows, strict=True)])
        assert f"accuracy {right:.1%} before" in said[0]
    else:
        assert "of the pairs of titles" in said[0]


def test_an_export_that_differs_is_no_export(trained, tmp_path, monkeypatch):
    merged = exporting.load_merged

    def broken(*args, **more):
        model = merged(*args, **more)
        model.score.weight.data.mul_(1.01)
        return model

    monkeypatch.setattr(exporting, "load_merged", broken)
    with pytest.raises(RuntimeError, match="does not score as"):
        export(trained("single"), tmp_path / "plain", "transformers")
    assert not (tmp_path / "plain").exists()


def test_a_run_that_reads_long_texts_in_chunks_leaves_as_one_that_cuts_them(trained, tmp_path):
    said = []
    export(trained("single", long="chunk"), tmp_path / "plain", "transformers", log=said.append)
    assert any("chunk" in line for line in said)


@pytest.mark.parametrize("roundings", [0, 1e6])
def test_rounding_is_measured_by_the_run_itself(trained, tmp_path, monkeypatch, roundings):
    monkeypatch.setattr(exporting, "TOLERANCE", 0.0)
    monkeypatch.setattr(exporting, "ROUNDINGS", roundings)
    allowed, said = pytest.raises(RuntimeError, match="does not score as") if roundings == 0 else nullcontext(), []
    with allowed:
        export(trained("single"), tmp_path / "plain", "transformers", log=said.append)
    assert [line.startswith("the run's scores to ") for line in said[:1]] == [True] * (roundings > 0)


def test_what_a_plain_class_cannot_hold_is_refused_with_the_reason(trained, tmp_path):
    for more, reason in (({"pooling": "mean"}, "mean pooling"), ({"head": "mlp"}, "an MLP head")):
        with pytest.raises(UserError, match=reason):
            export(trained("single", **more), tmp_path / "plain", "transformers")
    assert not (tmp_path / "plain").exists()


def test_a_folder_in_use_and_an_export_are_refused(trained, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match=r"thesis|files in it"):
        export(trained("single"), tmp_path / "mine", "transformers")
    assert (tmp_path / "mine" / "thesis.txt").exists()


EIGHT = {
    "last": ("single", "qwen2", {}), "mean": ("rank", "llama", {"pooling": "mean"}), "mlp": ("multi", "qwen2", {"head": "mlp"}),
    "windows": ("single", "gemma3_text", {}), "encoder": ("single", "bert", {"full": True}),
}  # fmt: skip


@pytest.mark.parametrize("how", EIGHT)
def test_int8_scores_nearly_as_the_run_and_the_same_in_any_company(trained, tmp_path, how):
    pytest.importorskip("openvino", reason="the extra int8 is not installed")
    kind, base, more = EIGHT[how]
    run = trained(kind, base, **more)
    said = []
    out = export(run, tmp_path / "eight", "openvino", log=said.append)
    exact, rounded = Predictor(run).scores(TEXTS), Predictor(out).scores(TEXTS)
    spread = np.abs(exact).max()
    assert 0 < np.abs(exact - rounded).max() < 0.1 * spread
    alone = np.concatenate([Predictor(out).scores([text]) for text in TEXTS])
    np.testing.assert_allclose(alone, rounded, atol=0.01 * spread)
    with (run / "predictions.csv").open() as f:
        tried = [row["text"] for row in csv.DictReader(f)]
    if kind != "rank":
        names = [Predictor(folder).predict(tried) for folder in (run, out)]
        same = np.mean([a == b for a, b in zip(*names, strict=True)])
        assert f"int8 gives the labels of the run to {same:.1%} of {len(tried)} test texts" in said[0]
    assert "int8" in said[0]
    with pytest.raises(UserError, match="which is an export"):
        export(out, tmp_path / "again", "openvino")


def test_a_tokenizer_that_transformers_takes_for_another_is_refused(tiny_model, tmp_path):
    """It rebuilds how texts are cut for every Qwen2, whatever tokenizer.json says, by which we train."""
    base = shutil.copytree(tiny_model("qwen2"), tmp_path / "base")
    known = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    known["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    (base / "tokenizer.json").write_text(json.dumps(known), encoding="utf-8")
    config = QUICK | {"data": str(write(tmp_path / "a.jsonl", labelled())), "model": str(base)}
    run = pipeline.train(
        RunConfig.from_flat(config | {"out": str(tmp_path / "run")}), log=lambda line: None, quiet=True
    )
    with pytest.raises(UserError, match=r"tokenizer.json has it; found Qwen2Tokenizer, .*Serve the run itself"):
        export(run, tmp_path / "plain", "transformers", log=lambda line: None)
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize("named", ["run", ".", ".."])
def test_without_a_folder_it_goes_beside_the_run(trained, monkeypatch, named):
    run = trained("single")
    monkeypatch.chdir({"run": run.parent, ".": run, "..": run / "tensorboard"}[named])
    made = []
    monkeypatch.setattr(exporting, "export", lambda run, out, *_, **more: made.append(out) or out)
    done = CliRunner().invoke(main, ["export", named, "--to", "openvino"])
    assert done.exit_code == 0, done.output
    assert [out.resolve() for out in made] == [run.with_name("run-openvino")]
    assert done.output == f"export: {made[0]}\n"


def test_int8_is_a_run_folder_that_predict_takes(trained, tmp_path):
    pytest.importorskip("openvino", reason="the extra int8 is not installed")
    run, data = trained("single"), tmp_path / "new.csv"
    data.write_text("text\n" + "\n".join(["good number 3", "bad number 4"]) + "\n")
    done = CliRunner().invoke(main, ["export", str(run), "--to", "openvino", "-o", str(tmp_path / "eight")])
    assert done.exit_code == 0, done.output
    assert "test texts; accuracy" in done.output
    done = CliRunner().invoke(main, ["predict", str(tmp_path / "eight"), str(data), "-o", str(tmp_path / "out.csv")])
    assert done.exit_code == 0, done.output
    with (tmp_path / "out.csv").open() as f:
        assert [row["predicted"] for row in csv.DictReader(f)] == Predictor(run).predict(
            ["good number 3", "bad number 4"]
        )
