"""Help: grouped, whole, quick and equal to config.py."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys

import click
import pytest
from cli_runner import loracle

from loracle.cli import SECTIONS, main
from loracle.config import DataConfig, TrainConfig

PARTIAL = ["train", "compare", "validate", "tune"]


def flags_in(text):
    return set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", text, re.MULTILINE))


@pytest.mark.parametrize("width", [80, 110])
def test_commands_have_groups_and_whole_summaries(width):
    text = loracle("--help", terminal_width=width).output
    assert "…" not in text
    assert "..." not in text.split("Explore:")[1]
    for title, commands in SECTIONS.items():
        assert f"\n{title}:\n" in text
        for command in commands:
            (line,) = re.findall(rf"^  {command.name} +(\S.*)$", text, re.MULTILINE)
            assert line.endswith("."), line
            assert line == click.Command.get_short_help_str(command, limit=200)
    assert {c.name for commands in SECTIONS.values() for c in commands} == set(main.commands)
    assert len(SECTIONS) == 4


def test_train_help_is_short_and_grouped():
    text = loracle("train", "--help").output
    assert 18 <= len(flags_in(text) - {"--quiet", "--verbose", "--help", "--help-all"}) <= 23
    titles = re.findall(r"^(\w+):$", text, re.MULTILINE)
    assert titles == ["Data", "Model", "Adapter", "Training", "Output", "General"]
    assert f"[default: {TrainConfig().batch}]" in text
    assert "loracle train --help-all" in text


@pytest.mark.parametrize("name", PARTIAL)
def test_help_all_shows_every_option(name):
    long, short = loracle(name, "--help-all").output, loracle(name, "--help").output
    options = {p.opts[-1] for p in main.commands[name].params if isinstance(p, click.Option)}
    assert flags_in(long) - {"--help"} == options
    assert flags_in(short) < flags_in(long)
    assert f"{len(flags_in(long) - flags_in(short))} more options" in short
    assert "more options" not in long


def test_other_commands_without_rare_options_have_no_help_all():
    for name in ("predict", "rank", "export", "doctor", "serve"):
        assert "--help-all" not in loracle(name, "--help").output
        assert "General:" in loracle(name, "--help").output


def test_commands_take_only_options_they_use():
    options = {name: {p.name for p in command.params} for name, command in main.commands.items()}
    assert not options["check"] & {"test_share", "validation_share", "quiet", "model"}
    assert not options["evaluate"] & {"test", "task", "slice", "date", "weight", "test_share"}
    assert not options["diff"] & {"test", "task", "slice", "date", "weight", "validation_share"}
    assert not options["tune"] & {"track", "texts", "baselines"}
    assert DataConfig.GROUP == "Data"


def test_help_is_quick_and_imports_no_torch():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "loracle", "--help"], capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.6  # seconds of processor time
    script = (
        "import sys, loracle.cli; print(*sorted({'torch', 'transformers', 'polars', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=dict(os.environ), timeout=60
    )
    assert done.stdout.strip() == "", done.stderr
