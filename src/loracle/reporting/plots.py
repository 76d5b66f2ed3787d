"""Pictures for the terminal's commands, by matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loracle.errors import UserError


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of that size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG, SVG or PDF, by the suffix; every axis gets its grid and legend.

    Raises:
        UserError: matplotlib cannot write such a file.
    """
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as e:
        raise UserError("a .png, .svg or .pdf file to draw to", f"{path} ({e})", "give --plot another name") from None
