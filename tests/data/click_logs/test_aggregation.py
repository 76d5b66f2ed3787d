"""A log of single impressions: the same groups as from its sums, in every format, in memory that its length leaves alone."""

from __future__ import annotations

import datetime
import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import polars as pl
import pytest
from small import has_facts, write

from loracle.config import DataConfig
from loracle.data.columns import Columns
from loracle.data.sources import open_table
from loracle.errors import UserError
from loracle.examples import RankGroup
from loracle.tasks.dataset import Examples, infer_task, read_examples

Rows = list[dict[str, Any]]


def events(n: int = 400) -> Rows:
    """Titles of two tests, each with two images, in a random order; texts that every format has to quote."""
    draw = random.Random(0)
    titles = ['A "quoted", one', "zwei\tWörter", "漢字 🙂", "Line\nbreak"]
    return [
        {"test": f"t{draw.randrange(2)}", "image": draw.randrange(2), "title": draw.choice(titles), "who": i,
         "clicked": int(draw.random() < 0.3)}
        for i in range(n)
    ]  # fmt: skip


def summed(rows: Rows, first: int = 1) -> list[RankGroup]:
    """What the log should give, by plain counting."""
    groups: dict[tuple[str, str], dict[str, list[int]]] = {}
    for number, row in enumerate(rows, first):
        counts = groups.setdefault((row["test"], str(row["image"])), {}).setdefault(row["title"], [number, 0, 0])
        counts[1] += row["clicked"]
        counts[2] += 1
    return [
        RankGroup(
            group=test, stratum=image, texts=tuple(titles), rows=tuple(c[0] for c in titles.values()),
            clicks=tuple(c[1] for c in titles.values()), impressions=tuple(c[2] for c in titles.values()),
        )
        for (test, image), titles in groups.items()
    ]  # fmt: skip


def read(path: Path, **data: Any) -> Examples:
    flags = {"group": "test", "text": "title", "clicked": "clicked", "min_impressions": 0} | data
    return read_examples(open_table(str(path)), DataConfig(**flags))


def log(path: Path, *rows: str, header: str = "test,title,clicked") -> Path:
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def counted(examples: Examples) -> dict[str, tuple[int, tuple[int, ...]]]:
    return {issue.kind: (issue.count, issue.rows) for issue in examples.issues}


def error_of(path: Path, **data: Any) -> str:
    with pytest.raises(UserError) as error:
        read(path, **data)
    return str(error.value)


def without_rows(groups: list[RankGroup]) -> list[dict[str, Any]]:
    return [{name: getattr(g, name) for name in ("group", "stratum", "texts", "clicks", "impressions")} for g in groups]


class TestFormats:
    @pytest.mark.parametrize("zipped", [False, True], ids=["", "gz"])
    @pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
    def test_every_format_gives_the_same_groups(self, tmp_path: Path, suffix: str, zipped: bool) -> None:
        rows, path = events(), tmp_path / f"log{suffix}"
        if suffix == ".parquet":
            pl.DataFrame(rows).write_parquet(path, row_group_size=64)
        else:
            write(path, rows)
        if zipped:
            content, path = path.read_bytes(), tmp_path / f"log{suffix}.gz"
            path.write_bytes(gzip.compress(content))
        found = read(path, compare_within="image")
        first = 2 if suffix in (".csv", ".tsv") else 1
        assert without_rows(found.items) == without_rows(summed(rows))
        assert found.issues == ()
        if suffix not in (".csv", ".tsv"):  # whose line breaks in cells make the lines run ahead
            assert found.items == summed(rows, first)

    @pytest.mark.slow
    def test_rows_are_lines_of_a_plain_csv(self, tmp_path: Path) -> None:
        rows = [row | {"title": row["title"].replace("\n", " ")} for row in events()]
        assert read(write(tmp_path / "log.csv", rows), compare_within="image").items == summed(rows, 2)

    def test_files_of_a_folder_are_one_log(self, tmp_path: Path) -> None:
        rows = events()
        for i, part in enumerate((rows[:150], rows[150:])):
            pl.DataFrame(part).write_parquet(tmp_path / f"part-{i}.parquet")
        assert read(tmp_path, compare_within="image").items == summed(rows)

    def test_numbers_and_missing_keys_of_json(self, tmp_path: Path) -> None:
        path = tmp_path / "log.jsonl"
        items: Rows = [
            {"test": 1, "title": t, "clicked": c, "more": {"x": [t]}} for t in "ab" for c in (True, False, True)
        ]
        items += [{"test": 1, "title": "a"}, {"title": "a", "clicked": 1}, {"test": 1, "clicked": 1}]
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
        found = read(path)
        [group] = found.items
        assert (group.group, group.texts, group.clicks, group.impressions) == ("1", ("a", "b"), (2, 2), (3, 3))
        assert counted(found) == {"blank-text": (1, (9,)), "no-group": (1, (8,)), "no-clicked": (1, (7,))}

    def test_chat_messages_go_through_our_own_reader(self, tmp_path: Path) -> None:
        path = tmp_path / "log.jsonl"
        items = [
            {"test": "t", "messages": [{"role": "user", "content": title}], "clicked": i % 3 == 0}
            for i, title in enumerate("aabbab")
        ]
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
        [group] = read(path, text=None).items
        assert (group.texts, group.rows, group.clicks, group.impressions) == (("a", "b"), (1, 3), (1, 1), (3, 3))


