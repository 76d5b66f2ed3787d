"""Losses: pure functions from scores to ``(sum, count)``, and ``LOSSES``, the registry of their names.

The sum goes backward. The count is the amount of evidence in it. Accumulation steps and processes add both up and divide
once, so the gradient does not depend on how a batch was cut.

A ``Loss`` is first bound to its examples, then called with their scores, as often as needed: the training loop calls once a
micro-batch, the baselines' optimizer hundreds of times. docs/how-it-works.md says which loss is for what.

Shapes: E texts, C labels, P pairs, G groups. Ranking scores are flat, ``[E]``: the titles of group 0, then of group 1, …
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from scipy.special import ndtr
from torch import Tensor

from loracle.config import TrainConfig
from loracle.errors import UserError, near
from loracle.evaluation.click_model import fit_click_model
from loracle.evaluation.pairs import grade_gains, group_pairs
from loracle.examples import LabeledText, RankGroup
from loracle.tasks.base import LinearFit
from loracle.tasks.click_ranking import click_rate
from loracle.tasks.dataset import Data

Bound = Callable[[Tensor], tuple[Tensor, float]]  # scores of the examples it was bound to -> (sum, count)
Loss = Callable[[Sequence[Any]], Bound]  # examples of one task

SATURATION = (1.0, 1e7)  # clicks between which m0 is searched; at the upper end nothing saturates
NEWTON = 30  # steps to a group's intercept; convergence is quadratic, so a dozen is plenty


def cross_entropy(scores: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    """Negative log-likelihood of one label a text: ``-Σ w log softmax(scores)[label]``; counts ``Σ w``."""
    return (F.cross_entropy(scores, labels, reduction="none") * weights).sum(), float(weights.sum())


def binary(scores: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    """Mean binary cross entropy over the labels of a text, ``targets [E, C]`` in {0, 1}; counts ``Σ w``."""
    each = F.binary_cross_entropy_with_logits(scores, targets, reduction="none").mean(1)
    return (each * weights).sum(), float(weights.sum())


def bradley_terry(distance: Tensor, margin: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    """``-Σ w log σ(distance - margin)`` over P pairs, where a pair's distance is the winner's score less the loser's.

    Bradley & Terry 1952; the margin as in Llama 2 (arXiv:2307.09288). Counts ``Σ w``.
    """
    return -(weights * F.logsigmoid(distance - margin)).sum(), float(weights.sum())


def margin_ranking(distance: Tensor, margin: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    """``Σ w max(0, margin - distance)`` over P pairs, the original recipe's loss; counts ``Σ w``."""
    return (weights * F.relu(margin - distance)).sum(), float(weights.sum())


def list_likelihood(scores: Tensor, owner: Tensor, share: Tensor, offset: Tensor, groups: int) -> tuple[Tensor, float]:
    """One likelihood for a list: ``-Σ share_i log p_i`` with ``p_i ∝ exp(score_i + offset_i)`` within each group.

    Two weightings of it are used. *Clicks*: given a click in a group, the chance that it fell on title i is proportional to
    ``impressions_i · exp(score_i)`` (exact for rare clicks; McFadden 1974), so the offset is the log of the impressions and
    the share the clicks. *Grades*: offset 0, and the share is the gain ``2^grade - 1`` over its group's sum (ListNet, Cao et
    al. 2007). Counts ``Σ share``.

    Args:
        scores: ``[E]``. owner: int64 ``[E]``, group of each title. share, offset: ``[E]``. groups: G.
    """
    return -(share * _log_softmax(scores + offset, owner, groups)).sum(), float(share.sum())


