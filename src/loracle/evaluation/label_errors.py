"""Labels that are likely wrong: confident learning (Northcutt et al. 2021, arXiv:1911.00068), ranked by margin. NumPy.

Written here instead of cleanlab, which needs pandas for what is thirty lines. The probabilities must come from a model that
has not learnt the text: out of fold for training texts, the run's own for test texts.

Legend of shapes: N texts, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from loracle.data.splits import fold_numbers
from loracle.evaluation.intervals import Array
from loracle.evaluation.labels import Labels
from loracle.evaluation.linear_models import tfidf_classifier, words_of
from loracle.examples import LabeledText

FOLDS = 5


def label_errors(proba: Array, targets: np.ndarray) -> npt.NDArray[np.intp]:
    """Rows whose one label is likely wrong, the worst first.

    A row is listed when the model is sure of another class: at least as sure as its mean over the texts of that class.
    Rows are in the order of ``margins``.
    """
    usual = np.array([proba[targets == c, c].mean() if (targets == c).any() else np.inf for c in range(proba.shape[1])])
    sure = np.where(proba >= usual, proba, -1.0)
    rows = np.flatnonzero((sure.max(axis=1) >= 0) & (sure.argmax(axis=1) != targets))
    return rows[np.argsort(margins(proba, targets)[rows], kind="stable")]


def label_errors_of_sets(proba: Array, targets: np.ndarray) -> npt.NDArray[np.intp]:
    """``[K, 2]``: text and label where a text can have several labels and one of them, present or absent, is likely wrong.

    Each label is a question of its own with the classes yes and no. All are in the order of their margins. Targets are bool
    ``[N, C]``.
    """
    yes = [np.stack([1 - p, p], axis=1) for p in proba.T]
    has = targets.astype(np.intp)
    by_label = [(label_errors(p, has[:, c]), c) for c, p in enumerate(yes)]
    pairs = np.array([(row, c) for rows, c in by_label for row in rows], dtype=np.intp).reshape(-1, 2)
    margin = np.array([margins(p, has[:, c]) for c, p in enumerate(yes)]).reshape(-1, len(proba))
    return pairs[np.argsort(margin[pairs[:, 1], pairs[:, 0]], kind="stable")]


def margins(proba: Array, targets: np.ndarray) -> Array:
    """Probability of the given label minus that of the likeliest other one, ``[N]``: low where the label is doubtful."""
    given = np.eye(proba.shape[1], dtype=bool)[targets]
    return proba[given] - np.where(given, -1.0, proba).max(axis=1)


def out_of_fold(examples: Sequence[LabeledText], labels: Labels, count: int, *, seed: int = 0) -> Array:
    """Probabilities ``[N, C]`` of each text under a TF-IDF classifier that learnt from the other four fifths.

    Equal texts are held out together: a model that has learnt a copy would confirm its label.
    """
    texts, targets, fold = words_of(examples), labels.targets(examples, count), fold_numbers(examples, FOLDS, seed)
    proba = np.empty((len(texts), count))
    for k in np.unique(fold):
        test, train = (np.flatnonzero(side).tolist() for side in (fold == k, fold != k))
        train_texts, test_texts = ([texts[i] for i in side] for side in (train, test))
        proba[test] = labels.probabilities(tfidf_classifier(train_texts, targets[train], test_texts, labels, count))
    return proba
