"""The registry of file formats: a new format is one entry."""

from __future__ import annotations

import gzip

import pytest
from small import facts

from loracle.config import DataConfig
from loracle.data.formats import FORMATS, format_of, suffix_list
from loracle.data.sources import open_splits, open_table
from loracle.data.table import Format, Table, empty_file_error, read_lines, require_rows
from loracle.errors import UserError
from loracle.tasks.dataset import read_examples


def open_pipes(file):
    """A toy format: a text, a pipe and a label on each line."""

    def read():
        for number, line in enumerate(read_lines(file), 1):
            yield number, dict(zip(("text", "label"), line.strip().split("|"), strict=True))

    return require_rows(Table(file.name, ("text", "label"), {}, read), empty_file_error(file))


@pytest.fixture
def pipes(monkeypatch):
    monkeypatch.setitem(FORMATS, "pipes", Format(suffixes=(".pipes",), open=open_pipes))


@pytest.mark.parametrize("zipped", [False, True], ids=["", "gz"])
def test_registered_format_is_read_end_to_end(tmp_path, pipes, zipped):
    content = b"good|a\nbad|b\nfine|a\n"
    path = tmp_path / ("train.pipes.gz" if zipped else "train.pipes")
    path.write_bytes(gzip.compress(content) if zipped else content)
    examples = read_examples(open_table(str(path)), DataConfig())
    assert [(item.text, item.labels, item.row) for item in examples.items] == [
        ("good", (0,), 1), ("bad", (1,), 2), ("fine", (0,), 3),
    ]  # fmt: skip
    assert list(open_splits(str(tmp_path))) == ["train"]


def test_registered_format_is_streamed_from_click_logs(tmp_path, monkeypatch):
    """A format without a scan is summed row by row."""

    def open_events(file):
        table = open_pipes(file)
        rows = [(n, {"group": "g", "title": row["text"], "clicked": row["label"]}) for n, row in table.rows()]
        return Table(file.name, ("group", "title", "clicked"), {}, lambda: iter(rows))

    monkeypatch.setitem(FORMATS, "events", Format(suffixes=(".events",), open=open_events))
    (tmp_path / "log.events").write_text("a|1\nb|0\na|0\n")
    [group] = read_examples(open_table(str(tmp_path / "log.events")), DataConfig(min_impressions=0)).items
    assert (group.texts, group.clicks, group.impressions) == (("a", "b"), (1, 0), (2, 1))


def test_messages_list_registered_suffixes(tmp_path, pipes):
    assert suffix_list().startswith(".csv, .tsv, .tab, .json, .jsonl, .ndjson, .parquet, .pq, .txt or .pipes")
    (tmp_path / "x.xlsx").write_bytes(b"PK")
    with pytest.raises(UserError, match=facts("x.xlsx", ".pipes", ".gz")):
        open_table(str(tmp_path / "x.xlsx"))


def test_format_follows_the_suffix_in_any_case(tmp_path):
    assert format_of(tmp_path / "LOG.CSV.GZ") is FORMATS["csv"]
    assert format_of(tmp_path / "log.gz") is None


def test_no_two_formats_share_a_suffix():
    suffixes = [suffix for format in FORMATS.values() for suffix in format.suffixes]
    assert len(set(suffixes)) == len(suffixes)
