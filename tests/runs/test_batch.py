"""Tables labelled window by window: every format, several files, and what happens when it is stopped."""

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
from small import write

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
    """A table that stops the process at a row, the second time it is read: it is looked through before."""
    table, readings = open_table(str(path)), []

    def read():
        readings.append(1)
        for number, cells in table.rows():
            if number == row and len(readings) == reading:
                stop()
            yield number, cells

    return dataclasses.replace(table, read=read)


def interrupted(labelled_run, data, out, row=40):
    """What Ctrl-C leaves, at that row of the scoring."""
    table = stopped_at(data, row, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted, match=r"stopped; the same command goes on after 32 of 70 rows"):
        predict(kills.job_of(labelled_run, data, table), out, 0.0, log=lambda line: None)
    assert not out.exists()


def test_every_format_says_the_same(labelled_run, tmp_path):
    data, said = write(tmp_path / "new.csv", ROWS), {}
    for suffix in ("csv", "tsv", "jsonl", "parquet"):
        done = CliRunner().invoke(
            main, ["predict", str(labelled_run), str(data), "-o", str(tmp_path / f"out.{suffix}")]
        )
        assert done.exit_code == 0, done.output
        assert "10 rows without a text" in done.stderr
        assert "rows/s" not in done.stderr  # no bar where nobody looks
    for name, delimiter in (("csv", ","), ("tsv", "\t")):
        said[name] = list(csv.DictReader((tmp_path / f"out.{name}").read_text().splitlines(), delimiter=delimiter))
    said["jsonl"] = list(map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines()))
    said["parquet"] = pl.read_parquet(tmp_path / "out.parquet").to_dicts()
    plain = {
        name: [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows] for name, rows in said.items()
    }
    assert len(plain["csv"]) == 70
    assert all(rows == plain["csv"] for rows in plain.values())
    assert isinstance(said["parquet"][1]["p(pos)"], float)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new.csv", *sorted(f"out.{s}" for s in said)]


def test_several_files_by_a_pattern_are_one_table_in_the_order_of_their_names(labelled_run, tmp_path, unbroken):
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


def test_ctrl_c_keeps_what_is_done_and_another_suffix_may_go_on_with_it(labelled_run, tmp_path, unbroken):
    data, said = write(tmp_path / "new.csv", ROWS), []
    interrupted(labelled_run, data, tmp_path / "out.csv")
    assert len(PartialResults(tmp_path / "out.scores")) == 2
    read = stopped_at(
        data, 40, lambda: os.kill(os.getpid(), signal.SIGINT), reading=3
    )  # now while the output is written
    with pytest.raises(Interrupted, match="after 70 of 70 rows"):
        predict(kills.job_of(labelled_run, data, read), tmp_path / "out.csv", 0.0, log=said.append)
    assert len(PartialResults(tmp_path / "out.scores")) == WINDOWS
    predict(kills.job_of(labelled_run, data), tmp_path / "out.jsonl", 0.0, log=said.append)
    assert [line for line in said if "going on" in line] == [
        f"note: going on after {n} of 70 rows, kept in {tmp_path / 'out.scores'}" for n in (32, 70)
    ]
    assert sum("10 rows without a text" in line for line in said) == 1
    ours = [row["p(pos)"] for row in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())]
    theirs = [row["p(pos)"] for row in csv.DictReader(unbroken.decode().splitlines())]
    assert ["" if p is None else str(p) for p in ours] == theirs
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new.csv", "out.jsonl"]


