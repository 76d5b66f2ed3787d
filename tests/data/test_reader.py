"""What columns mean, and how rows become examples: names kept end to end, nothing dropped in silence."""

import csv
import io
import itertools
import json
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import facts, has_facts

from loracle.config import DataConfig
from loracle.data.columns import Columns, infer_text_column
from loracle.data.reader import iter_texts, read_unlabeled_groups
from loracle.data.sources import open_table
from loracle.data.table import Table
from loracle.errors import UserError
from loracle.examples import LabeledText, Preference, RankGroup
from loracle.tasks import Task
from loracle.tasks.dataset import columns_for, infer_task, read_examples


def table(rows, **label_names):
    """A table in memory; its rows are numbered from 1."""
    columns = tuple(dict.fromkeys(key for row in rows for key in row))
    return Table("x.json", columns, label_names, lambda: iter(list(enumerate(rows, 1))))


def texts(*labels):
    return table([{"text": f"text {i}", "label": label} for i, label in enumerate(labels)])


def labels_of(examples):
    return [tuple(examples.task.label_names[i] for i in item.labels) for item in examples.items]


def counted(issues):
    return {issue.kind: (issue.count, issue.rows) for issue in issues}


def read(rows, task=None, **data):
    source = table(rows) if isinstance(rows, list) else open_table(str(rows)) if isinstance(rows, Path) else rows
    return read_examples(source, DataConfig(**data), task=task)


def error_of(rows, task=None, **data):
    with pytest.raises(UserError) as error:
        read(rows, task, **data)
    return str(error.value)


# --- columns ----------------------------------------------------------------------------------------------------------

LONG, SHORT = "a text of some length, such as it is", "yes"


@pytest.mark.parametrize(
    ("row", "data", "name", "columns"),
    [
        ({"text": LONG, "label": "a"}, {}, "single_label", {"text": "text", "label": "label"}),
        ({"Category": "a", "Title": LONG, "id": 1}, {}, "single_label", {"text": "Title", "label": "Category"}),
        ({"title": SHORT, "abstract": LONG, "topic": 1}, {}, "single_label", {"text": "abstract", "label": "topic"}),
        ({"title": SHORT, "abstract": LONG, "topic": 1}, {"text": "title"}, "single_label",
         {"text": "title", "label": "topic"}),
        ({"text": LONG, "label": 1, "stars": 5}, {"label": "stars"}, "single_label", {"text": "text", "label": "stars"}),
        ({"text": LONG, "label": 1, "who": "x"}, {"context": "who"}, "single_label",
         {"text": "text", "label": "label", "context": "who"}),
        ({"text": LONG, "label": 1, "sample_weight": 2}, {}, "single_label",
         {"text": "text", "label": "label", "weight": "sample_weight"}),
        ({"text": LONG, "labels": ["a", "b"]}, {}, "multi_label", {"text": "text", "label": "labels"}),
        ({"text": LONG, "label": "a,b"}, {"label_delimiter": ","}, "multi_label", {"text": "text", "label": "label"}),
        ({"messages": [{"role": "user", "content": LONG}], "label": 3}, {}, "single_label",
         {"messages": "messages", "label": "label"}),
        ({"chosen": LONG, "rejected": SHORT}, {}, "ranking", {"chosen": "chosen", "rejected": "rejected"}),
        ({"prompt": SHORT, "chosen": LONG, "rejected": SHORT, "margin": 1}, {}, "ranking",
         {"chosen": "chosen", "rejected": "rejected", "context": "prompt", "margin": "margin"}),
        ({"chosen": LONG, "rejected": SHORT, "text": LONG, "label": 1}, {"label": "label"}, "single_label",
         {"text": "text", "label": "label"}),
        ({"a": 1, "b": 2, "headline": LONG, "clicks": 1, "impressions": 2}, {"group": "a, b"}, "click_ranking",
         {"text": "headline", "group": ("a", "b"), "clicks": "clicks", "impressions": "impressions"}),
        ({"test_id": 1, "t": LONG, "c": 1, "i": 2}, {"text": "t", "clicks": "c", "impressions": "i"}, "click_ranking",
         {"text": "t", "group": ("test_id",), "clicks": "c", "impressions": "i"}),
        ({"qid": 1, "document": LONG, "relevance": 3}, {}, "ranking",
         {"text": "document", "group": ("qid",), "grade": "relevance"}),
        ({"query": SHORT, "text": LONG, "likes": 3}, {"grade": "likes"}, "ranking",
         {"text": "text", "group": ("query",), "context": "query", "grade": "likes"}),
        ({"text": LONG, "score": 3, "label": "a"}, {}, "single_label", {"text": "text", "label": "label"}),
        ({"a,b": 1, "title": LONG, "grade": 3}, {"group": "a,b"}, "ranking",
         {"text": "title", "group": ("a,b",), "grade": "grade"}),
    ],
)  # fmt: skip
def test_columns_are_found_by_flag_and_name(row, data, name, columns):
    task, found = infer_task(table([row]), DataConfig(**data))
    assert found == Columns(**columns)
    assert task.name == name


