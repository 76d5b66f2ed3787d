"""The page of every kind of report: hostile texts stay texts, charts share no id, thirty classes and an empty run have one."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from reports import results_of

from loracle.evaluation.calibration import Calibration
from loracle.examples import LabeledText, RankGroup
from loracle.reporting.html import render
from loracle.reporting.report import build_report
from loracle.tasks import Task

HOSTILE = "<script>console.error('run')</script> & \"quoted\" <img src=x onerror=alert(1)> {{ 7 * 7 }}"
RUN = {
    "name": "a <b>run</b>", "unit": "texts", "counts": {"train": 200, "validation": 50, "test": 200},
    "facts": [["base model", "tiny"], ["data", "/a/very/long/path/" * 6 + "reviews.csv"]], "issues": ["empty texts: 3"],
    "settings": {"lr": 0.1}, "versions": {"loracle": "0"},
}  # fmt: skip
CURVES = {
    "steps": [{"step": i, "loss": 1 / i} for i in range(1, 30)],
    "validation": [{"step": i, "validation_metric": 0.8, "validation_loss": 0.5} for i in (10, 20)],
}


def classified(c=3, name="single_label", n=200):
    rng = np.random.default_rng(0)
    task = Task(name=name, label_names=tuple(f"class number {i}" for i in range(c)))
    labels = [(int(i),) for i in rng.integers(c, size=n)]
    examples = [
        LabeledText(text=f"{HOSTILE} {'word ' * (i % 12)}{i}", labels=given, row=i) for i, given in enumerate(labels)
    ]
    logits = 3 * rng.normal(size=(n, c)) + 2 * np.eye(c)[[given[0] for given in labels]]
    scores, baselines = list(logits[:, None]), {"tfidf": list(rng.normal(size=(n, 1, c)))}
    calibration = task.evaluation.fit_calibration(scores, examples, task)
    training = task.output.training_report(examples, task, seed=0)
    return reported(scores, baselines, examples, task, calibration, training)


def ranked():
    rng = np.random.default_rng(0)
    groups = [
        RankGroup(group=str(i), texts=tuple(f"{HOSTILE} {i} {j}" for j in range(3)), rows=(1, 2, 3), context=HOSTILE,
                  clicks=tuple(rng.integers(5, 60, size=3).tolist()), impressions=(1000, 900, 1100))
        for i in range(40)
    ]  # fmt: skip
    scores, lengths = ([rng.normal(size=(3, 1)) for _ in groups] for _ in range(2))
    return reported(scores, {"length": lengths}, groups, Task(name="click_ranking"), None)


def reported(scores, baselines, examples, task, calibration, training=None):
    results, data = results_of(task, examples, scores, baselines, calibration, training)
    return build_report(results, data) | {"run": RUN, "curves": CURVES}


REPORTS = {
    "single": classified, "many": lambda: classified(c=30), "multi": lambda: classified(name="multi_label"), "rank": ranked
}  # fmt: skip


@pytest.fixture(scope="module", params=REPORTS)
def report(request):
    return REPORTS[request.param]()


@pytest.fixture(scope="module")
def page(report):
    return render(report)


class Elements(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.ids = [], []

    def handle_starttag(self, tag, attrs):
        self.found += [(tag, *pair) for pair in (attrs or [("", "")])]
        self.ids += [value for name, value in attrs if name == "id"]


@pytest.mark.slow
def test_hostile_texts_stay_texts_and_nothing_is_fetched(page):
    elements = Elements()
    elements.feed(page)
    assert "&lt;script&gt;console.error" in page
    assert "{{ 7 * 7 }}" in page.replace("&#34;", '"')
    assert not {tag for tag, *_ in elements.found} & {"script", "img", "b", "iframe", "base"}
    assert not [name for _, name, _ in elements.found if name and name.startswith("on")]
    linked = [v for _, name, v in elements.found if name in ("src", "href", "xlink:href")]
    assert all(v.startswith(("#", "data:")) for v in linked)
    assert not re.search(r"url\((?!#)", page)
    assert len(elements.ids) == len(set(elements.ids))  # of all charts together
    assert not re.search(r"#0[1-4]0[1-4]0[1-4]", page)  # no stand-in colour is left


@pytest.mark.slow
def test_the_page_is_small_and_holds_the_figures_of_the_report(report, page):
    assert len(page.encode()) < 1_000_000
    first = re.search(r"<body>\s*<p class=\"verdict[^>]*>([^<]*)<", page)[1]
    assert first == report["verdict"]["text"].replace("'", "&#39;")
    for row in report["table"]:
        assert all(f">{cell}</td>" in page for cell in row[1:] if "[" in cell)


def test_a_run_without_looks_baselines_or_mistakes_has_a_page():
    examples = [LabeledText(text=f"t{i}", labels=(i % 2,), row=i) for i in range(4)]
    task = Task(name="single_label", label_names=("a", "b"))
    report = reported(list(np.eye(2)[[0, 1, 0, 1]][:, None]), {}, examples, task, Calibration())
    page = render(report | {"curves": {"steps": [], "validation": []}})
    assert "Not compared: no baseline was measured." in page
    assert "None on the test side." in page
