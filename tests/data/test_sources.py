"""Tables from files, folders and hub snapshots: equal rows from every format, and errors that name their place."""

import csv
import gzip
import io
import json
import subprocess
import sys

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import facts, has_facts

from loracle.data.formats import delimited as delimited_format
from loracle.data.formats import json as json_format
from loracle.data.formats import parquet as parquet_format
from loracle.data.issues import Issue, IssueLog
from loracle.data.sources import fingerprint, open_splits, open_table
from loracle.errors import UserError

ROWS = [
    {"text": "Plain", "label": "a"},
    {"text": 'He said "no", twice', "label": "b"},
    {"text": "zwei\nZeilen", "label": "a"},
    {"text": "漢字\u2028und 🙂", "label": "b"},
]


def delimited(rows, delimiter=",", newline="\r\n"):
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, lineterminator=newline)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def parquet(rows, **options):
    out = io.BytesIO()
    pl.DataFrame(rows).write_parquet(out, **options)
    return out.getvalue()


def lines(rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


WRITTEN = {
    "comma.csv": delimited(ROWS),
    "semicolon.csv": delimited(ROWS, ";", "\n"),
    "tab.csv": delimited(ROWS, "\t"),
    "x.tsv": delimited(ROWS, "\t", "\n"),
    "array.json": json.dumps(ROWS, indent=1).encode(),
    "lines.json": lines(ROWS),
    "x.jsonl": lines(ROWS) + b"\n\n",
    "x.parquet": parquet(ROWS),
}


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["", "bom"])
@pytest.mark.parametrize("zipped", [False, True], ids=["", "gz"])
@pytest.mark.parametrize("name", WRITTEN)
def test_every_format_gives_the_same_rows(tmp_path, name, zipped, bom):
    content = (b"" if name == "x.parquet" else bom) + WRITTEN[name]
    spec = write(tmp_path, name + ".gz" * zipped, gzip.compress(content) if zipped else content)
    table = open_table(spec)
    assert table.name == spec
    assert table.columns == ("text", "label")
    assert [row for _, row in table.rows()] == ROWS
    assert list(table.rows()) == list(table.rows())


@pytest.mark.parametrize(
    ("name", "numbers"),
    [("comma.csv", [2, 3, 4, 6]), ("x.tsv", [2, 3, 4, 6]), ("array.json", [1, 2, 3, 4]), ("x.jsonl", [1, 2, 3, 4]),
     ("x.parquet", [1, 2, 3, 4])],
)  # fmt: skip
def test_row_numbers_are_lines_or_items(tmp_path, name, numbers):
    assert [number for number, _ in open_table(write(tmp_path, name, WRITTEN[name])).rows()] == numbers


def test_blank_lines_count_but_are_no_rows(tmp_path):
    assert list(open_table(write(tmp_path, "x.csv", "\na,b\n\n1,2\n\n3,4\n\n")).rows()) == [
        (4, {"a": "1", "b": "2"}),
        (6, {"a": "3", "b": "4"}),
    ]
    assert [n for n, _ in open_table(write(tmp_path, "x.jsonl", '\n{"a": 1}\n\n{"a": 2}\n')).rows()] == [2, 4]


def test_txt_keeps_blank_lines(tmp_path):
    table = open_table(write(tmp_path, "x.txt", "\ufeffone\r\n\n  two"))
    assert table.columns == ("text",)
    assert list(table.rows()) == [(1, {"text": "one"}), (2, {"text": ""}), (3, {"text": "  two"})]


def test_tsv_unquotes_only_whole_fields(tmp_path):
    raw = 'text\tlabel\n"Why?" she said\t1\n"unclosed\t2\n"a ""quoted"" field"\t3\n"a\ttab"\t4\n"a\nbreak"\t5\n'
    rows = list(open_table(write(tmp_path, "x.tsv", raw)).rows())
    texts = ['"Why?" she said', '"unclosed', 'a "quoted" field', "a\ttab", "a\nbreak"]
    assert [row["text"] for _, row in rows] == texts
    assert [row["label"] for _, row in rows] == ["1", "2", "3", "4", "5"]
    assert [number for number, _ in rows] == [2, 3, 4, 5, 6]


def test_json_columns_come_from_all_first_rows(tmp_path):
    table = open_table(write(tmp_path, "x.jsonl", '{"a": 1}\n{"b": null, "a": NaN}\n'))
    assert table.columns == ("a", "b")
    assert [set(row) for _, row in table.rows()] == [{"a"}, {"a", "b"}]