def test_what_was_inferred_is_said():
    row = {"test": 1, "image": 2, "headline": LONG, "clicks": 1, "impressions": 2}
    assert infer_task(table([row]), DataConfig(group="test,image"))[1].lines == (
        "task: ranking from clicks", "text column: 'headline'", "group columns: 'test', 'image'",
        "clicks column: 'clicks'", "impressions column: 'impressions'",
    )  # fmt: skip
    said = infer_task(table([{"text": LONG, "tags": ["a"]}]), DataConfig())[1].lines
    assert said == ("task: any number of labels a text", "text column: 'text'", "label column: 'tags'")


def test_unknown_names_are_told_by_their_content():
    rows = [
        {
            "id": f"{i:08x}",
            "url": "https://example.org/" + "x" * 80,
            "was": "你好，世界 " * 5,
            "art": "ab"[i % 2],
            "k": "c",
        }
        for i in range(8)
    ]
    columns = infer_task(table(rows), DataConfig())[1]
    assert (columns.text, columns.label) == ("was", "art")


@pytest.mark.parametrize(
    ("rows", "data", "words"),
    [
        ([{"a": LONG, "b": LONG + SHORT}], {}, "'a' | 'b' | x.json | --text"),
        ([{"a": "x1", "b": "y1"}], {}, "'a' | 'b'"),
        ([{"a": f"{LONG} {i}", "b": i % 2, "c": i % 3} for i in range(9)], {},
         "'a' | 'b' | 'c' | x.json | --label"),
        ([{"a": f"{LONG} {i}", "b": i} for i in range(9)], {}, "column"),
        ([{"text": LONG, "label": 1}], {"text": "txt"}, "'txt' | --text | 'text' | 'label' | x.json"),
        ([{"text": LONG, "label": 1}], {"label": "Lable"}, "(did you mean 'label'?). Name one of them with --label."),
        ([{"text": LONG, "label": 1}], {"group": "text,b"}, "'b' | --group"),
        ([{"text": LONG, "label": 1}], {"context": "b"}, "'b' | --context"),
        ([{"text": LONG, "label": 1}], {"grade": "b"}, "'b' | --grade"),
        ([{"text": LONG, "label": 1}], {"group": "text"}, "--group"),
        ([{"title": LONG, "n": 1}], {"clicks": "n"}, "'title' | 'n' | x.json | --impressions"),
        ([{"title": LONG, "n": 1}], {"impressions": "n"}, "Name it with --clicks."),
        ([{"title": LONG, "clicks": 1, "impressions": 1}], {}, "compete"),
        ([{"title": LONG, "likes": 1}], {"grade": "likes"}, "--group"),
        ([{"text": LONG, "label": 1, "c": 1}], {"label": "label", "clicks": "c"}, "--label | --clicks"),
        ([{"Is this really in New Orleans, I ask?": LONG, "27": "1"}], {}, "'Is this really in New Orleans, I ask?' | x.json"),
        ([{"good film": LONG, "1": "0"}], {}, "'1'"),
    ],
)  # fmt: skip
def test_columns_that_cannot_be_told_are_asked_for(rows, data, words):
    assert has_facts(error_of(rows, **data), *words.split(" | "))


def test_columns_numbered_by_pandas_are_names():
    rows = [{"0": f"{LONG} {i}", "1": i % 2} for i in range(9)]
    columns = infer_task(table(rows), DataConfig())[1]
    assert (columns.text, columns.label) == ("0", "1")


