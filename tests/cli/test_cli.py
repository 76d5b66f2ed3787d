"""The command line as a user meets it: every job end to end on a tiny model, and every error in one line."""

from __future__ import annotations

import csv
import gzip
import json
import re
import subprocess
import sys
import time

import polars
import pytest
from click.testing import CliRunner
from small import clicked, graded, has_facts, integers, labelled, messages, pairs, prompted, several, write

from loracle.cli import main
from loracle.runs.folder import read_info

FAST = ["--epochs", "8", "--batch", "8", "--lr", "0.01", "--test-share", "0.2", "--validation-share", "0.2"]
CLICKS = ["--group", "site,day", "--text", "headline", "--clicks", "clicks", "--impressions", "impressions"]


def loracle(*args, code=0):
    done = CliRunner().invoke(main, [str(a) for a in args], catch_exceptions=True)
    assert done.exit_code == code, (done.output, done.stderr, done.exception)
    return done


def trained(folder, model, rows, *more, name="data.csv"):
    data = write(folder / name, rows)
    done = loracle("train", data, "--model", model, "-o", folder / "run", *FAST, *more)
    return folder / "run", done.output, json.loads((folder / "run" / "metrics.json").read_text())


def rows_of(path):
    with path.open(encoding="utf-8") as f:
        return list(csv.DictReader(f))


# --- jobs -------------------------------------------------------------------------------------------------------------


def test_a_classifier_from_train_to_evaluate(tiny_model, tmp_path):
    run, said, metrics = trained(tmp_path, tiny_model("qwen2"), labelled())
    assert "text column: 'text'" in said
    assert "label column: 'label'" in said
    assert set(metrics["baselines"]) == {"majority", "tfidf", "linear-probe", "zero-shot"}
    assert re.search(r"note: frozen features are those after layer [123], chosen on validation texts", said)
    assert metrics["test"]["accuracy"]["value"] > 0.9
    assert metrics["train"]["examples_per_s"] > 0
    assert metrics["train"]["tokens_per_s"] > metrics["train"]["examples_per_s"]

    new = write(tmp_path / "new.csv", [{"id": "a", "text": "good number 7"}, {"id": "b", "text": " "}])
    done = loracle("predict", run, new, "-o", tmp_path / "scored.csv")
    assert "1 rows without a text" in done.stderr
    first, second = rows_of(tmp_path / "scored.csv")
    assert first.keys() == {"id", "text", "predicted", "p(mid)", "p(neg)", "p(pos)"}
    assert (first["id"], first["predicted"]) == ("a", "pos")
    assert sum(float(first[f"p({n})"]) for n in ("mid", "neg", "pos")) == pytest.approx(1, abs=1e-5)
    assert (second["id"], second["predicted"]) == ("b", "")

    done = loracle("evaluate", run, tmp_path / "data.csv", "--json")
    assert json.loads(done.stdout)["accuracy"]["value"] > 0.9
    assert "ece_uncalibrated" in json.loads(done.stdout)


def test_unsure_rows_get_no_label_and_are_counted(tiny_model, tmp_path):
    run, *_ = trained(tmp_path, tiny_model("qwen2"), labelled(), "--no-baselines")
    new = write(tmp_path / "new.csv", [{"text": "good number 7"}, {"text": " "}, {"text": "bad so"}])
    loracle("predict", run, new, "-o", tmp_path / "all.csv")
    scored = rows_of(tmp_path / "all.csv")
    sure, unread, unsure = (max(float(row[f"p({n})"] or 0) for n in ("mid", "neg", "pos")) for row in scored)
    assert unread == 0 < unsure < sure, "nothing to choose between: the test would be vacuous"
    done = loracle("predict", run, new, "-o", tmp_path / "some.csv", "--abstain-below", (sure + unsure) / 2)
    assert "1 rows without a text" in done.stderr
    assert "1 rows of which the model is less sure than" in done.stderr
    assert rows_of(tmp_path / "some.csv") == [scored[0], scored[1], scored[2] | {"predicted": ""}]


