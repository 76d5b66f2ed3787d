"""What is minimised: pure functions from scores to ``(sum, count)``.

The sum goes backward; the count says how much evidence was summed. Whoever accumulates (micro-batches, processes) adds both
up and divides once, so that the gradient does not depend on how a batch was cut.

A ``Loss`` is first bound to its examples, then called with their scores, as often as one likes: the loop calls once a round,
the baselines' optimizer hundreds of times. docs/clicks.md says which loss is for what; benchmarks/losses.py compares them.

Shapes: E texts, C labels, P pairs, G groups. Ranking scores are flat, ``[E]``: the titles of group 0, then of group 1, …
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from scipy.special import ndtr
from torch import Tensor

from loracle.config import SATURATING
from loracle.errors import UserError
from loracle.evaluation.pairs import grade_gains, group_pairs
from loracle.examples import LabeledText, RankGroup, Task

Bound = Callable[[Tensor], tuple[Tensor, float]]  # scores of the examples it was bound to -> (sum, count)
Loss = Callable[[Sequence[Any]], Bound]  # all LabeledText, or all RankGroup

FREQUENT = 0.1  # click rate above which clicks are no longer rare, and the list likelihood no longer exact
SATURATION = (1.0, 1e7)  # clicks between which m0 is looked for; at the upper end nothing saturates
NEWTON = 30  # steps to a group's intercept; quadratic, so a dozen is plenty


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

    A pair that noise could have turned round pulls with half a heart, where the hard target takes it at its word. Counts Σ w.
    """
    each = target * F.logsigmoid(distance) + (1 - target) * F.logsigmoid(-distance)
    return -(weights * each).sum(), float(weights.sum())


def _log_softmax(logits: Tensor, owner: Tensor, groups: int) -> Tensor:
    """Logarithm of the softmax within each group, ``[E]``."""
    top = torch.full((groups,), float("-inf"), dtype=logits.dtype, device=logits.device)
    top = top.scatter_reduce(0, owner, logits.detach(), "amax")
    total = torch.zeros_like(top).index_add(0, owner, (logits - top[owner]).exp())
    return logits - top[owner] - total.log()[owner]


def class_weights(examples: Sequence[LabeledText], task: Task, how: str) -> np.ndarray:
    """Weight of each class, ``float64 [C]``; ``balanced`` is N / (C · count), as in scikit-learn, absent classes 1."""
    classes = len(task.label_names)
    if how == "none":
        return np.ones(classes)
    counts = np.bincount([label for e in examples for label in e.labels], minlength=classes)
    return np.where(counts > 0, counts.sum() / (classes * np.maximum(counts, 1)), 1.0)


def click_rate(groups: Sequence[RankGroup]) -> float:
    """Clicks per impression over all groups; 0 where nothing was shown."""
    clicks, shown = (sum(sum(getattr(g, name) or ()) for g in groups) for name in ("clicks", "impressions"))
    return clicks / shown if shown else 0.0


PAIRWISE, CLICKWISE = ("bradley-terry", "margin"), (*SATURATING, "soft-bradley-terry")


def resolve_loss(task: Task, name: str = "auto", rate: float = 0.0) -> str:
    """The loss that ``name`` means for a task; ``rate`` is the click rate of a click log.

    Raises:
        UserError: the task's evidence cannot feed it.
    """
    by_evidence = {"pairs": PAIRWISE, "grades": ("list", *PAIRWISE), "clicks": (*CLICKWISE, *PAIRWISE)}
    fits: tuple[str, ...] = {"single": ("cross-entropy",), "multi": ("binary",)}.get(task.kind) or by_evidence[
        task.evidence or "pairs"
    ]
    if name != "auto" and name not in fits:
        what = f"ranking from {task.evidence}" if task.kind == "rank" else f"{task.kind}-label classification"
        raise UserError(f"a loss for {what} ({', '.join(fits)})", repr(name), "leave out --loss, or pick one of these")
    if name == "auto":
        return "binomial" if task.evidence == "clicks" and rate > FREQUENT else fits[0]
    return name


def make_loss(
    task: Task, *, name: str = "auto", weights: np.ndarray | None = None, margin: float = 1.0, saturation: float = 200.0
) -> Loss:
    """The loss of a task, to be bound to examples: ``loss(examples)(scores) -> (sum, count)``.

    Args:
        name: ``auto`` or one that fits the task. weights: ``[C]``, of the classes. margin: of pairs that name none (margin
            loss only). saturation: m0; a group with m clicks weighs m / (1 + m / m0).

    Raises:
        UserError: a loss that the task's evidence cannot feed.
    """
    chosen = resolve_loss(task, name)
    if chosen in ("cross-entropy", "binary"):
        return _classification(task, np.ones(len(task.label_names)) if weights is None else weights)
    if chosen == "list":
        return _lists(saturation)
    if chosen in ("dirichlet", "binomial"):
        return _counts(chosen, saturation)
    if chosen == "soft-bradley-terry":
        return _soft_pairs()
    return _pairs(bradley_terry, 0.0) if chosen == "bradley-terry" else _pairs(margin_ranking, margin)


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


def _classification(task: Task, weights: np.ndarray) -> Loss:
    def bind(examples: Sequence[LabeledText]) -> Bound:
        hot = np.zeros((len(examples), len(task.label_names)))
        for row, e in zip(hot, examples, strict=True):
            row[list(e.labels)] = 1.0
        own = np.array([e.weight for e in examples])
        if task.kind == "single":
            labels, weigh = hot.argmax(1), own * (hot @ weights)
            return lambda scores: cross_entropy(scores, _to(labels, scores), _to(weigh, scores))
        # A text with several labels weighs what they weigh on average, one without any weighs 1.
        mean = own * np.where(hot.any(1), hot @ weights / np.maximum(hot.sum(1), 1), 1.0)
        return lambda scores: binary(scores, _to(hot, scores), _to(mean, scores))

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
