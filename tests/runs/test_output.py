"""Writing rows: every format, and files that are complete or absent."""

from __future__ import annotations

import csv
import io
import json
from datetime import date

import polars as pl
import pytest
from small import facts

from loracle.errors import UserError
from loracle.runs import output
from loracle.runs.output import open_output

ROWS = [{"a": 'x, "y"', "b": None, "c": [1, "ö"]}, {"a": "line\nbreak", "b": 2, "c": {"k": "标"}}]


def put(path, rows=ROWS):
    with open_output(path) as write:
        for row in rows:
            write(row)


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
def test_delimited_rows_round_trip(tmp_path, suffix, delimiter):
    put(tmp_path / f"out{suffix}")
    text = (tmp_path / f"out{suffix}").read_text(encoding="utf-8")
    assert list(csv.DictReader(io.StringIO(text), delimiter=delimiter)) == [
        {"a": 'x, "y"', "b": "", "c": '[1, "ö"]'},
        {"a": "line\nbreak", "b": "2", "c": '{"k": "标"}'},
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson"])
def test_json_lines_round_trip(tmp_path, suffix):
    put(tmp_path / f"out{suffix}")
    lines = (tmp_path / f"out{suffix}").read_text(encoding="utf-8").splitlines()
    assert list(map(json.loads, lines)) == ROWS


def test_parquet_keeps_types_and_widens_columns(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "BATCH", 2)
    rows = [{"n": 1, "d": date(2026, 1, 2), "l": []}, {"n": 2, "d": None, "l": ["x"]}, {"n": 2.5, "d": None, "l": None}]
    put(tmp_path / "out.parquet", rows)
    table = pl.read_parquet(tmp_path / "out.parquet")
    assert table.schema == {"n": pl.Float64, "d": pl.Date, "l": pl.List(pl.String)}
    assert table.to_dicts() == rows
    assert [p.name for p in tmp_path.iterdir()] == ["out.parquet"]


@pytest.mark.parametrize("batch", [1, 8])
def test_mixed_types_in_a_parquet_column_raise(tmp_path, monkeypatch, batch):
    monkeypatch.setattr(output, "BATCH", batch)
    with pytest.raises(UserError, match=facts("column", ".jsonl")):
        put(tmp_path / "out.parquet", [{"a": {"k": 1}}, {"a": "x"}])
    assert not list(tmp_path.iterdir())


def test_dates_become_text_in_csv_and_json(tmp_path):
    for name in ("out.jsonl", "out.csv"):
        put(tmp_path / name, [{"d": date(2026, 1, 2), "l": [date(2026, 1, 3)]}])
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {"d": "2026-01-02", "l": ["2026-01-03"]}
    assert (tmp_path / "out.csv").read_text() == 'd,l\n2026-01-02,"[""2026-01-03""]"\n'


def test_no_path_writes_csv_to_stdout(capsys):
    put(None, [{"a": 1}])
    assert capsys.readouterr().out == "a\n1\n"


def test_failure_keeps_the_old_file(tmp_path):
    out = tmp_path / "out.csv"
    out.write_text("old")
    with pytest.raises(ZeroDivisionError), open_output(out) as write:  # noqa: PT012
        write({"a": 1})
        1 / 0  # noqa: B018
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("out.csv", "old")]


@pytest.mark.parametrize(
    ("name", "words"), [("out.xlsx", ".csv, .tsv, .jsonl or .parquet"), ("no/out.csv", "no folder")]
)
def test_unwritable_output_raises(tmp_path, name, words):
    with pytest.raises(UserError, match=words), open_output(tmp_path / name):
        raise AssertionError("not reached")


def test_extra_column_in_a_csv_row_raises(tmp_path):
    with pytest.raises(UserError, match=facts("columns: a", "z", ".jsonl")):
        put(tmp_path / "out.csv", [{"a": 1}, {"a": 2, "z": 3}])
    assert not list(tmp_path.iterdir())
