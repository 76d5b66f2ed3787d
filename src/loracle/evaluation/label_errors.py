"""Which labels are likely wrong: confident learning (Northcutt et al. 2021, arXiv:1911.00068), ranked by margin. NumPy.

Own lines instead of cleanlab, as that brings pandas along for what is thirty lines. The probabilities must come from a model
that has not learnt the text: out of fold on the training side, the run's own on the test side.

Legend of shapes: N texts, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from loracle.data.splits import fold_numbers
from loracle.evaluation.classification import Array, probabilities, target_array
from loracle.evaluation.linear_models import tfidf_classifier, words_of
from loracle.examples import LabeledText, Task

FOLDS = 5


def suspects(proba: Array, targets: np.ndarray) -> npt.NDArray[np.intp]:
    """Rows whose one label is suspect, the worst first.

    Those that a model is sure to be of another class: at least as sure as it is on average of the texts labelled so. In the
    order of ``margins``.
    """
    usual = np.array([proba[targets == c, c].mean() if (targets == c).any() else np.inf for c in range(proba.shape[1])])
    sure = np.where(proba >= usual, proba, -1.0)
    rows = np.flatnonzero((sure.max(axis=1) >= 0) & (sure.argmax(axis=1) != targets))
    return rows[np.argsort(margins(proba, targets)[rows], kind="stable")]


def pair_suspects(proba: Array, targets: np.ndarray) -> npt.NDArray[np.intp]:
    """``[K, 2]``: text and label where labels can stand together and one that is given, or is not, is suspect.

    Each label is a question of its own with the classes yes and no, so ``suspects`` answers it; all together are in the order
    of their margins. Targets are bool ``[N, C]``.
    """
    yes = [np.stack([1 - p, p], axis=1) for p in proba.T]
    has = targets.astype(np.intp)
    found = [(suspects(p, has[:, c]), c) for c, p in enumerate(yes)]
    pairs = np.array([(row, c) for rows, c in found for row in rows], dtype=np.intp).reshape(-1, 2)
    margin = np.array([margins(p, has[:, c]) for c, p in enumerate(yes)]).reshape(-1, len(proba))
    return pairs[np.argsort(margin[pairs[:, 1], pairs[:, 0]], kind="stable")]


def margins(proba: Array, targets: np.ndarray) -> Array:
    """Probability of the given label less that of the likeliest other one, ``[N]``: low where the label is doubtful."""
    given = np.eye(proba.shape[1], dtype=bool)[targets]
    return proba[given] - np.where(given, -1.0, proba).max(axis=1)


def out_of_fold(examples: Sequence[LabeledText], task: Task, *, seed: int = 0) -> Array:
    """Probabilities ``[N, C]`` of each text by a TF-IDF classifier that learnt from the other four fifths.

    Equal texts are held out together: a model that has learnt a copy would find its label right.
    """
    texts, targets, fold = words_of(examples), target_array(examples, task), fold_numbers(examples, FOLDS, seed)
    proba = np.empty((len(texts), len(task.label_names)))
    for k in np.unique(fold):
        held, seen = (np.flatnonzero(side).tolist() for side in (fold == k, fold != k))
        logits = tfidf_classifier([texts[i] for i in seen], targets[seen], [texts[i] for i in held], task)
        proba[held] = probabilities(logits, task)
    return proba
