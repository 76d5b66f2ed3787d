"""Seeded splits in which no text stands on both sides; where groups have dates, the latest are held out.

All randomness is one vector of raw PCG64 doubles, sorted: the bit generator's stream is fixed by NumPy's compatibility
policy while ``permutation`` and ``choice`` are not, so a seed means the same split on every machine and version.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loracle.data.dates import order_of
from loracle.data.issues import Issue
from loracle.errors import UserError
from loracle.examples import Example, LabeledText, Preference, RankGroup, Task


@dataclass(frozen=True, slots=True)
class Split:
    """Two sides in the order of the data, and what had to be done to keep them apart."""

    train: list[Any]  # of the same kind as what was split
    held: list[Any]
    notes: tuple[Issue, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """The three sides, which share no text, and what was done to get there."""

    task: Task
    train: list[Any]  # all LabeledText, or all RankGroup
    validation: list[Any]
    test: list[Any]
    issues: tuple[Issue, ...] = ()
    checksums: dict[str, str] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)  # role -> the columns it was read from, joined by commas


def split(items: Sequence[Example], share: float, seed: int, task: Task) -> Split:
    """Hold ``share`` of the texts (of the groups, when ranking) out.

    Raises:
        UserError: too few examples, or examples too entangled, for two sides without a common text.
    """
    if task.kind == "rank":
        return split_groups([item for item in items if isinstance(item, RankGroup)], share, seed)
    return split_texts([item for item in items if isinstance(item, LabeledText)], share, seed, task)


# --- labelled texts ---------------------------------------------------------------------------------------------------


def split_texts(items: Sequence[LabeledText], share: float, seed: int, task: Task) -> Split:
    """Hold out ``share`` of the distinct texts, stratified; rows of equal text (stripped) go together.

    One label a text: each class of two distinct texts and more has at least one on either side, whatever the share.
    Several labels: iterative stratification (Sechidis et al. 2011), which fills up the rarest label first. A text whose
    rows disagree counts as its first row says.

    Raises:
        UserError: fewer than two distinct texts, or no class that has two.
    """
    units = _equal_texts(items)
    if len(units) < 2:
        raise UserError(
            "at least 2 distinct texts to hold one out", str(len(units)), "add examples, or pass --test FILE"
        )
    labels = [items[unit[0]].labels for unit in units]
    order = _shuffled(len(units), seed)
    if task.kind == "multi":
        held_units = _hold_labels(labels, share, order, len(task.label_names))
        notes: tuple[Issue, ...] = ()
    else:
        classes = np.array([label for (label,) in labels])
        counts = np.bincount(classes, minlength=len(task.label_names))
        if counts.max() < 2:
            raise UserError(
                "a class with at least 2 distinct texts, to hold one out", f"{len(units)} classes of one text each",
                "add examples, or pass --test FILE",
            )  # fmt: skip
        held_units = _hold_classes(classes, _quotas(counts, share), order)
        notes = _lonely_classes(items, units, classes, counts)
    held = np.zeros(len(items), dtype=bool)
    for unit, is_held in zip(units, held_units, strict=True):
        held[unit] = is_held
    return _two_sides(items, held, notes)


def text_folds(items: Sequence[LabeledText], folds: int, seed: int, task: Task) -> list[Split]:
    """``folds`` rotations in which every text is held out once, as ``fold_numbers`` deals them out.

    Raises:
        UserError: fewer distinct texts than folds.
    """
    units = _equal_texts(items)
    if len(units) < folds:
        raise UserError(f"at least {folds} distinct texts, for {folds} folds", str(len(units)), "add examples")
    fold_of = fold_numbers(items, folds, seed)
    counts = Counter(items[unit[0]].labels for unit in units)
    lonely = [u for u in units if task.kind == "single" and counts[items[u[0]].labels] == 1]
    notes = issue_of(
        "class-not-held", "classes with one distinct text, which no rotation both learns and measures",
        [items[unit[0]].row for unit in lonely],
    )  # fmt: skip
    return [_two_sides(items, fold_of == f, notes) for f in range(folds)]


def fold_numbers(items: Sequence[LabeledText], folds: int, seed: int) -> NDArray[np.int_]:
    """Fold ``[N]`` of each row, stratified; rows of equal text (stripped) go together. With fewer texts some stay empty.

    Distinct texts are shuffled, sorted by their labels (sets of labels, where there may be several) and dealt out in turn,
    so that a class's numbers differ by at most one between folds.
    """
    units = _equal_texts(items)
    order = sorted(_shuffled(len(units), seed).tolist(), key=lambda at: sorted(items[units[at][0]].labels))
    fold_of = np.zeros(len(items), dtype=int)
    for turn, at in enumerate(order):
        fold_of[units[at]] = turn % folds
    return fold_of


def _equal_texts(items: Sequence[LabeledText]) -> list[list[int]]:
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


def _hold_classes(classes: NDArray[np.int_], quotas: NDArray[np.int_], order: NDArray[np.int_]) -> NDArray[np.bool_]:
    left, held = quotas.copy(), np.zeros(len(classes), dtype=bool)
    for unit in order:
        if left[classes[unit]] > 0:
            left[classes[unit]] -= 1
            held[unit] = True
    return held


def _lonely_classes(
    items: Sequence[LabeledText], units: list[list[int]], classes: NDArray[np.int_], counts: NDArray[np.int_]
) -> tuple[Issue, ...]:
    rows = [items[unit[0]].row for unit, label in zip(units, classes, strict=True) if counts[label] == 1]
    return issue_of(
        "class-not-held", "classes with one distinct text, which trains, so that they are not measured", rows
    )


def _hold_labels(
    labels: Sequence[tuple[int, ...]], share: float, order: NDArray[np.int_], n_labels: int
) -> NDArray[np.bool_]:
    """Iterative stratification into two sides; linear in the number of labels given."""
    with_label: list[list[int]] = [[] for _ in range(n_labels)]
    for unit in order:
        for label in set(labels[unit]):
            with_label[label].append(int(unit))
    left = np.array([len(units) for units in with_label])
    shares = np.array([1 - share, share])
    wanted, room = np.outer(shares, left), shares * len(labels)  # [side, label], [side]
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
    held = sides == 1
    if held.all() or not held.any():  # rounding on a handful of texts
        held[order[0]] = ~held[order[0]]
    return held


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
        raise UserError("at least 2 groups to hold one out", str(len(groups)), "add groups, or pass --test FILE")
    if all(group.date is not None for group in groups):
        return split_by_date(groups, share)
    parts = _parts(groups)
    if len(parts) < 2:
        raise UserError(
            "at least 2 groups to hold one out",
            f"{len(groups)} of one and the same id",
            "add groups, or pass --test FILE",
        )
    room = max(1, round(share * len(groups)))
    held = np.zeros(len(groups), dtype=bool)
    for part in _fill(parts, room, seed):
        held[part] = True
    too_large = [groups[i].rows[0] for part in parts if len(part) > room for i in part if not held[i]]
    notes = issue_of(
        "kept-together", "groups tied to more groups than the held-out share has room for, trained on", too_large
    )
    return _without_shared(_two_sides(groups, held, notes), len(groups))


def group_folds(groups: Sequence[RankGroup], folds: int, seed: int) -> list[Split]:
    """``folds`` rotations in which every group is held out once, those that hang together in one of them.

    Largest parts first, each into the fold that has the fewest groups so far. Dates are not looked at.

    Raises:
        UserError: fewer parts than folds, or a fold that shares all its titles with the rest.
    """
    parts = _parts(groups)
    if len(parts) < folds:
        raise UserError(
            f"at least {folds} groups that share no title, for {folds} folds", str(len(parts)), "add groups"
        )
    order = sorted(_shuffled(len(parts), seed).tolist(), key=lambda at: -len(parts[at]))
    sizes, fold_of = [0] * folds, np.zeros(len(groups), dtype=int)
    for at in order:
        smallest = sizes.index(min(sizes))
        sizes[smallest] += len(parts[at])
        fold_of[parts[at]] = smallest
    return [_without_shared(_two_sides(groups, fold_of == f, ()), len(groups)) for f in range(folds)]


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
            "groups of at least 2 dates, to hold out the latest", f"{len(groups)} that end with {groups[0].date}",
            "leave --date out, or pass --test FILE",
        )  # fmt: skip
    counts = np.array([(times >= start).sum() for start in starts])
    held = times >= starts[np.argmin(np.abs(counts - share * len(groups)))]
    return _without_shared(_two_sides(groups, held, ()), len(groups))


def _without_shared(sides: Split, count: int) -> Split:
    """The sides of ``count`` groups, less the held-out titles that train as well."""
    known = {text.strip() for group in sides.train for text in group.texts}
    kept, taken = without_titles(sides.held, known, "shared-title", "held-out titles that training groups have too")
    if not kept:
        raise UserError(
            "groups to hold out that share no title with the others", f"titles shared all over {count} groups",
            "pass --test FILE with groups of other titles",
        )  # fmt: skip
    return replace(sides, held=kept, notes=sides.notes + taken)


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


def _two_sides(items: Sequence[Example], held: NDArray[np.bool_], notes: tuple[Issue, ...]) -> Split:
    sides: tuple[list[Example], list[Example]] = ([], [])
    for item, is_held in zip(items, held, strict=True):
        sides[int(is_held)].append(item)
    return Split(*sides, notes)


def issue_of(kind: str, message: str, rows: Iterable[int]) -> tuple[Issue, ...]:
    """One issue about these rows, or none where there are none."""
    found = sorted(rows)
    return (Issue(kind, f"{message}: {len(found):,}", len(found), tuple(found[: Issue.ROWS_NAMED])),) if found else ()