@pytest.mark.parametrize(("limit", "kept"), [(200, 0), (1500, WINDOWS)])
def test_a_full_disk_is_said_and_room_is_all_it_takes(labelled_run, tmp_path, unbroken, limit, kept):
    """A limit on the size of files that the system sets stands in for the disk: the job's first file, and its output."""
    data, out = write(tmp_path / "new.csv", ROWS), tmp_path / "out.csv"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(UserError, match=r"expected room for .*out\.csv; found File too large\. Make room"):
            predict(kills.job_of(labelled_run, data), out, 0.0, log=lambda line: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(list(tmp_path.glob("out.scores/*.safetensors"))) == kept
    assert not out.exists()
    predict(kills.job_of(labelled_run, data), out, 0.0, log=lambda line: None)
    assert out.read_bytes() == unbroken


def test_other_data_do_not_go_on_with_it(labelled_run, tmp_path):
    data, out = write(tmp_path / "new.csv", ROWS), tmp_path / "out.csv"
    interrupted(labelled_run, data, out)
    write(tmp_path / "new.csv", ROWS[1:])
    with pytest.raises(UserError, match=r"scores in .*out\.scores were begun with; found another data\. Give the same"):
        predict(kills.job_of(labelled_run, data), out, 0.0, log=lambda line: None)
    other = dataclasses.replace(kills.job_of(labelled_run, data), device="cpu")
    with pytest.raises(UserError, match="another data and device"):
        predict(other, out, 0.0, log=lambda line: None)
    assert len(PartialResults(tmp_path / "out.scores")) == 2
    predict(kills.job_of(labelled_run, data), tmp_path / "elsewhere.csv", 0.0, log=lambda line: None)
    assert (tmp_path / "elsewhere.csv").read_text().count("\n") == 70


def test_data_that_change_meanwhile_are_seen(labelled_run, tmp_path):
    data = write(tmp_path / "new.csv", ROWS)
    table = stopped_at(data, 40, lambda: os.utime(data, (1, 1)))
    with pytest.raises(UserError, match=r"data that stay as they are; found other bytes in .*new\.csv by now"):
        predict(kills.job_of(labelled_run, data, table), tmp_path / "out.csv", 0.0, log=lambda line: None)
    assert not (tmp_path / "out.csv").exists()


def test_what_is_broken_far_down_is_met_before_anything_is_scored(labelled_run, tmp_path):
    data = write(tmp_path / "new.csv", ROWS)
    with data.open("a") as stream:
        stream.write("one cell too many,x,y\n")
    with pytest.raises(UserError, match="3 in row 72"):
        predict(kills.job_of(labelled_run, data), tmp_path / "out.csv", 0.0, log=lambda line: None)
    assert [p.name for p in tmp_path.iterdir()] == ["new.csv"]


def test_one_process_at_a_time_and_never_onto_what_is_read(labelled_run, tmp_path):
    data = write(tmp_path / "new.csv", ROWS)
    (tmp_path / "out.scores").mkdir()
    with (
        FileLock(tmp_path / "out.scores" / "lock"),
        pytest.raises(UserError, match=r"one process for an output; found another at work in .*out\.scores\. Wait"),
    ):
        predict(kills.job_of(labelled_run, data), tmp_path / "out.csv", 0.0, log=lambda line: None)
    with pytest.raises(UserError, match=r"expected an --out that is not itself read; found .*new\.csv"):
        predict(kills.job_of(labelled_run, data), data, 0.0, log=lambda line: None)


def test_what_another_start_was_killed_over_taking_away_is_not_taken_for_ones_own(labelled_run, tmp_path, unbroken):
    """Its first windows are gone, its last ones are there, and the data are others."""
    data, out, scores = write(tmp_path / "new.csv", ROWS), tmp_path / "out.csv", tmp_path / "out.scores"
    interrupted(labelled_run, data, out)
    (scores / "0000000.safetensors").unlink()
    other = write(tmp_path / "other.csv", [{"id": i, "text": "another"} for i in range(40)])
    interrupt = stopped_at(other, 20, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted, match="after 16 of 40 rows"):
        predict(kills.job_of(labelled_run, other, interrupt), out, 0.0, log=lambda line: None)
    assert len(PartialResults(scores)) == 1
    for name in ("out.csv", "alone.csv"):
        predict(kills.job_of(labelled_run, other), tmp_path / name, 0.0, log=lambda line: None)
    assert out.read_bytes() == (tmp_path / "alone.csv").read_bytes()
    assert not scores.exists()


def test_a_folder_of_the_users_own_is_left_alone(labelled_run, tmp_path):
    mine = tmp_path / "out.scores" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("x")
    (tmp_path / "file.scores").write_text("x")
    data = write(tmp_path / "new.csv", [{"text": "good"}])
    for name in ("out.csv", "file.csv"):
        with pytest.raises(UserError, match=r"scores free for the scores of this job; found other files there"):
            predict(kills.job_of(labelled_run, data), tmp_path / name, 0.0, log=lambda line: None)
    assert mine.read_text() == (tmp_path / "file.scores").read_text() == "x"


def test_damaged_scores_are_seen(labelled_run, tmp_path, unbroken):
    data, out = write(tmp_path / "new.csv", ROWS), tmp_path / "out.csv"
    interrupted(labelled_run, data, out)
    torn = tmp_path / "out.scores" / "0000001.safetensors"
    torn.write_bytes(torn.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"scores in .*0000001\.safetensors; found .*Remove it"):
        predict(kills.job_of(labelled_run, data), out, 0.0, log=lambda line: None)
    torn.unlink()
    predict(kills.job_of(labelled_run, data), out, 0.0, log=lambda line: None)
    assert out.read_bytes() == unbroken


def test_a_terminal_shows_how_far_it_is(labelled_run, tmp_path, monkeypatch):
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
