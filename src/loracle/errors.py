"""The exceptions that a user is meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

Log = Callable[[str], None]  # prints a line for the user


class UserError(Exception):
    """Something the user gave cannot be used, or something it needs is missing.

    The library raises it. The command line prints it and exits with code 2. Any other exception is a bug and keeps its
    traceback.

    Args:
        message: what is wrong and where: file, row, column, value.
        hint: what to do about it. Leave it out where the message already says so.
    """

    def __init__(self, message: str, hint: str | None = None):
        self.message, self.hint = message, hint
        super().__init__(" ".join(filter(None, (message, hint))))


class Interrupted(Exception):
    """Work was stopped from outside (Ctrl-C). What was done is kept, and the message says how to continue."""


def near(name: str, names: Iterable[str]) -> str:
    """Return " (did you mean 'label'?)" when one of ``names`` is close to ``name``, else an empty string."""
    by_lower = {n.lower(): n for n in names}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f" (did you mean '{by_lower[close[0]]}'?)" if close else ""