def test_a_test_file_is_read_for_its_training_task():
    row = {"text": LONG, "label": 1, "group": 1, "clicks": 1, "impressions": 2}
    assert columns_for(table([row]), DataConfig(), Task(name="single_label")).clicks is None
    assert columns_for(table([row]), DataConfig(), Task(name="click_ranking")).clicks == "clicks"
    words = "impressions"
    assert has_facts(error_of([{"text": LONG, "label": 1}], Task(name="ranking")), *words.split(" | "))


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([10, 9, 2], ("2", "9", "10")),
        (["10", "9", "-2"], ("-2", "9", "10")),
        ([3.0, 1.0], ("1", "3")),
        (["3.0", "3", "1.0"], ("1", "3")),
        ([True, False], ("false", "true")),
        (["b", " a ", "B"], ("B", "a", "b")),
        (["01", "1"], ("01", "1")),
        (["v1.5", "1.5"], ("1.5", "v1.5")),
        (["1", "other"], ("1", "other")),
        (["体育", "财经"], ("体育", "财经")),
    ],
)
def test_label_names_are_those_of_the_data_in_a_natural_order(labels, names):
    examples = read(texts(*labels))
    assert examples.task == Task(name="single_label", label_names=names)
    assert len(examples.items) == len(labels)


@given(st.lists(st.integers(-30, 30), min_size=1))
def test_integer_labels_come_back_in_any_guise(labels):
    for dress in (int, float, str, lambda n: f"{n}.0"):
        examples = read(texts(*map(dress, labels)))
        assert examples.task.label_names == tuple(map(str, sorted(set(labels))))
        assert labels_of(examples) == [(str(label),) for label in labels]


@pytest.mark.slow
@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1))
def test_names_are_kept_end_to_end(labels):
    labels = ["#" + label for label in labels]  # so that none is a number or blank
    assert labels_of(read(texts(*labels))) == [(label.strip(),) for label in labels]


@pytest.mark.parametrize(("label", "found"), [(0.5, "0.5"), ("1.5", "1.5"), ("-2e-3", "-2e-3")])
def test_numbers_that_are_no_classes_are_refused(label, found):
    assert has_facts(error_of(texts(1, label)), "classes")


def test_class_labels_give_their_names_and_order():
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": -1}, {"text": "c", "label": 0}]
    examples = read_examples(table(rows, label=("World", "Sports", "Unseen")), DataConfig())
    assert examples.task.label_names == ("World", "Sports", "Unseen")
    assert labels_of(examples) == [("Sports",), ("World",)]
    assert counted(examples.issues) == {"no-label": (1, (2,))}
    rows[1]["label"] = 3
    with pytest.raises(UserError, match=facts("0", "3", "row 2")):
        read_examples(table(rows, label=("World", "Sports", "Unseen")), DataConfig())


def test_labels_of_a_test_file_are_those_of_training():
    task = Task(name="single_label", label_names=("0", "1", "3"))
    assert labels_of(read(texts(3, "3", 3.0, "1.0"), task)) == [("3",), ("3",), ("3",), ("1",)]
    assert read(texts(3), task).task is task
    assert has_facts(error_of(texts(3, 1, 2), task), "0", "1", "'2'", "row 3", "x.json")
    assert has_facts(
        error_of(texts("sport"), Task(name="single_label", label_names=("Sports", "World"))),
        "'sport'",
        "'Sports'",
        "row 1",
    )


def test_several_labels_come_from_lists():
    examples = read(texts(["b", "a"], [], ["b", "b"], None, "c"))
    assert examples.task == Task(name="multi_label", label_names=("a", "b", "c"))
    assert labels_of(examples) == [("a", "b"), (), ("b",), ("c",)]
    assert counted(examples.issues) == {"no-label": (1, (4,))}
    assert has_facts(error_of(texts(["a", None])), "row 1")


def test_several_labels_come_from_one_cell():
    examples = read(texts("4, 27", "4", "", "10,"), label_delimiter=",")
    assert examples.task == Task(name="multi_label", label_names=("4", "10", "27"))
    assert labels_of(examples) == [("4", "27"), ("4",), ("10",)]
    assert counted(examples.issues) == {"no-label": (1, (3,))}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (texts({"a": 1}), "row 1 | x.json"),
        (texts(float("inf")), "row 1"),
        (
            [{"text": ["a"], "label": 1}],
            "row 1 | x.json",
        ),
        ([{"text": b"a", "label": 1}], "row 1"),
        ([{"text": "a", "label": 1, "sample_weight": -1}], "1.0 | row 1"),
        ([{"text": "a", "label": 1, "sample_weight": "x"}], "'x' | row 1"),
    ],
)
def test_cells_that_cannot_be_read_are_named(rows, words):
    assert has_facts(error_of(rows), *words.split(" | "))


