"""No text on both sides, whatever the data look like; and the same sides for the same seed, for ever."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import facts

from loracle.data.splits import Split, restricted, split_groups
from loracle.errors import UserError
from loracle.examples import LabeledText, Preference, RankGroup
from loracle.tasks import Task

THREE = Task(name="single_label", label_names=("a", "b", "c"))
MANY = Task(name="multi_label", label_names=("a", "b", "c", "d"))


def split(items: list, share: float, seed: int, task: Task) -> Split:
    return task.reading.split(items, share, seed, task)


def texts(*labels: tuple[int, ...], text: str = "text {}") -> list[LabeledText]:
    return [LabeledText(text=text.format(i), labels=label, row=i + 2) for i, label in enumerate(labels)]


def clicked(name: str, *titles: str, row: int = 1) -> RankGroup:
    n = len(titles)
    return RankGroup(
        group=name,
        texts=titles,
        rows=tuple(range(row, row + n)),
        clicks=tuple(range(n)),
        impressions=tuple(range(100, 100 + n)),
    )


def apart(n: int) -> list[RankGroup]:
    return [clicked(f"g{i}", f"{i} x", f"{i} y", row=2 * i + 1) for i in range(n)]


def dated(*dates: str, **known: str) -> list[RankGroup]:
    groups = [clicked(f"g{i}", f"{i} x", f"{i} y", row=2 * i + 1) for i in range(len(dates))]
    return [dataclasses.replace(g, date=date, **known) for g, date in zip(groups, dates, strict=True)]


def titles_of(groups: list[RankGroup]) -> set[str]:
    return {text.strip() for group in groups for text in group.texts}


class TestTexts:
    def test_the_sides_of_a_seed_are_pinned(self) -> None:
        sides = split(texts(*[(i % 2,) for i in range(12)]), 0.25, 0, THREE)
        assert [item.row for item in sides.held_out] == [4, 10, 13]
        assert [item.row for item in sides.train] == [2, 3, 5, 6, 7, 8, 9, 11, 12]

    def test_another_seed_is_another_split(self) -> None:
        items = texts(*[(i % 3,) for i in range(90)])
        assert split(items, 0.2, 0, THREE).held_out != split(items, 0.2, 1, THREE).held_out

    def test_classes_keep_their_shares(self) -> None:
        items = texts(*[(0,)] * 500, *[(1,)] * 290, *[(2,)] * 10)
        held = split(items, 0.1, 3, THREE).held_out
        assert [sum(item.labels == (c,) for item in held) for c in range(3)] == [50, 29, 1]

    def test_rounding_of_many_classes_keeps_the_total(self) -> None:
        items = texts(*[(i % 10,) for i in range(150)])  # a tenth of 15 a class is 1.5
        task = Task(name="single_label", label_names=tuple("abcdefghij"))
        assert len(split(items, 0.1, 0, task).held_out) == 15

    def test_a_class_of_two_is_on_both_sides_and_a_class_of_one_trains_and_is_counted(self) -> None:
        sides = split(texts(*[(0,)] * 50, (1,), (1,), (2,)), 0.02, 0, THREE)
        assert {item.labels for item in sides.held_out} == {(0,), (1,)}
        assert {item.labels for item in sides.train} == {(0,), (1,), (2,)}
        (note,) = sides.notes
        assert (note.kind, note.count, note.rows) == ("class-not-held", 1, (54,))

    def test_a_rare_label_of_several_is_spread(self) -> None:
        """Chance would put all ten of label d on the large side in a third of the cases."""
        items = texts(*[(0, 1)] * 60, *[(0,)] * 120, *[(2, 3)] * 10, *[()] * 10)
        for seed in range(20):
            held = split(items, 0.1, seed, MANY).held_out
            assert sum(3 in item.labels for item in held) == 1
            assert sum(1 in item.labels for item in held) == 6
            assert len(held) == 20

    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def test_equal_texts_stay_together_and_nothing_is_lost(self, data: st.DataObject) -> None:
        task = data.draw(st.sampled_from([THREE, MANY]))
        label = st.integers(0, 2).map(lambda i: (i,)) if task is THREE else st.sets(st.integers(0, 3)).map(tuple)
        rows = data.draw(
            st.lists(st.tuples(st.sampled_from(["p", " p", "q\n", "q", "r", "s", "t"]), label), min_size=1)
        )
        items = [LabeledText(text=text, labels=labels, row=i) for i, (text, labels) in enumerate(rows)]
        try:
            sides = split(items, data.draw(st.floats(0.01, 0.99)), data.draw(st.integers(0, 99)), task)
        except UserError:
            first_labels = [
                next(i.labels for i in items if i.text.strip() == t) for t in {i.text.strip() for i in items}
            ]
            assert len(first_labels) < 2 or (task is THREE and len(set(first_labels)) == len(first_labels))
            return
        assert sides.train
        assert sides.held_out
        assert not {i.text.strip() for i in sides.train} & {i.text.strip() for i in sides.held_out}
        assert sorted([*sides.train, *sides.held_out], key=lambda i: i.row) == items
        assert sides.held_out == sorted(sides.held_out, key=lambda i: i.row)

    def test_one_text_cannot_be_split(self) -> None:
        items = [LabeledText(text=text, labels=(0,), row=1) for text in ("same", " same ")]
        with pytest.raises(UserError, match=facts("2", "1")):
            split(items, 0.1, 0, THREE)

    def test_classes_of_one_text_each_cannot_be_split(self) -> None:
        with pytest.raises(UserError, match=facts("2", "3")):
            split(texts((0,), (1,), (2,)), 0.1, 0, THREE)


class TestGroups:
    def test_the_sides_of_a_seed_are_pinned(self) -> None:
        assert [group.group for group in split_groups(apart(20), 0.2, 0).held_out] == ["g2", "g3", "g11", "g13"]

    def test_share_is_of_the_groups(self) -> None:
        sides = split_groups(apart(50), 0.1, 0)
        assert (len(sides.train), len(sides.held_out), sides.notes) == (45, 5, ())

    def test_groups_that_share_a_title_or_an_id_go_together(self) -> None:
        groups = [*apart(12), clicked("h", "0 x ", "1 y"), clicked("g3", "other", "another")]
        for seed in range(30):
            held = {g.group for g in split_groups(groups, 0.3, seed).held_out}
            assert len(held & {"g0", "g1", "h"}) in (0, 3)
            train = {g.group for g in split_groups(groups, 0.3, seed).train}
            assert not train & held

    def test_pairs_of_one_prompt_go_together_and_other_groups_of_one_context_need_not(self) -> None:
        def pair(i: int, prompt: str) -> RankGroup:
            preferences = (Preference(winner=0, loser=1),)
            return RankGroup(
                group=f"{i}", texts=(f"{i} x", f"{i} y"), rows=(i, i), context=prompt, preferences=preferences
            )

        pairs = [pair(i, f"prompt {i // 3}") for i in range(12)]
        for seed in range(10):
            sides = split_groups(pairs, 0.25, seed)
            assert len(sides.held_out) == 3
            assert len({group.context for group in sides.held_out}) == 1
        one_prompt = split_groups([pair(i, "Which is better?") for i in range(12)], 0.25, 0)
        assert len(one_prompt.held_out) == 3  # a prompt that all have ties nothing

    def test_a_part_above_the_share_trains_and_is_counted(self) -> None:
        chain = [clicked(f"c{i}", f"link {i}", f"link {i + 1}", row=100 + i) for i in range(4)]
        for seed in range(20):
            sides = split_groups([*apart(12), *chain], 0.125, seed)
            assert len(sides.held_out) == 2
            assert not {g.group for g in sides.held_out} & {g.group for g in chain}
            (note,) = sides.notes
            assert (note.kind, note.count, note.rows) == ("kept-together", 4, (100, 101, 102, 103))

    def test_the_smallest_part_is_held_where_none_fits(self) -> None:
        groups = [*apart(4), *apart(4)]  # each id twice: parts of two, room for one
        assert len(split_groups(groups, 0.1, 0).held_out) == 2

    def test_a_part_above_half_is_taken_apart_and_shared_titles_leave_the_held_side(self) -> None:
        groups = [clicked(f"g{i}", f"{i} x", f"{i} y", "everywhere", row=3 * i) for i in range(10)]
        sides = split_groups(groups, 0.2, 0)
        assert len(sides.held_out) == 2
        for group in sides.held_out:
            number = int(group.group[1:])
            assert group.texts == (f"{number} x", f"{number} y")
            assert (group.rows, group.clicks, group.impressions) == ((3 * number, 3 * number + 1), (0, 1), (100, 101))
        assert all("everywhere" in group.texts for group in sides.train)
        (note,) = sides.notes
        assert (note.kind, note.count) == ("shared-title", 2)

    def test_groups_left_without_two_titles_are_dropped_and_counted(self) -> None:
        groups = [clicked(f"g{i}", f"{i} x", "everywhere") for i in range(5)]
        groups += [clicked(f"h{i}", f"{i} y", f"{i} z", "everywhere") for i in range(5)]
        sides = next(s for s in (split_groups(groups, 0.4, seed) for seed in range(20)) if len(s.held_out) < 4)
        counts = {note.kind: note.count for note in sides.notes}
        assert counts == {"shared-title": 4, "shared-title-group": 4 - len(sides.held_out)}

    def test_titles_shared_all_over_cannot_be_split(self) -> None:
        groups = [clicked(f"g{i}", *pair) for i, pair in enumerate(itertools.combinations("abcdef", 2))]
        with pytest.raises(UserError, match=facts("15")):
            split_groups(groups, 0.1, 0)

    @pytest.mark.parametrize(
        ("groups", "found"),
        [(apart(1), "there are 1"), (apart(1) * 3, "All 3 groups have the same id")],
        ids=["one", "one id"],
    )
    def test_too_few_groups(self, groups: list[RankGroup], found: str) -> None:
        with pytest.raises(UserError, match=found):
            split_groups(groups, 0.9, 0)

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(st.sets(st.sampled_from([f"title {i}" for i in range(25)]), min_size=2, max_size=4), min_size=2),
        st.floats(0.05, 0.9),
        st.integers(0, 99),
    )
    def test_no_title_on_both_sides(self, sets: list[set[str]], share: float, seed: int) -> None:
        groups = [clicked(f"g{i}", *sorted(s), row=10 * i) for i, s in enumerate(sets)]
        try:
            sides = split(groups, share, seed, Task(name="click_ranking"))
        except UserError:
            assert any(len(titles_of(groups[:i]) & titles_of([group])) for i, group in enumerate(groups))
            return
        assert sides.train
        assert sides.held_out
        assert not titles_of(sides.train) & titles_of(sides.held_out)
        counts = {note.kind: note.count for note in sides.notes}
        assert len(sides.train) + len(sides.held_out) + counts.get("shared-title-group", 0) == len(groups)


class TestDates:
    def test_the_latest_are_held_out_whatever_the_seed(self) -> None:
        groups = dated(*[str(i) for i in (3, 11, 2, 9, 10, 1, 8, 7, 6, 5)])  # as texts, 9 would be the latest
        for seed in range(3):
            sides = split_groups(groups, 0.2, seed)
            assert ([g.date for g in sides.held_out], sides.notes) == (["11", "10"], ())
        again = split_groups(sides.train, 0.1, 1)  # as recipe.divide does for the validation side
        assert [g.date for g in again.held_out] == ["9"]

    def test_a_date_is_on_one_side(self) -> None:
        sides = split_groups(dated(*["2014-01"] * 6, *["2014-02"] * 3, "2014-03"), 0.3, 0)
        assert {g.date for g in sides.held_out} == {"2014-02", "2014-03"}
        assert {
            g.date for g in split_groups(dated(*["2014-01"] * 6, *["2014-02"] * 3, "2014-03"), 0.1, 0).held_out
        } == {"2014-03"}

    def test_strata_of_one_group_go_by_its_latest_date(self) -> None:
        groups = dated("1", "2", "3", "4", "5")
        groups.append(dataclasses.replace(groups[4], date="1", stratum="other", texts=("u", "v")))
        sides = split_groups(groups, 0.2, 0)
        assert [(g.group, g.date) for g in sides.held_out] == [("g4", "5"), ("g4", "1")]

    def test_titles_that_come_again_leave_the_held_out_side(self) -> None:
        groups = dated("1", "2", "3", "4", "5")
        groups[3] = dataclasses.replace(groups[3], texts=("0 x ", "new", "newer"), rows=(7, 8, 9),
                                        clicks=(1, 2, 3), impressions=(100, 100, 100), stratum="s", weight=2.0)  # fmt: skip
        groups[4] = dataclasses.replace(groups[4], texts=("1 x", "newest"))
        sides = split_groups(groups, 0.4, 0)
        assert [g.date for g in sides.train] == ["1", "2", "3"]
        (rest,) = sides.held_out
        assert (rest.texts, rest.clicks, rest.stratum, rest.weight, rest.date) == (
            ("new", "newer"), (2, 3), "s", 2.0, "4",
        )  # fmt: skip
        assert {note.kind: note.count for note in sides.notes} == {"shared-title": 2, "shared-title-group": 1}

    def test_one_date_cannot_be_split(self) -> None:
        with pytest.raises(UserError, match=facts("3", "7", "--date")):
            split_groups(dated("7", "7", "7"), 0.1, 0)

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(
            st.tuples(st.sets(st.integers(0, 30), min_size=2, max_size=4), st.integers(0, 9), st.integers(0, 12)),
            min_size=2,
        ),
        st.floats(0.05, 0.9),
    )
    def test_the_future_never_trains(self, drawn: list[tuple[set[int], int, int]], share: float) -> None:
        groups = [
            dataclasses.replace(
                clicked(f"g{name}", *(f"title {t}" for t in sorted(titles)), row=10 * i), date=str(date)
            )
            for i, (titles, date, name) in enumerate(drawn)
        ]
        try:
            sides = split_groups(groups, share, 0)
        except UserError:
            return
        assert sides.train
        assert not titles_of(sides.train) & titles_of(sides.held_out)
        assert not {g.group for g in sides.train} & {g.group for g in sides.held_out}
        latest = {g.group: max(int(h.date or 0) for h in groups if h.group == g.group) for g in groups}
        assert max(latest[g.group] for g in sides.train) < min(latest[g.group] for g in sides.held_out)
        counts = {note.kind: note.count for note in sides.notes}
        assert len(sides.train) + len(sides.held_out) + counts.get("shared-title-group", 0) == len(groups)


def test_restricting_a_group_renumbers_its_preferences() -> None:
    preferences = (
        Preference(winner=0, loser=2, margin=0.5),
        Preference(winner=1, loser=2),
        Preference(winner=2, loser=3),
    )
    group = RankGroup(group="g", texts=("a", "b", "c", "d"), rows=(1, 1, 2, 3), preferences=preferences)
    rest = restricted(group, [1, 2, 3])
    assert rest == RankGroup(
        group="g",
        texts=("b", "c", "d"),
        rows=(1, 2, 3),
        preferences=(Preference(winner=0, loser=1), Preference(winner=1, loser=2)),
    )
    assert restricted(group, [0, 1]) is None  # nobody preferred one of them to the other
    assert restricted(group, [3]) is None
    graded = RankGroup(group="g", texts=("a", "b", "c"), rows=(1, 2, 3), grades=(0.0, 1.0, 2.0))
    assert restricted(graded, [0, 2]) == RankGroup(group="g", texts=("a", "c"), rows=(1, 3), grades=(0.0, 2.0))
