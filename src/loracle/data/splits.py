"""Seeded splits that share no text. Where groups have dates, the latest are held out.

All randomness is one vector of raw PCG64 doubles, sorted. NumPy's compatibility policy fixes the bit generator's stream, but
not ``permutation`` and ``choice``. So a seed gives the same split on every machine and version.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loracle.data.dates import order_of
from loracle.data.issues import Issue
from loracle.errors import UserError
from loracle.examples import Example, LabeledText, Preference, RankGroup


@dataclass(frozen=True, slots=True)
class Split:
    """Two parts in the order of the data, and the notes on how they were kept apart."""

    train: list[Any]
    held_out: list[Any]
    notes: tuple[Issue, ...] = ()


# Given labels [N], the number of labels, the share to hold out and a shuffled order: which of N texts are held out.
Stratify = Callable[[Sequence[tuple[int, ...]], int, float, NDArray[np.int_]], NDArray[np.bool_]]


# --- labelled texts ---------------------------------------------------------------------------------------------------


def split_texts(
    items: Sequence[LabeledText], share: float, seed: int, label_count: int, stratify: Stratify
) -> tuple[Split, list[list[int]]]:
    """Hold out ``share`` of the distinct texts. Rows of equal text (stripped) stay together.

    A text whose rows disagree counts as its first row says. Returns the split and the rows of each distinct text.

    Raises:
        UserError: fewer than two distinct texts, or ``stratify`` finds none to hold out.
    """
    units = distinct_texts(items)
    if len(units) < 2:
        raise UserError(
            f"Holding out a text needs at least 2 distinct texts, there are {len(units)}.",
            "Add examples, or pass --test FILE.",
        )
    labels = [items[unit[0]].labels for unit in units]
    chosen = stratify(labels, label_count, share, _shuffled(len(units), seed))
    mask = np.zeros(len(items), dtype=bool)
    for unit, is_chosen in zip(units, chosen, strict=True):
        mask[unit] = is_chosen
    return two_parts(items, mask, ()), units


def by_class(
    labels: Sequence[tuple[int, ...]], label_count: int, share: float, order: NDArray[np.int_]
) -> NDArray[np.bool_]:
    """Hold out ``share`` of each class. A class of two distinct texts and more has at least one in either part.

    Raises:
        UserError: no class has two texts.
    """
    classes = np.array([label for (label,) in labels])
    counts = np.bincount(classes, minlength=label_count)
    if counts.max() < 2:
        raise UserError(
            f"No class has 2 distinct texts, so none can be held out ({len(labels)} classes of one text each).",
            "Add examples, or pass --test FILE.",
        )
    left, held_out = _quotas(counts, share), np.zeros(len(classes), dtype=bool)
    for unit in order:
        if left[classes[unit]] > 0:
            left[classes[unit]] -= 1
            held_out[unit] = True
    return held_out


def single_text_classes(items: Sequence[LabeledText], units: list[list[int]], message: str) -> tuple[Issue, ...]:
    """An issue about the classes with one distinct text, or none."""
    counts = Counter(items[unit[0]].labels for unit in units)
    return issue_of("class-not-held", message, [items[u[0]].row for u in units if counts[items[u[0]].labels] == 1])


def text_folds(items: Sequence[LabeledText], folds: int, seed: int) -> tuple[list[Split], list[list[int]]]:
    """``folds`` rotations in which every text is held out once, and the rows of each distinct text.

    Raises:
        UserError: fewer distinct texts than folds.
    """
    units = distinct_texts(items)
    if len(units) < folds:
        raise UserError(
            f"{folds} folds need at least {folds} distinct texts, there are {len(units)}.",
            "Add examples.",
        )
    fold_of = fold_numbers(items, folds, seed)
    return [two_parts(items, fold_of == f, ()) for f in range(folds)], units


def fold_numbers(items: Sequence[LabeledText], folds: int, seed: int) -> NDArray[np.int_]:
    """Fold ``[N]`` of each row, stratified; rows of equal text (stripped) go together. With fewer texts some stay empty.

    Distinct texts are shuffled, sorted by their labels (sets of labels, where there may be several) and dealt out in turn,
    so that a class's numbers differ by at most one between folds.
    """
    units = distinct_texts(items)
    order = sorted(_shuffled(len(units), seed).tolist(), key=lambda at: sorted(items[units[at][0]].labels))
    fold_of = np.zeros(len(items), dtype=int)
    for turn, at in enumerate(order):
        fold_of[units[at]] = turn % folds
    return fold_of


def distinct_texts(items: Sequence[LabeledText]) -> list[list[int]]:
    """The rows (indices) of each distinct text, by first appearance."""
    units: dict[Hashable, list[int]] = {}
    for i, item in enumerate(items):
        units.setdefault(item.identity, []).append(i)
    return list(units.values())


def _quotas(counts: NDArray[np.int_], share: float) -> NDArray[np.int_]:
    """How many of each class to hold: largest remainders, then at least one where a class has two, and never all."""
    exact = counts * share
    quotas = np.floor(exact).astype(int)
    rest = round(share * int(counts.sum())) - int(quotas.sum())
    quotas[np.argsort(quotas - exact, kind="stable")[: max(rest, 0)]] += 1
    return np.clip(quotas, counts >= 2, np.maximum(counts - 1, 0))


def by_labels(
    labels: Sequence[tuple[int, ...]], label_count: int, share: float, order: NDArray[np.int_]
) -> NDArray[np.bool_]:
    """Iterative stratification into two parts (Sechidis et al. 2011), which fills up the rarest label first.

    Linear in the number of labels that texts have.
    """
    with_label: list[list[int]] = [[] for _ in range(label_count)]
    for unit in order:
        for label in set(labels[unit]):
            with_label[label].append(int(unit))
    left = np.array([len(units) for units in with_label])
    shares = np.array([1 - share, share])
    wanted, room = np.outer(shares, left), shares * len(labels)  # [part, label], [part]
    sides = np.full(len(labels), -1)

    def place(unit: int, side: int) -> None:
        mine = list(set(labels[unit]))
        sides[unit], room[side] = side, room[side] - 1
        wanted[side, mine] -= 1
        left[mine] -= 1

    while left.any():
        rarest = int(np.argmin(np.where(left > 0, left, np.inf)))
        for unit in with_label[rarest]:
            if sides[unit] < 0:
                place(unit, int((wanted[1, rarest], room[1]) > (wanted[0, rarest], room[0])))
    for unit in order:  # those without a label
        if sides[unit] < 0:
            place(int(unit), int(room[1] > room[0]))
    held_out = sides == 1
    if held_out.all() or not held_out.any():  # rounding on a handful of texts
        held_out[order[0]] = ~held_out[order[0]]
    return held_out


# --- groups -----------------------------------------------------------------------------------------------------------


def split_groups(groups: Sequence[RankGroup], share: float, seed: int) -> Split:
    """Hold out ``share`` of the groups; groups with a common id or title, or pairs with a common prompt, go together.

    Groups with dates are split by time instead, see ``split_by_date``.

    What hangs together and is larger than the held-out share trains. What is larger than half of everything could
    hardly be split at all: it is taken apart, first where only a prompt ties it, then by group id; titles that then
    stand on both sides leave the held-out side, with the groups in which they leave nothing to order. ``notes`` counts
    all this.

    Raises:
        UserError: fewer than two groups, or nothing to hold out that shares no title with the rest.
    """
    if len(groups) < 2:
        raise UserError(
            f"Holding out a group needs at least 2 groups, there are {len(groups)}.", "Add groups, or pass --test FILE."
        )
    if all(group.date is not None for group in groups):
        return split_by_date(groups, share)
    parts = _parts(groups)
    if len(parts) < 2:
        raise UserError(
            f"All {len(groups)} groups have the same id, so none can be held out.", "Add groups, or pass --test FILE."
        )
    room = max(1, round(share * len(groups)))
    held_out = np.zeros(len(groups), dtype=bool)
    for part in _fill(parts, room, seed):
        held_out[part] = True
    too_large = [groups[i].rows[0] for part in parts if len(part) > room for i in part if not held_out[i]]
    notes = issue_of(
        "kept-together", "groups tied to more groups than the held-out share has room for, trained on", too_large
    )
    return _without_shared(two_parts(groups, held_out, notes), len(groups))


def group_folds(groups: Sequence[RankGroup], folds: int, seed: int) -> list[Split]:
    """``folds`` rotations in which every group is held out once, those that hang together in one of them.

    Largest parts first, each into the fold that has the fewest groups so far. Dates are not looked at.

    Raises:
        UserError: fewer parts than folds, or a fold that shares all its titles with the rest.
    """
    parts = _parts(groups)
    if len(parts) < folds:
        raise UserError(
            f"{folds} folds need at least {folds} groups that share no title, there are {len(parts)}.", "Add groups."
        )
    order = sorted(_shuffled(len(parts), seed).tolist(), key=lambda at: -len(parts[at]))
    sizes, fold_of = [0] * folds, np.zeros(len(groups), dtype=int)
    for at in order:
        smallest = sizes.index(min(sizes))
        sizes[smallest] += len(parts[at])
        fold_of[parts[at]] = smallest
    return [_without_shared(two_parts(groups, fold_of == f, ()), len(groups)) for f in range(folds)]


def split_by_date(groups: Sequence[RankGroup], share: float) -> Split:
    """Hold out the latest groups: all from the one date on that comes closest to ``share`` of them.

    No training group is of the held-out time: groups of one id go by the latest date among them, and titles of before
    that come again in it leave the held-out side, with the groups in which they leave nothing to order; both counted.

    Raises:
        UserError: groups of a single date, or nothing to hold out that shares no title with the rest.
    """
    ranks = order_of(str(group.date) for group in groups)
    of_id: dict[str, int] = {}
    for group in groups:
        of_id[group.group] = max(of_id.get(group.group, 0), ranks[str(group.date)])
    times = np.array([of_id[group.group] for group in groups])
    starts = np.unique(times)[1:]
    if not len(starts):
        raise UserError(
            f"All {len(groups)} groups have the date {groups[0].date}, so there are no latest ones to hold out.",
            "Leave --date out, or pass --test FILE.",
        )
    counts = np.array([(times >= start).sum() for start in starts])
    held_out = times >= starts[np.argmin(np.abs(counts - share * len(groups)))]
    return _without_shared(two_parts(groups, held_out, ()), len(groups))


def _without_shared(split: Split, count: int) -> Split:
    """The sides of ``count`` groups, less the held-out titles that train as well."""
    known = {text.strip() for group in split.train for text in group.texts}
    kept, removed = without_titles(
        split.held_out, known, "shared-title", "held-out titles that training groups have too"
    )
    if not kept:
        raise UserError(
            f"No group can be held out: all {count} share titles with each other.",
            "Pass --test FILE with groups of other titles.",
        )
    return replace(split, held_out=kept, notes=split.notes + removed)


def without_titles(
    groups: Sequence[RankGroup], banned: Set[str], kind: str, message: str
) -> tuple[list[RankGroup], tuple[Issue, ...]]:
    """The groups less the ``banned`` (stripped) titles, less the groups in which nothing is left to order.

    Both are counted, the titles as ``kind`` and ``message`` say.
    """
    kept: list[RankGroup] = []
    titles: list[int] = []
    lost: list[int] = []
    for group in groups:
        stay = [i for i, text in enumerate(group.texts) if text.strip() not in banned]
        titles += [row for row, text in zip(group.rows, group.texts, strict=True) if text.strip() in banned]
        if len(stay) == len(group.texts):
            kept.append(group)
        elif rest := restricted(group, stay):
            kept.append(rest)
        else:
            lost.append(group.rows[0])
    lost_groups = issue_of(f"{kind}-group", "groups with too little left without such titles, left out", lost)
    return kept, issue_of(kind, f"{message}, left out", titles) + lost_groups


def restricted(group: RankGroup, stay: Sequence[int]) -> RankGroup | None:
    """The group with only the titles at ``stay``, or None where nothing is left to order or to learn from."""
    place = {old: new for new, old in enumerate(stay)}
    preferences = tuple(
        Preference(winner=place[p.winner], loser=place[p.loser], margin=p.margin)
        for p in group.preferences
        if p.winner in place and p.loser in place
    )
    if len(stay) < 2 or (group.preferences and not preferences):
        return None

    def pick(values: tuple[Any, ...] | None) -> Any:
        return None if values is None else tuple(values[i] for i in stay)

    return replace(
        group, texts=pick(group.texts), rows=pick(group.rows), preferences=preferences,
        grades=pick(group.grades), clicks=pick(group.clicks), impressions=pick(group.impressions),
    )  # fmt: skip


def _by_id(group: RankGroup) -> Iterator[Hashable]:
    yield "group", group.group


def _by_title(group: RankGroup) -> Iterator[Hashable]:
    yield from _by_id(group)
    for text in group.texts:
        yield "title", text.strip()


def _by_prompt(group: RankGroup) -> Iterator[Hashable]:
    yield from _by_title(group)
    if group.preferences and group.context is not None:
        yield "prompt", group.context.strip()


def _parts(groups: Sequence[RankGroup]) -> list[list[int]]:
    """Indices of groups that go together; parts above half of everything are taken apart by ever weaker ties."""
    parts = [list(range(len(groups)))]
    for ties in (_by_prompt, _by_title, _by_id):
        parts = [
            piece
            for part in parts
            for piece in (_connected(groups, part, ties) if 2 * len(part) > len(groups) else [part])
        ]
    return parts


def _connected(
    groups: Sequence[RankGroup], part: list[int], ties: Callable[[RankGroup], Iterable[Hashable]]
) -> list[list[int]]:
    """Connected components of the graph between groups and what ties them, in order of their first group."""
    from scipy.sparse import coo_array  # here, since ``--help`` and classifiers can do without
    from scipy.sparse.csgraph import connected_components

    nodes: dict[Hashable, int] = {}
    edges = [(i, nodes.setdefault(tie, len(nodes))) for i, at in enumerate(part) for tie in ties(groups[at])]
    left, right = np.array(edges).T
    size = len(part) + len(nodes)
    graph = coo_array((np.ones(len(edges)), (left, right + len(part))), shape=(size, size))
    _, component = connected_components(graph, directed=False)
    pieces: dict[int, list[int]] = {}
    for i, at in enumerate(part):
        pieces.setdefault(int(component[i]), []).append(at)
    return list(pieces.values())


def _fill(parts: list[list[int]], room: int, seed: int) -> list[list[int]]:
    """Parts in random order as long as they fit, but not all; where none fits, the smallest."""
    chosen = []
    order = _shuffled(len(parts), seed)
    for at in order:
        if len(parts[at]) <= room:
            chosen.append(parts[at])
            room -= len(parts[at])
    return chosen[: len(parts) - 1] or [min((parts[at] for at in order), key=len)]


# --- both -------------------------------------------------------------------------------------------------------------


def _shuffled(n: int, seed: int) -> NDArray[np.int_]:
    return np.argsort(np.random.Generator(np.random.PCG64(seed)).random(n), kind="stable")


def two_parts(items: Sequence[Example], held_out: NDArray[np.bool_], notes: tuple[Issue, ...]) -> Split:
    """Split items by a mask ``[N]`` of those to hold out."""
    parts: tuple[list[Example], list[Example]] = ([], [])
    for item, is_held_out in zip(items, held_out, strict=True):
        parts[int(is_held_out)].append(item)
    return Split(*parts, notes)


def issue_of(kind: str, message: str, rows: Iterable[int]) -> tuple[Issue, ...]:
    """One issue about these rows, or none where there are none."""
    found = sorted(rows)
    return (Issue(kind, f"{message}: {len(found):,}", len(found), tuple(found[: Issue.ROWS_NAMED])),) if found else ()
