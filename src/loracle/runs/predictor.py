"""From a run folder to scores: what predict, rank, evaluate and a server share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loracle.errors import UserError
from loracle.evaluation.calibration import Calibration
from loracle.evaluation.classification import UNCALIBRATED, given_labels, probabilities
from loracle.evaluation.click_model import Spread, expected_lift, win_probability
from loracle.examples import RankGroup, Task
from loracle.models import openvino
from loracle.models.build import load_scorer, score
from loracle.models.loading import BaseModel, load_tokenizer, pick_device, pick_dtype, resolve_base
from loracle.models.openvino import Int8Scorer
from loracle.models.scorer import Scorer
from loracle.runs.folder import LOCAL, RunInfo, read_calibration, read_info, read_reference, verify
from loracle.text.template import check_contexts
from loracle.text.tokenize import Encoded, Encoder

WINDOW = 4096  # titles that are scored together, sorted by what stands before them and by length
COMPARED = 100  # titles up to which each one's chance against each other is given


@dataclass(frozen=True, slots=True)
class RankedTitle:
    """A title among those that were offered with it, best first.

    ``index`` is its place among the titles as they were given. ``beats[j]`` is the chance that it is truly better than the
    j-th best (0.5 against itself); ``lift`` its expected click rate over the mean of the titles offered, minus 1, with a 95 %
    interval; both are None unless clicks were learnt from.
    """

    text: str
    score: float
    beats: tuple[float, ...] | None = None
    lift: float | None = None
    lift_low: float | None = None
    lift_high: float | None = None
    index: int = 0


def find_base(info: RunInfo, folder: Path, base: str | None = None) -> BaseModel:
    """The base model that a run stands on, ``base`` if it has moved.

    Raises:
        UserError: it is not the one that was trained on.
    """
    source = info.base["source"]
    if base is None and source.startswith(LOCAL) and not Path(source).exists():
        raise UserError(
            f"the base model of {folder}", f"{source.removeprefix(LOCAL)}, which was a folder where it was trained",
            f"pass --base with the weights of SHA-256 {info.base['sha256'][:12]}…",
        )  # fmt: skip
    found = resolve_base(base or info.base["source"], None if base else info.base.get("revision"))
    if found.checksum() != info.base["sha256"]:
        raise UserError(
            f"the base model that {folder} was trained on ({info.base['source']})",
            f"other weights in {found.folder}",
            "point --base to the right one",
        )
    return found


def names_of(proba: np.ndarray, task: Task, calibration: Calibration) -> list[str] | list[list[str]]:
    """The likeliest label of each row of probabilities; where labels can stand together, all above their thresholds."""
    if task.kind == "multi":
        return [[task.label_names[i] for i in np.flatnonzero(row)] for row in given_labels(proba, task, calibration)]
    return [task.label_names[i] for i in proba.argmax(1)]


class Predictor:
    """A trained classifier or ranker, loaded from its run folder.

    Args:
        folder: what ``loracle train`` left.
        base: where the base model is now, if not where the run found it.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        dtype: of a frozen decoder; by default as the run says, where ``auto`` depends on the device (``pick_dtype``).
        merged: add the adapters to the base's weights, which are then this run's alone. Faster for few texts at a time; the
            sums are rounded to ``dtype``, so in 16 bits scores differ a little from the run's own.

    Raises:
        UserError: the folder is damaged or unfinished, the base model is not the one that was trained on, or cannot be merged.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        base: str | None = None,
        device: str = "auto",
        dtype: str | None = None,
        merged: bool = False,
    ):
        self.folder = Path(folder)
        self.info = read_info(self.folder)
        verify(self.folder)
        self.task, model = self.info.task, self.info.config.model
        meaning = read_calibration(self.folder)
        self.spread = meaning if isinstance(meaning, Spread) else None
        self.calibration = meaning if isinstance(meaning, Calibration) else UNCALIBRATED
        self.reference = read_reference(self.folder)
        tokenizer = load_tokenizer(self.folder)
        self.scorer: Scorer | Int8Scorer
        if (self.folder / openvino.MODEL).exists():
            self.scorer = Int8Scorer(self.folder, pad_token_id=tokenizer.pad_token_id)
        else:
            where = pick_device(device)
            self.scorer = load_scorer(
                find_base(self.info, self.folder, base).folder,
                self.folder,
                self.task,
                pad_token_id=tokenizer.pad_token_id,
                dtype=pick_dtype(dtype or model.dtype, self.info.config.lora.full, where),
                device=where,
                pooling=model.pooling,
                head=model.head,
                depth=model.layers,
                quantize=model.quantize,
                merged=merged,
            )
        self.encoder = Encoder(tokenizer, long=model.long, encoder=self.scorer.encoder)

    def scores(self, texts: Sequence[str], contexts: Sequence[str | None] | None = None) -> np.ndarray:
        """Scores before any softmax, ``float32 [N, C]``; C is 1 for rankers."""
        if not len(texts):
            return np.zeros((0, len(self.task.label_names) or 1), dtype=np.float32)
        return score(self.scorer, self.encode(texts, contexts))

    def encode(self, texts: Sequence[str], contexts: Sequence[str | None] | None = None) -> list[Encoded]:
        """Texts as the model sees them.

        Raises:
            UserError: the template wants a context and one has none.
        """
        check_contexts(self.info.config.model.template, contexts or [None] * len(texts))
        return self.encoder(texts, contexts)

    def predict_proba(self, texts: Sequence[str], contexts: Sequence[str | None] | None = None) -> np.ndarray:
        """Probability of each label, ``float64 [N, C]``, at the temperature that validation texts called for: a softmax, or a
        sigmoid each where labels can stand together.

        Raises:
            UserError: the run is a ranker.
        """
        if self.task.kind == "rank":
            raise UserError("a classifier", f"a ranker in {self.folder}", "use rank")
        return probabilities(self.scores(texts, contexts), self.task, self.calibration)

    def predict(
        self, texts: Sequence[str], contexts: Sequence[str | None] | None = None
    ) -> list[str] | list[list[str]]:
        """Name of the likeliest label of each text; where labels can stand together, all above their thresholds."""
        return self.names(self.predict_proba(texts, contexts))

    def names(self, proba: np.ndarray) -> list[str] | list[list[str]]:
        """Label names for rows of probabilities."""
        return names_of(proba, self.task, self.calibration)

    def rank(self, titles: Sequence[str], context: str | None = None, *, draws: int | None = None) -> list[RankedTitle]:
        """Titles best first, each with what can be said about it; equal scores keep their order.

        ``draws`` of Monte Carlo stand behind a lift (``judge.spread.expected_lift``). Of more than ``COMPARED`` titles
        nobody reads every chance against every other, so ``beats`` is None.

        Raises:
            UserError: the run is a classifier, or there is nothing to rank.
        """
        self._check_ranker()
        if not len(titles):
            raise UserError("titles to rank", "none", "give at least one")
        return self.ranked(titles, self.scores(titles, [context] * len(titles))[:, 0], draws=draws)

    def rank_groups(
        self, groups: Iterable[RankGroup], *, draws: int | None = None
    ) -> Iterator[tuple[RankGroup, list[RankedTitle]]]:
        """``rank`` of each group; groups are scored by the window, where what they share is computed once.

        Raises:
            UserError: the run is a classifier.
        """
        self._check_ranker()
        groups = iter(groups)
        while window := list(_window(groups)):
            texts = [text for group in window for text in group.texts]
            scores = self.scores(texts, [group.context for group in window for _ in group.texts])[:, 0]
            each = np.split(scores, np.cumsum([len(group.texts) for group in window])[:-1])
            for group, own in zip(window, each, strict=True):
                yield group, self.ranked(group.texts, own, draws=draws)

    def _check_ranker(self) -> None:
        if self.task.kind != "rank":
            raise UserError("a ranker", f"a classifier in {self.folder}", "use predict")

    def ranked(self, titles: Sequence[str], scores: np.ndarray, *, draws: int | None = None) -> list[RankedTitle]:
        """``rank`` of titles whose scores ``[N]`` are known."""
        order = np.argsort(-scores, kind="stable")
        scores = scores[order].astype(np.float64)
        if self.spread is None or len(titles) < 2:
            return [RankedTitle(titles[i], float(s), index=int(i)) for i, s in zip(order, scores, strict=True)]
        compared = win_probability(scores, self.spread) if len(titles) <= COMPARED else [None] * len(titles)
        lifts = expected_lift(scores, self.spread, draws=draws)
        return [
            RankedTitle(
                titles[i],
                float(s),
                beats=None if wins is None else tuple(map(float, wins)),
                lift=float(lift),
                lift_low=float(low),
                lift_high=float(high),
                index=int(i),
            )
            for i, s, wins, lift, low, high in zip(order, scores, compared, *lifts, strict=True)
        ]


def _window(groups: Iterator[RankGroup]) -> Iterator[RankGroup]:
    """The next groups, until they have ``WINDOW`` titles."""
    titles = 0
    while titles < WINDOW and (group := next(groups, None)) is not None:
        titles += len(group.texts)
        yield group


def score_window(predictor: Predictor, texts: list[str | None], contexts: list[str | None]) -> np.ndarray:
    """Probabilities of each label, ``float64 [N, C]``; a row of NaN for each text that is None."""
    known = [i for i, text in enumerate(texts) if text is not None]
    out = np.full((len(texts), len(predictor.task.label_names)), np.nan)
    out[known] = predictor.predict_proba([texts[i] or "" for i in known], [contexts[i] for i in known])
    return out