def test_calibration_asks_validation_texts_only(tiny_model, tmp_path):
    """Another test side, labelled otherwise: the same calibration. The metrics differ, so it was another one."""
    found = []
    for name, shift in (("right", 0), ("wrong", 1)):
        (folder := tmp_path / name).mkdir()
        rows = [row | {"label": list("abc")[(i + shift) % 3]} for i, row in enumerate(labelled(30))]
        test = write(folder / "test.csv", [row | {"text": f"{row['text']} again"} for row in rows])
        data = [row | {"label": list("abc")[i % 3]} for i, row in enumerate(labelled())]
        run, _, metrics = trained(folder, tiny_model("qwen2"), data, "--no-baselines", "--test", test)
        found.append(((run / "calibration.json").read_text(), metrics["test"]["accuracy"]["value"]))
    (first, accuracy), (second, other) = found
    assert first == second
    assert accuracy > 0.9 > 0.1 > other


def test_a_wanted_precision_is_of_several_labels(tiny_model, tmp_path):
    data = write(tmp_path / "single.csv", labelled())
    done = loracle("train", data, "--model", tiny_model("qwen2"), "--target-precision", "0.9", code=2)
    assert "several labels a text for --target-precision" in done.stderr


def test_the_original_message_format_in_a_json_file(tiny_model, tmp_path):
    rows = messages()
    (tmp_path / "train.json").write_text("".join(json.dumps(r) + "\n" for r in rows[:48]))
    (tmp_path / "test.json").write_text("".join(json.dumps(r) + "\n" for r in rows[48:]))
    loracle("train", tmp_path / "train.json", "--test", tmp_path / "test.json", "--model", tiny_model("llama"),
            "-o", tmp_path / "run", *FAST)  # fmt: skip
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["test"]["accuracy"]["value"] > 0.9
    assert len(rows_of(tmp_path / "run" / "predictions.csv")) == 12


def test_integer_labels_come_back_as_they_were(tiny_model, tmp_path):
    run, *_ = trained(tmp_path, tiny_model("qwen2"), integers())
    write(tmp_path / "new.jsonl", [{"text": "bad number 3"}])
    loracle("predict", run, tmp_path / "new.jsonl", "-o", tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text())["predicted"] == "10"


def test_chinese_texts_and_labels_come_back(tiny_model, tmp_path):
    names = {"体育": "球队赢了比赛", "财经": "股市今天上涨"}
    rows = [{"text": f"{list(names.values())[i % 2]}{i}", "label": list(names)[i % 2]} for i in range(60)]
    run, *_ = trained(tmp_path, tiny_model("qwen3"), rows)
    write(tmp_path / "new.csv", [{"text": "股市今天上涨99"}, {"text": "球队赢了比赛99"}])
    loracle("predict", run, tmp_path / "new.csv", "-o", tmp_path / "out.csv")
    assert [r["predicted"] for r in rows_of(tmp_path / "out.csv")] == ["财经", "体育"]


def test_several_labels_a_text(tiny_model, tmp_path):
    run, said, metrics = trained(tmp_path, tiny_model("qwen2"), several(), name="data.jsonl")
    assert "any number of labels a text" in said
    assert metrics["test"]["accuracy"] == metrics["test"]["subset_accuracy"]
    write(tmp_path / "new.csv", [{"text": "good and cheap 8"}])
    loracle("predict", run, tmp_path / "new.csv", "-o", tmp_path / "out.csv")
    (row,) = rows_of(tmp_path / "out.csv")
    assert set(row["predicted"].split("|")) <= {"price", "quality", ""}
    assert 0 < float(row["p(price)"]) < 1


@pytest.mark.parametrize(
    ("rows", "flags"), [(pairs, []), (prompted, []), (graded, ["--group", "query"]), (clicked, CLICKS)]
)
def test_a_ranker_from_every_kind_of_evidence(tiny_model, tmp_path, rows, flags):
    run, _, metrics = trained(tmp_path, tiny_model("qwen2"), rows(), *flags, name="data.jsonl")
    assert metrics["test"]["pair_accuracy"]["value"] > 0.9
    assert set(metrics["baselines"]) == {"length", "tfidf", "linear-probe", "zero-shot"}
    lines = loracle("rank", run, "bad title 3", "good title 3").stdout.splitlines()
    (best,) = (line for line in lines if line.startswith("  1"))
    assert best.endswith("good title 3")
    header = loracle("evaluate", run, tmp_path / "data.jsonl").stdout.splitlines()[1]
    assert header.split()[0] == "pair_accuracy"


