"""The one exception that a user is meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user gave cannot be used, or the world it needs is not there.

    Every message answers three questions, in this order: what was expected, what was found, how to fix it. The library
    raises it, ``cli.py`` renders it as one line and exits with code 2; any other exception is a bug and keeps its traceback.

    Args:
        expected: what the code needed, as a noun phrase ("a column with the texts").
        found: what was there instead, with the file and row number where there is one ("columns 'a', 'b' in x.csv").
        fix: what the user can do about it, as an imperative ("name it with --text").
    """

    def __init__(self, expected: str, found: str, fix: str):
        self.expected, self.found, self.fix = expected, found, fix
        super().__init__(f"expected {expected}; found {found}. {fix[:1].upper()}{fix[1:].rstrip('.')}.")


class Interrupted(Exception):
    """Work was stopped from outside (Ctrl-C); what was done is kept whole and the message says how to go on."""


def near(name: str, names: Iterable[str]) -> str:
    """' (did you mean 'label'?)' where one of ``names`` is close, else nothing."""
    known = {n.lower(): n for n in names}
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    return f" (did you mean '{known[close[0]]}'?)" if close else ""