class TestWhatIsSaid:
    def test_the_users_columns_may_be_called_like_ours(self, tmp_path: Path) -> None:
        path = log(tmp_path / "x.csv", "t,a,1", "t,b,0", header="impressions,clicks,clicked")
        [group] = read(path, group="impressions", text="clicks").items
        assert (group.group, group.texts, group.clicks, group.impressions) == ("t", ("a", "b"), (1, 0), (1, 1))

    def test_a_column_called_clicked_is_enough(self, tmp_path: Path) -> None:
        found = read_examples(
            open_table(str(log(tmp_path / "x.csv", "t,a,1", "t,b,0", header="group,title,clicked"))),
            DataConfig(min_impressions=0),
        )
        assert found.columns == Columns(text="title", group=("group",), clicked="clicked")
        assert found.columns.lines == (
            "task: ranking from clicks", "text column: 'title'", "group column: 'group'", "clicked column: 'clicked'",
            "one impression a row: summed to clicks and impressions of each title",
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("header", "row"),
        [("group,text,clicked,label", "t,some text,{},x"), ("id,text,clicked", "t,some text,{}"),
         ("group,text,clicked,clicks,impressions", "t,some text,{},2,3"), ("group,title,clicked,grade", "t,some text,{},2")],
        ids=["a label", "no group", "sums", "a grade"],
    )  # fmt: skip
    def test_it_is_not_where_something_else_could_be_meant(self, tmp_path: Path, header: str, row: str) -> None:
        path = log(tmp_path / "x.csv", *(row.format(i % 2) for i in range(4)), header=header)
        assert infer_task(open_table(str(path)), DataConfig())[1].clicked is None

    def test_clicks_beside_clicked_are_refused(self, tmp_path: Path) -> None:
        path = log(tmp_path / "x.csv", "t,a,1,3", header="test,title,clicked,clicks")
        assert has_facts(error_of(path, clicks="clicks"), "--clicked", "--clicks", "--impressions")
        assert has_facts(error_of(path, label="title"), "--label")