def test_a_list_among_single_labels_is_refused():
    rows = [{"text": LONG, "label": 1}] * 200 + [{"text": LONG, "label": [1]}]
    assert has_facts(error_of(rows), "row 201")


# --- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [None, "", " \n\t", float("nan")])
def test_rows_without_text_or_label_are_skipped_and_counted(missing):
    rows = [
        {"text": missing, "label": "a"},
        {"text": LONG, "label": missing},
        {"text": LONG, "label": "a"},
        {"label": "a"},
    ]
    examples = read(rows)
    assert examples.items == [LabeledText(text=LONG, labels=(0,), row=3)]
    assert counted(examples.issues) == {"blank-text": (2, (1, 4)), "no-label": (1, (2,))}
    assert has_facts(error_of(rows[:2]), "x.json", "row 1", "row 2")


def test_numbers_are_texts_and_lost_characters_are_counted():
    examples = read(
        [{"text": 1984, "label": "a"}, {"text": "x\ufffd", "label": "NaN"}, {"text": "y\ufffd", "label": "a"}]
    )
    assert [item.text for item in examples.items] == ["1984", "y\ufffd"]
    assert counted(examples.issues) == {"no-label": (1, (2,)), "lost-character": (1, (3,))}


def test_context_and_weight_are_kept():
    rows = [{"text": "a", "label": 1, "brief": "b", "sample_weight": "2"}, {"text": "a", "label": 1, "brief": None}]
    first, second = read(rows, context="brief").items
    assert (first.context, first.weight) == ("b", 2.0)
    assert (second.context, second.weight) == (None, 1.0)


def test_messages_give_the_users_text_and_the_systems_context():
    def row(*messages):
        return {"messages": [{"role": role, "content": content} for role, content in messages], "label": 11}

    rows = [
        row(("user", "one")),
        row(("system", "be brief"), ("user", "two"), ("user", "more")),
        row(("user", [{"type": "text", "text": "three"}])),
        row(("user", " ")),
        {"messages": None, "label": 1},
    ]
    examples = read(rows)
    assert [(item.text, item.context) for item in examples.items] == [
        ("one", None), ("two\nmore", "be brief"), ("three", None),
    ]  # fmt: skip
    assert counted(examples.issues) == {"blank-text": (2, (4, 5))}
    words = "'assistant' | row 1"
    assert has_facts(error_of([row(("user", "a"), ("assistant", "b"))]), *words.split(" | "))
    assert has_facts(error_of([row(("user", [{"type": "image"}]))]), "row 1")
    assert has_facts(error_of([{"messages": ["hi"], "label": 1}]), "'hi'", "row 1")


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_a_pair_alone_is_a_group_of_two():
    examples = read([{"chosen": "<title>Good one</title>\n", "rejected": "bad <title>"}])
    assert examples.task == Task(name="ranking")
    assert examples.items == [
        RankGroup(
            group="row 1", texts=("Good one", "bad <title>"), rows=(1, 1), preferences=(Preference(winner=0, loser=1),)
        )
    ]


def test_pairs_of_one_prompt_compete_together():
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2},
        {"prompt": "q", "chosen": "a", "rejected": "b", "margin": None},
        {"prompt": "p", "chosen": "c", "rejected": "a", "margin": "0.5"},
        {"prompt": "p", "chosen": "b", "rejected": "a"},
    ]
    first, second = read(rows).items
    assert first == RankGroup(
        group="p", context="p", texts=("a", "b", "c"), rows=(1, 1, 3),
        preferences=(Preference(winner=0, loser=1, margin=2.0), Preference(winner=2, loser=0, margin=0.5),
                     Preference(winner=1, loser=0)),
    )  # fmt: skip
    assert (second.group, second.rows) == ("q", (2, 2))
    assert counted(read(rows).issues) == {"contradiction": (1, (4,))}


def test_pairs_of_a_group_column_compete_together():
    rows = [{"t": 1, "chosen": "a", "rejected": "b"}, {"t": 1, "chosen": "b", "rejected": "c"}]
    rows += [{"t": None, "chosen": "a", "rejected": "b"}]
    examples = read(rows, group="t")
    assert [(group.group, group.texts) for group in examples.items] == [("1", ("a", "b", "c"))]
    assert counted(examples.issues) == {"no-group": (1, (3,))}