def dirichlet_multinomial(
    scores: Tensor, owner: Tensor, clicks: Tensor, offset: Tensor, groups: int, concentration: float
) -> Tensor:
    """``-log P(clicks)`` of each group, ``[G]``, its m clicks falling on titles with Dirichlet chances ``A · p``.

    ``p_i ∝ exp(score_i + offset_i)`` as in ``list_likelihood``, A the concentration: the smaller, the more titles differ
    beyond their scores (Mosimann 1962). m clicks then carry the information of ``m (1 + A) / (m + A)`` independent ones,
    which is where the weight ``m / (1 + m/m0)`` comes from, with m0 = A. The multinomial coefficient is left out.
    """
    alpha = concentration * _log_softmax(scores + offset, owner, groups).exp().clamp(min=1e-9)
    total = torch.zeros(groups, dtype=scores.dtype, device=scores.device)
    each = torch.lgamma(clicks + alpha) - torch.lgamma(alpha)
    a, m = total + concentration, total.index_add(0, owner, clicks)
    return torch.lgamma(m + a) - torch.lgamma(a) - total.index_add(0, owner, each)


def binomial(scores: Tensor, owner: Tensor, clicks: Tensor, shown: Tensor, groups: int) -> Tensor:
    """``-log P(clicks)`` of each group, ``[G]``: ``clicks_i ~ Binomial(shown_i, σ(score_i + b))``, for rates that are not rare.

    The group's intercept b is at its best for these scores (profile likelihood); there its derivative is 0, so that scores
    get the right gradient though b carries none (envelope theorem). The binomial coefficients are left out.
    """
    with torch.no_grad():
        zeros = torch.zeros(groups, dtype=scores.dtype, device=scores.device)
        m, n = zeros.index_add(0, owner, clicks), zeros.index_add(0, owner, shown)
        rate = (m / n).clamp(1e-12, 1 - 1e-12)
        level = zeros.index_add(0, owner, shown * scores) / n
        b = torch.logit(rate) - level
        for _ in range(NEWTON):
            p = torch.sigmoid(scores + b[owner])
            slope = zeros.index_add(0, owner, shown * p * (1 - p)).clamp(min=1e-12)
            b = b + ((m - zeros.index_add(0, owner, shown * p)) / slope).clamp(-2, 2)
        b = b.clamp(-40 - level, 40 - level)  # where all or none were clicked the best one is infinite
    logits = scores + b[owner]
    each = clicks * F.logsigmoid(logits) + (shown - clicks) * F.logsigmoid(-logits)
    return -zeros.index_add(0, owner, each)


