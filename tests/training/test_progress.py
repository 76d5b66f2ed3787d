"""Progress on a terminal, elsewhere, and quiet."""

from __future__ import annotations

import io
import sys

import pytest

from loracle.training import progress
from loracle.training.progress import ProgressDisplay, duration


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets, in seconds."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_without_terminal_one_line_every_30_seconds(clock, capsys):
    with ProgressDisplay(300, done=20) as display:
        for _ in range(8):
            clock[0] += 10
            display.update(5, "loss 0.412, 12.3 examples/s")
    err = capsys.readouterr().err
    assert err.splitlines() == [
        "step 35 of 300, loss 0.412, 12.3 examples/s, about 9 minutes left",
        "step 50 of 300, loss 0.412, 12.3 examples/s, about 8 minutes left",
    ]
    assert "\r" not in err


def test_terminal_gets_a_bar(monkeypatch, clock):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with ProgressDisplay(2, unit="row") as display:
        display.update(2, "loss 0.412")
    assert "100%" in sys.stderr.getvalue()
    assert "2/2" in sys.stderr.getvalue()
    assert "loss 0.412" in sys.stderr.getvalue()


def test_quiet_shows_nothing(clock, capsys):
    with ProgressDisplay(2, quiet=True) as display:
        clock[0] = 100
        display.update()
        display.line("step 1: validation accuracy 0.812")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 second"), (119, "119 seconds"), (240, "4 minutes"), (7200, "2 hours")]
)
def test_duration_in_fitting_units(seconds, text):
    assert duration(seconds) == text
