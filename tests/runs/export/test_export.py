"""Exports score as the run does, for every family and head; test_parity.py compares all ways of scoring."""

from __future__ import annotations

import csv
import json
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
from click.testing import CliRunner
from small import QUICK, facts, has_facts, labelled, pairs, several, write

from loracle import pipeline
from loracle.cli import main
from loracle.config import RunConfig
from loracle.errors import UserError
from loracle.models import build
from loracle.runs import export as exporting
from loracle.runs.export import EXPORTERS, export
from loracle.runs.export import transformers as transformers_export
from loracle.runs.predictor import Predictor

TEXTS = ["good day", "bad " * 300, "so — naïve 标题", "<|im_end|> good"]
KINDS = {"single": labelled, "multi": several, "rank": pairs}


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """Runs by kind of task, base model and further settings, each trained once."""
    runs = {}

    def train(kind, base="qwen2", **more):
        key = (kind, base, *sorted(more.items()))
        if key not in runs:
            folder = tmp_path_factory.mktemp(f"{kind}-{base}")
            config = QUICK | {"data": str(write(folder / "a.jsonl", KINDS[kind]())), "model": str(tiny_model(base))}
            runs[key] = pipeline.train(
                RunConfig.from_flat(config | {"out": str(folder / "run"), "max_length": 64} | more),
                log=lambda line: None,
                quiet=True,
            )
        return runs[key]

    return train


@pytest.mark.slow
@pytest.mark.parametrize("base", ["llama", "gemma3_text", "bert", "roberta"])
def test_every_family_exports_to_transformers(trained, tmp_path, base):
    more = {"full": True} if base in ("bert", "roberta") else {}
    out = export(trained("single", base, **more), tmp_path / "plain", "transformers", log=lambda line: None)
    assert (
        out / "model.safetensors"
    ).exists()  # export compares it: see test_differing_export_raises_and_leaves_nothing


def behind(kind, **more):
    """Rows with a context each; some contexts are longer than their text."""
    return [{**row, "context": f"Brief {i}" if i % 2 else f"Money {i} " * 20} for i, row in enumerate(KINDS[kind]())]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["single", "rank"])
