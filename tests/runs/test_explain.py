"""Words and what a score loses without them: by scoring the shorter titles oneself."""

from __future__ import annotations

import pytest

from loracle.runs.explain import leave_one_out


class Counts:
    """Scores a title by its letters ``a``, a context by 100."""

    def scores(self, texts, contexts):
        import numpy as np

        self.asked = list(texts)
        return np.array([[t.count("a") + (100.0 if c else 0.0)] for t, c in zip(texts, contexts, strict=True)])


def test_each_word_is_left_out_once():
    judge = Counts()
    (words,) = leave_one_out(judge, ["A banana, isn't it a banana?"])
    assert judge.asked[1:4] == ["banana, isn't it a banana?", "A , isn't it a banana?", "A banana isn't it a banana?"]
    assert words == [("A", 0), ("banana", 3), (",", 0), ("isn't", 0), ("it", 0), ("a", 1), ("banana", 3), ("?", 0)]


def test_chinese_goes_by_characters():
    judge = Counts()
    leave_one_out(judge, ["标题a好"], context="brief")
    assert judge.asked == ["标题a好", "题a好", "标a好", "标题好", "标题a"]


def test_blanks_are_charged_to_no_word():
    class Wide:
        def scores(self, texts, contexts):
            import numpy as np

            return np.array([[7.0 * t.count("\u3000")] for t in texts])

    assert leave_one_out(Wide(), ["震惊\u3000了"]) == [[("震", 0), ("惊", 0), ("了", 0)]]


@pytest.mark.parametrize("title", ["word", "", "?!"])
def test_a_single_word_has_nothing_to_compare_with(title):
    assert leave_one_out(Counts(), [title]) == [[]]