class TestOddRows:
    def test_what_is_missing_is_skipped_and_counted(self, tmp_path: Path) -> None:
        path = log(
            tmp_path / "x.csv", "t,i,a,1", "t,i, ,1", "t,i,,0", ",i,a,1", "t,,a,1", "t,i,a,", "t,i,a,nan", "t,i,b,false",
            "t,i,b,TRUE", "t,i,a,0.0", *[",i,a,1"] * 6, header="test,image,title,clicked",
        )  # fmt: skip
        found = read(path, compare_within="image")
        [group] = found.items
        assert (group.texts, group.clicks, group.impressions) == (("a", "b"), (1, 1), (2, 2))
        assert counted(found) == {
            "blank-text": (2, (3, 4)), "no-group": (7, (5, 12, 13, 14, 15)), "no-compare": (1, (6,)),
            "no-clicked": (2, (7, 8)),
        }  # fmt: skip

    @pytest.mark.parametrize("odd", ["2", "-1", "0.5", "yes"])
    def test_clicks_that_are_none_are_counted_and_refused(self, tmp_path: Path, odd: str) -> None:
        path = log(tmp_path / "x.csv", "t,a,1", *[f"t,a,{odd}"] * 7)
        assert has_facts(error_of(path), "0", "1", "rows 3, 4, 5, 6, 7")

    def test_titles_that_differ_in_space_around_them_are_one(self, tmp_path: Path) -> None:
        found = read(log(tmp_path / "x.csv", "t, a,1", "t,b,0", "t,a ,0", "t,\u3000a,1"))
        assert [(g.texts, g.rows, g.clicks, g.impressions) for g in found.items] == [
            (("a", "b"), (2, 3), (2, 0), (3, 1))
        ]
        assert found.issues == ()

    def test_weights_are_those_of_groups(self, tmp_path: Path) -> None:
        header = "test,title,clicked,w"
        path = log(tmp_path / "x.csv", "t,a,1,2", "t,b,0, 2.0", "u,a,1,", "u,b,0,1", header=header)
        assert [g.weight for g in read(path, weight="w").items] == [2, 1]
        path = log(tmp_path / "x.csv", "t,a,1,2", "t,b,0,2", "t,b,0,3", header=header)
        assert "row 3" in error_of(path, weight="w")
        path = log(tmp_path / "x.csv", "t,a,1,2", "t,b,0,3", header=header)
        assert has_facts(error_of(path, weight="w"), "row 3")
        path = log(tmp_path / "x.csv", "t,a,1,x", "t,b,0,-1", header=header)
        assert has_facts(error_of(path, weight="w"), "0", "rows 2, 3")

    @pytest.mark.parametrize(
        ("dates", "latest"),
        [(("9", "10", "8"), "10"), (("9.5", "10.25", "10"), "10.25"),
         (("2014-11-03", "2014-11-12", " 2014-11-04"), "2014-11-12"), (("2014-W05", "2014-W40", "2014-W06"), "2014-W40"),
         (("2014-01-01T23:00-05:00", "2014-01-02T10:00+09:00"), "2014-01-02T04:00:00+00:00"),
         (("2014-01-01T23:00", "2014-01-01 23:30"), "2014-01-01T23:30:00")],
    )  # fmt: skip
    def test_the_date_of_a_group_is_its_latest(self, tmp_path: Path, dates: tuple[str, ...], latest: str) -> None:
        rows = [f"t,{title},1,{date}" for title in "ab" for date in dates]
        found = read(log(tmp_path / "x.csv", *rows, header="test,title,clicked,day"), date="day")
        assert [g.date for g in found.items] == [latest]

    @pytest.mark.parametrize(
        ("days", "latest"),
        [([datetime.date(2014, 11, d) for d in (3, 12)], "2014-11-12"), ([9, 10], "10"),
         ([datetime.datetime(2014, 11, d, 10, tzinfo=ZoneInfo("Asia/Tokyo")) for d in (3, 12)],
          "2014-11-12T01:00:00+00:00")],
        ids=["dates", "numbers", "times"],
    )  # fmt: skip
    def test_dates_of_parquet(self, tmp_path: Path, days: list[Any], latest: str) -> None:
        frame = pl.DataFrame({"test": "t", "title": ["a", "a", "b", "b"], "clicked": 1, "day": days * 2})
        frame.write_parquet(tmp_path / "x.parquet")
        assert [g.date for g in read(tmp_path / "x.parquet", date="day").items] == [latest]

    def test_dates_have_one_form_in_the_rows_that_are_used(self, tmp_path: Path) -> None:
        header, odd = "test,title,clicked,day", "t,,1,2014-11"
        path = log(tmp_path / "x.csv", odd, "t,a,1,2014-W05", "t,b,0,2014-W06", odd, header=header)
        assert [g.date for g in read(path, date="day").items] == ["2014-W06"]
        path = log(
            tmp_path / "x.csv",
            odd,
            "t,a,1,2014-W05",
            "t,b,0,2014-W06",
            "t,a,1,2014-12-01",
            "u,c,1,2014-Q1",
            header=header,
        )
        assert has_facts(error_of(path, date="day"), "row 5", "row 3")

    @pytest.mark.parametrize("odd", ["", "3/11/2014", "2014-99-99"])
    def test_dates_that_are_none_are_refused(self, tmp_path: Path, odd: str) -> None:
        path = log(tmp_path / "x.csv", "t,a,1,201446", f"t,b,1,{odd}", header="test,title,clicked,day")
        assert has_facts(said := error_of(path, date="day"), "201446", "11", "03")
        assert "row 3" in said

    def test_damage_is_named_as_elsewhere(self, tmp_path: Path) -> None:
        path = tmp_path / "x.csv"
        path.write_bytes(b"test,title,clicked\nt,fine,1\nt,caf\xe9,1\n")
        assert has_facts(error_of(path), "8", "0xe9", "line 3")
        path.write_bytes(b"test,title,clicked\nt,a,1\nt,b,1,2\n")
        assert has_facts(error_of(path), "4", "row 3")
        path = tmp_path / "x.jsonl"
        path.write_text('{"test": "t", "title": "a", "clicked": 1}\n{"test": \n')
        assert has_facts(error_of(path), "JSON", f"line 2 of {path}")

    def test_what_polars_would_let_pass(self, tmp_path: Path) -> None:
        path = log(tmp_path / "x.csv", "t,a,1", "t,b,0", *["t,a,1"] * 300, "t,a\0,1")
        assert has_facts(error_of(path), "8", "0x00", "line 304")
        path = tmp_path / "x.jsonl"
        path.write_text(
            "".join(f'{{"test": 1, "title": "{t}", "clicked": 1}}\n' for t in ("a\\ud800", "b", "a\\ud800"))
        )
        found = read(path)
        assert [(g.texts, g.clicks) for g in found.items] == [(("a\ufffd", "b"), (2, 1))]
        assert counted(found) == {"lost-character": (1, (1,))}

    def test_lost_characters_are_counted(self, tmp_path: Path) -> None:
        path = log(tmp_path / "x.csv", "t,caf\ufffd,1", "t,b,0", "t,caf\ufffd,1")
        assert counted(read(path)) == {"lost-character": (1, (2,))}