@pytest.mark.parametrize("template", [None, "About {context}: {text}"], ids=["no template", "template"])
def test_exports_are_compared_with_contexts(tiny_model, tmp_path, monkeypatch, kind, template):
    """Both formats, with over-long texts and contexts, and the run's own accuracy."""
    pytest.importorskip("openvino", reason="the extra int8 is not installed")
    config = QUICK | {"data": str(write(tmp_path / "a.jsonl", behind(kind))), "model": str(tiny_model("qwen2"))}
    config |= {"out": str(tmp_path / "run"), "max_length": 48, "template": template, "context": "context"}
    run = pipeline.train(RunConfig.from_flat(config), log=lambda line: None, quiet=True)
    with (run / "predictions.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert {row["context"] for row in rows} <= {row["context"] for row in behind(kind)}
    assert {row["context"][:5] for row in rows} == {"Brief", "Money"}
    calls = []
    scores = Predictor.scores
    monkeypatch.setattr(Predictor, "scores", lambda self, *given: calls.append(given) or scores(self, *given))
    export(run, tmp_path / "plain", "transformers", log=lambda line: None)
    texts, contexts = calls[0]
    assert contexts[:-1] == [row["context"] for row in rows[:64]]
    assert len(texts[-1]) > 48
    lines = []
    export(run, tmp_path / "eight", "openvino", log=lines.append)
    if kind == "single":
        monkeypatch.undo()
        predicted = Predictor(run).predict([row["text"] for row in rows], [row["context"] for row in rows])
        right = np.mean([label == row["label"] for label, row in zip(predicted, rows, strict=True)])
        assert f"accuracy {right:.1%} before" in lines[0]
    else:
        assert "of the pairs of titles" in lines[0]


@pytest.mark.slow
def test_differing_export_raises_and_leaves_nothing(trained, tmp_path, monkeypatch):
    merged = build.load_merged

    def broken(*args, **more):
        model = merged(*args, **more)
        model.score.weight.data.mul_(1.01)
        return model

    monkeypatch.setattr(build, "load_merged", broken)
    with pytest.raises(RuntimeError, match="does not score as"):
        export(trained("single"), tmp_path / "plain", "transformers")
    assert not (tmp_path / "plain").exists()


@pytest.mark.slow
def test_export_of_a_chunking_run_notes_that_texts_are_cut(trained, tmp_path):
    lines = []
    export(trained("single", long="chunk"), tmp_path / "plain", "transformers", log=lines.append)
    assert any("chunk" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("roundings", [0, 1e6])
def test_allowed_rounding_is_that_of_the_run(trained, tmp_path, monkeypatch, roundings):
    monkeypatch.setattr(transformers_export, "TOLERANCE", 0.0)
    monkeypatch.setattr(transformers_export, "ROUNDINGS", roundings)
    allowed, lines = pytest.raises(RuntimeError, match="does not score as") if roundings == 0 else nullcontext(), []
    with allowed:
        export(trained("single"), tmp_path / "plain", "transformers", log=lines.append)
    assert [line.startswith("the run's scores to ") for line in lines[:1]] == [True] * (roundings > 0)


@pytest.mark.slow
def test_head_or_pooling_that_transformers_cannot_hold_raises(trained, tmp_path):
    for more, reason in (({"pooling": "mean"}, "mean pooling"), ({"head": "mlp"}, "an MLP head")):
        with pytest.raises(UserError, match=reason):
            export(trained("single", **more), tmp_path / "plain", "transformers")
    assert not (tmp_path / "plain").exists()


def test_folder_in_use_raises_and_is_kept(trained, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="mine"):
        export(trained("single"), tmp_path / "mine", "transformers")
    assert (tmp_path / "mine" / "thesis.txt").exists()


EIGHT = {
    "last": ("single", "qwen2", {}), "mean": ("rank", "llama", {"pooling": "mean"}), "mlp": ("multi", "qwen2", {"head": "mlp"}),
    "windows": ("single", "gemma3_text", {}), "encoder": ("single", "bert", {"full": True}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("how", EIGHT)
def test_int8_scores_are_close_and_independent_of_the_batch(trained, tmp_path, how):
    pytest.importorskip("openvino", reason="the extra int8 is not installed")
    kind, base, more = EIGHT[how]
    run = trained(kind, base, **more)
    lines = []
    out = export(run, tmp_path / "eight", "openvino", log=lines.append)
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
        assert has_facts(lines[0], f"{same:.1%} of {len(tried)} test texts")
    assert "int8" in lines[0]
    with pytest.raises(UserError, match="is an export"):
        export(out, tmp_path / "again", "openvino")


@pytest.mark.slow
def test_tokenizer_that_transformers_rebuilds_raises(tiny_model, tmp_path):
    """transformers ignores the pre-tokenizer in tokenizer.json for every Qwen2; loracle trains with it."""
    base = shutil.copytree(tiny_model("qwen2"), tmp_path / "base")
    tokenizer = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": True,
    }
    (base / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    config = QUICK | {"data": str(write(tmp_path / "a.jsonl", labelled())), "model": str(base)}
    run = pipeline.train(
        RunConfig.from_flat(config | {"out": str(tmp_path / "run")}), log=lambda line: None, quiet=True
    )
    with pytest.raises(UserError, match=facts("Qwen2Tokenizer", "qwen2", "tokenizer.json")):
        export(run, tmp_path / "plain", "transformers", log=lambda line: None)
    assert not (tmp_path / "plain").exists()


class ToyExporter:
    """Write the number of weights."""

    help = "a number"

    def check(self, info):
        if info.config.model.head != "linear":
            raise UserError("The run has an MLP head.")

    def write(self, model, run, out):
        (out / "weights.txt").write_text(str(sum(p.numel() for p in model.parameters())))

    def compare(self, run, out, base):
        return f"{(out / 'weights.txt').read_text()} weights"

    def notes(self, info):
        return ["a number is no model"]


@pytest.mark.slow
def test_registered_exporter_needs_no_other_change(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(EXPORTERS, "toy", ToyExporter())
    lines = []
    out = export(trained("single"), tmp_path / "toy", "toy", log=lines.append)
    assert lines == [f"{(out / 'weights.txt').read_text()} weights", "note: a number is no model"]
    with pytest.raises(UserError, match="MLP head"):
        export(trained("single", head="mlp"), tmp_path / "mlp", "toy")
    assert not (tmp_path / "mlp").exists()


@pytest.mark.parametrize("named", ["run", ".", ".."])
def test_default_output_is_beside_the_run(trained, monkeypatch, named):
    run = trained("single")
    monkeypatch.chdir({"run": run.parent, ".": run, "..": run / "tensorboard"}[named])
    made = []
    monkeypatch.setattr(exporting, "export", lambda run, out, *_, **more: made.append(out) or out)
    done = CliRunner().invoke(main, ["export", named, "--to", "openvino"])
    assert done.exit_code == 0, done.output
    assert [out.resolve() for out in made] == [run.with_name("run-openvino")]
    assert done.output == f"export: {made[0]}\n"


@pytest.mark.slow
def test_int8_export_is_a_run_folder_for_predict(trained, tmp_path):
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
