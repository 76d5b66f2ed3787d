"""The same in Python, in scikit-learn's manner: the constructor stores, ``fit`` returns self, what is learnt ends in ``_``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loracle import pipeline
from loracle.config import RunConfig
from loracle.data.click_logs.counts import Shown, check_counts
from loracle.data.columns import Columns
from loracle.errors import UserError, near
from loracle.examples import LabeledText, Preference, RankGroup
from loracle.runs.predictor import Predictor
from loracle.runs.save import new_folder
from loracle.tasks import Task
from loracle.tasks.dataset import Examples, split_data


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
        settings: any dial of ``loracle train`` by its name (``model="Qwen/…"``, ``epochs=3``, ``lr=2e-4`` …).

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
        if len(texts) != len(labels):
            raise UserError(f"There are {len(texts)} texts but {len(labels)} labels.", "Give one label for each text.")
        several = any(isinstance(label, (list, tuple, set, frozenset)) for label in labels)
        given = [sorted(label, key=str) if several else [label] for label in labels]
        distinct = {label for some in given for label in some}
        numeric = all(isinstance(label, (int, np.integer)) for label in distinct)
        names = tuple(str(label) for label in sorted(distinct, key=int if numeric else str))
        index = {name: i for i, name in enumerate(names)}
        items = [
            LabeledText(text=text, labels=tuple(index[str(label)] for label in some), row=row)
            for row, (text, some) in enumerate(zip(texts, given, strict=True), 1)
        ]
        task = Task(name="multi_label" if several else "single_label", label_names=names)
        self._fit(Examples(task=task, items=items, columns=Columns()))
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
        items = [_group(i, g) for i, g in enumerate(groups, 1)]
        names = {_evidence(g) for g in items}
        if len(names) != 1:
            found = ", ".join(sorted(names)) or "no group"
            raise UserError(f"All groups need the same evidence; they have: {found}.", "Keep one.")
        task = Task(name="click_ranking" if "clicks" in names else "ranking")
        self._fit(Examples(task=task, items=items, columns=Columns()))
        return self

    def rank(self, titles: Sequence[str], context: str | None = None) -> list[tuple[str, float]]:
        """Titles with their scores, best first."""
        return [(ranked.text, ranked.score) for ranked in self.predictor_.rank(titles, context)]


def _group(number: int, group: Mapping[str, Any]) -> RankGroup:
    texts = tuple(group["texts"])
    known: dict[str, Any] = {name: tuple(group[name]) for name in ("clicks", "impressions", "grades") if name in group}
    if bad := [name for name, values in known.items() if len(values) != len(texts)]:
        raise UserError(f"Group {number} has {len(texts)} titles but {len(known[bad[0]])} {bad[0]}.", "Give one each.")
    if not all(isinstance(t, str) and t.strip() for t in texts):
        raise UserError(f"Group {number} has a blank title: {list(texts)!r}.", "Leave it out.")
    if len(set(texts)) < max(2, len(texts)):
        raise UserError(f"Group {number} needs two or more distinct titles: {list(texts)!r}.", "Merge equal titles.")
    if "clicks" in known and "impressions" in known:
        counts = zip(texts, known["clicks"], known["impressions"], strict=True)
        check_counts([Shown(number, *count) for count in counts], "the groups")
    best = group.get("best")
    if best is not None and best not in range(len(texts)):
        raise UserError(f"best of group {number} is {best!r}; it must be the index of a title, 0 to {len(texts) - 1}.")
    pairs = () if best is None else tuple(Preference(winner=best, loser=i) for i in range(len(texts)) if i != best)
    return RankGroup(
        group=str(number),
        texts=texts,
        rows=(number,) * len(texts),
        context=group.get("context"),
        preferences=pairs,
        **known,
    )


def _evidence(group: RankGroup) -> str:
    if group.clicks and group.impressions:
        return "clicks"
    if group.grades:
        return "grades"
    if group.preferences:
        return "pairs"
    raise UserError(f"Group {group.group} has nothing to learn from.", "Give clicks and impressions, grades, or best.")