def test_rank_takes_a_file_of_groups(tiny_model, tmp_path):
    run, *_ = trained(tmp_path, tiny_model("qwen2"), clicked(), *CLICKS, name="data.jsonl")
    titles = [{"site": "x", "day": d, "headline": f"{w} headline 1"} for d in "12" for w in ("bad", "good")]
    write(tmp_path / "new.csv", titles)
    loracle("rank", run, tmp_path / "new.csv", "-o", tmp_path / "ranked.csv")
    ranked = rows_of(tmp_path / "ranked.csv")
    assert [r["text"] for r in ranked] == ["good headline 1", "bad headline 1"] * 2
    assert [r["rank"] for r in ranked] == ["1", "2"] * 2
    assert len({r["group"] for r in ranked}) == 2


def test_a_ranker_of_clicks_says_what_its_scores_mean(tiny_model, tmp_path):
    run, said, metrics = trained(tmp_path, tiny_model("qwen2"), clicked(40), *CLICKS, name="data.jsonl")
    assert re.search(r"loss: list, saturation [\d,.e+]+", said)
    assert metrics["calibration"]["slope"] > 0
    titles = ("bad headline 1", "so headline 1", "good headline 1")
    (tmp_path / "titles.txt").write_text("\n".join((*titles, "")), encoding="utf-8")
    from_stdin = CliRunner().invoke(main, ["rank", str(run), "-"], input="\n".join(titles) + "\n\n")
    assert from_stdin.stdout == loracle("rank", run, *titles).stdout
    header, first, *_ = from_stdin.stdout.splitlines()
    assert header.split() == ["score", "lift", "95", "%", "beats", "1", "beats", "2", "beats", "3", "title"]
    assert first.endswith("good headline 1")

    loracle("rank", run, tmp_path / "titles.txt", "-o", tmp_path / "ranked.jsonl", "--explain")
    ranked = [json.loads(line) for line in (tmp_path / "ranked.jsonl").read_text().splitlines()]
    assert [r["text"] for r in ranked] == [titles[2], titles[1], titles[0]]
    assert ranked[0]["lift_low"] < ranked[0]["lift"] < ranked[0]["lift_high"]
    assert sum(r["lift"] for r in ranked) == pytest.approx(0, abs=1e-3)
    assert ranked[0]["beats"][0] == 0.5 < ranked[0]["beats"][1] <= ranked[0]["beats"][2]
    assert ranked[0]["beats"][2] + ranked[2]["beats"][0] == pytest.approx(1, abs=2e-4)
    words = dict(ranked[0]["words"])
    assert max(words, key=words.get) == "good"


def test_a_ranker_of_pairs_has_no_lift_to_promise(tiny_model, tmp_path):
    run, *_ = trained(tmp_path, tiny_model("qwen2"), pairs(), "--epochs", "1", name="data.jsonl")
    assert not (run / "calibration.json").exists()
    loracle("rank", run, "a", "b", "-o", tmp_path / "ranked.csv")
    assert rows_of(tmp_path / "ranked.csv")[0].keys() == {"group", "rank", "score", "text"}


