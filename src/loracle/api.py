"""The same in Python, in scikit-learn's manner: the constructor stores, ``fit`` returns self, what is learnt ends in ``_``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loracle import pipeline
from loracle.config import RunConfig
from loracle.errors import UserError, near
from loracle.runs.predictor import Predictor
from loracle.runs.save import new_folder
from loracle.tasks.dataset import Examples, split_data
from loracle.tasks.in_memory import labeled_groups, labeled_texts


class _Estimator:
    """What classifier and ranker share: settings in, a run folder and a predictor out."""

    def __init__(self, *, out: str | Path | None = None, verbose: bool = True, **settings: Any):
        known = {f.name for section in RunConfig.SECTIONS for f in dataclasses.fields(getattr(RunConfig(), section))}
        if unknown := sorted(settings.keys() - known - {"baselines"}):
            raise UserError(
                f"There is no setting {unknown[0]!r}{near(unknown[0], known)}.",
                "`loracle train --help-all` lists them.",
            )
        self.out, self.verbose, self.settings = out, verbose, settings

    def _fit(self, examples: Examples) -> None:
        config = RunConfig.from_flat({**self.settings, "out": None if self.out is None else str(self.out)})
        log: Callable[[str], None] = print if self.verbose else lambda line: None
        data = split_data(config, examples)
        self.run_ = pipeline.train_on(config, data, new_folder(config), log=log, quiet=not self.verbose)
        self.predictor_ = Predictor(self.run_)

    @classmethod
    def load(cls, run: str | Path) -> Any:
        """The estimator that a run folder holds, fitted already."""
        self = cls(out=run)
        self.run_, self.predictor_ = Path(run), Predictor(run)
        return self


class TextClassifier(_Estimator):
    """Fine-tunes an LLM on texts with labels.

    Args:
        out: folder of the run; by default the next free ``runs/run``. verbose: say what happens.
        settings: any setting of ``loracle train`` by its name (``model="Qwen/…"``, ``epochs=3``, ``lr=2e-4`` …).

    Attributes:
        run_: the run folder.
        predictor_: the ``Predictor`` that ``predict`` uses.

    Example:
        >>> TextClassifier(model="demo").fit(texts, labels).predict(["a new text"])  # doctest: +SKIP
    """

    def fit(self, texts: Sequence[str], labels: Sequence[Any]) -> TextClassifier:
        """Learn from texts and their labels: strings, integers, or a list of them each, which makes it multi-label.

        Raises:
            UserError: lengths differ, or nothing can be learnt from these labels.
        """
        self._fit(labeled_texts(texts, labels))
        return self

    @property
    def classes_(self) -> tuple[str, ...]:
        """Label names, in the order of the columns of ``predict_proba``."""
        return self.predictor_.task.label_names

    def predict_proba(self, texts: Sequence[str]) -> np.ndarray:
        """Probability of each label, ``float64 [N, C]``."""
        return self.predictor_.predict_proba(texts)

    def predict(self, texts: Sequence[str]) -> list[str] | list[list[str]]:
        """Name of the likeliest label of each text, or of all above their thresholds if it is multi-label."""
        return self.predictor_.predict(texts)


class TextRanker(_Estimator):
    """Fine-tunes an LLM to tell which of several titles people prefer. Arguments as for ``TextClassifier``."""

    def fit(self, groups: Sequence[Mapping[str, Any]]) -> TextRanker:
        """Learn from groups of titles.

        Each is ``{"texts": [...]}`` with one kind of evidence, the same for all: ``"clicks"`` and ``"impressions"``,
        ``"grades"`` (a number a title each), or ``"best": i``, the index of the title that was preferred to all others;
        ``"context"`` (a brief, a query) may stand beside it.

        Raises:
            UserError: a group without evidence, or with lists of other lengths than its titles.
        """
        self._fit(labeled_groups(groups))
        return self

    def rank(self, titles: Sequence[str], context: str | None = None) -> list[tuple[str, float]]:
        """Titles with their scores, best first."""
        return [(ranked.text, ranked.score) for ranked in self.predictor_.rank(titles, context)]