def soft_bradley_terry(distance: Tensor, target: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    """``-Σ w [q log σ(d) + (1 - q) log σ(-d)]`` over P pairs: q is the chance that the first is truly the better one.

    Ambiguous pairs get a smaller gradient than with a hard target. Counts Σ w.
    """
    each = target * F.logsigmoid(distance) + (1 - target) * F.logsigmoid(-distance)
    return -(weights * each).sum(), float(weights.sum())


def _log_softmax(logits: Tensor, owner: Tensor, groups: int) -> Tensor:
    """Logarithm of the softmax within each group, ``[E]``."""
    top = torch.full((groups,), float("-inf"), dtype=logits.dtype, device=logits.device)
    top = top.scatter_reduce(0, owner, logits.detach(), "amax")
    total = torch.zeros_like(top).index_add(0, owner, (logits - top[owner]).exp())
    return logits - top[owner] - total.log()[owner]


def class_weights(examples: Sequence[LabeledText], classes: int, how: str) -> np.ndarray:
    """Weight of each class, ``float64 [C]``. ``balanced`` is N / (C · count), as in scikit-learn; absent classes get 1."""
    if how == "none":
        return np.ones(classes)
    counts = np.bincount([label for e in examples for label in e.labels], minlength=classes)
    return np.where(counts > 0, counts.sum() / (classes * np.maximum(counts, 1)), 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSettings:
    """What a loss may depend on beside the examples that it is bound to."""

    class_weights: np.ndarray | None = None  # [C], of tasks with labels
    margin: float = 1.0  # of pairs that name none (margin loss)
    saturation: float = 200.0  # m0: a group with m clicks weighs m / (1 + m / m0)


@dataclass(frozen=True, slots=True)
class LossType:
    """An entry of ``LOSSES``: a factory, and the evidence that it needs, any of these.

    ``saturates``: whether it has a saturation m0 where it learns from clicks.
    """

    make: Callable[[LossSettings], Loss]
    needs: frozenset[str]
    saturates: bool = False


def choose_loss(data: Data, settings: TrainConfig) -> tuple[Loss, dict[str, Any]]:
    """The loss of a run, and what was settled about it: its name and, of clicks, the saturation m0.

    m0 is fitted on the validation groups, around the scores of a TF-IDF ranker that has not seen them. What words leave
    unexplained is close to what a model leaves, and it takes a second.

    Raises:
        UserError: the loss does not fit the task, or a setting does not fit the loss.
    """
    learning = data.task.learning
    evidence, name = learning.evidence(data.train), settings.loss
    fitting = [known for known, loss in LOSSES.items() if loss.needs & evidence]
    if name == "auto":
        name = learning.default_loss(data.train)
    elif name not in fitting:
        raise UserError(
            f"Loss '{name}' does not fit this task ({data.task.reading.description}){near(name, fitting)}.",
            f"Leave out --loss, or pick one of: {', '.join(fitting)}.",
        )
    if settings.target_precision is not None and not learning.sets_thresholds:
        raise UserError("--target-precision needs a task with several labels a text.", "Leave it out.")
    loss, saturates = LOSSES[name], LOSSES[name].saturates and learning.saturates
    if settings.saturation is not None and not saturates:
        raise UserError(f"Loss '{name}' has no saturation here.", "Leave --saturation out.")
    if not saturates:
        labels = len(data.task.label_names)
        weights = class_weights(data.train, labels, settings.class_weights) if labels else None
        return loss.make(LossSettings(class_weights=weights, margin=settings.margin)), {"name": name}
    m0 = settings.saturation or _fit_m0(name, data, settings.seed)
    return loss.make(LossSettings(saturation=m0)), {"name": name, "saturation": m0}


def _fit_m0(name: str, data: Data, seed: int) -> float:
    fit = LinearFit(numpy_objective(LOSSES["list"].make(LossSettings())), seed)
    scores = [s[:, 0] for s in data.task.learning.fit_words(data.train, data.validation, data.task, fit)]
    return _saturation_of_odds(scores, data) if name == "binomial" else fit_saturation(scores, data.validation)


def _saturation_of_odds(scores: list[np.ndarray], data: Data) -> float:
    """m0 where clicks are not rare: n titles with c clicks at rate p know their log-odds to 1 / (c (1 - p)), against τ²."""
    model, rate = fit_click_model(data.validation, scores), click_rate(data.validation)
    if not model.groups:
        return SATURATION[1]
    titles = float(np.mean([len(g.texts) for g in data.validation]))
    return float(np.clip(titles / (model.spread**2 * (1 - rate)), *SATURATION))


def numpy_objective(loss: Loss) -> Callable[[Sequence[Any]], Callable[[np.ndarray], tuple[float, np.ndarray]]]:
    """The loss for optimizers that want NumPy: ``objective(groups)(scores [E]) -> (mean, its gradient [E])``, float64."""

    def objective(groups: Sequence[Any]) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
        bound = loss(groups)

        def value_and_gradient(scores: np.ndarray) -> tuple[float, np.ndarray]:
            leaf = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
            summed, count = bound(leaf)
            if count == 0:
                return 0.0, np.zeros_like(scores)
            (gradient,) = torch.autograd.grad(summed, leaf)
            return summed.item() / count, gradient.numpy() / count

        return value_and_gradient

    return objective


def fit_saturation(scores: Sequence[np.ndarray], groups: Sequence[RankGroup]) -> float:
    """m0 by maximum likelihood of the Dirichlet-multinomial, given scores ``[n_i]`` of each group that did not see its clicks.

    It is the number of clicks beyond which a group tells little more: its noise has fallen below what scores leave
    unexplained. The largest of ``SATURATION`` where clicks are spread as evenly around the scores as chance has it.
    """
    owner, clicks, offset = _click_tensors(groups)
    flat = torch.from_numpy(np.concatenate([np.asarray(s, dtype=np.float64).ravel() for s in scores]))

    def cost(log_m0: float) -> float:
        with torch.no_grad():
            return dirichlet_multinomial(flat, owner, clicks, offset, len(groups), float(np.exp(log_m0))).sum().item()

    found = minimize_scalar(cost, bounds=np.log(SATURATION), method="bounded", options={"xatol": 1e-3})
    return float(np.exp(found.x))


def _one_label(settings: LossSettings) -> Loss:
    def bind(examples: Sequence[LabeledText]) -> Bound:
        labels = np.array([e.labels[0] for e in examples])
        weights = np.array([e.weight for e in examples])
        if settings.class_weights is not None:
            weights = weights * settings.class_weights[labels]
        return lambda scores: cross_entropy(scores, _to(labels, scores), _to(weights, scores))

    return bind


def _any_labels(settings: LossSettings) -> Loss:
    """A text with several labels weighs their mean class weight, one without any weighs 1."""

    def bind(examples: Sequence[LabeledText]) -> Bound:
        rows = np.repeat(np.arange(len(examples)), [len(e.labels) for e in examples])
        columns = np.array([label for e in examples for label in e.labels], dtype=np.int64)
        weights = np.array([e.weight for e in examples])
        if settings.class_weights is not None:
            totals = np.bincount(rows, settings.class_weights[columns], minlength=len(examples))
            counts = np.bincount(rows, minlength=len(examples))
            weights = weights * np.where(counts, totals / np.maximum(counts, 1), 1.0)

        def bound(scores: Tensor) -> tuple[Tensor, float]:
            targets = torch.zeros_like(scores)
            targets[_to(rows, scores), _to(columns, scores)] = 1.0
            return binary(scores, targets, _to(weights, scores))

        return bound

    return bind


def _lists(saturation: float) -> Loss:
    def bind(groups: Sequence[RankGroup]) -> Bound:
        share, offset = (np.concatenate(x) for x in zip(*(list_targets(g, saturation) for g in groups), strict=True))
        owner = _owner(groups)

        def bound(scores: Tensor) -> tuple[Tensor, float]:
            flat = scores.flatten()
            at, shares, offsets = (_to(x, flat) for x in (owner, share, offset))
            return list_likelihood(flat, at, shares, offsets, len(groups))

        return bound

    return bind


def list_targets(group: RankGroup, saturation: float) -> tuple[np.ndarray, np.ndarray]:
    """``(share, offset)`` of a group's titles for ``list_likelihood``, float64 ``[n]`` each."""
    if group.clicks is not None and group.impressions is not None:
        clicks = np.array(group.clicks, dtype=np.float64)
        share = clicks / (1 + clicks.sum() / saturation)
        return group.weight * share, _log_shown(group)
    gain = grade_gains(group.grades or ())
    return group.weight * gain / (gain.sum() or 1.0), np.zeros(len(gain))


def _counts(name: str, saturation: float) -> Loss:
    """Likelihoods of whole groups; both count, like the list, what a group's clicks weigh: Σ m / (1 + m / m0)."""

    def bind(groups: Sequence[RankGroup]) -> Bound:
        owner, clicks, offset = _click_tensors(groups)
        shown = offset.exp()
        m = torch.zeros(len(groups), dtype=torch.float64).index_add(0, owner, clicks)
        own = torch.tensor([g.weight for g in groups], dtype=torch.float64)
        tempered = own / (1 + m / saturation)
        count = float((tempered * m).sum())

        def bound(scores: Tensor) -> tuple[Tensor, float]:
            wide = scores.flatten().cpu().double()  # differences of large log-gammas need the digits; titles are few
            if name == "dirichlet":
                each = own * dirichlet_multinomial(wide, owner, clicks, offset, len(groups), saturation)
            else:
                each = tempered * binomial(wide, owner, clicks, shown, len(groups))
            return each.sum(), count

        return bound

    return bind


def _click_tensors(groups: Sequence[RankGroup]) -> tuple[Tensor, Tensor, Tensor]:
    """Owner int64, clicks and log impressions float64, ``[E]`` each."""
    clicks = np.concatenate([np.asarray(g.clicks, dtype=np.float64) for g in groups])
    offset = np.concatenate([_log_shown(g) for g in groups])
    return torch.from_numpy(_owner(groups)), torch.from_numpy(clicks), torch.from_numpy(offset)


def _log_shown(group: RankGroup) -> np.ndarray:
    """Log impressions; of a title never shown, so never clicked, the logarithm of next to nothing."""
    return np.log(np.maximum(np.asarray(group.impressions, dtype=np.float64), 1e-30))


def _owner(groups: Sequence[RankGroup]) -> np.ndarray:
    return np.repeat(np.arange(len(groups)), [len(g.texts) for g in groups])


def _pairs(function: Callable[..., tuple[Tensor, float]], default_margin: float) -> Loss:
    def bind(groups: Sequence[RankGroup]) -> Bound:
        each = [group_pairs(g) for g in groups]
        known = [[p.margin for p in g.preferences] or [None] * len(e) for g, e in zip(groups, each, strict=True)]
        margins = np.array(
            [default_margin if m is None else m for of_group in known for m in of_group], dtype=np.float64
        )
        return _over_pairs(function, groups, each, margins)

    return bind


def _soft_pairs() -> Loss:
    def bind(groups: Sequence[RankGroup]) -> Bound:
        each = [np.argwhere(np.tri(len(g.texts), k=-1)) for g in groups]
        targets = [_better(g, pairs) for g, pairs in zip(groups, each, strict=True)]
        return _over_pairs(soft_bradley_terry, groups, each, np.concatenate(targets))

    return bind


def _over_pairs(
    function: Callable[..., tuple[Tensor, float]],
    groups: Sequence[RankGroup],
    each: list[np.ndarray],
    known: np.ndarray,
) -> Bound:
    """A pair loss of ``(distance, known, weights)`` bound to the pairs ``[p, 2]`` of each group."""
    starts = np.cumsum([0, *(len(g.texts) for g in groups[:-1])])
    winner, loser = np.concatenate([pairs + start for pairs, start in zip(each, starts, strict=True)]).T
    weights = np.repeat([g.weight for g in groups], [len(pairs) for pairs in each])

    def bound(scores: Tensor) -> tuple[Tensor, float]:
        flat = scores.flatten()
        distance = flat[_to(winner, flat)] - flat[_to(loser, flat)]
        return function(distance, _to(known, flat), _to(weights, flat))

    return bound


def _better(group: RankGroup, pairs: np.ndarray) -> np.ndarray:
    """Chance that the first title of each pair has the higher true click rate, from the log-odds' normal approximation.

    Half a click is added to either side of the count (Haldane and Anscombe 1956), so that no click is no certainty.
    """
    clicks, shown = (np.asarray(x, dtype=np.float64) for x in (group.clicks, group.impressions))
    odds, variance = np.log((clicks + 0.5) / (shown - clicks + 0.5)), 1 / (clicks + 0.5) + 1 / (shown - clicks + 0.5)
    first, second = pairs.T
    return ndtr((odds[first] - odds[second]) / np.sqrt(variance[first] + variance[second]))


def _to(array: np.ndarray, like: Tensor) -> Tensor:
    """An array beside the scores: integers stay int64, the rest takes the scores' dtype."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.to(like.device, like.dtype if tensor.is_floating_point() else torch.int64)


# To add a loss, write the function above and register it here.
LOSSES: dict[str, LossType] = {
    "cross-entropy": LossType(_one_label, frozenset({"label"})),
    "binary": LossType(_any_labels, frozenset({"labels"})),
    "bradley-terry": LossType(lambda s: _pairs(bradley_terry, 0.0), frozenset({"pairs"})),
    "margin": LossType(lambda s: _pairs(margin_ranking, s.margin), frozenset({"pairs"})),
    "list": LossType(lambda s: _lists(s.saturation), frozenset({"grades", "clicks"}), saturates=True),
    "dirichlet": LossType(lambda s: _counts("dirichlet", s.saturation), frozenset({"clicks"}), saturates=True),
    "binomial": LossType(lambda s: _counts("binomial", s.saturation), frozenset({"clicks"}), saturates=True),
    "soft-bradley-terry": LossType(lambda s: _soft_pairs(), frozenset({"clicks"})),
}
