"""What baselines may take: 15 % of a training's operations, divided in a fixed order, and what is done without is said."""

import pytest

from loracle.baselines.budget import FOLDS, FREE, LINEAR, SHARE, WATCHED, Work, plan

SIZES = {"train": 4000, "validation": 400, "test": 1000, "characters": 400_000, "labels": 24, "most": 2048}


def planned(epochs, *, asked=None, layers=True, **more):
    """A decoder of 100 M weights in its layers, 40 tokens a text, trained for so many epochs."""
    work = Work(training=epochs * 4000 * 40 * 4e8, forward=2e8, tokens=40)
    return work, plan(work, **SIZES | more, layers=layers, asked=asked)


def cost(work, found, *, asked=0.0, labels=24):
    """Operations of it all, counted anew."""
    linear = LINEAR * labels * 400_000 * (1 + (FOLDS - 1) * found.searched / 4000)
    texts = found.frozen + found.watched + (1000 if found.frozen else 0)
    return linear + (texts * work.tokens + (asked if found.asked else 0)) * work.forward


def test_a_long_training_leaves_nothing_out():
    work, found = planned(10, asked=100_000)
    assert (found.frozen, found.watched, found.searched, found.asked) == (2048, 400, 4000, True)
    assert found.said == ("frozen features learn from 2,048 of 4,000 training texts",)
    assert cost(work, found, asked=100_000) < SHARE * work.training


@pytest.mark.parametrize("epochs", [0.5, 1, 2, 3, 5, 20])
@pytest.mark.parametrize("asked", [None, 30_000, 300_000])
def test_the_share_is_kept_whatever_the_training(epochs, asked):
    work, found = planned(epochs, asked=asked)
    assert cost(work, found, asked=asked or 0) <= max(SHARE * work.training, FREE)
    assert found.watched <= min(WATCHED, 400)


def test_less_training_means_fewer_texts_and_what_is_left_out_is_said():
    found = [planned(epochs, asked=200_000)[1] for epochs in (0.5, 2, 3, 10)]
    assert [f.frozen for f in found] == sorted(f.frozen for f in found)
    assert found[0].frozen == 0 < found[1].frozen < found[2].frozen <= found[3].frozen
    assert "no frozen features: those of the 1,000 test texts alone would leave too little" in found[0].said[0]
    assert f"frozen features learn from {found[1].frozen:,} of 4,000" in found[1].said[0]
    assert "the untuned model is not asked: that would take" in found[1].said[1]
    assert found[3].asked


def test_a_short_training_has_its_baselines_all_the_same():
    """Forty texts of a tiny model cost nothing that anyone would wait for."""
    work = Work(training=1e8, forward=1e5, tokens=8)
    found = plan(work, train=40, validation=10, test=10, characters=600, labels=3, most=2048, layers=True, asked=500)
    assert (found.frozen, found.watched, found.searched, found.asked, found.said) == (40, 10, 40, True, ())


def test_an_encoder_chooses_no_layer_and_what_cannot_be_asked_is_not_missed():
    work, found = planned(10, layers=False)
    assert (found.watched, found.asked) == (400, False)  # which say what its scores mean
    ranker = plan(work, train=4000, validation=400, test=1000, characters=400_000, labels=1, most=2048, layers=False,
                  asked=None)  # fmt: skip
    assert ranker.watched == 0
    assert not any("untuned" in line for line in found.said)
