"""What is minimised: pure functions from scores to ``(sum, count)``.

The sum goes backward; the count says how much evidence was summed. Whoever accumulates (micro-batches, processes) adds both
up and divides once, so that the gradient does not depend on how a batch was cut.

Shapes: E texts, C labels, P pairs, G groups. Ranking scores are flat, ``[E]``: the titles of group 0, then of group 1, …
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from loracle.data.examples import LabeledText, RankGroup, Task
from loracle.errors import UserError
from loracle.judge.ranking import grade_gains, group_pairs

Loss = Callable[[Tensor, Sequence[Any]], tuple[Tensor, float]]  # all LabeledText, or all RankGroup


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
    logits = scores + offset
    top = torch.full((groups,), float("-inf"), dtype=logits.dtype, device=logits.device)
    top = top.scatter_reduce(0, owner, logits.detach(), "amax")
    total = torch.zeros_like(top).index_add(0, owner, (logits - top[owner]).exp())
    log_p = logits - top[owner] - total.log()[owner]
    return -(share * log_p).sum(), float(share.sum())


def class_weights(examples: Sequence[LabeledText], task: Task, how: str) -> np.ndarray:
    """Weight of each class, ``float64 [C]``; ``balanced`` is N / (C · count), as in scikit-learn, absent classes 1."""
    classes = len(task.label_names)
    if how == "none":
        return np.ones(classes)
    counts = np.bincount([label for e in examples for label in e.labels], minlength=classes)
    return np.where(counts > 0, counts.sum() / (classes * np.maximum(counts, 1)), 1.0)


def resolve_loss(task: Task, name: str = "auto") -> str:
    """The loss that ``name`` means for a task.

    Raises:
        UserError: the task's evidence cannot feed it.
    """
    fits: tuple[str, ...]
    if task.kind == "rank":
        fits = ("bradley-terry", "margin") if task.evidence == "pairs" else ("list", "bradley-terry", "margin")
    else:
        fits = ("cross-entropy",) if task.kind == "single" else ("binary",)
    if name != "auto" and name not in fits:
        what = f"ranking from {task.evidence}" if task.kind == "rank" else f"{task.kind}-label classification"
        raise UserError(f"a loss for {what} ({', '.join(fits)})", repr(name), "leave out --loss, or pick one of these")
    return fits[0] if name == "auto" else name


def make_loss(
    task: Task, *, name: str = "auto", weights: np.ndarray | None = None, margin: float = 1.0, saturation: float = 200.0
) -> Loss:
    """The loss of a task as a function of a batch: ``loss(scores, examples) -> (sum, count)``.

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
    return _pairs(bradley_terry, 0.0) if chosen == "bradley-terry" else _pairs(margin_ranking, margin)


def _classification(task: Task, weights: np.ndarray) -> Loss:
    def loss(scores: Tensor, examples: Sequence[LabeledText]) -> tuple[Tensor, float]:
        hot = np.zeros((len(examples), len(task.label_names)))
        for row, e in zip(hot, examples, strict=True):
            row[list(e.labels)] = 1.0
        own = np.array([e.weight for e in examples])
        if task.kind == "single":
            return cross_entropy(scores, _to(hot.argmax(1), scores), _to(own * (hot @ weights), scores))
        # A text with several labels weighs what they weigh on average, one without any weighs 1.
        mean = np.where(hot.any(1), hot @ weights / np.maximum(hot.sum(1), 1), 1.0)
        return binary(scores, _to(hot, scores), _to(own * mean, scores))

    return loss


def _lists(saturation: float) -> Loss:
    def loss(scores: Tensor, groups: Sequence[RankGroup]) -> tuple[Tensor, float]:
        share, offset = zip(*(list_targets(g, saturation) for g in groups), strict=True)
        owner = np.repeat(np.arange(len(groups)), [len(g.texts) for g in groups])
        shares, offsets = (_to(np.concatenate(x), scores) for x in (share, offset))
        return list_likelihood(scores.flatten(), _to(owner, scores), shares, offsets, len(groups))

    return loss


def list_targets(group: RankGroup, saturation: float) -> tuple[np.ndarray, np.ndarray]:
    """``(share, offset)`` of a group's titles for ``list_likelihood``, float64 ``[n]`` each."""
    if group.clicks is not None and group.impressions is not None:
        clicks = np.array(group.clicks, dtype=np.float64)
        share = clicks / (1 + clicks.sum() / saturation)
        shown = np.maximum(group.impressions, np.finfo(np.float64).tiny)  # never shown, never clicked: weight 0
        return group.weight * share, np.log(shown)
    gain = grade_gains(group.grades or ())
    return group.weight * gain / (gain.sum() or 1.0), np.zeros(len(gain))


def _pairs(function: Callable[..., tuple[Tensor, float]], default_margin: float) -> Loss:
    def loss(scores: Tensor, groups: Sequence[RankGroup]) -> tuple[Tensor, float]:
        winners, margins, weights, first = [], [], [], 0
        for g in groups:
            pairs = group_pairs(g)
            winners.append(pairs + first)
            known = [p.margin for p in g.preferences] or [None] * len(pairs)
            margins += [default_margin if m is None else m for m in known]
            weights += [g.weight] * len(pairs)
            first += len(g.texts)
        winner, loser = _to(np.concatenate(winners), scores).unbind(1)
        distance = scores.flatten()[winner] - scores.flatten()[loser]
        return function(distance, *(_to(np.array(x, dtype=np.float64), scores) for x in (margins, weights)))

    return loss


def _to(array: np.ndarray, like: Tensor) -> Tensor:
    """An array beside the scores: integers stay int64, the rest takes the scores' dtype."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.to(like.device, like.dtype if tensor.is_floating_point() else torch.int64)
