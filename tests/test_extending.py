"""Each registry takes a new entry, and the entry works from the command line's own functions to the saved files."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from serving.serving_client import client_for, post
from small import QUICK, labelled, write
from toy_task import STARS
from transformers import AutoModelForSequenceClassification

from loracle import hubs, pipeline
from loracle.baselines import BASELINES
from loracle.baselines.base import Baseline, BaselineInputs, BaselineType
from loracle.cli import main
from loracle.config import RunConfig
from loracle.data.formats import FORMATS
from loracle.data.table import File, Format, Table, read_lines
from loracle.models.architectures import ARCHITECTURES, Architecture
from loracle.runs.export import EXPORTERS, export
from loracle.runs.folder import read_info
from loracle.runs.predictor import Predictor
from loracle.tasks import TASKS
from loracle.training.losses import LOSSES, Loss, LossSettings, LossType

SETTINGS = QUICK | {"max_steps": 2}


def train(folder: Path, data: str | Path, model: str | Path, **settings: Any) -> Path:
    config = SETTINGS | {"data": str(data), "model": str(model), "out": str(folder / "run")} | settings
    return pipeline.train(RunConfig.from_flat(config), log=lambda line: None, quiet=True)


def metrics_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "metrics.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_hub(tmp_path, tiny_model, monkeypatch):
    class Shelf(hubs.Hub):
        """Repositories are folders of this test; the name says which."""

        def fetch(self, repo: str, repo_type: str, revision: str | None) -> Path:
            return tmp_path / "shelf" / repo

        def upload(self, folder: Path, repo: str, options: hubs.UploadOptions) -> str:
            return str(shutil.copytree(folder, tmp_path / "shelf" / repo))

    monkeypatch.setitem(hubs.HUBS, "shelf", Shelf())
    (tmp_path / "shelf/me/reviews").mkdir(parents=True)
    write(tmp_path / "shelf/me/reviews/train.csv", labelled())
    shutil.copytree(tiny_model("qwen2"), tmp_path / "shelf/me/model")
    run = train(tmp_path, "shelf:me/reviews", "shelf:me/model")
    main(["push", str(run), "shelf:me/run"], standalone_mode=False)
    main(["pull", "shelf:me/run", "--out", str(tmp_path / "again")], standalone_mode=False)
    texts = ["good day", "bad day"]
    np.testing.assert_array_equal(Predictor(tmp_path / "again").scores(texts), Predictor(run).scores(texts))


@pytest.mark.slow
def test_format(tmp_path, tiny_model, monkeypatch):
    def open_pipes(file: File) -> Table:
        rows = [dict(zip(("text", "label"), line.strip().split("|"), strict=True)) for line in read_lines(file)]
        return Table(file.name, ("text", "label"), {}, lambda: iter(enumerate(rows, 1)))

    monkeypatch.setitem(FORMATS, "pipes", Format(suffixes=(".pipes",), open=open_pipes))
    data = tmp_path / "reviews.pipes"
    data.write_text("".join(f"{row['text']}|{row['label']}\n" for row in labelled()), encoding="utf-8")
    assert Predictor(train(tmp_path, data, tiny_model("qwen2"))).task.label_names == ("mid", "neg", "pos")


@pytest.mark.slow
def test_loss(tmp_path, tiny_model, monkeypatch):
    def squared(settings: LossSettings) -> Loss:
        def bind(examples: Any) -> Any:
            labels = torch.tensor([e.labels[0] for e in examples])
            return lambda scores: ((scores - torch.eye(scores.shape[1])[labels]).square().sum(), float(len(labels)))

        return bind

    monkeypatch.setitem(LOSSES, "squared", LossType(squared, frozenset({"label"})))
    data = write(tmp_path / "a.csv", labelled())
    run = train(tmp_path, data, tiny_model("qwen2"), loss="squared", epochs=8.0, max_steps=None)
    assert read_info(run).config.train.loss == "squared"
    assert np.abs(Predictor(run).scores(["good number 3"])).max() < 2  # towards 0 and 1


@pytest.mark.slow
def test_baseline(tmp_path, tiny_model, monkeypatch):
    def fit_random(inputs: BaselineInputs) -> Baseline:
        rng, task = np.random.default_rng(inputs.seed), inputs.data.task
        return Baseline([rng.standard_normal((1, len(task.label_names))) for _ in inputs.data.test])

    monkeypatch.setitem(BASELINES, "random", BaselineType(fit_random))
    data = write(tmp_path / "a.csv", labelled())
    run = train(tmp_path, data, tiny_model("qwen2"), baselines=True)
    assert 0 <= metrics_of(run)["baselines"]["random"]["accuracy"]["value"] < 1
    assert "random" in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_exporter(labelled_run, tmp_path, monkeypatch):
    class HeadExporter:
        help = "the head's weights, as NumPy"

        def check(self, info: Any) -> None:
            pass

        def write(self, model: Any, run: Path, out: Path) -> None:
            np.save(out / "head.npy", model.score.weight.detach().numpy())

        def compare(self, run: Path, out: Path, base: str | None) -> str:
            return f"head of shape {np.load(out / 'head.npy').shape}"

        def notes(self, info: Any) -> list[str]:
            return ["only the head"]

    monkeypatch.setitem(EXPORTERS, "head", HeadExporter())
    lines: list[str] = []
    export(labelled_run, tmp_path / "head", "head", log=lines.append)
    assert lines == ["head of shape (3, 32)", "note: only the head"]


@pytest.mark.slow
def test_model_family(tmp_path, tiny_model, monkeypatch):
    """OLMo 2 norms after its layers. With a row it is packed, and scores as transformers does."""
    monkeypatch.setitem(ARCHITECTURES, "olmo2", Architecture(name="OLMo 2"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model("qwen2"))
    config = transformers.Olmo2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, initializer_range=0.25,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    run = train(tmp_path, write(tmp_path / "a.csv", labelled()), tmp_path / "base", full=True, dtype="float32")
    predictor = Predictor(run, dtype="float32")
    assert predictor.scorer.packed
    texts = [row["text"] for row in labelled()[:7]]
    plain = AutoModelForSequenceClassification.from_pretrained(run, dtype=torch.float32).eval()
    encoded = [torch.tensor([text.chunks[0]]) for text in predictor.encode(texts)]
    with torch.inference_mode():
        alone = torch.cat([plain(input_ids=ids).logits for ids in encoded])
    np.testing.assert_allclose(predictor.scores(texts), alone.numpy(), atol=1e-4)


@pytest.mark.slow
def test_task(tmp_path, tiny_model, monkeypatch):
    """Train, report, predict and serve the task of ``toy_task.py``."""
    monkeypatch.setitem(TASKS, "stars", STARS)
    stars = {"pos": "5", "mid": "3", "neg": "1"}
    rows = [row | {"label": stars[row["label"]]} for row in labelled()]
    data = write(tmp_path / "reviews.csv", rows)
    run = train(tmp_path, data, tiny_model("qwen2"), task="stars", epochs=8.0, max_steps=None, baselines=True)
    assert metrics_of(run)["task"] == "stars"
    assert list(metrics_of(run)["test"])[:2]
    assert "macro" in (run / "report.html").read_text(encoding="utf-8").lower()

    main(["predict", str(run), str(data), "-o", str(tmp_path / "scored.csv")], standalone_mode=False)
    with (tmp_path / "scored.csv").open(encoding="utf-8", newline="") as file:
        scored = list(csv.DictReader(file))
    assert len(scored) == len(rows)
    for row in scored:
        mean = sum(int(name) * float(row[f"p({name})"]) for name in "135")
        assert float(row["stars"]) == pytest.approx(mean, abs=1e-3)

    with client_for({"reviews": Predictor(run)}) as client:
        results = post(client, "/v1/classify", texts=[scored[0]["text"]])["results"]
        assert results[0]["labels"] == [scored[0]["predicted"]]
        assert client.get("/v1/models").json()["data"][0]["task"] == "stars"
