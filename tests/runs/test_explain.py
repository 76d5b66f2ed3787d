"""Leave-one-out attribution, compared with the scores of the shorter titles."""

from __future__ import annotations

import pytest

from loracle.runs.explain import leave_one_out


class Counts:
    """Score a title by its number of letters ``a``, and add 100 for a context."""

    def scores(self, texts, contexts):
        import numpy as np

        self.texts = list(texts)
        return np.array([[t.count("a") + (100.0 if c else 0.0)] for t, c in zip(texts, contexts, strict=True)])


def test_every_word_is_left_out_once():
    scorer = Counts()
    (words,) = leave_one_out(scorer, ["A banana, isn't it a banana?"])
    assert scorer.texts[1:4] == ["banana, isn't it a banana?", "A , isn't it a banana?", "A banana isn't it a banana?"]
    assert words == [("A", 0), ("banana", 3), (",", 0), ("isn't", 0), ("it", 0), ("a", 1), ("banana", 3), ("?", 0)]


def test_chinese_is_split_into_characters():
    scorer = Counts()
    leave_one_out(scorer, ["标题a好"], context="brief")
    assert scorer.texts == ["标题a好", "题a好", "标a好", "标题好", "标题a"]


def test_extra_blanks_do_not_change_scores_of_words():
    class Wide:
        def scores(self, texts, contexts):
            import numpy as np

            return np.array([[7.0 * t.count("\u3000")] for t in texts])

    assert leave_one_out(Wide(), ["震惊\u3000了"]) == [[("震", 0), ("惊", 0), ("了", 0)]]


@pytest.mark.parametrize("title", ["word", "", "?!"])
def test_single_word_gets_no_attribution(title):
    assert leave_one_out(Counts(), [title]) == [[]]