def test_pairs_that_say_nothing_are_skipped_and_counted():
    rows = [
        {"chosen": "a", "rejected": None}, {"chosen": " ", "rejected": "b"},
        {"chosen": "a", "rejected": "<title>a</title>"}, {"chosen": "a", "rejected": "b"},
    ]  # fmt: skip
    examples = read(rows)
    assert len(examples.items) == 1
    assert counted(examples.issues) == {"null-pair": (2, (1, 2)), "same-pair": (1, (3,))}
    assert has_facts(error_of(rows[:1]), "x.json", "row 1")


def test_conversations_are_pairs_of_their_last_messages():
    def turns(*contents):
        return [{"role": "user", "content": c} for c in contents]

    row = {"chosen": turns("Write a title", "good"), "rejected": turns("Write a title", "bad")}
    [group] = read([row]).items
    assert (group.context, group.texts) == ("Write a title", ("good", "bad"))
    [group] = read([{"prompt": turns("Write"), "chosen": turns("good"), "rejected": turns("bad")}]).items
    assert (group.context, group.texts) == ("Write", ("good", "bad"))
    row["rejected"] = turns("Another", "bad")
    assert has_facts(error_of([row]), "row 1")


def test_margins_are_checked():
    row = {"chosen": "a", "rejected": "b", "margin": -1}
    assert has_facts(error_of([row]), "1.0", "row 1", "x.json")
    assert has_facts(error_of([row | {"margin": "big"}]), "'big'", "row 1")
    assert has_facts(error_of([row | {"margin": True}]), "row 1")


# --- grades -----------------------------------------------------------------------------------------------------------


def graded(*rows):
    return [{"group": group, "title": title, "grade": grade} for group, title, grade in rows]


def test_grades_make_groups():
    examples = read(graded((1, "a", 2), (2, "c", 0), (1, "b", "0.5"), (2, "d", 1)))
    assert examples.task == Task(name="ranking")
    assert examples.items == [
        RankGroup(group="1", texts=("a", "b"), rows=(1, 3), grades=(2.0, 0.5)),
        RankGroup(group="2", texts=("c", "d"), rows=(2, 4), grades=(0.0, 1.0)),
    ]


def test_grades_that_say_nothing_are_counted():
    examples = read(
        graded(
            (1, "a", 2), (1, "a", 2), (1, "a", 8), (1, "b", 0), (2, "x", 1), (3, "x", 1), (3, "y", 1), (4, "x", None),
            (None, "x", 1), (4, "", 1),
        )
    )  # fmt: skip
    assert [(group.texts, group.grades) for group in examples.items] == [(("a", "b"), (4.0, 0.0))]
    assert counted(examples.issues) == {
        "no-grade": (1, (8,)), "no-group": (1, (9,)), "blank-text": (1, (10,)), "repeated-title": (1, (2,)),
        "mixed-grades": (1, (3,)), "single-title": (1, (5,)), "equal-grades": (1, (6,)),
    }  # fmt: skip
    assert has_facts(error_of(graded((1, "a", "top"))), "'top'", "row 1")


def test_a_group_has_one_context():
    rows = [{"group": 1, "who": who, "title": who, "grade": 1} for who in "ab"]
    assert has_facts(error_of(rows, context="who"), "row 2", "x.json", "--group")


# --- clicks -----------------------------------------------------------------------------------------------------------

CLICKS = """test,image,headline,impressions,clicks
t1,i1,A,60,3
t1,i1,B,200,1
t1,i2,A,500,9
t1,i1,A,60,2
t1,,C,500,9
t1,i1,D,500,
t2,i1,Rare,99,1
"""


@pytest.fixture
def log(tmp_path):
    (tmp_path / "clicks.csv").write_text(CLICKS)
    return open_table(str(tmp_path / "clicks.csv"))


