"""Losses by hand, by finite differences, and by what must not change them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from small import make_loss

from loracle.config import TrainConfig
from loracle.errors import UserError
from loracle.evaluation.ranking import rank_metrics
from loracle.examples import LabeledText, Preference, RankGroup
from loracle.tasks import Task
from loracle.tasks.click_ranking import click_rate
from loracle.tasks.dataset import Data
from loracle.training import losses

SINGLE, MULTI, PAIRS, GRADES, CLICKS = "label", "labels", "pairs", "grades", "clicks"


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
    "dirichlet": (
        CLICKS, "dirichlet",
        [group(3, clicks=(9, 0, 4), impressions=(100, 50, 120)), group(2, clicks=(1, 3), impressions=(70, 80), weight=3.0)],
        (5, 1),
    ),
    "binomial": (
        CLICKS, "binomial",
        [group(3, clicks=(9, 0, 4), impressions=(20, 15, 12)), group(2, clicks=(5, 3), impressions=(7, 8), weight=3.0)],
        (5, 1),
    ),
    "soft pairs": (
        CLICKS, "soft-bradley-terry",
        [group(3, clicks=(9, 0, 4), impressions=(20, 15, 12)), group(2, clicks=(5, 3), impressions=(7, 8), weight=3.0)],
        (5, 1),
    ),
    "grades": (GRADES, "list", [group(3, grades=(0.0, 2.0, 1.0)), group(2, grades=(1.0, 0.5), weight=2.0)], (5, 1)),
    "graded pairs": (GRADES, "bradley-terry", [group(3, grades=(0.0, 2.0, 1.0)), group(2, grades=(1.0, 0.5))], (5, 1)),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request):
    """(loss, examples, scores in float64 that want a gradient)."""
    task, name, examples, shape = CASES[request.param]
    weights = np.array([1.0, 2.0, 0.5]) if task in (SINGLE, MULTI) else None
    scores = torch.from_numpy(np.random.default_rng(0).normal(size=shape)).requires_grad_()
    return make_loss(task, name=name, weights=weights, saturation=20.0), examples, scores


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_cross_entropy_by_hand():
    loss = make_loss(SINGLE)
    value, count = loss([text(0), text(1)])(torch.tensor([[math.log(2), 0.0, 0.0], [0.0, 0.0, math.log(6)]]))
    assert (value.item(), count) == (pytest.approx(math.log(2) + math.log(8)), 2)


def test_a_text_counts_by_its_own_weight_and_that_of_its_class():
    loss = make_loss(SINGLE, weights=np.array([1.0, 2.0, 1.0]))
    value, count = loss([text(1, weight=0.5), text(0, weight=3.0)])(torch.zeros(2, 3))
    assert (value.item(), count) == (pytest.approx((0.5 * 2 + 3) * math.log(3)), 4)


def test_binary_by_hand_is_the_mean_over_the_labels():
    value, count = make_loss(MULTI)([text(1)])(torch.tensor([[0.0, math.log(3), -math.log(3)]]))
    assert (value.item(), count) == (pytest.approx((math.log(2) + 2 * math.log(4 / 3)) / 3), 1)


def test_several_labels_weigh_what_they_weigh_on_average_and_none_weighs_one():
    loss = make_loss(MULTI, weights=np.array([1.0, 5.0, 2.0]))
    counts = [loss([e])(torch.zeros(1, 3))[1] for e in (text(0, 1), text(2), text())]
    assert counts == [3, 2, 1]


def test_bradley_terry_by_hand():
    value, count = make_loss(PAIRS)([pairs(2, (0, 1, None))])(torch.tensor([[math.log(3)], [0.0]]))
    assert (value.item(), count) == (pytest.approx(math.log(4 / 3)), 1)


def test_a_margin_shifts_the_distance():
    scores = torch.tensor([[1.0], [0.0]])
    value, _ = make_loss(PAIRS)([pairs(2, (0, 1, 1.0))])(scores)
    assert value.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(("known", "expected"), [(None, 1.5), (0.25, 0.0), (0.0, 0.0)])
def test_margin_ranking_takes_the_pairs_own_margin_even_a_zero(known, expected):
    loss = make_loss(PAIRS, name="margin", margin=2.0)
    value, _ = loss([pairs(2, (0, 1, known))])(torch.tensor([[0.5], [0.0]]))
    assert value.item() == pytest.approx(expected)


def test_a_list_of_clicks_by_hand():
    """10 clicks with m0 = 10 weigh 5; equal scores leave the shares of the impressions, 1/4 and 3/4."""
    loss = make_loss(CLICKS, saturation=10.0)
    value, count = loss([group(2, clicks=(6, 4), impressions=(100, 300))])(torch.zeros(2, 1))
    assert (value.item(), count) == (pytest.approx(-3 * math.log(1 / 4) - 2 * math.log(3 / 4)), pytest.approx(5))


def test_a_list_of_grades_by_hand():
    """Gains 2^2 - 1 = 3 and 2^1 - 1 = 1 become the shares 3/4 and 1/4."""
    value, count = make_loss(GRADES)([group(2, grades=(2.0, 1.0))])(torch.tensor([[math.log(3)], [0.0]]))
    assert (value.item(), count) == (pytest.approx(-0.75 * math.log(3 / 4) - 0.25 * math.log(1 / 4)), pytest.approx(1))


def test_click_rates_are_where_the_list_likelihood_is_least():
    """exp(score) ∝ clicks / impressions: the gradient there is zero."""
    shown = group(3, clicks=(5, 12, 3), impressions=(100, 150, 90))
    scores = torch.tensor([[math.log(c / n)] for c, n in zip(shown.clicks, shown.impressions, strict=True)])
    scores = scores.double().requires_grad_()
    make_loss(CLICKS)([shown])(scores)[0].backward()
    assert scores.grad.abs().max() < 1e-6


def test_a_title_never_shown_is_harmless():
    scores = torch.zeros(2, 1, requires_grad=True)
    value, _ = make_loss(CLICKS)([group(2, clicks=(5, 0), impressions=(100, 0))])(scores)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_large_scores_stay_finite(case, scale):
    loss, examples, scores = case
    value, _ = loss(examples)((scores.detach() * scale).float())
    assert math.isfinite(value.item())


# --- gradients and a reference ----------------------------------------------------------------------------------------


def test_gradients_are_those_of_finite_differences(case):
    loss, examples, scores = case
    assert torch.autograd.gradcheck(lambda s: loss(examples)(s)[0], scores, eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("cross-entropy", "binary")])
def test_baselines_minimise_the_very_loss_of_the_model(name):
    task, loss, examples, shape = CASES[name]
    loss = make_loss(task, name=loss, margin=1.5, saturation=20.0)
    scores = np.random.default_rng(1).normal(size=shape[0])
    leaf = torch.from_numpy(scores[:, None]).requires_grad_()
    value, count = loss(examples)(leaf)
    (value / count).backward()
    found, gradient = losses.numpy_objective(loss)(examples)(scores)
    assert found == pytest.approx(value.item() / count, abs=1e-12)
    np.testing.assert_allclose(gradient, leaf.grad[:, 0].numpy(), atol=1e-12)
    assert np.abs(gradient).max() > 0.01


# --- likelihoods of clicks --------------------------------------------------------------------------------------------


def test_a_dirichlet_multinomial_of_two_titles_is_the_beta_binomial_of_scipy():
    from scipy.stats import betabinom, multinomial

    shown = group(2, clicks=(7, 3), impressions=(100, 300))
    value, _ = make_loss(CLICKS, name="dirichlet", saturation=12.0)([shown])(torch.zeros(2, 1, dtype=torch.float64))
    ways = multinomial.logpmf([7, 3], 10, [0.5, 0.5]) + 10 * math.log(2)  # the coefficient, which the loss leaves out
    assert -value.item() + ways == pytest.approx(betabinom.logpmf(7, 10, 12 * 0.25, 12 * 0.75))


def test_without_overdispersion_the_dirichlet_multinomial_is_the_list_likelihood():
    groups = CASES["clicks"][2]
    scores = torch.randn(5, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loose, plain = (make_loss(CLICKS, name=n, saturation=1e9)(groups) for n in ("dirichlet", "list"))
    assert loose(scores)[0].item() == pytest.approx(plain(scores)[0].item(), rel=1e-5)
    assert loose(scores)[1] == pytest.approx(plain(scores)[1])


def test_rare_clicks_make_the_binomial_the_list_likelihood():
    groups = [group(3, clicks=(9, 2, 4), impressions=(10**6, 2 * 10**6, 10**6))]
    gradients = []
    for name in ("binomial", "list"):
        scores = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
        make_loss(CLICKS, name=name, saturation=50.0)(groups)(scores)[0].backward()
        gradients.append(scores.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    assert gradients[0].abs().max() > 0.5


def test_log_odds_are_where_the_binomial_is_least_and_its_level_is_free():
    shown = group(3, clicks=(50, 20, 90), impressions=(100, 100, 100))
    bound = make_loss(CLICKS, name="binomial")([shown])
    scores = torch.logit(torch.tensor([0.5, 0.2, 0.9], dtype=torch.float64)) + 5
    scores.requires_grad_()
    bound(scores)[0].backward()
    assert scores.grad.abs().max() < 1e-6
    assert bound(scores - 9)[0].item() == pytest.approx(bound(scores)[0].item())


@pytest.mark.parametrize("name", ["dirichlet", "binomial", "soft-bradley-terry"])
def test_titles_never_shown_always_clicked_or_never_are_harmless(name):
    extreme = [
        group(2, clicks=(5, 0), impressions=(100, 0)),
        group(2, clicks=(9, 7), impressions=(9, 7)),
        group(2, clicks=(0, 0), impressions=(9, 7)),
    ]
    scores = torch.tensor([0.5, -0.5, 1.0, 0.0, 0.2, 0.1], requires_grad=True)
    value, _ = make_loss(CLICKS, name=name)(extreme)(scores)
    value.backward()
    assert math.isfinite(value.item())
    assert torch.isfinite(scores.grad).all()


def test_a_soft_pair_pulls_by_how_sure_the_counts_are():
    """Log-odds of 0.10 against 0.05: a few clicks leave a doubt, many none, equal ones a tie."""
    bound = make_loss(CLICKS, name="soft-bradley-terry")
    slopes = []
    for clicks, shown in (((2, 1), 20), ((2000, 1000), 20000), ((5, 5), 100)):
        scores = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        bound([group(2, clicks=clicks, impressions=(shown, shown))])(scores)[0].backward()
        slopes.append(-scores.grad[0].item())
    assert 0 < slopes[0] < 0.3
    assert slopes[1] == pytest.approx(0.5, abs=1e-6)
    assert slopes[2] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("name", "same"), [("list", True), ("binomial", True), ("dirichlet", False)])
def test_a_row_split_into_two_titles_of_equal_score_says_the_same(name, same):
    """Repeated titles are merged by adding counts; the click likelihood would not have minded (up to a constant).

    To the Dirichlet-multinomial, whose titles differ beyond their scores, halves that agree are news.
    """
    whole = group(2, clicks=(9, 4), impressions=(300, 200))
    halves = group(3, clicks=(5, 4, 4), impressions=(150, 150, 200))
    bound = make_loss(CLICKS, name=name, saturation=20.0)

    def slope(groups, place):
        scores = torch.tensor([0.4, 0.1], dtype=torch.float64, requires_grad=True)
        bound(groups)(scores[place])[0].backward()
        return scores.grad

    split, merged = slope([halves], [0, 0, 1]), slope([whole], [0, 1])
    if same:
        torch.testing.assert_close(split, merged, atol=1e-9, rtol=1e-9)
    else:
        assert (split - merged).abs().max() > 0.05


@pytest.mark.parametrize("true", [30.0, 300.0])
def test_the_saturation_is_found_again(true):
    rng, groups, scores = np.random.default_rng(0), [], []
    for _ in range(600):
        s, shown = rng.normal(size=4) * 0.3, rng.integers(500, 4000, 4)
        p = shown * np.exp(s)
        clicks = rng.multinomial(rng.integers(20, 800), rng.dirichlet(true * p / p.sum()))
        groups.append(group(4, clicks=tuple(clicks.tolist()), impressions=tuple(shown.tolist())))
        scores.append(s)
    assert losses.fit_saturation(scores, groups) == pytest.approx(true, rel=0.15)


def test_clicks_that_the_scores_explain_do_not_saturate():
    rng, groups, scores = np.random.default_rng(0), [], []
    for _ in range(1000):
        s, shown = rng.normal(size=4) * 0.3, np.full(4, 1000)
        clicks = rng.multinomial(200, np.exp(s) / np.exp(s).sum())
        groups.append(group(4, clicks=tuple(clicks.tolist()), impressions=tuple(shown.tolist())))
        scores.append(s)
    assert losses.fit_saturation(scores, groups) > 2000


# --- what changes nothing ---------------------------------------------------------------------------------------------


def test_the_order_of_examples_does_not_matter(case):
    loss, examples, scores = case
    sizes = [len(e.texts) if isinstance(e, RankGroup) else 1 for e in examples]
    value, count = loss(examples)(scores)
    turned, turned_count = loss(examples[::-1])(torch.cat(scores.split(sizes)[::-1]))
    assert (turned.item(), turned_count) == (pytest.approx(value.item()), pytest.approx(count))


def test_sums_of_parts_are_the_sum_of_the_whole(case):
    loss, examples, scores = case
    sizes = [len(e.texts) if isinstance(e, RankGroup) else 1 for e in examples]
    parts = [loss([e])(s) for s, e in zip(scores.split(sizes), examples, strict=True)]
    value, count = loss(examples)(scores)
    assert sum(v.item() for v, _ in parts) == pytest.approx(value.item())
    assert sum(c for _, c in parts) == pytest.approx(count)


@pytest.mark.parametrize("name", ["clicks", "dirichlet", "binomial", "soft pairs", "grades", "graded pairs"])
def test_the_order_of_titles_does_not_matter(name):
    task, loss, examples, _ = CASES[name]
    first, order = examples[0], [2, 0, 1]
    picked = {f: tuple(v[i] for i in order) for f in ("clicks", "impressions", "grades") if (v := getattr(first, f))}
    turned = dataclasses.replace(first, **picked)
    scores = torch.tensor([[0.3], [-1.0], [0.7]])
    function = make_loss(task, name=loss)
    assert function([turned])(scores[order])[0].item() == pytest.approx(function([first])(scores)[0].item())


def test_a_pair_given_twice_counts_twice():
    loss, scores = make_loss(PAIRS), torch.tensor([[0.3], [-1.0]])
    once, twice = (loss([pairs(2, *[(0, 1, None)] * n)])(scores) for n in (1, 2))
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
    found = losses.class_weights([text(i) for i in labels], 3, "balanced")
    np.testing.assert_allclose(found, compute_class_weight("balanced", classes=np.arange(3), y=labels))


def test_balanced_classes_carry_equal_weight_and_absent_ones_weigh_one():
    examples = [text(0)] * 6 + [text(1)] * 2
    weights = losses.class_weights(examples, 3, "balanced")
    assert 6 * weights[0] == pytest.approx(2 * weights[1])
    assert weights[2] == 1
    assert losses.class_weights(examples, 3, "none").tolist() == [1, 1, 1]


TRAINING = {
    SINGLE: ("single_label", [text(0), text(1)]),
    MULTI: ("multi_label", [text(0, 1), text(1)]),
    PAIRS: ("ranking", [pairs(2, (0, 1, None))]),
    GRADES: ("ranking", [group(2, grades=(2.0, 1.0))]),
    CLICKS: ("click_ranking", [group(2, clicks=(5, 1), impressions=(100, 100))]),
}


def data_of(evidence, train=None):
    name, examples = TRAINING[evidence]
    task = Task(name=name, label_names=("a", "b", "c") if evidence in (SINGLE, MULTI) else ())
    return Data(task=task, train=train or examples, validation=examples, test=examples)


@pytest.mark.parametrize(
    ("evidence", "chosen"),
    [(SINGLE, "cross-entropy"), (MULTI, "binary"), (PAIRS, "bradley-terry"), (GRADES, "list"), (CLICKS, "list")],
)
def test_auto_picks_by_task(evidence, chosen):
    for name in ("auto", chosen):
        assert losses.choose_loss(data_of(evidence), TrainConfig(loss=name))[1]["name"] == chosen


def test_frequent_clicks_get_the_binomial():
    frequent = data_of(CLICKS, [group(2, clicks=(6, 4), impressions=(20, 20))])
    assert losses.choose_loss(frequent, TrainConfig())[1]["name"] == "binomial"
    assert losses.choose_loss(frequent, TrainConfig(loss="list"))[1]["name"] == "list"
    assert click_rate(frequent.train) == 0.25


@pytest.mark.parametrize(
    ("evidence", "name", "fitting"),
    [
        (SINGLE, "list", "cross-entropy"),
        (MULTI, "cross-entropy", "binary"),
        (PAIRS, "list", "bradley-terry, margin"),
        (CLICKS, "binary", "bradley-terry, margin, list, dirichlet, binomial, soft-bradley-terry"),
        (GRADES, "binomial", "bradley-terry, margin, list"),
    ],
)
def test_loss_of_another_task_names_those_that_fit(evidence, name, fitting):
    with pytest.raises(UserError) as error:
        losses.choose_loss(data_of(evidence), TrainConfig(loss=name))
    assert f"'{name}'" in error.value.message
    assert error.value.hint.endswith(f"{fitting}.")