def test_a_cut_model_with_adapters_on_top_reloads_and_its_cache_is_listed(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("LORACLE_CACHE", str(tmp_path / "cache"))
    flags = ["--depth", "2", "--adapt-top", "1", "--pooling", "mean"]
    run, said, metrics = trained(tmp_path, tiny_model("qwen2"), clicked(), *CLICKS, *flags, name="data.jsonl")
    assert "states of the lower 1 layers" in said
    assert metrics["test"]["pair_accuracy"]["value"] > 0.8
    assert set(metrics["baselines"]) == {"length", "tfidf", "linear-probe", "zero-shot"}
    listed = loracle("cache").stdout
    assert "lower 1 layers" in listed
    assert "MB freed" in loracle("cache", "--clear").stdout
    assert "lower" not in loracle("cache").stdout
    assert loracle("rank", run, "bad headline 1", "good headline 1").stdout


@pytest.mark.parametrize("rows", [labelled, clicked])
def test_a_depth_found_by_evidence_is_kept_by_the_run(tiny_model, tmp_path, rows):
    data = write(tmp_path / "data.jsonl", rows(60))
    flags = ["--model", tiny_model("qwen2"), *(CLICKS if rows is clicked else [])]
    probed = json.loads(loracle("probe", data, *flags, "--json", "--plot", tmp_path / "depth.svg").stdout)
    assert [d["layers"] for d in probed["depths"]] == [1, 2, 3]
    assert all(d["low"] <= d["value"] <= d["high"] for d in probed["depths"])
    assert "<svg" in (tmp_path / "depth.svg").read_text()
    said = loracle("probe", data, *flags).stdout
    assert f"depth {probed['auto']} of 3: a linear probe reaches" in said
    run = tmp_path / "run"
    said = loracle("train", data, *flags, "--depth", "auto", "--epochs", "1", "--no-baselines", "-o", run).stdout
    assert f"depth {probed['auto']} of 3" in said
    assert read_info(run).config.model.depth == probed["auto"]
    words = loracle("train", data, *flags, "--depth", "half", "-o", tmp_path / "no", code=2).stderr
    assert has_facts(words, "--depth", "'half'")


def test_what_cannot_be_ranked_is_said_in_a_line(tiny_model, tmp_path):
    run, *_ = trained(tmp_path, tiny_model("qwen2"), pairs(), "--epochs", "1", name="data.jsonl")
    for given, words in (
        (b"\n \n", "standard"),
        (b"good\n\xff\xfe bad\n", "8 | line 2"),
    ):
        done = CliRunner().invoke(main, ["rank", str(run), "-"], input=given)
        assert (done.exit_code, has_facts(done.stderr, *words.split(" | "))) == (2, True), done.stderr
    assert has_facts(loracle("rank", run, "grups.csv", code=2).stderr, "grups.csv")
    assert loracle("rank", run, "Why data.csv").stdout
    marked = CliRunner().invoke(main, ["rank", str(run), "-"], input="\ufefftitle one\ntitle two\n".encode())
    assert "\ufeff" not in marked.stdout


def test_many_titles_are_ranked_without_every_comparison(tiny_model, tmp_path):
    run, *_ = trained(tmp_path, tiny_model("qwen2"), clicked(40), *CLICKS, "--epochs", "1", name="data.jsonl")
    (tmp_path / "many.txt").write_text("".join(f"title {i}\n" for i in range(120)), encoding="utf-8")
    loracle("rank", run, tmp_path / "many.txt", "-o", tmp_path / "ranked.jsonl")
    first = json.loads((tmp_path / "ranked.jsonl").read_text().splitlines()[0])
    assert first["beats"] is None
    assert first["lift_low"] <= first["lift"] <= first["lift_high"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--full", "--adapt-top", "1"], "--full | --adapt-top"),
        (["--loss", "margin", "--saturation", "9"], "--saturation"),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(tmp_path, flags, words):
    assert has_facts(loracle("train", write(tmp_path / "a.jsonl", pairs()), *flags, code=2).stderr, *words.split(" | "))


def test_a_context_that_training_inferred_is_looked_for_again(tiny_model, tmp_path):
    run, *_ = trained(tmp_path, tiny_model("qwen2"), prompted(), "--epochs", "1", name="data.jsonl")
    titles = ("good title 1", "bad title 1")
    new = [{"prompt": p, "title": t} for p in ("article 1", "article 2") for t in titles]
    loracle("rank", run, write(tmp_path / "new.jsonl", new), "-o", tmp_path / "ranked.csv")
    from_file = {(r["group"], r["text"]): float(r["score"]) for r in rows_of(tmp_path / "ranked.csv")}
    for prompt in ("article 1", "article 2"):
        for line in loracle("rank", run, *titles, "--context", prompt).stdout.splitlines():
            _, score, title = line.split(maxsplit=2)
            assert from_file[prompt, title] == pytest.approx(float(score), abs=2e-3)


def test_a_reader_that_leaves_early_is_no_error(tiny_model, tmp_path):
    run, *_ = trained(tmp_path, tiny_model("qwen2"), labelled(), "--epochs", "1")
    new = write(tmp_path / "new.csv", [{"text": f"good number {i} {'x' * 80}"} for i in range(3000)])
    command = f"{sys.executable} -m loracle.cli predict {run} {new} | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("text,predicted,")
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_the_original_recipe_is_a_matter_of_flags(tiny_model, tmp_path):
    flags = ["--pooling", "mean", "--head", "mlp", "--loss", "margin", "--targets", "q_proj,v_proj", "--epochs", "1"]
    run, *_ = trained(tmp_path, tiny_model("qwen2"), pairs(), *flags, name="data.jsonl")
    adapted = json.loads((run / "adapter_config.json").read_text())["target_modules"]
    assert "q_proj" in adapted
    assert "k_proj" not in adapted


@pytest.mark.parametrize("how", ["--full", "--no-full"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_encoders_go_the_same_way(tiny_model, tmp_path, kind, how):
    run, said, _ = trained(tmp_path, tiny_model(kind), labelled(), how, "--epochs", "1")
    assert "float32 on" in said
    assert ("padded, sorted by length" in said) == (kind == "distilbert")
    assert loracle("evaluate", run, tmp_path / "data.csv").exit_code == 0


def test_a_predicted_column_of_the_users_own_is_kept(tiny_model, tmp_path):
    run, *_ = trained(tmp_path, tiny_model("qwen2"), labelled(), "--epochs", "1")
    write(tmp_path / "new.csv", [{"text": "good number 1", "label": "mine", "predicted": "theirs"}])
    loracle("predict", run, tmp_path / "new.csv", "-o", tmp_path / "out.csv")
    (row,) = rows_of(tmp_path / "out.csv")
    assert (row["label"], row["predicted"]) == ("mine", "theirs")
    assert row["predicted_2"] in ("pos", "neg", "mid")


def test_memory_of_predict_does_not_grow_with_the_rows(tiny_model, tmp_path):
    run, *_ = trained(tmp_path, tiny_model("qwen2"), labelled(), "--epochs", "1")
    peaks = []
    for count in (4_000, 24_000):  # more than one window each
        write(tmp_path / f"{count}.csv", [{"text": f"good number {i} {'x' * 50}"} for i in range(count)])
        script = (
            "import resource, sys; from loracle.cli import main\n"
            f"main(['predict', {str(run)!r}, {str(tmp_path / f'{count}.csv')!r}, '-o', {str(tmp_path / 'out.csv')!r}],"
            " standalone_mode=False)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
        peaks.append(int(done.stdout.split()[-1]) / 1024)
        assert (tmp_path / "out.csv").read_text().count("\n") == count + 1
    assert peaks[1] - peaks[0] < 40  # MiB; 20,000 more rows held whole would be more


def test_check_says_what_is_there(tmp_path):
    rows = [*labelled(30), *labelled(3), {"text": "", "label": "pos"}]
    done = loracle("check", write(tmp_path / "data.csv", rows))
    assert "one label a text" in done.stdout
    assert "rows without a text" in done.stdout
    assert "rows that repeat an earlier text: 3 (rows 32, 33, 34)" in done.stdout


# --- errors -----------------------------------------------------------------------------------------------------------


def refused(*args):
    done = loracle(*args, code=2)
    assert done.stdout == "" or "Traceback" not in done.stdout
    (line,) = [x for x in done.stderr.splitlines() if x]
    assert line.startswith("loracle: expected ")
    return line


def _text(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


BAD_FILES = {
    "empty.csv": (b"", "empty"),
    "header.csv": (b"text,label\n", "header"),
    "one.csv": (b"text,label\na,x\nb,x\nc,x\n", "class"),
    "ragged.csv": (b"text,label\na,x\nb,y,z\n", "row 3"),
    "bytes.csv": (b"text,label\na,x\n\xff\xfe,y\n", "line 3"),
    "broken.jsonl": (b'{"text": "a", "label": "x"}\n{"text": \n', "line 2"),
    "garbage.parquet": (b"PAR1 this is no parquet", "Parquet"),
    "cut.csv.gz": (gzip.compress(b"text,label\n" + b"a,x\n" * 5000)[:60], "gzip"),
    "clicks.csv": (b"g,title,clicks,impressions\n1,a,500,200\n1,b,5,200\n", "row"),
    "nolabel.csv": (b"text,label\na,\nb,\n", "label"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_get_one_clear_line_and_leave_nothing(tiny_model, tmp_path, name):
    content, words = BAD_FILES[name]
    data = _text(tmp_path / name, content)
    flags = ["--group", "g"] if name == "clicks.csv" else []
    assert (
        words.lower() in refused("train", data, "--model", tiny_model("qwen2"), "-o", tmp_path / "run", *flags).lower()
    )
    assert not (tmp_path / "run").exists()


def test_other_wrong_words_get_one_clear_line(tiny_model, tmp_path):
    data, model = write(tmp_path / "data.csv", labelled()), tiny_model("qwen2")
    assert "did you mean" in refused("train", data, "--text", "txt").lower()
    assert "missing.csv" in refused("train", tmp_path / "missing.csv")
    assert "no-such" in refused("train", data, "--model", tmp_path / "no-such", "-o", tmp_path / "run")
    assert "targets" in refused("train", data, "--model", model, "--targets", "nothing", "-o", tmp_path / "run")
    assert "loss" in refused("train", data, "--model", model, "--loss", "margin", "-o", tmp_path / "run")
    assert "--resume" in refused("train", data, "--resume", tmp_path)
    assert "run.toml" in refused("train", "--resume", tmp_path)
    assert "run folder" in refused("predict", tmp_path / "nowhere", data)
    (tmp_path / "full").mkdir()
    _text(tmp_path / "full" / "x", "x")
    assert "--out" in refused("train", data, "--model", model, "-o", tmp_path / "full")
    assert not (tmp_path / "run").exists()


BAD_NUMBERS = [
    ("--r", 0), ("--alpha", 0), ("--dropout", 1), ("--seed", -1), ("--lr", -1), ("--lr", 0), ("--epochs", "nan"),
    ("--epochs", "inf"), ("--max-steps", 0), ("--warmup", 2), ("--clip", 0), ("--patience", -1),
    ("--template", "{text} of {context}"), ("--template", "{context} {context} {text}"), ("--template", "no text"),
]  # fmt: skip


@pytest.mark.parametrize(("flag", "value"), BAD_NUMBERS)
def test_values_out_of_range_get_one_clear_line(tmp_path, flag, value):
    data = write(tmp_path / "data.csv", labelled())
    assert flag in refused("train", data, flag, value, "-o", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_places_that_cannot_be_written_to_get_one_clear_line(tiny_model, tmp_path):
    run, *_ = trained(tmp_path, tiny_model("qwen2"), labelled(), "--epochs", "1")
    (tmp_path / "folder.csv").mkdir()
    done = loracle("predict", run, tmp_path / "data.csv", "-o", tmp_path / "folder.csv", code=2)
    assert "folder.csv, a folder" in done.stderr.splitlines()[-1]
    data, inside = tmp_path / "data.csv", tmp_path / "data.csv" / "run"
    assert "--out" in refused("train", data, "--model", tiny_model("qwen2"), "-o", inside)


def test_a_very_long_title_is_a_title(tiny_model, tmp_path):
    run, *_ = trained(tmp_path, tiny_model("qwen2"), pairs(), "--epochs", "1", name="data.jsonl")
    assert "x" * 300 in loracle("rank", run, "x" * 300).stdout
    assert "1 repeated titles are ranked once" in loracle("rank", run, "a", "b", "a").stderr


def test_sums_and_single_impressions_take_turns(tmp_path):
    """A ranker trained on one kind of click log is measured on the other, and flags win over what is remembered."""
    from types import SimpleNamespace

    from loracle.cli import _remembered
    from loracle.config import RunConfig
    from loracle.data.sources import open_table

    def remembered(info, columns, **given):
        table = open_table(str(write(tmp_path / "log.csv", [dict.fromkeys(columns.split(), 1)])))
        found = _remembered(info, table, given)
        return {
            name for name in ("clicked", "clicks", "impressions", "compare", "weight", "date") if getattr(found, name)
        }

    def trained(columns):
        config = RunConfig.from_flat({"group": "test", "compare": "image", "weight": "w", "date": "day"})
        return SimpleNamespace(config=config, provenance={"columns": columns})

    one, sums = trained({"clicked": "clicked"}), trained({"clicks": "clicks", "impressions": "shown"})
    assert remembered(one, "test image clicked w day") == {"clicked", "compare"}
    assert remembered(one, "test clicks shown") == set()
    assert remembered(one, "test clicked clicks shown", clicks="clicks") == {"clicks"}
    assert remembered(sums, "test image,too clicks shown") == {"clicks", "impressions"}
    assert remembered(sums, "test image clicks shown clicked", clicked="clicked") == {"clicked", "compare"}


def test_short_names_and_long_delimiters_are_remembered(tiny_model, tmp_path):
    rows = [{"t": r["text"], "y": ", ".join(r["labels"]) or "none"} for r in several()]
    run, *_ = trained(tmp_path, tiny_model("qwen2"), rows, "--text", "t", "--label", "y", "--label-delimiter", ", ",
                      "--epochs", "1")  # fmt: skip
    metrics = json.loads(loracle("evaluate", run, tmp_path / "data.csv", "--json").stdout)
    assert 0 <= metrics["accuracy"]["value"] <= 1
    assert metrics["base"] == str(tiny_model("qwen2").resolve())
    write(tmp_path / "new.csv", [{"text": "good and cheap"}])
    assert "predicted" in loracle("predict", run, tmp_path / "new.csv").stdout


def test_no_network_is_said_in_one_line(tmp_path):
    data = write(tmp_path / "data.csv", labelled())
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-m", "loracle", "train", str(data), "--model", "nobody/nothing"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("loracle: expected ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_null_in_a_pair_is_skipped_and_counted(tiny_model, tmp_path):
    rows = [*pairs(), {"chosen": None, "rejected": "bad"}]
    _, said, metrics = trained(tmp_path, tiny_model("qwen2"), rows, "--epochs", "1", name="data.jsonl")
    assert "41" in "".join(line for line in said.splitlines() if line.startswith("note:"))
    assert sum(metrics["noticed"].values()) >= 1


# --- waiting ----------------------------------------------------------------------------------------------------------


def test_help_is_quick_and_shows_the_defaults_of_config():
    times = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "loracle", "--help"], capture_output=True, text=True, timeout=60)
        times.append(time.perf_counter() - started)
        assert done.returncode == 0
    assert min(times) < 0.5
    for command in ("train", "predict", "rank", "evaluate", "check", "simulate", "cache", "demo"):
        assert command in done.stdout
    from loracle.config import TrainConfig

    assert f"[{TrainConfig().batch}]" in loracle("train", "--help").output


def test_check_does_not_wait_for_torch(tmp_path):
    data = write(tmp_path / "data.csv", labelled())
    script = f"import sys; from loracle.cli import main; main(['check', {str(data)!r}], standalone_mode=False)\n"
    script += "print(*sorted({'torch', 'transformers', 'peft'} & set(sys.modules)), 'end')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1].split() == ["end"], done.stderr


def test_every_format_trains_the_same(tmp_path):
    rows = labelled(30)
    write(tmp_path / "a.csv", rows)
    write(tmp_path / "b.tsv", rows)
    write(tmp_path / "c.json", rows)
    write(tmp_path / "d.jsonl", rows)
    polars.DataFrame(rows).write_parquet(tmp_path / "e.parquet")
    (tmp_path / "f.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    outputs = {loracle("check", path).stdout for path in sorted(tmp_path.iterdir())}
    assert len(outputs) == 1