def test_a_click_log_makes_groups(log):
    examples = read(log, group="test,image")
    assert examples.task == Task(name="click_ranking")
    assert examples.items == [
        RankGroup(group="t1|i1", texts=("A", "B"), rows=(2, 3), clicks=(5, 1), impressions=(120, 200))
    ]
    assert counted(examples.issues) == {
        "no-group": (1, (6,)), "no-count": (1, (7,)), "repeated-title": (1, (5,)), "single-title": (1, (4,)),
        "few-impressions": (1, (8,)),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["t3,i,A,5,6", "t3,i,B,5,5"], "1 | row 9"),
        (
            ["t3,i,A,-5,-6", "t3,i,B,5,-1"],
            "2 | rows 9, 10",
        ),
        (["t3,i,A,5.5,1"], "1 | row 9"),
        (["t3,i,A,5,1.5"] * 7, "7 | rows 9, 10, 11, 12, 13"),
        (["t3,i,A,many,1"], "'many' | row 9"),
        (["t3,i,Caf\udce9,500,1"], "8 | 0xe9 | line 9"),
    ],
    ids=["more clicks", "negative", "broken clicks", "broken impressions", "no number", "another encoding"],
)
def test_impossible_rows_of_a_click_log_are_refused(tmp_path, lines, words):
    path = tmp_path / "clicks.csv"
    path.write_bytes((CLICKS + "\n".join(lines) + "\n").encode("utf-8", "surrogateescape"))
    assert has_facts(error_of(path, group="test"), *words.split(" | "))


def test_rows_of_a_click_log_that_tell_nothing_are_counted(tmp_path):
    lines = ["t3,i,Zero,500,0", "t3,i,Nil,500,0", "t4,i,Alone,500,3", "t1,i1,Caf\ufffd,500,3"]
    (tmp_path / "clicks.csv").write_text(CLICKS + "\n".join(lines) + "\n", encoding="utf-8")
    issues = counted(read(open_table(str(tmp_path / "clicks.csv")), group="test,image").issues)
    assert issues["zero-clicks"] == (1, (9,))
    assert issues["single-title"] == (2, (4, 11))
    assert issues["lost-character"] == (1, (12,))


def test_only_what_is_equal_in_the_compared_columns_competes(tmp_path):
    lines = ["t1,i2,E,500,2", "t1,i2,B,500,2", "t2,i1,A,500,1", "t2,i1,B,500,2", "t1,,A,9,1"]
    (tmp_path / "clicks.csv").write_text(CLICKS + "\n".join(lines) + "\n")
    examples = read(open_table(str(tmp_path / "clicks.csv")), group="test", compare_within="image")
    assert [(g.group, g.stratum, g.texts, g.rows) for g in examples.items] == [
        ("t1", "i1", ("A", "B"), (2, 3)), ("t1", "i2", ("A", "E", "B"), (4, 9, 10)), ("t2", "i1", ("A", "B"), (11, 12)),
    ]  # fmt: skip
    assert counted(examples.issues)["no-compare"] == (2, (6, 13))
    assert [(arms.group, arms.impressions) for arms in examples.arms] == [
        ("t1", (60, 200, 60)), ("t1", (500, 500, 500)), ("t2", (99, 500, 500)),
    ]  # fmt: skip
    several = read(open_table(str(tmp_path / "clicks.csv")), group="test", compare_within="image,impressions")
    assert [(g.stratum, g.texts) for g in several.items] == [("i2|500", ("A", "E", "B")), ("i1|500", ("A", "B"))]


def test_grades_are_compared_within_columns_too():
    rows = [{"group": 1, "at": at, "title": t, "grade": n} for at in (1, 2) for n, t in enumerate("ab")]
    assert [(g.group, g.stratum) for g in read(rows, compare_within="at").items] == [("1", "1"), ("1", "2")]
    words = "--compare-within"
    assert has_facts(error_of([{"at": 1, "chosen": "a", "rejected": "b"}], compare_within="at"), *words.split(" | "))
    assert has_facts(error_of(texts(1, 2), compare_within="label"), "--compare-within")
    assert has_facts(error_of(rows, compare_within="at,of"), "'of'", "--compare-within")


def weighed(*weights, pair=False):
    evidence = [{"chosen": f"a{i}", "rejected": "b"} if pair else {"title": f"{i}", "grade": i} for i in range(9)]
    return [{"g": 1, "w": w, **known} for w, known in zip(weights, evidence, strict=False)]


@pytest.mark.parametrize("pair", [False, True], ids=["grades", "pairs"])
def test_a_group_has_one_weight(pair):
    assert [g.weight for g in read(weighed(2, "2.0", pair=pair), group="g", weight="w").items] == [2]
    assert [g.weight for g in read(weighed(None, 1, pair=pair), group="g", weight="w").items] == [1]
    assert has_facts(error_of(weighed(2, 1, 2, 1, pair=pair), group="g", weight="w"), "rows 2, 4", "x.json")
    assert "rows 2, 3, 4, 5, 6, ... (6 in all)" in error_of(weighed(2, *[1] * 6, pair=pair), group="g", weight="w")
    assert has_facts(error_of(weighed(-1, pair=pair), group="g", weight="w"), "1.0", "row 1")


