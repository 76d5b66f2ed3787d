"""Which words move a title's score: each is left out in turn, and the score that is lost is its share."""

from __future__ import annotations

import re
from collections.abc import Sequence

from loracle.runs.predictor import Predictor

CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{CJK}]|(?:(?![{CJK}])\w)+(?:['’\-](?:(?![{CJK}])\w)+)*|[^\w\s]+")


def _tidy(title: str) -> str:
    return re.sub(r"\s+", " ", title).strip()


def leave_one_out(
    predictor: Predictor, titles: Sequence[str], context: str | None = None
) -> list[list[tuple[str, float]]]:
    """For each title its words (Chinese and Japanese: characters) and what the score loses without each, in title order.

    All variants of all titles are scored together, so that what stands before them is computed once. A word that comes
    twice is left out one place at a time. A title of one word has nothing to compare with and gets no words.
    """
    spans = [list(WORD.finditer(title)) for title in titles]
    spans = [found if len(found) > 1 else [] for found in spans]
    variants = [
        _tidy(title[: m.start()] + title[m.end() :]) for title, found in zip(titles, spans, strict=True) for m in found
    ]
    texts = [*map(_tidy, titles), *variants]  # both tidied, or a word would be charged with the blanks around it
    scores = iter(predictor.scores(texts, [context] * len(texts))[:, 0].tolist())
    whole = [next(scores) for _ in titles]
    return [[(m.group(), score - next(scores)) for m in found] for score, found in zip(whole, spans, strict=True)]
