"""What ``check`` says is counted right, and what cannot train is refused in so many words."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from small import facts

from loracle.data.checks import DataReport, Quantiles, remove_leaked_texts, remove_leaked_titles
from loracle.data.columns import Columns
from loracle.data.issues import Issue
from loracle.errors import UserError
from loracle.examples import LabeledText, Preference, RankGroup
from loracle.tasks import Task
from loracle.tasks.dataset import Examples, check_examples

TWO = Task(name="single_label", label_names=("bad", "good"))
CLICKS = Task(name="click_ranking")


def examples(task: Task, items: list[Any], issues: tuple[Issue, ...] = ()) -> Examples:
    return Examples(task=task, items=items, columns=Columns(), issues=issues)


def labelled(*rows: tuple[str, int], first_row: int = 2) -> list[LabeledText]:
    return [LabeledText(text=text, labels=(label,), row=first_row + i) for i, (text, label) in enumerate(rows)]


def clicked(name: str, row: int, **titles: tuple[int, int]) -> RankGroup:
    clicks, impressions = zip(*titles.values(), strict=True)
    rows = tuple(range(row, row + len(titles)))
    return RankGroup(group=name, texts=tuple(titles), rows=rows, clicks=clicks, impressions=impressions)


def preferred(name: str, row: int, *pairs: str, context: str | None = None) -> RankGroup:
    """``pairs`` such as "ab": a was preferred to b."""
    texts = tuple(dict.fromkeys("".join(pairs)))
    preferences = tuple(Preference(winner=texts.index(w), loser=texts.index(l)) for w, l in pairs)  # noqa: E741
    return RankGroup(group=name, texts=texts, rows=tuple(row for _ in texts), context=context, preferences=preferences)


def issues_of(found: DataReport) -> dict[str, tuple[int, tuple[int, ...]]]:
    return {issue.kind: (issue.count, issue.rows) for issue in found.issues}


class TestTexts:
    def test_duplicates_conflicts_and_rare_classes(self) -> None:
        items = labelled(("fine", 1), ("poor", 0), (" fine", 1), ("fine", 0), ("poor", 0), ("odd", 2))
        task = Task(name="single_label", label_names=("bad", "good", "rare", "never"))
        found = check_examples(examples(task, items))
        assert found.counts.values["classes"] == {"bad": 3, "good": 2, "rare": 1, "never": 0}
        assert issues_of(found) == {
            "duplicate": (3, (4, 5, 6)),
            "conflict": (3, (2, 4, 5)),
            "rare-class": (1, (7,)),
        }

    def test_equal_texts_of_different_contexts_are_different(self) -> None:
        items = [LabeledText(text="yes", labels=(i,), row=i, context=f"question {i}") for i in range(2)]
        assert issues_of(check_examples(examples(TWO, items)))["rare-class"] == (2, (0, 1))
        assert set(issues_of(check_examples(examples(TWO, items)))) == {"rare-class"}

    def test_labels_of_a_multi_label_text_count_each(self) -> None:
        items = [LabeledText(text=f"{i}", labels=labels, row=i) for i, labels in enumerate([(0, 1), (0,), (), (1,)])]
        found = check_examples(examples(Task(name="multi_label", label_names=("x", "y")), items))
        assert found.counts.values["classes"] == {"x": 2, "y": 2}
        assert issues_of(found) == {"no-class": (1, (2,))}

    def test_lengths_are_of_characters(self) -> None:
        found = check_examples(examples(TWO, labelled(*[("x" * n, n % 2) for n in range(1, 101)])))
        assert found.characters == Quantiles(low=1, median=51, p95=96, high=100)

    def test_empty_and_very_long_texts_are_odd(self) -> None:
        found = check_examples(examples(TWO, labelled(("x" * 100_000, 0), (" \n", 1), ("x" * 100_001, 0), ("fine", 1))))
        assert issues_of(found) == {"empty": (1, (3,)), "very-long": (1, (4,))}

    def test_only_the_first_rows_are_named(self) -> None:
        (issue,) = check_examples(examples(TWO, labelled(*[("same", 0)] * 9, ("other", 1), ("another", 1)))).issues
        assert (issue.count, issue.rows) == (8, (3, 4, 5, 6, 7))

    def test_what_the_schema_noticed_comes_first(self) -> None:
        skipped = Issue("no-label", "rows without a label were skipped", 2, (8, 9))
        found = check_examples(examples(TWO, labelled(("a", 0), ("a", 0), ("b", 1), ("c", 1)), (skipped,)))
        assert [issue.kind for issue in found.issues] == ["no-label", "duplicate"]

    def test_leaks_name_the_rows_of_the_training_side(self) -> None:
        train, test = labelled(("a", 0), ("b", 1), ("a ", 1), ("c", 0)), labelled(("a", 0), ("x", 1))
        found = check_examples(examples(TWO, train), examples(TWO, test))
        assert found.test_examples == 2
        assert issues_of(found)["leak"] == (2, (2, 4))
        kept, (issue,) = remove_leaked_texts(train, test)
        assert [item.row for item in kept] == [3, 5]
        assert (issue.kind, issue.count, issue.rows) == ("leak", 2, (2, 4))
        assert remove_leaked_texts(kept, test) == (kept, ())


class TestGroups:
    def test_counts_of_a_click_log(self) -> None:
        groups = [clicked("1", 2, a=(5, 100), b=(9, 120)), clicked("2", 4, a=(1, 50), c=(1, 50), d=(1, 50))]
        found = check_examples(examples(CLICKS, groups))
        assert (found.examples, found.texts) == (2, 5)
        assert (found.counts.values["clicks"], found.counts.values["impressions"]) == (17, 370)
        assert found.counts.values["titles"] == Quantiles(low=2, median=3, p95=3, high=3)
        assert issues_of(found) == {"several-groups": (1, (4,)), "no-difference": (1, (4,))}

    def test_contradictions_between_groups_but_not_between_contexts(self) -> None:
        groups = [preferred("1", 1, "ab", "bc"), preferred("2", 2, "ba"), preferred("3", 3, "cb", context="other")]
        found = check_examples(examples(Task(name="ranking"), groups))
        assert found.counts.values["preferences"] == 4
        assert issues_of(found)["contradiction-across"] == (2, (1, 2))

    def test_leaking_titles_leave_their_training_groups(self) -> None:
        train = [clicked("1", 2, a=(1, 9), b=(2, 9), c=(3, 9)), clicked("2", 5, d=(1, 9), e=(2, 9))]
        test = [clicked("1", 2, a=(1, 9), e=(2, 9))]
        assert issues_of(check_examples(examples(CLICKS, train), examples(CLICKS, test)))["leak"] == (2, (2, 6))
        kept, issues = remove_leaked_titles(train, test)
        assert kept == [RankGroup(group="1", texts=("b", "c"), rows=(3, 4), clicks=(2, 3), impressions=(9, 9))]
        assert [(issue.kind, issue.count, issue.rows) for issue in issues] == [
            ("leak", 2, (2, 6)),
            ("leak-group", 1, (5,)),
        ]


class TestUntrainable:
    @pytest.mark.parametrize(
        ("items", "message"),
        [
            (
                labelled(("a", 1), ("b", 1)),
                "2 | 'good' | 3",
            ),
            (labelled(("a", 1), ("a ", 0)), "2 | 1"),
            ([], "2 | 0"),
        ],
    )
    def test_texts(self, items: list[LabeledText], message: str) -> None:
        with pytest.raises(UserError, match=facts(*message.split(" | "))):
            TWO.reading.check_trainable(items, TWO)

    def test_texts_without_any_label(self) -> None:
        items = [LabeledText(text=text, labels=(), row=2) for text in "ab"]
        task = Task(name="multi_label", label_names=("x",))
        with pytest.raises(UserError, match=facts("2")):
            task.reading.check_trainable(items, task)

    @pytest.mark.parametrize(
        "group",
        [
            clicked("1", 2, a=(0, 100), b=(0, 900)),
            clicked("1", 2, a=(10, 100), b=(20, 200)),
            RankGroup(group="1", texts=("a", "b"), rows=(2, 3), grades=(1.0, 1.0)),
            preferred("1", 2, "ab", "ba"),
            RankGroup(group="1", texts=("a", "b"), rows=(2, 3)),
        ],
        ids=["no clicks", "equal rates", "equal grades", "undecided", "no evidence"],
    )
    def test_groups_without_a_difference(self, group: RankGroup) -> None:
        with pytest.raises(UserError, match=facts("another")):
            CLICKS.reading.check_trainable([group], CLICKS)

    def test_no_groups(self) -> None:
        with pytest.raises(UserError, match=facts("2", "--group")):
            CLICKS.reading.check_trainable([], CLICKS)

    @pytest.mark.parametrize(
        ("task", "items"),
        [
            (TWO, labelled(("a", 0), ("b", 1))),
            (
                Task(name="multi_label", label_names=("x",)),
                [*labelled(("a", 0)), LabeledText(text="b", labels=(), row=3)],
            ),
            (CLICKS, [clicked("1", 2, a=(0, 9), b=(0, 9)), clicked("2", 4, a=(1, 9), b=(0, 9))]),
            (Task(name="ranking"), [preferred("1", 2, "ab", "ba", "ab")]),
            (
                Task(name="ranking"),
                [RankGroup(group="1", texts=("a", "b"), rows=(2, 3), grades=(0, 1))],
            ),
        ],
        ids=["single", "multi", "clicks", "pairs", "grades"],
    )
    def test_the_least_that_can_train_passes(self, task: Task, items: list[Any]) -> None:
        task.reading.check_trainable(items, task)


class TestLines:
    def test_of_texts(self) -> None:
        items = labelled(*[(f"text {i}", 1) for i in range(1234)], ("text 0", 0), ("text\n", 0))
        found = check_examples(examples(TWO, items))
        assert found.lines() == [
            "task        one label a text",
            "texts       1,236",
            "classes     2, of 2 to 1,234 texts",
            "characters  min 5 · median 8 · p95 9 · max 9",
            "",
            "texts per class",
            "  good      1,234",
            "  bad           2",
            "",
            "issues",
            "  rows that repeat an earlier text: 1 (row 1236)",
            "  rows of equal texts with different labels: 2 (rows 2, 1236)",
        ]

    def test_of_a_click_log(self) -> None:
        found = check_examples(
            examples(CLICKS, [clicked("1", 2, ant=(1000, 20_000), b=(300, 20_000))]), examples(CLICKS, [])
        )
        assert found.lines() == [
            "task              ranking from clicks",
            "groups            1",
            "titles            2",
            "titles per group  min 2 · median 2 · p95 2 · max 2",
            "impressions       40,000",
            "clicks            1,300 (3.25%)",
            "characters        min 1 · median 3 · p95 3 · max 3",
            "test examples     0",
            "",
            "allocation",
            "  0.0% (0 of 1) of the groups of 2 titles or more were not shown in equal shares (p < 0.001)",
            "  what was clicked more was not shown more than chance has it (z = +0.0)",
            "  so click rates within a group can be compared",
            "",
            "no issues found",
        ]

    def test_of_a_log_that_chance_did_not_deal_out(self) -> None:
        groups = [
            replace(clicked(f"{i}", i, **{f"a{i}": (99, 1000), f"b{i}": (20, 1500 if i == 3 else 1000)}), date=f"{i}")
            for i in range(2, 5)
        ]
        assert issues_of(check_examples(examples(CLICKS, groups))) == {"uneven-allocation": (1, (3,))}
        groups = [
            replace(clicked(f"{i}", i, **{f"a{i}": (99, 1000), f"b{i}": (20, 1500)}), date=f"{201400 + i // 10}")
            for i in range(2, 52)
        ]
        found = check_examples(examples(CLICKS, groups))
        assert issues_of(found) == {"uneven-allocation": (50, (2, 3, 4, 5, 6))}
        assert found.lines()[8:] == [
            "allocation",
            "  100.0% (50 of 50) of the groups of 2 titles or more were not shown in equal shares (p < 0.001)",
            "    201400 to 201405: 100.0% (50 of 50)",
            "    they begin in rows 2, 3, 4, 5, 6, ...; beyond chance for so many groups: 50",
            "  what was clicked more was shown less, beyond chance (z = -7.1)",
            "  Pair accuracy, significance, CTR lift and the noise ceiling all take it that chance decided who saw what.",
            "  Where it did not, a click rate also tells when and to whom a title was shown, not only how good it is.",
            "  Leave the groups of these times out, or read figures with and without them.",
            "",
            "issues",
            "  groups not shown in equal shares, so allocation may not be random: 50 (rows 2, 3, 4, 5, 6, ...)",
        ]
        as_json = json.loads(json.dumps(found.to_json()))["allocation"]
        assert (as_json["groups"], as_json["failing"], len(as_json["dates"])) == (50, 50, 6)
        assert as_json["periods"] == [{"start": "201400", "end": "201405", "groups": 50, "failing": 50}]

    def test_one_title_in_two_strata_of_a_group_is_in_one_group(self) -> None:
        groups = [replace(clicked("1", row, a=(5, 100), b=(9, 100)), stratum=f"{row}") for row in (2, 4)]
        assert issues_of(check_examples(examples(CLICKS, groups))) == {}

    def test_many_classes_and_names_that_would_break_the_table(self) -> None:
        names = ("x" * 50, "two\nlines", *(f"c{i}" for i in range(18)))
        items = labelled(*[(f"{i}", i % 20) for i in range(40)])
        lines = check_examples(examples(Task(name="single_label", label_names=names), items)).lines()
        table = lines[lines.index("texts per class") + 1 : lines.index("no issues found") - 1]
        assert table[9] == "  ... 8 classes between"
        assert [line.split()[0] for line in table[10:]] == ["c15", "c16", "c17"]
        assert any(line.startswith(f"  {'x' * 39}…  ") for line in lines)
        assert any(line.startswith("  two lines  ") for line in lines)

    def test_json_holds_everything_in_plain_values(self) -> None:
        found = check_examples(examples(TWO, labelled(("a", 0), ("a", 1), ("b", 1))))
        as_json = json.loads(json.dumps(found.to_json()))
        assert as_json["task"] == "single_label"
        assert as_json["classes"] == {"bad": 1, "good": 2}
        assert as_json["characters"] == {"low": 1.0, "median": 1.0, "p95": 1.0, "high": 1.0}
        assert [issue["kind"] for issue in as_json["issues"]] == ["duplicate", "conflict", "rare-class"]
        assert as_json["issues"][0]["rows"] == [3]


def test_check_needs_no_torch() -> None:
    code = "import sys, loracle.data.checks, loracle.data.demo; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
