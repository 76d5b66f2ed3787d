"""Attribution by leave-one-out: the score that a title loses without each of its words."""

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
    """For each title, its words in order and the score lost without each; characters in Chinese and Japanese.

    All variants of all titles are scored together, so a shared context is computed once. A repeated word is left out one
    place at a time. A title of one word gets an empty list.
    """
    matches = [list(WORD.finditer(title)) for title in titles]
    matches = [words if len(words) > 1 else [] for words in matches]
    variants = [
        _tidy(title[: m.start()] + title[m.end() :])
        for title, words in zip(titles, matches, strict=True)
        for m in words
    ]
    texts = [*map(_tidy, titles), *variants]  # both without extra blanks, so that no word is charged with its blanks
    scores = iter(predictor.scores(texts, [context] * len(texts))[:, 0].tolist())
    whole = [next(scores) for _ in titles]
    return [[(m.group(), score - next(scores)) for m in words] for score, words in zip(whole, matches, strict=True)]
