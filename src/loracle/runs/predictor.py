"""From a run folder to scores: what predict, rank, evaluate and a server share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loracle.errors import UserError
from loracle.evaluation.click_model import expected_lift, win_probability
from loracle.examples import RankGroup
from loracle.models import openvino
from loracle.models.build import ScorerSpec, load_scorer
from loracle.models.devices import pick_device, pick_dtype
from loracle.models.loading import BaseModel, load_tokenizer, resolve_base
from loracle.models.openvino import Int8Scorer
from loracle.models.scorer import Scorer
from loracle.models.scoring import score
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
            f"The base model of {folder} was the folder {source.removeprefix(LOCAL)} where it was trained.",
            f"Pass --base with the weights of SHA-256 {info.base['sha256'][:12]}….",
        )
    found = resolve_base(base or info.base["source"], None if base else info.base.get("revision"))
    if found.checksum() != info.base["sha256"]:
        raise UserError(
            f"{found.folder} has other weights than the base model of {folder} ({info.base['source']}).",
            "Pass the right folder with --base.",
        )
    return found


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
        self.calibration = read_calibration(self.folder, self.task)
        self.reference = read_reference(self.folder)
        tokenizer = load_tokenizer(self.folder)
        self.scorer: Scorer | Int8Scorer
        if (self.folder / openvino.MODEL).exists():
            self.scorer = Int8Scorer(self.folder, pad_token_id=tokenizer.pad_token_id)
        else:
            where = pick_device(device)
            spec = ScorerSpec(
                base=find_base(self.info, self.folder, base).folder,
                outputs=self.task.learning.outputs(self.task),
                label_names=self.task.label_names,
                problem_type=self.task.learning.problem_type,
                pad_token_id=tokenizer.pad_token_id,
                dtype=pick_dtype(dtype or model.dtype, self.info.config.lora.full, where),
                device=where,
                pooling=model.pooling,
                head=model.head,
                depth=model.layers,
                quantize=model.quantize,
            )
            self.scorer = load_scorer(spec, self.folder, merged=merged)
        self.encoder = Encoder(tokenizer, long=model.long, encoder=self.scorer.encoder)

    def scores(self, texts: Sequence[str], contexts: Sequence[str | None] | None = None) -> np.ndarray:
        """Scores before any softmax, ``float32 [N, C]``; C is 1 for rankers."""
        if not len(texts):
            return np.zeros((0, self.task.learning.outputs(self.task)), dtype=np.float32)
        return score(self.scorer, self.encode(texts, contexts))

    def encode(self, texts: Sequence[str], contexts: Sequence[str | None] | None = None) -> list[Encoded]:
        """Texts as the model sees them.

        Raises:
            UserError: the template wants a context and one has none.
        """
        check_contexts(self.info.config.model.template, contexts or [None] * len(texts))
        return self.encoder(texts, contexts)

    def predict_proba(self, texts: Sequence[str], contexts: Sequence[str | None] | None = None) -> np.ndarray:
        """Calibrated probability of each label, ``float64 [N, C]``.

        Raises:
            UserError: the run is a ranker.
        """
        self.check_command("predict")
        return self.values(self.scores(texts, contexts))

    def values(self, scores: np.ndarray) -> np.ndarray:
        """Numbers ``[N, K]`` that scores ``[N, C]`` stand for: calibrated probabilities, or the scores themselves."""
        return self.task.output.values(scores, self.task, self.calibration)

    def predict(
        self, texts: Sequence[str], contexts: Sequence[str | None] | None = None
    ) -> list[str] | list[list[str]]:
        """Name of the likeliest label of each text. With several labels a text, all above their thresholds."""
        names = self.names(self.predict_proba(texts, contexts))
        return names if self.task.learning.sets_thresholds else [name for (name,) in names]

    def names(self, values: np.ndarray) -> list[list[str]]:
        """Names of the labels that each row of probabilities assigns."""
        return self.task.output.names(values, self.task, self.calibration)

    def check_command(self, command: str) -> None:
        """Check that ``predict`` or ``rank`` is what this run answers.

        Raises:
            UserError: it is not.
        """
        if self.task.output.command != command:
            what = self.task.output.describe(self.task)
            raise UserError(f"{self.folder} does not {command}: it is {what}.", f"Use {self.task.output.command}.")

    def rank(self, titles: Sequence[str], context: str | None = None, *, draws: int | None = None) -> list[RankedTitle]:
        """Titles best first, each with what can be said about it; equal scores keep their order.

        A lift is the mean of ``draws`` samples (``evaluation.click_model.expected_lift``). Of more than ``COMPARED`` titles
        nobody reads every chance against every other, so ``beats`` is None.

        Raises:
            UserError: the run is a classifier, or there is nothing to rank.
        """
        self.check_command("rank")
        if not len(titles):
            raise UserError("There are no titles to rank.", "Give at least one.")
        return self.ranked(titles, self.scores(titles, [context] * len(titles))[:, 0], draws=draws)

    def rank_groups(
        self, groups: Iterable[RankGroup], *, draws: int | None = None
    ) -> Iterator[tuple[RankGroup, list[RankedTitle]]]:
        """``rank`` of each group; groups are scored by the window, where what they share is computed once.

        Raises:
            UserError: the run is a classifier.
        """
        self.check_command("rank")
        groups = iter(groups)
        while window := list(_window(groups)):
            texts = [text for group in window for text in group.texts]
            scores = self.scores(texts, [group.context for group in window for _ in group.texts])[:, 0]
            each = np.split(scores, np.cumsum([len(group.texts) for group in window])[:-1])
            for group, own in zip(window, each, strict=True):
                yield group, self.ranked(group.texts, own, draws=draws)

    def ranked(self, titles: Sequence[str], scores: np.ndarray, *, draws: int | None = None) -> list[RankedTitle]:
        """``rank`` of titles whose scores ``[N]`` are known."""
        order = np.argsort(-scores, kind="stable")
        scores = scores[order].astype(np.float64)
        if self.calibration is None or len(titles) < 2:
            return [RankedTitle(titles[i], float(s), index=int(i)) for i, s in zip(order, scores, strict=True)]
        compared = win_probability(scores, self.calibration) if len(titles) <= COMPARED else [None] * len(titles)
        lifts = expected_lift(scores, self.calibration, draws=draws)
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
    """Values ``float64 [N, K]`` of each text (``Predictor.values``); a row of NaN where the text is None."""
    present = [i for i, text in enumerate(texts) if text is not None]
    scores = predictor.scores([texts[i] or "" for i in present], [contexts[i] for i in present])
    values = predictor.values(scores)
    out = np.full((len(texts), values.shape[1]), np.nan)
    out[present] = values
    return out
