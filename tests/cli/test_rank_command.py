"""Rankings from the command line: arguments, files and standard input."""

from __future__ import annotations

import json
import re

import pytest
from cli_runner import CLICKS, loracle, rows_of, trained
from click.testing import CliRunner
from small import clicked, graded, has_facts, pairs, prompted, write

from loracle.cli import main


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "flags"), [(pairs, []), (prompted, []), (graded, ["--group", "query"]), (clicked, CLICKS)]
)
def test_ranker_trains_on_each_kind_of_data(tiny_model, tmp_path, rows, flags):
    run, _, metrics = trained(tmp_path, tiny_model("qwen2"), rows(), *flags, name="data.jsonl")
    assert metrics["test"]["pair_accuracy"]["value"] > 0.9
    assert set(metrics["baselines"]) == {"length", "tfidf", "linear-probe", "zero-shot"}
    lines = loracle("rank", run, "bad title 3", "good title 3").stdout.splitlines()
    (best,) = (line for line in lines if line.startswith("  1"))
    assert best.endswith("good title 3")
    header = loracle("evaluate", run, tmp_path / "data.jsonl").stdout.splitlines()[1]
    assert header.split()[0] == "pair_accuracy"


@pytest.mark.slow
def test_rank_reads_file_of_groups(tiny_model, tmp_path):
    run, *_ = trained(tmp_path, tiny_model("qwen2"), clicked(), *CLICKS, name="data.jsonl")
    titles = [{"site": "x", "day": d, "headline": f"{w} headline 1"} for d in "12" for w in ("bad", "good")]
    write(tmp_path / "new.csv", titles)
    loracle("rank", run, tmp_path / "new.csv", "-o", tmp_path / "ranked.csv")
    ranked = rows_of(tmp_path / "ranked.csv")
    assert [r["text"] for r in ranked] == ["good headline 1", "bad headline 1"] * 2
    assert [r["rank"] for r in ranked] == ["1", "2"] * 2
    assert len({r["group"] for r in ranked}) == 2


@pytest.mark.slow
def test_click_ranker_prints_lift_and_chances(tiny_model, tmp_path):
    run, output, metrics = trained(tmp_path, tiny_model("qwen2"), clicked(40), *CLICKS, name="data.jsonl")
    assert re.search(r"loss: list, saturation [\d,.e+]+", output)
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


@pytest.mark.slow
def test_pair_ranker_has_no_lift(tiny_model, tmp_path):
    run, *_ = trained(tmp_path, tiny_model("qwen2"), pairs(), "--epochs", "1", name="data.jsonl")
    assert not (run / "calibration.json").exists()
    loracle("rank", run, "a", "b", "-o", tmp_path / "ranked.csv")
    assert rows_of(tmp_path / "ranked.csv")[0].keys() == {"group", "rank", "score", "text"}


@pytest.mark.slow
def test_titles_that_cannot_be_ranked(tiny_model, tmp_path):
    run, *_ = trained(tmp_path, tiny_model("qwen2"), pairs(), "--epochs", "1", name="data.jsonl")
    for given, words in (
        (b"\n \n", "standard"),
        (b"good\n\xff\xfe bad\n", "UTF-8 | Line 2"),
    ):
        done = CliRunner().invoke(main, ["rank", str(run), "-"], input=given)
        assert (done.exit_code, has_facts(done.stderr, *words.split(" | "))) == (2, True), done.stderr
    assert has_facts(loracle("rank", run, "grups.csv", code=2).stderr, "grups.csv")
    assert loracle("rank", run, "Why data.csv").stdout
    marked = CliRunner().invoke(main, ["rank", str(run), "-"], input="\ufefftitle one\ntitle two\n".encode())
    assert "\ufeff" not in marked.stdout


@pytest.mark.slow
def test_many_titles_are_ranked_without_chances(tiny_model, tmp_path):
    run, *_ = trained(tmp_path, tiny_model("qwen2"), clicked(40), *CLICKS, "--epochs", "1", name="data.jsonl")
    (tmp_path / "many.txt").write_text("".join(f"title {i}\n" for i in range(120)), encoding="utf-8")
    loracle("rank", run, tmp_path / "many.txt", "-o", tmp_path / "ranked.jsonl")
    first = json.loads((tmp_path / "ranked.jsonl").read_text().splitlines()[0])
    assert first["beats"] is None
    assert first["lift_low"] <= first["lift"] <= first["lift_high"]


@pytest.mark.slow
def test_rank_finds_inferred_context_again(tiny_model, tmp_path):
    run, *_ = trained(tmp_path, tiny_model("qwen2"), prompted(), "--epochs", "1", name="data.jsonl")
    titles = ("good title 1", "bad title 1")
    new = [{"prompt": p, "title": t} for p in ("article 1", "article 2") for t in titles]
    loracle("rank", run, write(tmp_path / "new.jsonl", new), "-o", tmp_path / "ranked.csv")
    from_file = {(r["group"], r["text"]): float(r["score"]) for r in rows_of(tmp_path / "ranked.csv")}
    for prompt in ("article 1", "article 2"):
        for line in loracle("rank", run, *titles, "--context", prompt).stdout.splitlines():
            _, score, title = line.split(maxsplit=2)
            assert from_file[prompt, title] == pytest.approx(float(score), abs=2e-3)


@pytest.mark.slow
def test_long_and_repeated_titles(tiny_model, tmp_path):
    run, *_ = trained(tmp_path, tiny_model("qwen2"), pairs(), "--epochs", "1", name="data.jsonl")
    assert "x" * 300 in loracle("rank", run, "x" * 300).stdout
    assert "1 repeated titles are ranked once" in loracle("rank", run, "a", "b", "a").stderr
