"""Losses by hand, by finite differences, against the NumPy baselines' own, and by what must not change them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from loracle.data.examples import LabeledText, Preference, RankGroup, Task
from loracle.errors import UserError
from loracle.judge.baselines import rank_loss
from loracle.judge.ranking import rank_metrics
from loracle.train import losses

SINGLE = Task(kind="single", label_names=("a", "b", "c"))
MULTI = Task(kind="multi", label_names=("a", "b", "c"))
PAIRS, GRADES, CLICKS = (Task(kind="rank", evidence=e) for e in ("pairs", "grades", "clicks"))


def text(*labels: int, weight: float = 1.0) -> LabeledText:
    return LabeledText(text="t", labels=labels, row=1, weight=weight)


def group(n: int, **evidence) -> RankGroup:
    return RankGroup(group="g", texts=tuple(f"title {i}" for i in range(n)), rows=tuple(range(1, n + 1)), **evidence)


def pairs(n: int, *winner_loser_margin: tuple, **more) -> RankGroup:
    return group(
        n, preferences=tuple(Preference(winner=w, loser=o, margin=m) for w, o, m in winner_loser_margin), **more
    )


CASES = {
    "cross-entropy": (SINGLE, "auto", [text(0), text(2, weight=0.5), text(0)], (3, 3)),
    "binary": (MULTI, "auto", [text(0, 2), text(), text(1, weight=2.0)], (3, 3)),
    "bradley-terry": (PAIRS, "auto", [pairs(3, (0, 1, None), (2, 1, 0.3), weight=2.0), pairs(2, (1, 0, None))], (5, 1)),
    "margin": (PAIRS, "margin", [pairs(3, (0, 1, None), (2, 1, 0.3)), pairs(2, (1, 0, None), weight=0.5)], (5, 1)),
    "clicks": (
        CLICKS, "list",
        [group(3, clicks=(9, 0, 4), impressions=(100, 50, 120)), group(2, clicks=(1, 3), impressions=(70, 80), weight=3.0)],
        (5, 1),
    ),
    "grades": (GRADES, "list", [group(3, grades=(0.0, 2.0, 1.0)), group(2, grades=(1.0, 0.5), weight=2.0)], (5, 1)),
    "graded pairs": (GRADES, "bradley-terry", [group(3, grades=(0.0, 2.0, 1.0)), group(2, grades=(1.0, 0.5))], (5, 1)),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request):
    """(loss, examples, scores in float64 that want a gradient)."""
    task, name, examples, shape = CASES[request.param]
    weights = np.array([1.0, 2.0, 0.5]) if task.kind != "rank" else None
    scores = torch.from_numpy(np.random.default_rng(0).normal(size=shape)).requires_grad_()
    return losses.make_loss(task, name=name, weights=weights, saturation=20.0), examples, scores


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_cross_entropy_by_hand():
    loss = losses.make_loss(SINGLE)
    value, count = loss(torch.tensor([[math.log(2), 0.0, 0.0], [0.0, 0.0, math.log(6)]]), [text(0), text(1)])
    assert (value.item(), count) == (pytest.approx(math.log(2) + math.log(8)), 2)


def test_a_text_counts_by_its_own_weight_and_that_of_its_class():
    loss = losses.make_loss(SINGLE, weights=np.array([1.0, 2.0, 1.0]))
    value, count = loss(torch.zeros(2, 3), [text(1, weight=0.5), text(0, weight=3.0)])
    assert (value.item(), count) == (pytest.approx((0.5 * 2 + 3) * math.log(3)), 4)


def test_binary_by_hand_is_the_mean_over_the_labels():
    value, count = losses.make_loss(MULTI)(torch.tensor([[0.0, math.log(3), -math.log(3)]]), [text(1)])
    assert (value.item(), count) == (pytest.approx((math.log(2) + 2 * math.log(4 / 3)) / 3), 1)


def test_several_labels_weigh_what_they_weigh_on_average_and_none_weighs_one():
    loss = losses.make_loss(MULTI, weights=np.array([1.0, 5.0, 2.0]))
    counts = [loss(torch.zeros(1, 3), [e])[1] for e in (text(0, 1), text(2), text())]
    assert counts == [3, 2, 1]


def test_bradley_terry_by_hand():
    value, count = losses.make_loss(PAIRS)(torch.tensor([[math.log(3)], [0.0]]), [pairs(2, (0, 1, None))])
    assert (value.item(), count) == (pytest.approx(math.log(4 / 3)), 1)


def test_a_margin_shifts_the_distance():
    scores = torch.tensor([[1.0], [0.0]])
    value, _ = losses.make_loss(PAIRS)(scores, [pairs(2, (0, 1, 1.0))])
    assert value.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(("known", "expected"), [(None, 1.5), (0.25, 0.0), (0.0, 0.0)])
def test_margin_ranking_takes_the_pairs_own_margin_even_a_zero(known, expected):
    loss = losses.make_loss(PAIRS, name="margin", margin=2.0)
    value, _ = loss(torch.tensor([[0.5], [0.0]]), [pairs(2, (0, 1, known))])
    assert value.item() == pytest.approx(expected)


def test_a_list_of_clicks_by_hand():
    """10 clicks with m0 = 10 weigh 5; equal scores leave the shares of the impressions, 1/4 and 3/4."""
    loss = losses.make_loss(CLICKS, saturation=10.0)
    value, count = loss(torch.zeros(2, 1), [group(2, clicks=(6, 4), impressions=(100, 300))])
    assert (value.item(), count) == (pytest.approx(-3 * math.log(1 / 4) - 2 * math.log(3 / 4)), pytest.approx(5))


def test_a_list_of_grades_by_hand():
    """Gains 2^2 - 1 = 3 and 2^1 - 1 = 1 become the shares 3/4 and 1/4."""
    value, count = losses.make_loss(GRADES)(torch.tensor([[math.log(3)], [0.0]]), [group(2, grades=(2.0, 1.0))])
    assert (value.item(), count) == (pytest.approx(-0.75 * math.log(3 / 4) - 0.25 * math.log(1 / 4)), pytest.approx(1))


def test_click_rates_are_where_the_list_likelihood_is_least():
    """exp(score) ∝ clicks / impressions: the gradient there is zero."""
    shown = group(3, clicks=(5, 12, 3), impressions=(100, 150, 90))
    scores = torch.tensor([[math.log(c / n)] for c, n in zip(shown.clicks, shown.impressions, strict=True)])
    scores = scores.double().requires_grad_()
    losses.make_loss(CLICKS)(scores, [shown])[0].backward()
    assert scores.grad.abs().max() < 1e-6


def test_a_title_never_shown_is_harmless():
    scores = torch.zeros(2, 1, requires_grad=True)
    value, _ = losses.make_loss(CLICKS)(scores, [group(2, clicks=(5, 0), impressions=(100, 0))])
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_large_scores_stay_finite(case, scale):
    loss, examples, scores = case
    value, _ = loss((scores.detach() * scale).float(), examples)
    assert math.isfinite(value.item())


# --- gradients and a reference ----------------------------------------------------------------------------------------


def test_gradients_are_those_of_finite_differences(case):
    loss, examples, scores = case
    assert torch.autograd.gradcheck(lambda s: loss(s, examples)[0], scores, eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("cross-entropy", "binary")])
def test_rankers_and_their_baselines_minimise_the_same(name):
    task, loss, examples, shape = CASES[name]
    loss = losses.resolve_loss(task, loss)
    scores = np.random.default_rng(1).normal(size=shape[0])
    leaf = torch.from_numpy(scores[:, None]).requires_grad_()
    value, count = losses.make_loss(task, name=loss, margin=1.5, saturation=20.0)(leaf, examples)
    (value / count).backward()
    expected, gradient = rank_loss(examples, loss, saturation=20.0, margin=1.5)(scores)
    assert value.item() / count == pytest.approx(expected, abs=1e-12)
    np.testing.assert_allclose(leaf.grad[:, 0].numpy(), gradient, atol=1e-12)


# --- what changes nothing ---------------------------------------------------------------------------------------------


def test_the_order_of_examples_does_not_matter(case):
    loss, examples, scores = case
    sizes = [len(e.texts) if isinstance(e, RankGroup) else 1 for e in examples]
    value, count = loss(scores, examples)
    turned, turned_count = loss(torch.cat(scores.split(sizes)[::-1]), examples[::-1])
    assert (turned.item(), turned_count) == (pytest.approx(value.item()), pytest.approx(count))


def test_sums_of_parts_are_the_sum_of_the_whole(case):
    loss, examples, scores = case
    sizes = [len(e.texts) if isinstance(e, RankGroup) else 1 for e in examples]
    parts = [loss(s, [e]) for s, e in zip(scores.split(sizes), examples, strict=True)]
    value, count = loss(scores, examples)
    assert sum(v.item() for v, _ in parts) == pytest.approx(value.item())
    assert sum(c for _, c in parts) == pytest.approx(count)


@pytest.mark.parametrize("name", ["clicks", "grades", "graded pairs"])
def test_the_order_of_titles_does_not_matter(name):
    task, loss, examples, _ = CASES[name]
    first, order = examples[0], [2, 0, 1]
    picked = {f: tuple(v[i] for i in order) for f in ("clicks", "impressions", "grades") if (v := getattr(first, f))}
    turned = dataclasses.replace(first, **picked)
    scores = torch.tensor([[0.3], [-1.0], [0.7]])
    function = losses.make_loss(task, name=loss)
    assert function(scores[order], [turned])[0].item() == pytest.approx(function(scores, [first])[0].item())


def test_a_pair_given_twice_counts_twice():
    loss, scores = losses.make_loss(PAIRS), torch.tensor([[0.3], [-1.0]])
    once, twice = (loss(scores, [pairs(2, *[(0, 1, None)] * n)]) for n in (1, 2))
    assert (twice[0].item(), twice[1]) == (pytest.approx(2 * once[0].item()), 2 * once[1])


def test_a_constant_scorer_gets_chance(case):
    _, examples, _ = case
    groups = [e for e in examples if isinstance(e, RankGroup)]
    if groups:
        assert rank_metrics([np.zeros(len(g.texts)) for g in groups], groups)["pair_accuracy"].value == 0.5


# --- class weights, and which loss is for what ------------------------------------------------------------------------


def test_balanced_weights_are_those_of_scikit_learn():
    from sklearn.utils.class_weight import compute_class_weight

    labels = [0] * 6 + [1] * 3 + [2]
    found = losses.class_weights([text(i) for i in labels], SINGLE, "balanced")
    np.testing.assert_allclose(found, compute_class_weight("balanced", classes=np.arange(3), y=labels))


def test_balanced_classes_carry_equal_weight_and_absent_ones_weigh_one():
    examples = [text(0)] * 6 + [text(1)] * 2
    weights = losses.class_weights(examples, SINGLE, "balanced")
    assert 6 * weights[0] == pytest.approx(2 * weights[1])
    assert weights[2] == 1
    assert losses.class_weights(examples, SINGLE, "none").tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("task", "chosen"),
    [(SINGLE, "cross-entropy"), (MULTI, "binary"), (PAIRS, "bradley-terry"), (GRADES, "list"), (CLICKS, "list")],
)
def test_auto_picks_by_task(task, chosen):
    assert losses.resolve_loss(task) == losses.resolve_loss(task, chosen) == chosen


@pytest.mark.parametrize(
    ("task", "name", "words"),
    [
        (SINGLE, "list", "a loss for single-label classification (cross-entropy); found 'list'"),
        (MULTI, "cross-entropy", "a loss for multi-label classification (binary); found 'cross-entropy'"),
        (PAIRS, "list", "a loss for ranking from pairs (bradley-terry, margin); found 'list'"),
        (CLICKS, "binary", "a loss for ranking from clicks (list, bradley-terry, margin); found 'binary'"),
    ],
)
def test_a_loss_of_another_task_is_refused(task, name, words):
    with pytest.raises(UserError) as refused:
        losses.make_loss(task, name=name)
    assert str(refused.value) == f"expected {words}. Leave out --loss, or pick one of these."