PEAK = """
import re, sys
from loracle.config import DataConfig
from loracle.tasks.dataset import read_examples
from loracle.data.sources import open_table
data = DataConfig(group="test", text="title", clicked="clicked", min_impressions=0)
found = read_examples(open_table(sys.argv[1]), data)
status = open("/proc/self/status").read()  # ru_maxrss would count what pytest held when it forked
print(sum(sum(g.impressions) for g in found.items), int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says how much memory was held at most")
@pytest.mark.parametrize(("suffix", "few", "many"), [(".csv", 2_000_000, 5_000_000), (".parquet", 500_000, 2_500_000)])
def test_memory_does_not_grow_with_the_log(tmp_path: Path, suffix: str, few: int, many: int) -> None:
    """Once the reader's buffers are full, millions of rows more of the same 300 titles cost nothing."""
    env = {**os.environ, "POLARS_MAX_THREADS": "1"}  # each has buffers of its own
    peaks, sizes = {}, {}
    for rows in (few, many):
        number = pl.int_range(rows, eager=True)
        frame = pl.DataFrame({"number": number, "test": number % 30, "clicked": (number % 7 == 0).cast(pl.Int8)})
        title = pl.format("The {}th title, which is long enough to weigh something in memory", (number * 7919) % 300)
        frame = frame.with_columns(title.alias("title"))
        sizes[rows] = frame.estimated_size("mb")
        path = tmp_path / f"{rows}{suffix}"
        frame.write_csv(path) if suffix == ".csv" else frame.write_parquet(path, row_group_size=100_000)
        del frame
        done = subprocess.run(
            [sys.executable, "-c", PEAK, path], capture_output=True, text=True, timeout=120, check=True, env=env
        )
        impressions, peaks[rows] = map(int, done.stdout.split())
        assert impressions == rows
        path.unlink()
    assert peaks[many] - peaks[few] < (sizes[many] - sizes[few]) / 4, (peaks, sizes)
