"""Completion: the scripts of three shells, files and run folders; a mistyped run folder gets a suggestion."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runner import error_of, loracle


def make_runs(*names):
    for name in names:
        Path(name).mkdir(parents=True)
        Path(name, "run.toml").touch()


def completions(line, folder):
    """(type, value) of each completion of a command line, as bash gets them."""
    words = line.split(" ")
    variables = {"_LORACLE_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", "from loracle.cli import main; main(prog_name='loracle')"],
        capture_output=True, text=True, env={**os.environ, **variables}, cwd=folder, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [tuple(item.split(",", 1)) for item in done.stdout.splitlines()]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_script_of_each_shell(shell):
    script = loracle("completion", shell).stdout
    assert f"_LORACLE_COMPLETE={shell}_complete" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True, timeout=60)


def test_unknown_shell_is_an_error():
    assert "csh" in loracle("completion", "csh", code=2).stderr


@pytest.mark.slow
def test_run_folders_files_and_options_complete(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_runs("runs/reviews", "runs/clicks")
    Path("runs/none").mkdir()
    assert completions("loracle predict ", tmp_path) == [("plain", "runs/clicks"), ("plain", "runs/reviews")]
    assert completions("loracle evaluate runs/r", tmp_path) == [("plain", "runs/reviews")]
    assert completions("loracle export elsewhere/", tmp_path) == [("dir", "elsewhere/")]
    assert completions("loracle predict runs/reviews ", tmp_path) == [("file", "")]
    assert completions("loracle train --test x", tmp_path) == [("file", "x")]
    assert ("plain", "original") in completions("loracle train --recipe ori", tmp_path)
    assert ("plain", "doctor") in completions("loracle do", tmp_path)
    assert ("plain", "--max-steps") in completions("loracle train --max-", tmp_path)


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_bash_completes_with_the_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_runs("runs/reviews")
    program = tmp_path / "loracle"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m loracle "$@"\n')
    program.chmod(0o755)
    script = loracle("completion", "bash").stdout
    function = "COMP_WORDS=(loracle evaluate runs/r); COMP_CWORD=2; _loracle_completion loracle; echo ${COMPREPLY[@]}"
    done = subprocess.run(
        ["bash", "-c", f"{script}\n{function}"],
        capture_output=True, text=True, env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}, timeout=60,
    )  # fmt: skip
    assert done.stdout.strip() == "runs/reviews", done.stderr


def test_mistyped_run_folder_gets_a_suggestion(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_runs("runs/reviews", "other/clicks")
    for args in (
        ["predict", "runs/reviws", "x.csv"],
        ["evaluate", "reviews", "x.csv"],
        ["train", "--resume", "runs/reviws"],
    ):
        error = error_of(*args)
        assert args[1] in error or args[2] in error
        assert "runs/reviews?" in error
    assert "other/clicks?" in error_of("serve", "runs/reviews", "other/clikcs")
    assert "Did you mean" not in error_of("export", "nothing-like-it", "--to", "transformers")
