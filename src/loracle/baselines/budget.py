"""How much of a run its baselines may take, and what they do with it.

Settled before anything is computed, in operations that follow from the data, the model's shapes and the settings alone. A
clock would stop a slow machine earlier than a fast one, and the same run would have other baselines on each.
"""

from __future__ import annotations

from dataclasses import dataclass

from loracle.evaluation.label_errors import FOLDS

SHARE = 0.15  # of the training's operations
FREE = 1e13  # operations that are granted however short the training is: weak rivals would flatter; half a minute on two cores
LINEAR = (
    6e4  # matrix operations in the time that a linear model on words takes for one character and label (dev/LOG.md)
)
SEARCHED = 10_000  # training texts among which wrong labels are looked for, at most
WATCHED = 512  # validation texts on which the best layer is chosen, at most
FEWEST = 50  # training texts below which frozen features say nothing of the model, where there are more


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a run has to do: floating-point operations."""

    training: float  # of all steps
    forward: float  # of a token
    tokens: float  # that are computed for a text, what texts share counted once a round


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the baselines learn from, in texts; 0 where one is left out. ``said`` names what they do without."""

    frozen: int  # training texts whose frozen features are learnt from
    watched: int  # validation texts on which the layer is chosen
    searched: int  # training texts among which wrong labels are looked for
    asked: bool  # the untuned model itself is asked
    said: tuple[str, ...] = ()


def plan(
    work: Work, *, train: int, validation: int, test: int, characters: int, labels: int, most: int, layers: bool,
    asked: float | None,
) -> Plan:  # fmt: skip
    """Divide ``SHARE`` of the training: TF-IDF always; at most a quarter of it for suspected labels; then frozen features, of
    up to ``most`` training texts and all test texts; the untuned model where what is left is enough.

    Args:
        train, validation, test: texts of each side. characters: of the training side. labels: 1 of a ranker.
        layers: whether the layer is to be chosen. asked: tokens that asking the untuned model takes; None: it cannot be.
    """
    whole = max(SHARE * work.training, FREE)
    budget = (
        f"{100 * SHARE:.0f} % of the training's operations" if whole > FREE else "as much as a short training grants"
    )
    left = whole - LINEAR * characters * labels
    each = (FOLDS - 1) * LINEAR * labels * characters / train  # every text is learnt from in all folds but its own
    searched = int(min(train, SEARCHED, max(left, 0) / 4 / each)) if each else train
    left -= searched * each

    a_text = work.forward * work.tokens
    room = int(max(left, 0) / a_text) - test
    # By these the layer is chosen, and what scores mean.
    watched = min(validation, WATCHED, max(room, 0) // 5) if layers or labels > 1 else 0
    frozen = min(train, most, room - watched)
    said = []
    if frozen < min(train, FEWEST):
        said.append(f"no frozen features: those of the {test:,} test texts alone would leave too little of {budget}")
        frozen = watched = 0
    elif frozen < train:
        said.append(f"frozen features learn from {frozen:,} of {train:,} training texts")
    left -= (frozen + watched + (test if frozen else 0)) * a_text

    can = asked is not None and asked * work.forward <= left
    if asked is not None and not can:
        share = 100 * asked * work.forward / whole
        take = f"{share:,.0f} % of what baselines may ({budget}), more than the others leave"
        said.append(f"the untuned model is not asked: that would take {take}")
    if searched < train:
        said.append(f"wrong labels are looked for among {searched:,} of {train:,} training texts")
    return Plan(frozen=frozen, watched=watched, searched=searched, asked=can, said=tuple(said))
