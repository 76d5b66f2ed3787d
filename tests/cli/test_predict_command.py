"""Predictions from the command line: columns, abstaining, memory, places to write to."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from cli_runner import error_of, loracle, rows_of, trained
from small import has_facts, labelled, write

from loracle.training import progress


@pytest.mark.slow
def test_abstain_below_leaves_labels_out_and_counts(tiny_model, tmp_path):
    run, *_ = trained(tmp_path, tiny_model("qwen2"), labelled(), "--no-baselines")
    new = write(tmp_path / "new.csv", [{"text": "good number 7"}, {"text": " "}, {"text": "bad so"}])
    loracle("predict", run, new, "-o", tmp_path / "all.csv")
    scored = rows_of(tmp_path / "all.csv")
    sure, unread, unsure = (max(float(row[f"p({n})"] or 0) for n in ("mid", "neg", "pos")) for row in scored)
    assert unread == 0 < unsure < sure, "nothing to choose between: the test would be vacuous"
    done = loracle("predict", run, new, "-o", tmp_path / "some.csv", "--abstain-below", (sure + unsure) / 2)
    assert "1 rows without a text" in done.stderr
    assert re.search(r"1 rows .* below 0\.\d+", done.stderr)
    assert rows_of(tmp_path / "some.csv") == [scored[0], scored[1], scored[2] | {"predicted": ""}]


@pytest.mark.slow
def test_closed_pipe_is_no_error(tiny_model, tmp_path):
    run, *_ = trained(tmp_path, tiny_model("qwen2"), labelled(), "--epochs", "1")
    new = write(tmp_path / "new.csv", [{"text": f"good number {i} {'x' * 80}"} for i in range(3000)])
    command = f"{sys.executable} -m loracle predict {run} {new} | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("text,predicted,")
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


@pytest.mark.slow
def test_predict_keeps_existing_predicted_column(tiny_model, tmp_path):
    run, *_ = trained(tmp_path, tiny_model("qwen2"), labelled(), "--epochs", "1")
    write(tmp_path / "new.csv", [{"text": "good number 1", "label": "mine", "predicted": "theirs"}])
    loracle("predict", run, tmp_path / "new.csv", "-o", tmp_path / "out.csv")
    (row,) = rows_of(tmp_path / "out.csv")
    assert (row["label"], row["predicted"]) == ("mine", "theirs")
    assert row["predicted_2"] in ("pos", "neg", "mid")


@pytest.mark.slow
def test_predict_memory_is_constant_in_rows(tiny_model, tmp_path):
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


@pytest.mark.slow
def test_unwritable_output_is_an_error(tiny_model, tmp_path):
    run, *_ = trained(tmp_path, tiny_model("qwen2"), labelled(), "--epochs", "1")
    (tmp_path / "folder.csv").mkdir()
    done = loracle("predict", run, tmp_path / "data.csv", "-o", tmp_path / "folder.csv", code=2)
    assert has_facts(done.stderr, "folder.csv", "folder")
    data, inside = tmp_path / "data.csv", tmp_path / "data.csv" / "run"
    assert "--out" in error_of("train", data, "--model", tiny_model("qwen2"), "-o", inside)


@pytest.mark.slow
def test_quiet_predict_shows_no_progress(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    run, *_ = trained(tmp_path, tiny_model("qwen2"), labelled(), "--no-baselines")
    data = write(tmp_path / "new.csv", labelled(30))
    for flags, shown in (((), True), (("--quiet",), False)):
        out = tmp_path / f"answers{len(flags)}.csv"
        assert ("row 30 of 30" in loracle("predict", run, data, "-o", out, *flags).stderr) is shown
        assert out.exists()
