"""Linear models on words or on features: what baselines, probes and the search for label errors are fitted with.

They return scores of the same form as the model's, so the same metrics apply. Rankers minimise the model's own loss. All
are seeded and none fails on tiny data: with nothing to learn from they return the prior.

Legend of shapes: N texts, C labels, H features, T titles (of all groups, one after the other), P pairs.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.sparse import csr_matrix, issparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, RidgeCV
from threadpoolctl import threadpool_limits

from loracle.evaluation.intervals import Array
from loracle.examples import LabeledText, RankGroup

if TYPE_CHECKING:
    from loracle.evaluation.labels import Labels

Features: TypeAlias = "np.ndarray | csr_matrix"  # [N, H] or [T, H]
RankLoss = Callable[[Array], tuple[float, Array]]  # scores [T] -> mean loss, its gradient [T]
Objective = Callable[[Sequence[RankGroup]], RankLoss]

logger = logging.getLogger(__name__)

CJK = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
WORDS_AND_MARKS = r"\w+|[^\w\s]+"  # runs of punctuation and emoji help to separate classes too
RARE_FROM = 1000  # texts from which terms that occur once are dropped: most of the features, little of the evidence
TFIDF_C = 30.0  # best log loss of 1..100 on N24News, Banking77 and THUCNews titles; accuracy is flat around it
FEATURE_C = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # a validation split chooses, for standardised features
RANKER_L2 = (10.0, 1.0, 0.1, 0.01, 0.001)  # likewise, strongest first, for features of unit mean square length
RIDGE = tuple(10.0**k for k in range(-1, 6))  # penalties for standardised features, chosen by leave-one-out
ITERATIONS = 200  # smooth losses need fewer; the margin loss has kinks, at which L-BFGS would dither on
HELD_OUT = 0.2  # share of the training examples or groups on which a strength is chosen


# --- classifiers ------------------------------------------------------------------------------------------------------


def tfidf_classifier(
    train_texts: Sequence[str], targets: np.ndarray, test_texts: Sequence[str], labels: Labels, count: int
) -> Array:
    """Logits ``[N_test, C]`` of logistic regression on TF-IDF. ``targets`` as ``labels.targets``; ``count`` is C."""
    train, test = _tfidf(train_texts, test_texts)
    return labels.fit_logistic(train, targets, test, count, TFIDF_C)


def feature_classifier(
    features: tuple[np.ndarray, np.ndarray], targets: np.ndarray, labels: Labels, count: int, *, seed: int = 0
) -> Array:
    """Logits ``[N_test, C]`` of logistic regression on standardised features ``[N, H]`` of training and test texts.

    The regularisation is chosen by log loss on a fifth of the training texts, then all of them are fitted.
    """
    train, test = standardised(*features)
    fit, validation = _held_out(len(train), seed)

    def validation_loss(strength: float) -> float:
        logits = labels.fit_logistic(train[fit], targets[fit], train[validation], count, strength)
        return float(-labels.log_likelihood(logits, targets[validation]).mean())

    strength = min(FEATURE_C, key=validation_loss) if len(validation) else FEATURE_C[len(FEATURE_C) // 2]
    return labels.fit_logistic(train, targets, test, count, strength)


def ridge_classifier(train: np.ndarray, indicator: np.ndarray, test: np.ndarray) -> Array:
    """Scores ``[M, C]`` of a ridge regression on the labels as ±1: a closed form, so thirty layers take seconds."""
    train, test = standardised(train, test)
    with one_thread():
        return RidgeCV(RIDGE).fit(train, np.where(indicator, 1.0, -1.0)).predict(test).reshape(len(test), -1)


def class_logits(train: Features, classes: np.ndarray, test: Features, c: float) -> Array:
    """Logits ``[N_test, K]`` of the K >= 2 classes that occur, in ascending order."""
    model = LogisticRegression(C=c, max_iter=ITERATIONS)
    with one_thread(), warnings.catch_warnings():  # scikit-learn warns where a log line is enough
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(train, classes)
    if model.n_iter_.max() >= ITERATIONS:
        logger.info("a baseline stopped after %d iterations, before its optimum", ITERATIONS)
    logits = model.decision_function(test).astype(np.float64)
    return np.stack([np.zeros_like(logits), logits], axis=1) if logits.ndim == 1 else logits


def words_of(examples: Sequence[LabeledText]) -> list[str]:
    """The words that TF-IDF reads of each example: its context, where it has one, and its text."""
    return [" ".join(filter(None, (e.context, e.text))) for e in examples]


# --- rankers ----------------------------------------------------------------------------------------------------------


def length_ranker(
    train_groups: Sequence[RankGroup], test_groups: Sequence[RankGroup], objective: Objective, *, seed: int = 0
) -> list[Array]:
    """Scores ``[n_i]`` of each test group from a title's number of characters and of words alone."""
    train, test = ([_lengths(group.texts) for group in groups] for groups in (train_groups, test_groups))
    return feature_ranker(train, train_groups, test, objective, seed=seed)


def tfidf_ranker(
    train_groups: Sequence[RankGroup], test_groups: Sequence[RankGroup], objective: Objective, *, seed: int = 0
) -> list[Array]:
    """Scores ``[n_i]`` of each test group linear in the TF-IDF of its titles; a context is shared, so it is left out."""
    train, test = _tfidf(_titles(train_groups), _titles(test_groups))
    weights = linear_ranker(train, train_groups, objective, seed=seed)
    return _by_group(test @ weights, test_groups)


