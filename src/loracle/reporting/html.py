"""``report.html`` from ``report.json``: one page that needs no network and no script; texts in it are escaped by Jinja.

Charts are matplotlib's, as SVG inside the page. Their colours are stand-ins that become the page's own, so that they are
right in light and dark.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from loracle.reporting.terminal import figure

COLOURS = {"#010101": "currentColor", "#020202": "var(--first)", "#030303": "var(--second)", "#040404": "var(--faint)"}
INK, FIRST, SECOND, FAINT = COLOURS
EXPLAINED = {
    "ece": "expected calibration error",
    "ece_if_calibrated": "… that perfect calibration would show",
    "ece_uncalibrated": "… before calibration",
    "log_loss_uncalibrated": "log loss before calibration",
    "map": "mean average precision",
    "auc": "AUC, one label against the rest",
}


def render(report: Mapping[str, Any]) -> str:
    """The page; ``report`` is what report.json holds."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"figure": figure, "spoken": spoken}
    template = environment.from_string((files("loracle.reporting") / "report.html.j2").read_text(encoding="utf-8"))
    drawn = {name: Markup(svg) for name, svg in charts(report).items()}  # made here, of numbers and our own words
    return template.render(**report, charts=drawn)


def spoken(name: str) -> str:
    """A metric's name as people read it."""
    return EXPLAINED.get(name, name.replace("_", " ").replace(" f1", " F1"))


def charts(report: Mapping[str, Any]) -> dict[str, str]:
    """The pictures that this run has something to show in."""
    drawn = {}
    curves = report["curves"]
    if curves["steps"]:
        drawn["loss"] = _loss(curves)
    if curves["validation"]:
        drawn["metric"] = _line(
            curves["validation"], "step", "validation_metric", f"validation {spoken(report['headline'])}", marker="o"
        )
    if report.get("reliability"):
        words = ("a label", "that has it") if report["per_label"] else ("the assigned label", "that is right")
        drawn["reliability"] = _reliability(report["reliability"], *words)
    if len(report.get("coverage") or ()) > 1:
        drawn["coverage"] = _line(
            report["coverage"], "coverage", "accuracy", "accuracy of those", x_label="share of the texts labelled"
        )
    return drawn


def _loss(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    picture, axes = _axes("step", "loss")
    steps, validation = curves["steps"], curves["validation"]
    axes.plot(*_columns(steps, "step", "loss"), color=FAINT, linewidth=1, label="training, each step")
    if validation:
        axes.plot(
            *_columns(validation, "step", "validation_loss"), color=FIRST, marker="o", markersize=4, label="validation"
        )
    return _svg(picture, "loss")


def _line(
    points: Sequence[Mapping[str, float]], x: str, y: str, y_label: str, *, x_label: str = "", marker: str = ""
) -> str:
    picture, axes = _axes(x_label or x, y_label)
    axes.plot(*_columns(points, x, y), color=FIRST, marker=marker, markersize=4)
    return _svg(picture, y)


def _reliability(bins: Mapping[str, Sequence[Mapping[str, float]]], of: str, which: str) -> str:
    picture, axes = _axes(f"mean probability of {of}", f"share {which}")
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, label="perfect")
    for name, colour, marker in (("before", SECOND, "s"), ("after", FIRST, "o")):
        axes.plot(
            *_columns(bins[name], "confidence", "accuracy"), color=colour, marker=marker, markersize=4,
            label=f"{name} calibration",
        )  # fmt: skip
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02))
    return _svg(picture, "reliability")


def _columns(points: Sequence[Mapping[str, float]], *names: str) -> list[list[float]]:
    return [[point[name] for point in points] for name in names]


def _axes(x_label: str, y_label: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    picture = Figure(figsize=(4.6, 2.9), layout="constrained", facecolor="none")
    axes = picture.add_subplot(facecolor="none")
    axes.locator_params(axis="x", integer=x_label == "step")
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.tick_params(colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.grid(color=FAINT, alpha=0.3, linewidth=0.6)
    return picture, axes


def _svg(picture: Any, name: str) -> str:
    """The figure as an element of a page: ids of its own, letters as letters, colours as the page has them."""
    import matplotlib

    for axes in picture.axes:
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, labelcolor=INK, fontsize=9)
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        picture.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    for mark in ('id="', "url(#", 'href="#'):
        svg = svg.replace(mark, f"{mark}{name}-")
    for stand_in, colour in COLOURS.items():
        svg = svg.replace(stand_in, colour)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)
