"""Rows out: each format, and a file that is whole or not there."""

from __future__ import annotations

import csv
import io
import json

import pytest

from loracle.errors import UserError
from loracle.run.output import open_output

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
    ("name", "words"), [("out.xlsx", "a .csv, .tsv or .jsonl file"), ("no/out.csv", "no such folder")]
)
def test_where_it_cannot_write_it_says_so(tmp_path, name, words):
    with pytest.raises(UserError, match=words), open_output(tmp_path / name):
        raise AssertionError("not reached")


def test_a_row_with_another_column_does_not_fit_a_csv(tmp_path):
    with pytest.raises(UserError, match=r"expected the columns a in every row; found also z\. Write a \.jsonl file"):
        put(tmp_path / "out.csv", [{"a": 1}, {"a": 2, "z": 3}])
    assert not list(tmp_path.iterdir())
