"""Rows out: each format, and a file that is whole or not there."""

from __future__ import annotations

import csv
import io
import json
from datetime import date

import polars as pl
import pytest

from loracle.errors import UserError
from loracle.runs import output
from loracle.runs.output import open_output

ROWS = [{"a": 'x, "y"', "b": None, "c": [1, "ö"]}, {"a": "line\nbreak", "b": 2, "c": {"k": "标"}}]


def put(path, rows=ROWS):
    with open_output(path) as write:
        for row in rows:
            write(row)


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
def test_delimited_rows_come_back(tmp_path, suffix, delimiter):
    put(tmp_path / f"out{suffix}")
    text = (tmp_path / f"out{suffix}").read_text(encoding="utf-8")
    assert list(csv.DictReader(io.StringIO(text), delimiter=delimiter)) == [
        {"a": 'x, "y"', "b": "", "c": '[1, "ö"]'},
        {"a": "line\nbreak", "b": "2", "c": '{"k": "标"}'},
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson"])
def test_json_lines_come_back(tmp_path, suffix):
    put(tmp_path / f"out{suffix}")
    lines = (tmp_path / f"out{suffix}").read_text(encoding="utf-8").splitlines()
    assert list(map(json.loads, lines)) == ROWS


def test_a_parquet_file_keeps_types_and_finds_the_one_that_holds_all(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "BATCH", 2)
    rows = [{"n": 1, "d": date(2026, 1, 2), "l": []}, {"n": 2, "d": None, "l": ["x"]}, {"n": 2.5, "d": None, "l": None}]
    put(tmp_path / "out.parquet", rows)
    table = pl.read_parquet(tmp_path / "out.parquet")
    assert table.schema == {"n": pl.Float64, "d": pl.Date, "l": pl.List(pl.String)}
    assert table.to_dicts() == rows
    assert [p.name for p in tmp_path.iterdir()] == ["out.parquet"]


@pytest.mark.parametrize("batch", [1, 8])
def test_values_that_no_column_holds_are_refused_and_not_made_words_of(tmp_path, monkeypatch, batch):
    monkeypatch.setattr(output, "BATCH", batch)
    with pytest.raises(
        UserError, match=r"values that go into one column; found some that do not .*Write a \.jsonl file"
    ):
        put(tmp_path / "out.parquet", [{"a": {"k": 1}}, {"a": "x"}])
    assert not list(tmp_path.iterdir())


def test_dates_are_written_as_words_where_there_is_no_type_for_them(tmp_path):
    for name in ("out.jsonl", "out.csv"):
        put(tmp_path / name, [{"d": date(2026, 1, 2), "l": [date(2026, 1, 3)]}])
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {"d": "2026-01-02", "l": ["2026-01-03"]}
    assert (tmp_path / "out.csv").read_text() == 'd,l\n2026-01-02,"[""2026-01-03""]"\n'


def test_without_a_path_csv_goes_to_the_terminal(capsys):
    put(None, [{"a": 1}])
    assert capsys.readouterr().out == "a\n1\n"


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    out = tmp_path / "out.csv"
    out.write_text("old")
    with pytest.raises(ZeroDivisionError), open_output(out) as write:  # noqa: PT012
        write({"a": 1})
        1 / 0  # noqa: B018
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("out.csv", "old")]


@pytest.mark.parametrize(
    ("name", "words"), [("out.xlsx", "a .csv, .tsv, .jsonl or .parquet file"), ("no/out.csv", "no such folder")]
)
def test_where_it_cannot_write_it_says_so(tmp_path, name, words):
    with pytest.raises(UserError, match=words), open_output(tmp_path / name):
        raise AssertionError("not reached")


def test_a_row_with_another_column_does_not_fit_a_csv(tmp_path):
    with pytest.raises(UserError, match=r"expected the columns a in every row; found also z\. Write a \.jsonl file"):
        put(tmp_path / "out.csv", [{"a": 1}, {"a": 2, "z": 3}])
    assert not list(tmp_path.iterdir())
