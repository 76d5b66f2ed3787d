"""The depth that the evidence allows: probes find the layer where labels can be read, and the rule of one standard error."""

from __future__ import annotations

import numpy as np
import pytest

from loracle.baselines.linear_probe import Depth, by_depth, choose, lines, ridge, verdict
from loracle.errors import UserError
from loracle.examples import Task

SINGLE = Task(kind="single", label_names=("a", "b", "c"))


def layered(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """States [n, 4, 8] of which layers 3 and 4 hold the label, the second a trace of it, the first nothing."""
    labels = rng.integers(3, size=n)
    states = rng.normal(size=(n, 4, 8))
    for layer, strength in enumerate((0, 1, 6, 6)):
        states[np.arange(n), layer, labels] += strength
    return states, labels


def accuracy(labels: np.ndarray):
    def judge(scores: np.ndarray) -> dict[str, float]:
        value = float((scores.argmax(1) == labels).mean())
        error = 1.96 * np.sqrt(max(value * (1 - value), 1e-4) / len(labels))
        return {"value": value, "low": value - error, "high": value + error}

    return judge


def test_the_lowest_layer_that_knows_as_much_as_any():
    rng = np.random.default_rng(0)
    (seen, labels), (unseen, hidden) = layered(400, rng), layered(300, rng)
    depths = by_depth(seen, unseen, lambda a, b: ridge(a, labels, b, SINGLE), accuracy(hidden))
    assert [d.layers for d in depths] == [1, 2, 3, 4]
    assert depths[0].value < 0.45 < depths[1].value < 0.8 < 0.97 < depths[2].value
    assert choose(depths).layers == 3
    assert "depth 3 of 4" in verdict(depths)
    assert "25 % of the layers' work is saved" in verdict(depths)
    assert lines(depths, "accuracy")[0].count("\n") == 4


def test_several_labels():
    rng = np.random.default_rng(1)
    seen, unseen = rng.normal(size=(200, 5)), rng.normal(size=(100, 5))
    scores = ridge(seen, seen[:, :3] > 0, unseen, Task(kind="multi", label_names=("a", "b", "c")))
    assert ((scores > 0) == (unseen[:, :3] > 0)).mean() > 0.9


@pytest.mark.parametrize(("values", "chosen"), [
    ((0.5, 0.78, 0.8, 0.7), 3),  # 0.78 is more than one error (0.01) below the best
    ((0.5, 0.795, 0.8, 0.7), 2),
    ((0.8, 0.5, 0.8, 0.7), 1),
])  # fmt: skip
def test_one_standard_error(values, chosen):
    depths = [Depth(i, v, v - 0.0196, v + 0.0196) for i, v in enumerate(values, 1)]
    assert choose(depths).layers == chosen


def test_nothing_to_judge_by_is_said():
    with pytest.raises(UserError, match="held-out examples that tell depths apart; found 2 texts"):
        by_depth(
            np.zeros((4, 1, 2)),
            np.zeros((2, 1, 2)),
            lambda a, b: None,
            lambda _: dict.fromkeys(("value", "low", "high")),
        )
