"""Suspected label errors: planted ones are found far above chance, and margins and thresholds by hand."""

import numpy as np
import pytest

from loracle.evaluation.label_errors import label_errors, label_errors_of_sets, margins, out_of_fold
from loracle.evaluation.labels import AnyLabels, OneLabel
from loracle.examples import LabeledText
from loracle.tasks.label_report import LISTED, label_error_section

NAMES = ("sea", "sky", "soil")
ONE, ANY = OneLabel(), AnyLabels()
WORDS = (("boat", "wave", "salt", "fish", "reef"), ("cloud", "wing", "star", "wind", "moon"),
         ("root", "worm", "seed", "mud", "stone"))  # fmt: skip


def flipped(n=600, share=0.05, seed=0):
    """Texts of five words, three of them telling; some labels replaced by another one."""
    rng = np.random.default_rng(seed)
    true = rng.integers(3, size=n)
    texts = [" ".join([*rng.choice(WORDS[c], 3), *rng.choice(sum(WORDS, ()), 2)]) for c in true]
    wrong = rng.permutation(n)[: int(share * n)]
    given = true.copy()
    given[wrong] = (given[wrong] + rng.integers(1, 3, size=len(wrong))) % 3
    return texts, given, set(wrong.tolist())


def labelled(texts, given):
    return [LabeledText(text=t, labels=(int(c),), row=i + 2) for i, (t, c) in enumerate(zip(texts, given, strict=True))]


def test_planted_errors_come_first():
    texts, given, wrong = flipped()
    proba = out_of_fold(labelled(texts, given), ONE, 3)
    first = np.argsort(margins(proba, given))[: len(wrong)]
    assert len(wrong & set(first.tolist())) / len(wrong) > 0.6  # by chance 0.05
    found = label_errors(proba, given)
    assert len(wrong & set(found.tolist())) / len(found) > 0.4
    assert len(wrong & set(found[:10].tolist())) >= 8


def test_no_text_is_judged_by_a_model_that_learnt_it():
    """Each text is a word of its own: whoever has seen it knows its label, and whoever has not knows nothing."""
    given = np.arange(60) % 3
    proba = out_of_fold(labelled([f"word{i}" for i in range(60)], given), ONE, 3)
    assert proba[np.arange(60), given] == pytest.approx(np.full(60, 1 / 3), abs=0.02)
    np.testing.assert_allclose(proba.sum(axis=1), 1)


def test_copies_of_a_text_are_held_out_together():
    """The same with every text twice, once with a blank behind it: a copy on the other side would give its label away."""
    given = np.arange(60) % 3
    proba = out_of_fold(labelled([f"word{i}{end}" for end in ("", " ") for i in range(60)], np.tile(given, 2)), ONE, 3)
    assert proba[np.arange(120), np.tile(given, 2)] == pytest.approx(np.full(120, 1 / 3), abs=0.02)


def test_planted_errors_among_several_labels():
    """A label is taken away, or one is given that is none of the text's own: both come first and say what they rather are."""
    rng = np.random.default_rng(1)
    has = rng.random((500, 3)) < 0.4
    texts = [" ".join([*(w for c in np.flatnonzero(row) for w in rng.choice(WORDS[c], 2)), f"text {i}"])
             for i, row in enumerate(has)]  # fmt: skip
    wrong = {(int(i), int(rng.integers(3))) for i in rng.permutation(500)[:30]}
    given = has.copy()
    for pair in wrong:
        given[pair] ^= True
    examples = [LabeledText(text=t, labels=tuple(np.flatnonzero(row).tolist()), row=i)
                for i, (t, row) in enumerate(zip(texts, given, strict=True))]  # fmt: skip
    found = [tuple(pair) for pair in label_errors_of_sets(out_of_fold(examples, ANY, 3), given).tolist()]
    assert len(wrong & set(found[:30])) > 22  # of 1,500 pairs 30 are wrong
    told = label_error_section(examples, NAMES, ANY, seed=0)
    assert (told["count"], told["of"]) == (len(found), 1500)
    for row, (i, c) in zip(told["rows"], found, strict=False):
        name = NAMES[c]
        assert (row["label"], row["rather"]) == ((name, f"not {name}") if given[i, c] else (f"not {name}", name))
        assert row["given"] < 0.5 < row["probability"] == pytest.approx(1 - row["given"])
        assert row["text"] == texts[i]


def test_several_labels_by_hand():
    proba, has = np.array([[0.9, 0.2], [0.8, 0.1], [0.1, 0.9]]), np.array([[1, 0], [0, 0], [0, 1]], dtype=bool)
    # Label 0 is 0.9 sure where it stands and text 1 only 0.8; with 0.95 there it is suspect. Label 1 is as it should be.
    assert label_errors_of_sets(proba, has).tolist() == []
    proba[1, 0] = 0.95
    assert label_errors_of_sets(proba, has).tolist() == [[1, 0]]
    assert label_errors_of_sets(proba, np.zeros((3, 2), dtype=bool)).shape == (0, 2)


def test_margins_and_label_errors_by_hand():
    proba = np.array([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.45, 0.55], [0.1, 0.9]])
    targets = np.array([0, 0, 0, 0, 1])
    assert margins(proba, targets) == pytest.approx([0.8, 0.4, -0.6, -0.1, 0.8])
    # The only text labelled 1 is 0.9 sure, and none of the others that sure of 1; made a little less sure, row 2 is.
    assert label_errors(proba, targets).tolist() == []
    proba[4] = [0.3, 0.7]
    assert label_errors(proba, targets).tolist() == [2]


def test_what_the_report_lists():
    texts, given, wrong = flipped()
    found = label_error_section(labelled(texts, given), NAMES, ONE, seed=0)
    assert (found["of"], len(found["rows"])) == (600, LISTED)
    assert sum(row["row"] - 2 in wrong for row in found["rows"]) > 0.7 * LISTED
    for row in found["rows"]:
        assert row["label"] != row["rather"]
        assert row["text"] == texts[row["row"] - 2]


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_handful_of_texts_does_not_crash(n):
    proba = out_of_fold(labelled([f"text {i}" for i in range(n)], np.arange(n) % 2), ONE, 3)
    assert np.isfinite(proba).all()
    assert len(label_errors(proba, np.arange(n) % 2)) <= n