def test_labelled_texts_have_weights_by_any_name():
    rows = [{"text": LONG, "label": i % 2, "how_much": i, "sample_weight": 9} for i in range(4)]
    assert [item.weight for item in read(rows, weight="how_much").items] == [0, 1, 2, 3]
    assert has_facts(error_of(rows, weight="much"), "'much'", "--weight")
    rows = [{"text": f"{LONG} {i}", "kind": "ab"[i % 2], "w": 1} for i in range(9)]  # only one column is left to guess
    assert read(rows, weight="w").columns.label == "kind"


@pytest.mark.parametrize(
    ("dates", "date"), [((9, 10, 2), "10"), (("2014-02-03", "2014-11-03", "2014-03-01"), "2014-11-03")]
)
def test_the_date_of_a_group_is_its_latest(dates, date):
    rows = [{"group": 1, "day": day, "title": f"{i}", "grade": i} for i, day in enumerate(dates)]
    assert [g.date for g in read(rows, date="day").items] == [date]
    pairs = [{"prompt": "p", "day": day, "chosen": f"{day}", "rejected": "x"} for day in dates]
    assert [g.date for g in read(pairs, date="day").items] == [date]


def test_dates_that_do_not_sort_are_refused():
    rows = [{"group": 1, "day": day, "title": f"{i}", "grade": i} for i, day in enumerate((201401, None))]
    assert has_facts(error_of(rows, date="day"), "201446", "11", "03", "row 2", "x.json", "--date")
    rows[1]["day"] = "2014-01"
    assert has_facts(error_of(rows, date="day"), "row 2", "x.json", "row 1")
    assert has_facts(error_of(texts(1, 2), date="label"), "--date")


@pytest.mark.parametrize(
    ("known", "kinds"),
    [({"clicks": 5, "impressions": 200}, {"repeated-title": (2, (2, 4))}),
     ({"grade": 1}, {"repeated-title": (1, (2,)), "mixed-grades": (1, (4,))})],
    ids=["clicks", "grades"],
)  # fmt: skip
def test_titles_that_differ_in_space_around_them_are_one(known, kinds):
    rows = [{"group": 1, "title": t, **known} for t in ("a", " a", "b", "b\n")]
    rows[3] = {name: 2 * value if isinstance(value, int) else value for name, value in rows[3].items()} | {"group": 1}
    examples = read(rows, group="group")
    [group] = examples.items
    assert (group.texts, group.rows) == (("a", "b"), (1, 3))
    assert counted(examples.issues) == kinds


def test_sides_that_differ_in_space_around_them_are_one():
    rows = [{"prompt": "p", "chosen": c, "rejected": r} for c, r in (("a ", "b"), ("a", "\tb"), ("a", " a"))]
    examples = read(rows)
    [group] = examples.items
    assert (group.texts, group.rows, len(group.preferences)) == (("a", "b"), (1, 1), 2)
    assert counted(examples.issues) == {"same-pair": (1, (3,))}


def test_min_impressions_counts(log):
    assert "No example is left" in error_of(log, group="test,image", min_impressions=201)


def test_clicks_above_impressions_are_refused(tmp_path):
    (tmp_path / "clicks.csv").write_text(CLICKS + "t3,i1,A,5,6\nt4,i1,A,5,7\n")
    spec = str(tmp_path / "clicks.csv")
    assert has_facts(error_of(open_table(spec), group="test"), "2", "rows 9, 10")


def test_different_groups_have_different_ids():
    rows = [{"a": a, "b": b, "title": t, "grade": n} for a, b in (("x|", "y"), ("x", "|y")) for n, t in enumerate("cd")]
    assert len(read(rows, group="a,b").items) == 2


# --- formats ----------------------------------------------------------------------------------------------------------


def as_csv(rows):
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def as_parquet(rows):
    out = io.BytesIO()
    pl.DataFrame(rows).write_parquet(out)
    return out.getvalue()


