"""Plots that commands write to a file, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loracle.errors import UserError
from loracle.training.probe import Depth, choose


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of that size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG, SVG or PDF, by the suffix; with a grid and a legend on each axis.

    Raises:
        UserError: matplotlib cannot write such a file.
    """
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as e:
        raise UserError(f"Cannot draw to {path}: {e}.", "Give --plot a name that ends in .png, .svg or .pdf.") from None


def plot_depths(depths: Sequence[Depth], metric: str, path: Path) -> None:
    """Draw the metric of a linear probe by depth.

    Raises:
        UserError: matplotlib cannot write such a file.
    """
    figure, chosen = new_figure(7, 3.6), choose(depths)
    axes, layers = figure.subplots(), [d.layers for d in depths]
    axes.fill_between(layers, [100 * d.low for d in depths], [100 * d.high for d in depths], alpha=0.2)
    axes.plot(layers, [100 * d.value for d in depths], "o-", label="linear probe, 95 % interval")
    axes.axvline(chosen.layers, ls="--", color="grey", label=f"--depth auto: {chosen.layers}")
    axes.set(xlabel="layers kept", ylabel=f"{metric.replace('_', ' ')}, % of validation examples")
    save(figure, path)