@pytest.mark.parametrize("layout", ["{}", "[{}]"], ids=["lines", "array"])
def test_half_surrogates_become_replacement_characters(tmp_path, layout):
    row = r'{"a\ud800": "x\ud83d", "b": [{"c": "\ude00"}], "d": "\ud83d\ude00"}'
    [(_, cells)] = open_table(write(tmp_path, "x.json", layout.replace("{}", row))).rows()
    assert cells == {"a\ufffd": "x\ufffd", "b": [{"c": "\ufffd"}], "d": "😀"}
    json.dumps(cells, ensure_ascii=False).encode()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.jsonl", "x.json", "x.txt", "x.parquet"])
def test_ten_megabyte_cell_is_read(tmp_path, name):
    rows = [{"text": "a " * 5_000_000}, {"text": "b"}]
    content = {
        "csv": delimited(rows), "tsv": delimited(rows, "\t"), "jsonl": lines(rows), "json": json.dumps(rows).encode(),
        "txt": "\n".join(row["text"] for row in rows).encode(), "parquet": parquet(rows),
    }[name.partition(".")[2]]  # fmt: skip
    assert [row for _, row in open_table(write(tmp_path, name, content)).rows()] == rows


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
TABLES = st.lists(st.fixed_dictionaries({"text": CELLS, "label": CELLS}), min_size=1, max_size=5)
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FEW
@given(rows=TABLES, delimiter=st.sampled_from(",;"))
def test_any_csv_round_trips(tmp_path, rows, delimiter):
    spec = write(tmp_path, "any.csv", delimited(rows, delimiter))
    assert [row for _, row in open_table(spec).rows()] == rows


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@FEW
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=3), JSON, max_size=3), min_size=1, max_size=4),
    ascii=st.booleans(), indent=st.sampled_from([None, 1]), chunk=st.integers(1, 40),
)  # fmt: skip
def test_any_json_array_round_trips_at_any_chunk_size(tmp_path, rows, ascii, indent, chunk):
    content = json.dumps(rows, ensure_ascii=ascii, indent=indent).encode("utf-8", "surrogatepass")
    spec = write(tmp_path, "any.json", content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_format, "CHUNK", chunk)
        assert [row for _, row in open_table(spec).rows()] == json.loads(content)