@pytest.mark.parametrize(
    ("suffix", "written"),
    [(".csv", as_csv), (".json", lambda rows: json.dumps(rows).encode()), (".parquet", as_parquet)],
)
@pytest.mark.parametrize("labels", [[2, 10, None, 2], ["b", "a", None, "b"]], ids=["integers", "strings"])
def test_every_format_gives_the_same_examples(tmp_path, suffix, written, labels):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(written([{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]))
    examples = read(open_table(str(path)))
    assert examples.task.label_names == (("2", "10") if 2 in labels else ("a", "b"))
    assert [item.text for item in examples.items] == ["text 0", "text 1", "text 3"]
    assert counted(examples.issues) == {"no-label": (1, (4 if suffix == ".csv" else 3,))}


# --- without labels ---------------------------------------------------------------------------------------------------


def test_texts_stream_and_a_row_without_one_is_not_fatal():
    rows = [
        {"body": "one", "who": "w"},
        {"body": " ", "who": None},
        {"body": ["x"], "who": "w"},
        {"body": 5, "who": "w"},
    ]
    source = table(rows)
    columns = infer_text_column(source, DataConfig(context="who"))
    assert columns == Columns(text="body", context="who")
    assert columns.lines == ("text column: 'body'", "context column: 'who'")
    assert list(iter_texts(source, columns)) == [
        (1, rows[0], "one", "w"), (2, rows[1], None, None), (3, rows[2], None, None), (4, rows[3], "5", "w"),
    ]  # fmt: skip
    endless = Table("x", ("text",), {}, lambda: ((n, {"text": "t"}) for n in itertools.count(1)))
    assert next(iter_texts(endless, Columns(text="text"))) == (1, {"text": "t"}, "t", None)


def test_the_only_column_is_the_text():
    assert infer_text_column(table([{"Überschrift": "word"}]), DataConfig()) == Columns(text="Überschrift")
    with pytest.raises(UserError, match=facts("'titel'", "--text", "'title'")):
        infer_text_column(table([{"title": "word"}]), DataConfig(text="titel"))


def test_titles_without_evidence_make_groups():
    rows = [
        {"group": g, "title": t} for g, t in (("1", "a"), ("2", "b"), ("1", "c"), ("1", "a"), (None, "d"), ("2", ""))
    ]
    source = table(rows)
    groups, notes = read_unlabeled_groups(source, infer_text_column(source, DataConfig()))
    assert groups == [
        RankGroup(group="1", texts=("a", "c"), rows=(1, 3)), RankGroup(group="2", texts=("b",), rows=(2,)),
    ]  # fmt: skip
    assert [has_facts(note, f"(row {row})") for note, row in zip(notes, (5, 6, 4), strict=True)] == [True] * 3


def test_titles_without_a_group_compete_by_context_or_all_together():
    source = table([{"title": "a", "brief": "x"}, {"title": "b", "brief": "y"}])
    groups, _ = read_unlabeled_groups(source, Columns(text="title", context="brief"))
    assert [(group.group, group.context, group.texts) for group in groups] == [("x", "x", ("a",)), ("y", "y", ("b",))]
    groups, _ = read_unlabeled_groups(source, Columns(text="title"))
    assert [(group.group, group.texts) for group in groups] == [("", ("a", "b"))]
    with pytest.raises(UserError, match=facts("x.json")):
        read_unlabeled_groups(table([{"title": ""}]), Columns(text="title"))


# --- slices -----------------------------------------------------------------------------------------------------------


def test_a_report_is_sliced_by_the_columns_named_or_by_the_source():
    rows = [{"text": LONG, "label": "a", "source": "web", "year": 2024 + i, "site": None} for i in range(2)]
    named = read(rows, slice="year,site")
    assert [e.slices for e in named.items] == [(("year", str(2024 + i)), ("site", "none")) for i in range(2)]
    assert "slice columns: 'year', 'site'" in named.columns.lines
    found = read(rows)
    assert found.items[0].slices == (("source", "web"),)
    assert "slice column: 'source'" in found.columns.lines
    assert read(rows, label="source").items[0].slices == ()  # what is learnt is no slice
    assert read([{"text": LONG, "label": "a"}]).items[0].slices == ()


def test_a_slice_is_never_guessed_to_be_the_label():
    rows = [{"text": f"{LONG} {i}", "kind": "ab"[i % 2], "site": "xy"[i // 2 % 2]} for i in range(8)]
    assert "Name it with --label" in error_of(rows)
    found = read(rows, slice="site")
    assert (found.columns.label, found.columns.slice) == ("kind", ("site",))


def test_slices_that_are_not_there_or_of_rankers_are_refused():
    assert has_facts(error_of([{"text": LONG, "label": "a"}], slice="site"), "'site'", "--slice")
    ranked = [{"chosen": "x", "rejected": "y", "site": "z"}]
    assert has_facts(error_of(ranked, slice="site"), "--slice")
