"""Tables labelled window by window: formats, several files, interruption and resuming."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import pty
import re
import resource
import signal
import sys
import termios

import kills
import polars as pl
import pytest
from click.testing import CliRunner
from filelock import FileLock
from small import facts, has_facts, write

from loracle.cli import main
from loracle.data.sources import open_table
from loracle.errors import Interrupted, UserError
from loracle.runs.batch import PartialResults, predict

ROWS = [{"id": i, "text": f"good number {i}" if i % 7 else " "} for i in range(70)]
WINDOWS = 5  # of kills.WINDOW rows


@pytest.fixture(scope="module")
def unbroken(labelled_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    predict(kills.job_of(labelled_run, write(folder / "new.csv", ROWS)), folder / "out.csv", 0.0, log=lambda line: None)
    return (folder / "out.csv").read_bytes()


def stopped_at(path, row, stop, reading=2):
    """A table that calls ``stop`` at a row of its second reading; the first reading checks it."""
    table, readings = open_table(str(path)), []

    def read():
        readings.append(1)
        for number, cells in table.rows():
            if number == row and len(readings) == reading:
                stop()
            yield number, cells

    return dataclasses.replace(table, read=read)


def interrupted(labelled_run, data, out, row=40):
    """Interrupt a job with Ctrl-C at that row of the scoring."""
    table = stopped_at(data, row, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted, match="32 of 70 rows"):
        predict(kills.job_of(labelled_run, data, table), out, 0.0, log=lambda line: None)
    assert not out.exists()


@pytest.mark.slow
def test_all_output_formats_agree(labelled_run, tmp_path):
    data, tables = write(tmp_path / "new.csv", ROWS), {}
    for suffix in ("csv", "tsv", "jsonl", "parquet"):
        done = CliRunner().invoke(
            main, ["predict", str(labelled_run), str(data), "-o", str(tmp_path / f"out.{suffix}")]
        )
        assert done.exit_code == 0, done.output
        assert "10 rows without a text" in done.stderr
        assert "rows/s" not in done.stderr  # no progress bar without a terminal
    for name, delimiter in (("csv", ","), ("tsv", "\t")):
        tables[name] = list(csv.DictReader((tmp_path / f"out.{name}").read_text().splitlines(), delimiter=delimiter))
    tables["jsonl"] = list(map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines()))
    tables["parquet"] = pl.read_parquet(tmp_path / "out.parquet").to_dicts()
    plain = {
        name: [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows]
        for name, rows in tables.items()
    }
    assert len(plain["csv"]) == 70
    assert all(rows == plain["csv"] for rows in plain.values())
    assert isinstance(tables["parquet"][1]["p(pos)"], float)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new.csv", *sorted(f"out.{s}" for s in tables)]


@pytest.mark.slow
def test_glob_pattern_reads_files_in_order_of_names(labelled_run, tmp_path, unbroken):
    (tmp_path / "in").mkdir()
    for name, rows in (("b.csv", ROWS[30:]), ("a.csv", ROWS[:30])):
        write(tmp_path / "in" / name, rows)
    for pattern, out in (("in/*.csv", "out.csv"), ("**/[ab].csv", "again.csv")):
        done = CliRunner().invoke(
            main, ["predict", str(labelled_run), str(tmp_path / pattern), "-o", str(tmp_path / out)]
        )
        assert done.exit_code == 0, done.output
        assert (tmp_path / out).read_bytes() == unbroken
    done = CliRunner().invoke(
        main, ["predict", str(labelled_run), str(tmp_path / "in/*.tsv"), "-o", str(tmp_path / "no.csv")]
    )
    assert done.exit_code == 2
    assert "no file" in done.stderr


@pytest.mark.slow
def test_ctrl_c_keeps_results_for_any_output_format(labelled_run, tmp_path, unbroken):
    data, lines = write(tmp_path / "new.csv", ROWS), []
    interrupted(labelled_run, data, tmp_path / "out.csv")
    assert len(PartialResults(tmp_path / "out.scores")) == 2
    read = stopped_at(
        data, 40, lambda: os.kill(os.getpid(), signal.SIGINT), reading=3
    )  # now while the output is written
    with pytest.raises(Interrupted, match="70 of 70 rows"):
        predict(kills.job_of(labelled_run, data, read), tmp_path / "out.csv", 0.0, log=lines.append)
    assert len(PartialResults(tmp_path / "out.scores")) == WINDOWS
    predict(kills.job_of(labelled_run, data), tmp_path / "out.jsonl", 0.0, log=lines.append)
    notes = [line for line in lines if "of 70 rows" in line]
    for n, note in zip((32, 70), notes, strict=True):
        assert has_facts(note, f"after {n} of 70 rows", str(tmp_path / "out.scores"))
    assert sum("10 rows without a text" in line for line in lines) == 1
    ours = [row["p(pos)"] for row in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())]
    theirs = [row["p(pos)"] for row in csv.DictReader(unbroken.decode().splitlines())]
    assert ["" if p is None else str(p) for p in ours] == theirs
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new.csv", "out.jsonl"]


@pytest.mark.parametrize(("limit", "kept"), [(200, 0), (1500, WINDOWS)])
def test_job_continues_after_a_full_disk(labelled_run, tmp_path, unbroken, limit, kept):
    """A file size limit simulates a full disk, at the job's first file and at its output."""
    data, out = write(tmp_path / "new.csv", ROWS), tmp_path / "out.csv"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(UserError, match=facts("out.csv", "File too large")):
            predict(kills.job_of(labelled_run, data), out, 0.0, log=lambda line: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(list(tmp_path.glob("out.scores/*.safetensors"))) == kept
    assert not out.exists()
    predict(kills.job_of(labelled_run, data), out, 0.0, log=lambda line: None)
    assert out.read_bytes() == unbroken


def test_partial_results_of_other_data_raise(labelled_run, tmp_path):
    data, out = write(tmp_path / "new.csv", ROWS), tmp_path / "out.csv"
    interrupted(labelled_run, data, out)
    write(tmp_path / "new.csv", ROWS[1:])
    with pytest.raises(UserError, match=facts("out.scores", "another data", "--out")):
        predict(kills.job_of(labelled_run, data), out, 0.0, log=lambda line: None)
    other = dataclasses.replace(kills.job_of(labelled_run, data), device="cpu")
    with pytest.raises(UserError, match="another data and device"):
        predict(other, out, 0.0, log=lambda line: None)
    assert len(PartialResults(tmp_path / "out.scores")) == 2
    predict(kills.job_of(labelled_run, data), tmp_path / "elsewhere.csv", 0.0, log=lambda line: None)
    assert (tmp_path / "elsewhere.csv").read_text().count("\n") == 70


def test_data_changed_during_the_job_raise(labelled_run, tmp_path):
    data = write(tmp_path / "new.csv", ROWS)
    table = stopped_at(data, 40, lambda: os.utime(data, (1, 1)))
    with pytest.raises(UserError, match=facts("new.csv", "changed", "out.scores")):
        predict(kills.job_of(labelled_run, data, table), tmp_path / "out.csv", 0.0, log=lambda line: None)
    assert not (tmp_path / "out.csv").exists()


def test_broken_row_raises_before_scoring(labelled_run, tmp_path):
    data = write(tmp_path / "new.csv", ROWS)
    with data.open("a") as stream:
        stream.write("one cell too many,x,y\n")
    with pytest.raises(UserError, match=facts("row 72", "3")):
        predict(kills.job_of(labelled_run, data), tmp_path / "out.csv", 0.0, log=lambda line: None)
    assert [p.name for p in tmp_path.iterdir()] == ["new.csv"]


def test_lock_and_output_over_input_raise(labelled_run, tmp_path):
    data = write(tmp_path / "new.csv", ROWS)
    (tmp_path / "out.scores").mkdir()
    with (
        FileLock(tmp_path / "out.scores" / "lock"),
        pytest.raises(UserError, match=facts("process", "out.scores")),
    ):
        predict(kills.job_of(labelled_run, data), tmp_path / "out.csv", 0.0, log=lambda line: None)
    with pytest.raises(UserError, match=facts("--out", "new.csv")):
        predict(kills.job_of(labelled_run, data), data, 0.0, log=lambda line: None)


def test_half_deleted_results_of_another_job_are_ignored(labelled_run, tmp_path, unbroken):
    """A kill during deletion leaves the last windows of another job's data."""
    data, out, scores = write(tmp_path / "new.csv", ROWS), tmp_path / "out.csv", tmp_path / "out.scores"
    interrupted(labelled_run, data, out)
    (scores / "0000000.safetensors").unlink()
    other = write(tmp_path / "other.csv", [{"id": i, "text": "another"} for i in range(40)])
    interrupt = stopped_at(other, 20, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted, match="16 of 40 rows"):
        predict(kills.job_of(labelled_run, other, interrupt), out, 0.0, log=lambda line: None)
    assert len(PartialResults(scores)) == 1
    for name in ("out.csv", "alone.csv"):
        predict(kills.job_of(labelled_run, other), tmp_path / name, 0.0, log=lambda line: None)
    assert out.read_bytes() == (tmp_path / "alone.csv").read_bytes()
    assert not scores.exists()


def test_other_files_in_the_scores_folder_are_kept(labelled_run, tmp_path):
    mine = tmp_path / "out.scores" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("x")
    (tmp_path / "file.scores").write_text("x")
    data = write(tmp_path / "new.csv", [{"text": "good"}])
    for name in ("out.csv", "file.csv"):
        with pytest.raises(UserError, match=facts(".scores", "other files")):
            predict(kills.job_of(labelled_run, data), tmp_path / name, 0.0, log=lambda line: None)
    assert mine.read_text() == (tmp_path / "file.scores").read_text() == "x"


def test_damaged_partial_results_raise(labelled_run, tmp_path, unbroken):
    data, out = write(tmp_path / "new.csv", ROWS), tmp_path / "out.csv"
    interrupted(labelled_run, data, out)
    torn = tmp_path / "out.scores" / "0000001.safetensors"
    torn.write_bytes(torn.read_bytes()[:-9])
    with pytest.raises(UserError, match=facts("0000001.safetensors", "damaged")):
        predict(kills.job_of(labelled_run, data), out, 0.0, log=lambda line: None)
    torn.unlink()
    predict(kills.job_of(labelled_run, data), out, 0.0, log=lambda line: None)
    assert out.read_bytes() == unbroken


def test_terminal_shows_a_progress_bar(labelled_run, tmp_path, monkeypatch):
    terminal, inside = pty.openpty()
    termios.tcsetwinsize(inside, (24, 100))
    with open(inside, "w") as stderr, open(terminal, "rb", buffering=0) as screen:
        monkeypatch.setattr(sys, "stderr", stderr)
        predict(
            kills.job_of(labelled_run, write(tmp_path / "new.csv", ROWS)),
            tmp_path / "out.csv",
            0.0,
            log=lambda line: None,
        )
        stderr.flush()
        shown = screen.read(4096).decode()
    assert re.search(r"100%.*70/70 \[00:0\d<00:00, .* rows/s\]", shown), shown