@FEW
@given(garbage=st.binary(max_size=60), name=st.sampled_from(sorted({*WRITTEN, "x.txt", "x.csv.gz", "x.parquet.gz"})))
def test_garbage_is_a_table_or_a_user_error(tmp_path, garbage, name):
    spec = write(tmp_path, "g." + name, garbage)
    try:
        result = list(open_table(spec).rows())
    except UserError as error:
        result = str(error)
    assert spec in result if isinstance(result, str) else result


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.csv", b"", "nothing"),
        ("x.csv", b"\xef\xbb\xbf\n \n", "nothing"),
        ("x.jsonl", b" \n", "nothing"),
        ("x.json", b"[]", "nothing"),
        ("x.txt", b"", "nothing"),
        ("x.parquet", b"", "nothing"),
        ("x.csv", b"a,b\n", "column"),
        ("x.tsv", b"a\tb\n\n", "column"),
        ("x.csv", b"a,b\n1,2\n\n1,2,3\n", "2 | 3 | row 4"),
        ("x.tsv", b"a\tb\n1\t2\n1\n", "2 | 1 | row 3"),
        ("x.csv", b"a,b\n1,\"x\ny\n", "quote | row 2 of {} | unexpected end of data"),
        ("x.csv", b'a,b\n1,2\n"x\\"y",2\n', "row 3 of {} | ',' expected after '\"' | Close every quote"),
        ("x.csv", b"a, a\n1,2\n", "'a' | twice"),
        ("x.csv", b"a,b\n1,2\n1,\xff\n", "0xff | line 3 | 8"),
        ("x.txt", b"a\nb\0c\n", "8 | 0x00 | line 2"),
        ("x.csv", "a,b\n1,2\n".encode("utf-16"), "8 | 0xff | line 1"),
        ("x.json", b'[{"a":\n "\xe9"}]', "8 | 0xe9 | line 2"),
        ("x.json", b'[{"a": "b"},\n"\xc3', "8 | 0xc3 | line 2"),
        ("x.jsonl", b'{"a": 1}\n{"a": }\n', "JSON | line 2 of {} | Expecting value"),
        ("x.jsonl", b'{"a": 1}\n[2]\n', 'JSON object | an array | row 2 of {} | {{"column": value}}'),
        ("x.json", b'[{"a": 1}, "x"]', "row 2"),
        ("x.json", b'{\n"a": 1}', "line 1"),
        ("x.json", b'"a"', "'\"'"),
        ("x.json", b'[{"a": 1},\n{"a": tru}]', "line 2"),
        ("x.json", b'[\n{"a": 1}\n{"a": 2}]', "line 3 | '{{' | ','"),
        ("x.json", b'[{"a": 1},\n{"a": "cut o', "line 2"),
        ("x.json", b'[{"a": 1}', "line 1 | ','"),
        ("x.json", b'[{"a": 1}]\n[', "line 2 | '['"),
        ("x.jsonl", b"{\"a\":" * 100_000, "line 1"),
        ("x.json", b'[{"a":' + b"[" * 100_000, "line 1"),
        ("x.parquet", b"PAR1 this is not it PAR1", "Parquet"),
        ("x.parquet", parquet([{"a": 1}])[:-9], "Parquet"),
        ("x.parquet", parquet({"a": []}), "column"),
        ("x.csv.gz", gzip.compress(b"a,b\n1,2\n", mtime=0)[:-9], "whole"),
        ("x.csv.gz", b"a,b\n1,2\n", "damaged"),
        ("x.parquet.gz", gzip.compress(b"nonsense", mtime=0), "Parquet"),
        ("x.xlsx", b"PK", ".csv | .tsv | .json | .jsonl | .parquet | .txt | .gz"),
        ("x.gz", gzip.compress(b"a", mtime=0), ".csv | .gz"),
    ],
)  # fmt: skip
def test_damage_is_reported_with_its_place(tmp_path, name, content, words):
    spec = write(tmp_path, name, content)
    with pytest.raises(UserError) as error:
        list(open_table(spec).rows())
    assert has_facts(str(error.value), spec, *words.format(spec).split(" | "))


def test_rows_before_damage_are_streamed(tmp_path):
    rows = open_table(write(tmp_path, "x.csv", b"a\n1\n2\n\xff\n")).rows()
    assert [next(rows), next(rows)] == [(2, {"a": "1"}), (3, {"a": "2"})]
    with pytest.raises(UserError, match="line 4"):
        next(rows)


def test_unclosed_quote_stops_at_the_cell_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(delimited_format, "MAX_CELL", 1000)
    spec = write(tmp_path, "x.csv", b'a\n1\n"2\n' + b"3\n" * 5000)
    with pytest.raises(UserError, match=facts("row 3", "field larger than field limit (1000)")):
        list(open_table(spec).rows())


def test_broken_array_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(json_format, "CHUNK", 64)
    read = []
    chunks = json_format._chunks
    monkeypatch.setattr(json_format, "_chunks", lambda file: (read.append(len(c)) or c for c in chunks(file)))
    with pytest.raises(UserError, match="line 2"):
        open_table(write(tmp_path, "x.json", '[{"a": 1},\n{"a": oops},\n' + '{"a": 1},\n' * 10_000))
    assert sum(read) < 1000


def test_missing_file_suggests_a_similar_name(tmp_path):
    write(tmp_path, "train.csv", "a\n1\n")
    with pytest.raises(UserError) as error:
        open_table(f"{tmp_path}/trian.csv")
    assert has_facts(str(error.value), "trian.csv", "did you mean 'train.csv'")
    with pytest.raises(UserError, match=facts("folder", f"{tmp_path}/no")):
        open_table(f"{tmp_path}/no/train.csv")


def test_hub_id_without_prefix_suggests_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fancyzhx").mkdir()
    with pytest.raises(UserError, match=facts("hf:fancyzhx/ag_news", "modelscope:fancyzhx/ag_news")):
        open_table("fancyzhx/ag_news")


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (["train.csv", "test.csv", "validation.csv"], ["train", "validation", "test"]),
        (["data/dev-0.csv", "data/training_1.csv", "data/eval.csv"], ["train", "validation", "test"]),
        (["train/0.csv", "test/latest.csv"], ["train", "test"]),
        (["latest.csv", "contest.csv"], ["train"]),
        (["train.csv", "test.csv", "categories.json", ".hidden/x.csv", "dataset_infos.json"], ["train", "test"]),
    ],
)
def test_splits_follow_file_and_folder_names(tmp_path, files, splits):
    for name in files:
        write(tmp_path, name, f"name\n{name}\n" if name.endswith("csv") else "{}")
    assert list(open_splits(str(tmp_path))) == splits


