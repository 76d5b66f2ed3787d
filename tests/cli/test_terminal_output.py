"""Colour, --quiet, --verbose and errors on the terminal."""

from __future__ import annotations

import logging
import os
import pty
import subprocess
import sys

import pytest
from cli_runner import FAST, loracle
from small import labelled, write

from loracle.cli import terminal
from loracle.errors import UserError


def on_terminal(*args, **variables):
    """Output of a command on a pseudo-terminal."""
    parent, child = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | variables
    command = [sys.executable, "-m", "loracle", *map(str, args)]
    process = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, env=environment, close_fds=True)
    os.close(child)
    text = b""
    try:
        while part := os.read(parent, 65536):
            text += part
    except OSError:  # Linux reports the closed terminal as an error
        pass
    os.close(parent)
    process.wait(60)
    return text.decode()


@pytest.mark.slow
def test_color_on_terminal_unless_no_color(tmp_path):
    missing = tmp_path / "missing.csv"
    assert "\x1b[" in on_terminal("check", missing)
    assert "\x1b[" in on_terminal("--help")
    for args in (["check", missing], ["--help"]):
        assert "\x1b[" not in on_terminal(*args, NO_COLOR="1")
    done = subprocess.run([sys.executable, "-m", "loracle", "check", missing], capture_output=True, text=True)
    assert "\x1b" not in done.stdout + done.stderr
    assert done.returncode == 2


def test_error_and_hint_have_lines_of_their_own(capsys):
    terminal.show_error(UserError("No text column in x.csv.", "Name it with --text."))
    assert capsys.readouterr().err == "Error: No text column in x.csv.\nName it with --text.\n"
    terminal.show_error(UserError("The file is empty."))
    assert capsys.readouterr().err == "Error: The file is empty.\n"


def test_verbose_prints_traceback_of_an_error(tmp_path):
    done = loracle("check", tmp_path / "missing.csv", "--verbose", code=2)
    assert "Traceback" in done.stderr
    assert "Error: " in done.stderr.splitlines()[-2] + done.stderr.splitlines()[-1]


def test_bug_keeps_traceback_and_names_doctor(tmp_path, monkeypatch):
    from loracle.data import sources

    monkeypatch.setattr(sources, "open_splits", lambda data: 1 / 0)
    done = loracle("check", tmp_path / "x.csv", code=1)
    assert isinstance(done.exception, ZeroDivisionError)
    assert "loracle doctor" in done.stderr


@pytest.mark.slow
def test_quiet_training_prints_only_the_run_folder(tiny_model, tmp_path):
    data, run = write(tmp_path / "data.csv", labelled()), tmp_path / "run"
    flags = ["--model", tiny_model("qwen2"), *FAST, "--epochs", "1", "--no-baselines"]
    done = loracle("train", data, *flags, "-o", run, "--quiet")
    assert (done.stdout, done.stderr) == (f"{run}\n", "")
    done = loracle("predict", run, data, "--quiet")
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 61


@pytest.mark.slow
def test_training_without_terminal_prints_plain_lines(tiny_model, tmp_path):
    data = write(tmp_path / "data.csv", labelled())
    command = [sys.executable, "-m", "loracle", "train", data, "--model", tiny_model("qwen2"), "-o", tmp_path / "run"]
    done = subprocess.run([*map(str, command), "--epochs", "1"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stdout + done.stderr
    assert not [mark for mark in ("it/s", "%|", "Warning") if mark in done.stderr]


@pytest.mark.slow
def test_export_on_terminal_shows_no_library_bars(labelled_run, tmp_path):
    output = on_terminal("export", labelled_run, "--to", "transformers", "-o", tmp_path / "out")
    assert output.splitlines()[-1] == f"export: {tmp_path / 'out'}"
    assert not [mark for mark in ("it/s", "%|", "Warning", "shards") if mark in output]


def test_libraries_are_silenced_unless_verbose(monkeypatch):
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(terminal, "is_set", lambda flag: flag == "verbose")
    terminal.silence_libraries()
    assert "TRANSFORMERS_VERBOSITY" not in os.environ
    monkeypatch.setattr(terminal, "is_set", lambda flag: False)
    levels = {name: logging.getLogger(name).level for name in terminal.LIBRARIES}
    try:
        terminal.silence_libraries()
        assert os.environ["TRANSFORMERS_VERBOSITY"] == os.environ["HF_HUB_VERBOSITY"] == "error"
        assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"
        assert logging.getLogger("torch").level == logging.ERROR
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
