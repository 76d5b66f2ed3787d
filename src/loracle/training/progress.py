"""Progress of long work: a bar on a terminal, a plain line every 30 seconds elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0


class ProgressDisplay:
    """Show how far ``total`` units of work are.

    On a terminal it is a bar, elsewhere a line every 30 seconds without carriage returns, both on standard error.

    Args:
        total: units of work.
        done: units done before, by a run that continues.
        unit: singular name of a unit.
        quiet: show nothing.
    """

    def __init__(self, total: int, done: int = 0, *, unit: str = "step", quiet: bool = False):
        self.total, self.done, self.before, self.unit, self.quiet = total, done, done, unit, quiet
        self.started = self.shown = time.monotonic()
        on_terminal = not quiet and sys.stderr.isatty()
        self.bar = (
            tqdm(total=total, initial=done, unit=f" {unit}s", dynamic_ncols=True, mininterval=0.5)
            if on_terminal
            else None
        )

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, count: int = 1, details: str = "") -> None:
        """Count units as done and show it; ``details`` describes the work, such as ``loss 0.412, 12.3 examples/s``."""
        self.done += count
        if self.bar is not None:
            self.bar.set_postfix_str(details, refresh=False)
            self.bar.update(count)
        elif not self.quiet and (now := time.monotonic()) - self.shown >= SECONDS_BETWEEN_LINES:
            self.shown = now
            left = (now - self.started) / (self.done - self.before) * (self.total - self.done)
            parts = (f"{self.unit} {self.done:,} of {self.total:,}", details, f"about {duration(left)} left")
            print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)

    def line(self, text: str) -> None:
        """Print a line of its own, above the bar where there is one."""
        if self.bar is not None:
            self.bar.write(text)
        elif not self.quiet:
            print(text, flush=True)


def duration(seconds: float) -> str:
    """A rounded duration in seconds, minutes or hours: ``90 seconds``, ``4 minutes``, ``3 hours``."""
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{round(seconds / size)} {unit}"
    count = max(1, round(seconds))
    return f"{count} second{'s' * (count > 1)}"
