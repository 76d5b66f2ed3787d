"""The depth that the evidence allows: probes find the layer where labels can be read, and the rule of one standard error."""

from __future__ import annotations

import numpy as np
import pytest

from loracle.errors import UserError
from loracle.evaluation.linear_models import ridge_classifier
from loracle.examples import LabeledText
from loracle.tasks import Task
from loracle.tasks.base import LinearFit
from loracle.tasks.dataset import Data
from loracle.training.probe import Depth, choose, lowest_good_depth, probe_layers, probe_table

DATA = Data(task=Task(name="single_label", label_names=("a", "b", "c")), train=[], validation=[], test=[])
FIT = LinearFit(None, 0)  # classifiers need no objective


def examples_of(labels) -> list[LabeledText]:
    return [LabeledText(text=f"text {i}", labels=(int(c),), row=i) for i, c in enumerate(labels)]


def layered(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """States [n, 4, 8] of which layers 3 and 4 hold the label, the second a trace of it, the first nothing."""
    labels = rng.integers(3, size=n)
    states = rng.normal(size=(n, 4, 8))
    for layer, strength in enumerate((0, 1, 6, 6)):
        states[np.arange(n), layer, labels] += strength
    return states, labels


def test_the_lowest_layer_that_knows_as_much_as_any():
    rng = np.random.default_rng(0)
    (seen, labels), (unseen, hidden) = layered(400, rng), layered(300, rng)
    depths = probe_layers((seen, unseen), examples_of(labels), examples_of(hidden), DATA, FIT)
    assert [d.layers for d in depths] == [1, 2, 3, 4]
    assert depths[0].value < 0.45 < depths[1].value < 0.8 < 0.97 < depths[2].value
    assert choose(depths).layers == 3
    layers, line = lowest_good_depth(depths)
    assert (layers, "depth 3 of 4" in line, "25 %" in line) == (3, True, True)
    assert probe_table(depths, "accuracy")[0].count("\n") == 4


def test_several_labels():
    rng = np.random.default_rng(1)
    seen, unseen = rng.normal(size=(200, 5)), rng.normal(size=(100, 5))
    scores = ridge_classifier(seen, seen[:, :3] > 0, unseen)
    assert ((scores > 0) == (unseen[:, :3] > 0)).mean() > 0.9


@pytest.mark.parametrize(("values", "chosen"), [
    ((0.5, 0.78, 0.8, 0.7), 3),  # 0.78 is more than one error (0.01) below the best
    ((0.5, 0.795, 0.8, 0.7), 2),
    ((0.8, 0.5, 0.8, 0.7), 1),
])  # fmt: skip
def test_one_standard_error(values, chosen):
    depths = [Depth(i, v, v - 0.0196, v + 0.0196) for i, v in enumerate(values, 1)]
    assert choose(depths).layers == chosen


def test_too_few_validation_examples_are_an_error():
    pairs = Data(task=Task(name="multi_label", label_names=("a", "b", "c")), train=[], validation=[], test=[])
    texts = [LabeledText(text=str(i), labels=(), row=i) for i in range(2)]
    with pytest.raises(UserError, match="2 validation texts"):
        probe_layers((np.zeros((2, 1, 2)), np.zeros((2, 1, 2))), texts, texts, pairs, FIT)