def test_shards_are_joined_with_running_row_numbers(tmp_path):
    for i in range(3):
        write(tmp_path, f"data/train-0000{i}-of-00003.csv", f"n\n{i}\n{i}\n")
    table = open_table(str(tmp_path))
    assert list(table.rows()) == [(i + 1, {"n": str(i // 2)}) for i in range(6)]
    write(tmp_path, "data/train-00003.csv", "m\n1\n")
    with pytest.raises(UserError, match=facts("train-00003.csv")):
        open_table(str(tmp_path))


def test_pattern_joins_its_files_by_name(tmp_path):
    for name in ("b.csv", "a.csv", "x/c.csv", "d.tsv", "[ab].csv"):
        write(tmp_path, name, f"n\n{name}\n")
    names = {spec: [row["n"] for _, row in open_table(f"{tmp_path}/{spec}").rows()] for spec in ("?.csv", "**/?.csv")}
    assert names == {"?.csv": ["a.csv", "b.csv"], "**/?.csv": ["a.csv", "b.csv", "x/c.csv"]}
    assert list(open_table(f"{tmp_path}/[ab].csv").rows()) == [(2, {"n": "[ab].csv"})]
    before = fingerprint(f"{tmp_path}/?.csv")
    write(tmp_path, "b.csv", "n\nother\n")
    assert before != fingerprint(f"{tmp_path}/?.csv") != fingerprint(f"{tmp_path}/a.csv")
    write(tmp_path, "b.csv", "m\n1\n")
    with pytest.raises(UserError, match=facts("b.csv")):
        open_table(f"{tmp_path}/?.csv")


def test_folder_with_several_splits_opens_train(tmp_path):
    write(tmp_path, "train.csv", "a\n1\n")
    write(tmp_path, "test.csv", "a\n2\n")
    assert list(open_table(str(tmp_path)).rows()) == [(2, {"a": "1"})]
    (tmp_path / "train.csv").rename(tmp_path / "dev.csv")
    with pytest.raises(UserError, match=facts("validation")):
        open_table(str(tmp_path))


def test_folder_without_data_is_an_error(tmp_path):
    write(tmp_path, "picture.png", b"")
    with pytest.raises(UserError, match=facts("folder")):
        open_splits(str(tmp_path))


README = """---
configs:
- config_name: small
  data_files:
  - split: train
    path: [a/part-*]
  - split: test
    path: "**/last.csv"
- config_name: large
  data_files: b/x.csv
{more}---
# A data set
"""


@pytest.fixture
def declared(tmp_path):
    for name in ("a/part-0.csv", "a/part-1.csv", "deep/er/last.csv", "b/x.csv"):
        write(tmp_path, name, f"name\n{name}\n")
    write(tmp_path, "README.md", README.format(more=""))
    return tmp_path


def names(table):
    return [row["name"] for _, row in table.rows()]


def test_readme_configs_define_splits(declared, monkeypatch):
    import loracle.hubs

    calls = []
    monkeypatch.setattr(
        loracle.hubs,
        "download",
        lambda spec, *, repo_type, revision: calls.append((spec, repo_type, revision)) or declared,
    )
    splits = open_splits("hf:owner/name#small", revision="v1")
    assert calls == [("hf:owner/name", "dataset", "v1")]
    assert {split: names(table) for split, table in splits.items()} == {
        "train": ["a/part-0.csv", "a/part-1.csv"],
        "test": ["deep/er/last.csv"],
    }
    assert splits["train"].name == "hf:owner/name#small (train)"
    assert names(open_table("modelscope:owner/name#large")) == ["b/x.csv"]
    for spec, problem in (("hf:owner/name", "several configs"), ("hf:owner/name#huge", "'huge'")):
        with pytest.raises(UserError, match=facts(spec, problem, "small, large", "hf:owner/name#NAME")):
            open_splits(spec)


def test_default_config_needs_no_name(declared):
    write(declared, "README.md", README.format(more="  default: true\n"))
    assert names(open_table(str(declared))) == ["b/x.csv"]


@pytest.mark.parametrize("pattern", ["../secret.csv", "/etc/passwd", "https://example.org/x.csv"])
def test_readme_cannot_name_files_outside_its_folder(tmp_path, pattern):
    write(tmp_path, "secret.csv", "a\n1\n")
    write(tmp_path, "set/README.md", f"---\nconfigs:\n- config_name: default\n  data_files: {pattern}\n---\n")
    with pytest.raises(UserError, match=facts("inside", pattern)):
        open_splits(str(tmp_path / "set"))


@pytest.mark.parametrize("readme", ["---\nconfigs: [\n---\n", "---\njust words\n---\n"])
def test_readme_with_broken_yaml_is_an_error(tmp_path, readme):
    write(tmp_path, "x.csv", "a\n1\n")
    write(tmp_path, "README.md", readme)
    with pytest.raises(UserError, match=facts("README.md")):
        open_splits(str(tmp_path))


def test_readme_without_yaml_is_ignored(tmp_path):
    write(tmp_path, "x.csv", "a\n1\n")
    write(tmp_path, "README.md", "# Only words\n")
    assert list(open_splits(str(tmp_path))) == ["train"]


CLASS = {"names": ["World", "Sports"], "_type": "ClassLabel"}


@pytest.mark.parametrize("feature", [CLASS, [CLASS], {"feature": CLASS, "_type": "List"}])
def test_class_labels_come_from_parquet(tmp_path, feature):
    info = {"info": {"features": {"text": {"dtype": "string", "_type": "Value"}, "label": feature}}}
    spec = write(
        tmp_path, "x.parquet", parquet([{"text": "a", "label": 1}], metadata={"huggingface": json.dumps(info)})
    )
    assert open_table(spec).label_names == {"label": ("World", "Sports")}


@pytest.mark.parametrize("metadata", ["nonsense", "[]", '{"info": {}}', '{"info": {"features": {"label": {}}}}'])
def test_other_parquet_metadata_is_ignored(tmp_path, metadata):
    spec = write(tmp_path, "x.parquet", parquet([{"label": 1}], metadata={"huggingface": metadata}))
    assert open_table(spec).label_names == {}


def test_class_labels_come_from_the_readme(tmp_path):
    write(tmp_path, "train.csv", "text,label\na,1\n")
    write(
        tmp_path,
        "README.md",
        "---\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n  - name: label\n    dtype:\n"
        "      class_label:\n        names:\n          '0': World\n          '1': Sports\n---\n",
    )
    assert open_table(str(tmp_path)).label_names == {"label": ("World", "Sports")}


def test_parquet_is_read_in_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_format, "BATCH", 3)
    rows = [{"n": i} for i in range(10)]
    assert list(open_table(write(tmp_path, "x.parquet", parquet(rows))).rows()) == list(enumerate(rows, 1))


MEASURE = """
import sys, tracemalloc
from loracle.data.sources import open_table
table = open_table(sys.argv[1])
tracemalloc.start()
count = sum(1 for _ in table.rows())
print(count, tracemalloc.get_traced_memory()[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x.csv", "x.tsv.gz", "x.jsonl", "x.json"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    rows = [{"text": "word " * 40, "label": "a"}] * 20_000
    content = {
        "x.csv": delimited(rows), "x.tsv.gz": gzip.compress(delimited(rows, "\t"), 1), "x.jsonl": lines(rows),
        "x.json": json.dumps(rows).encode(),
    }[name]  # fmt: skip
    spec = write(tmp_path, name, content)
    done = subprocess.run([sys.executable, "-c", MEASURE, spec], capture_output=True, text=True, check=True)
    count, peak = map(int, done.stdout.split())
    assert count == 20_000
    assert peak < 1_500_000, "the file holds 4 MB and more"


def test_importing_sources_imports_neither_torch_nor_polars():
    code = "import sys, loracle.data.reader; print({'torch', 'polars', 'huggingface_hub'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_issue_names_its_first_rows():
    log = IssueLog({"blank": "rows without a text, skipped"})
    for row in (9, 3, 12, 7, 8, 4):
        log.add("blank", row)
    assert log.issues() == (Issue("blank", "rows without a text, skipped: 6", 6, (3, 4, 7, 8, 9)),)
    assert str(log.issues()[0]) == "rows without a text, skipped: 6 (rows 3, 4, 7, 8, 9, ...)"
    assert str(Issue("blank", "skipped: 1", 1, (4,))) == "skipped: 1 (row 4)"
