"""``--no-texts``: the run folder holds no texts, and everything else works on it."""

from __future__ import annotations

import csv
from functools import cache

import numpy as np
import pytest
from small import QUICK, write

from loracle import pipeline
from loracle.config import RunConfig
from loracle.runs.export import export
from loracle.runs.predictor import Predictor

SECRETS = (b"quokka", b"Zyzzyva", "水獭".encode())  # in every text, context and group name


def classified():
    words = ("good", "bad", "so")
    return [
        {"text": f"Zyzzyva {words[i % 3]} quokka 水獭 {i}", "label": f"is {words[i * (i % 5 > 0) % 3]}"}
        for i in range(60)
    ]


def clicked():
    return [
        {"test": f"quokka {i}", "brief": f"Zyzzyva brief {i}", "title": f"{word} 水獭 {i}", "clicks": 30 * c + i,
         "impressions": 1000}
        for i in range(30)
        for c, word in enumerate(("bad", "so", "good"))
    ]  # fmt: skip


ROWS = {"single": classified, "rank": clicked}
COLUMNS = {"rank": {"group": "test", "context": "brief", "text": "title"}}


@pytest.fixture(scope="module")
def train(tiny_model, tmp_path_factory):
    @cache
    def make(kind, texts):
        folder = tmp_path_factory.mktemp(kind)
        config = QUICK | {"data": str(write(folder / "data.jsonl", ROWS[kind]())), "model": str(tiny_model("qwen2"))}
        config |= {"out": str(folder / "run"), "baselines": True, "dtype": "float32", "max_length": 48}
        config |= COLUMNS.get(kind, {}) | {"texts": texts}
        return pipeline.train(RunConfig.from_flat(config), log=lambda line: None, quiet=True)

    return make


def files_with_secrets(folder):
    """Names of files that hold a secret, plain or escaped for JSON or HTML."""
    spellings = [*SECRETS, rb"\u6c34\u736d", b"&#27700;"]
    return {p.name for p in folder.rglob("*") if p.is_file() and any(s in p.read_bytes() for s in spellings)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROWS)
def test_run_folder_holds_no_texts(train, tmp_path, kind):
    run = train(kind, False)
    assert files_with_secrets(run) == set()
    with (run / "predictions.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert len(rows) >= 12
    assert all(int(row["row"]) and "text" not in row for row in rows)
    page = (run / "report.html").read_text()
    assert '<td class="text" dir="auto">row ' in page  # the row number leads to the text
    out = export(run, tmp_path / "plain", "transformers", log=(lines := []).append)  # compared on random texts
    assert "the same scores as the run" in lines[0]
    assert files_with_secrets(out) == set()


@pytest.mark.slow
def test_int8_export_without_texts_reports_no_agreement(train, tmp_path):
    pytest.importorskip("openvino", reason="the extra int8 is not installed")
    run = train("rank", False)
    out = export(run, tmp_path / "eight", "openvino", log=(lines := []).append)
    assert "on random texts, as the run keeps none" in lines[0]
    assert files_with_secrets(out) == set()
    a, b = (Predictor(folder).scores(["good quokka", "bad"], ["a brief", "another"]) for folder in (run, out))
    np.testing.assert_allclose(a, b, atol=0.1 * np.abs(a).max())


@pytest.mark.slow
def test_runs_keep_texts_by_default(train):
    assert files_with_secrets(train("single", True)) == {"predictions.csv", "report.html", "report.json"}
