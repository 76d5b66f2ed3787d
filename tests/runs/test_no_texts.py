"""``--no-texts``: nothing of a text is in a run folder, and everything else still works on it."""

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

SECRETS = (b"quokka", b"Zyzzyva", "水獭".encode())  # in every text, context and name of a group


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


def spoken(folder):
    """Files in which one of the secrets stands, as it is or as JSON and HTML spell it."""
    spelt = [*SECRETS, rb"\u6c34\u736d", b"&#27700;"]
    return {p.name for p in folder.rglob("*") if p.is_file() and any(s in p.read_bytes() for s in spelt)}


@pytest.mark.parametrize("kind", ROWS)
def test_no_file_of_the_run_holds_a_word_of_the_data(train, tmp_path, kind):
    run = train(kind, False)
    assert spoken(run) == set()
    with (run / "predictions.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert len(rows) >= 12
    assert all(int(row["row"]) and "text" not in row for row in rows)
    page = (run / "report.html").read_text()
    assert '<td class="text" dir="auto">row ' in page  # the reader is told where to look
    out = export(run, tmp_path / "plain", "transformers", log=(said := []).append)  # tried on texts that are made up
    assert "the same scores as the run" in said[0]
    assert spoken(out) == set()


def test_eight_bits_of_such_a_run_promise_no_agreement(train, tmp_path):
    pytest.importorskip("openvino", reason="the extra int8 is not installed")
    run = train("rank", False)
    out = export(run, tmp_path / "eight", "openvino", log=(said := []).append)
    assert "on made-up texts, as the run keeps none" in said[0]
    assert spoken(out) == set()
    a, b = (Predictor(folder).scores(["good quokka", "bad"], ["a brief", "another"]) for folder in (run, out))
    np.testing.assert_allclose(a, b, atol=0.1 * np.abs(a).max())


def test_texts_stand_where_the_guide_says_otherwise(train):
    assert spoken(train("single", True)) == {"predictions.csv", "report.html", "report.json"}