def feature_ranker(
    train_features: Sequence[np.ndarray],
    train_groups: Sequence[RankGroup],
    test_features: Sequence[np.ndarray],
    objective: Objective,
    *,
    seed: int = 0,
) -> list[Array]:
    """Scores ``[n_i]`` of each test group linear in standardised features ``[n_i, H]``."""
    sizes = [len(part) for part in test_features]
    train, test = standardised(np.concatenate(train_features), np.concatenate(test_features))
    weights = linear_ranker(train, train_groups, objective, seed=seed)
    return np.split(test @ weights, np.cumsum(sizes)[:-1])


def linear_ranker(features: Features, groups: Sequence[RankGroup], objective: Objective, *, seed: int = 0) -> Array:
    """Weights ``[H]`` of a linear ranker, fitted by L-BFGS with an L2 penalty chosen on a fifth of the groups.

    Args:
        features: ``[T, H]``, dense or sparse, one row a title, in the order of the groups.
        objective: the loss to minimise, the model's own (``training.losses.numpy_objective``).

    Returns:
        Zeros, a constant scorer, where no group has evidence.
    """
    scale = _mean_squared_length(features)
    fit, validation = (sorted(part) for part in _held_out(len(groups), seed))
    rows = np.split(np.arange(features.shape[0]), np.cumsum([len(group.texts) for group in groups])[:-1])

    def part(chosen: Sequence[int]) -> tuple[Features, RankLoss]:
        index = np.concatenate([rows[i] for i in chosen])
        return features[index], objective([groups[i] for i in chosen])

    strength = RANKER_L2[len(RANKER_L2) // 2]
    weights = np.zeros(features.shape[1])
    if validation:
        fit_features, fit_loss = part(fit)
        validation_features, validation_loss = part(validation)
        losses = []
        for candidate in RANKER_L2:  # from strong to weak, each from where the last one ended
            weights = _minimise(fit_features, fit_loss, candidate * scale, weights)
            losses.append(validation_loss(validation_features @ weights)[0])
        strength = RANKER_L2[int(np.argmin(losses))]
    return _minimise(features, objective(groups), strength * scale, weights)


def _minimise(features: Features, loss: RankLoss, penalty: float, start: Array) -> Array:
    """Weights ``[H]`` that minimise ``loss(features @ w) + penalty/2 · |w|²``."""

    def cost(weights: Array) -> tuple[float, Array]:
        value, gradient = loss(features @ weights)
        return value + penalty / 2 * float(weights @ weights), features.T @ gradient + penalty * weights

    with one_thread():
        return minimize(cost, start, jac=True, method="L-BFGS-B", options={"maxiter": ITERATIONS}).x


def one_thread() -> threadpool_limits:
    """BLAS on one thread: the products here are so small that its threads mostly wait for each other on a busy machine.

    Measured with two cores under load: 0.9 s against 17 s for the frozen baseline on 4,000 texts.
    """
    return threadpool_limits(1, user_api="blas")


# --- features ---------------------------------------------------------------------------------------------------------


def _tfidf(train_texts: Sequence[str], test_texts: Sequence[str]) -> tuple[csr_matrix, csr_matrix]:
    """TF-IDF ``[N, H]`` of both, fitted on the first: words and pairs of words, or of characters where most are CJK."""
    if not any(text.strip() for text in train_texts):  # no term at all, which is an error for the vectoriser
        return csr_matrix((len(train_texts), 1)), csr_matrix((len(test_texts), 1))
    terms: dict[str, Any] = {"analyzer": "char"} if _mostly_cjk(train_texts) else {"token_pattern": WORDS_AND_MARKS}
    rare = 2 if len(train_texts) >= RARE_FROM else 1
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=rare, sublinear_tf=True, **terms)
    return vectorizer.fit_transform(train_texts), vectorizer.transform(test_texts)


def _mostly_cjk(texts: Sequence[str]) -> bool:
    """More than half of the letters are Chinese or Japanese, which are written without spaces."""
    joined = "".join(texts)
    return len(CJK.findall(joined)) > sum(map(str.isalpha, joined)) / 2


def _lengths(texts: Sequence[str]) -> Array:
    return np.array([[len(text), len(text.split())] for text in texts], dtype=np.float64)


def _titles(groups: Sequence[RankGroup]) -> list[str]:
    return [text for group in groups for text in group.texts]


def _by_group(scores: Array, groups: Sequence[RankGroup]) -> list[Array]:
    return np.split(scores, np.cumsum([len(group.texts) for group in groups])[:-1])


def standardised(train: np.ndarray, test: np.ndarray) -> tuple[Array, Array]:
    """Both in float64, less the training mean, over the training spread; a constant feature becomes 0."""
    train, test = np.asarray(train, dtype=np.float64), np.asarray(test, dtype=np.float64)
    mean, spread = train.mean(axis=0), train.std(axis=0)
    # A constant column's spread is rounding, not 0, and must not be blown up to unit variance.
    constant = spread <= 1e-12 * np.abs(mean)
    scale = np.where(constant, 0.0, 1 / np.where(constant, 1.0, spread))
    return (train - mean) * scale, (test - mean) * scale


def _mean_squared_length(features: Features) -> float:
    values = features.data if issparse(features) else features
    return float(np.square(values).sum()) / features.shape[0] or 1.0  # all features 0: any scale does


def _held_out(count: int, seed: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Indices to fit on and to choose on. With few examples none are left to choose on."""
    order = np.random.default_rng(seed).permutation(count)
    validation = int(count * HELD_OUT)
    return order[validation:], order[:validation]
