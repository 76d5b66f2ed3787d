"""The report in a real browser: no error, nothing hidden, nothing too wide, in light and dark, on a desk and in a hand."""

from __future__ import annotations

from itertools import cycle, product

import pytest
from small import QUICK, clicked, labelled, several, write

from loracle import pipeline
from loracle.config import RunConfig

pytestmark = pytest.mark.browser

CLICKS = {"group": "site,day", "text": "headline", "clicks": "clicks", "impressions": "impressions"}
HOSTILE = "<script>console.error(1)</script>"
LONG = "wheelbarrow" * 30  # a word that is wider than a phone


def runs(model, folder, kind):
    """A small finished run of each kind, its baselines measured."""
    rows = {"labels": labelled, "several": several, "clicks": clicked}[kind]()
    if kind == "labels":
        rows = [row | {"text": f"{row['text']} {odd}"} for row, odd in zip(rows, cycle((LONG, HOSTILE)), strict=False)]
    data = write(folder / "a.jsonl", rows)
    flat = QUICK | {"data": str(data), "model": str(model), "out": str(folder / "run"), "baselines": True}
    flat |= CLICKS if kind == "clicks" else {}
    return pipeline.train(RunConfig.from_flat(flat), log=lambda line: None, quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["labels", "several", "clicks"])
def test_the_report_looks_right(browser, tiny_model, tmp_path, kind):
    page = runs(tiny_model("qwen2"), tmp_path, kind) / "report.html"
    grounds = set()
    for width, scheme in product((1100, 390), ("light", "dark")):
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
        seen, said, asked = context.new_page(), [], []
        seen.on("console", lambda message, said=said: said.append(message.text))
        seen.on("pageerror", lambda error, said=said: said.append(str(error)))
        seen.on("request", lambda request, asked=asked: asked.append(request.url))
        seen.goto(page.as_uri())
        assert said == []
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
        assert seen.locator(".verdict").is_visible()
        assert seen.locator(".big").bounding_box()["y"] < 800, "the headline is below the fold"
        shot = tmp_path / f"{width}-{scheme}.png"
        seen.screenshot(path=shot, full_page=True)
        assert shot.stat().st_size > 20_000
        seen.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        assert seen.evaluate("document.documentElement.scrollWidth") <= width
        colours = seen.evaluate("[document.body, document.querySelector('svg text')].map(e => [getComputedStyle(e)"
                                ".backgroundColor, getComputedStyle(e).fill])")  # fmt: skip
        (ground, _), (_, ink) = colours
        grounds.add(ground)
        assert light(ground) - light(ink) > 128 if scheme == "light" else light(ink) - light(ground) > 128, colours
        context.close()
    assert len(grounds) == 2


def light(colour):
    """Mean of red, green and blue of ``rgb(…)``."""
    return sum(int(part) for part in colour[4:-1].split(",")[:3]) / 3
