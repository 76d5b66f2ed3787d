"""check and probe: what is in a file, and how many layers it needs."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys

import polars
import pytest
from cli_runner import CLICKS, loracle
from small import clicked, has_facts, labelled, write

from loracle.runs.folder import read_info


@pytest.mark.slow
@pytest.mark.parametrize("rows", [labelled, clicked])
def test_probed_depth_is_used_and_saved(tiny_model, tmp_path, rows):
    data = write(tmp_path / "data.jsonl", rows(60))
    flags = ["--model", tiny_model("qwen2"), *(CLICKS if rows is clicked else [])]
    probed = json.loads(loracle("probe", data, *flags, "--json", "--plot", tmp_path / "depth.svg").stdout)
    assert [d["layers"] for d in probed["depths"]] == [1, 2, 3]
    assert all(d["low"] <= d["value"] <= d["high"] for d in probed["depths"])
    assert "<svg" in (tmp_path / "depth.svg").read_text()
    output = loracle("probe", data, *flags).stdout
    assert f"depth {probed['auto']} of 3: a linear probe reaches" in output
    run = tmp_path / "run"
    output = loracle("train", data, *flags, "--depth", "auto", "--epochs", "1", "--no-baselines", "-o", run).stdout
    assert f"depth {probed['auto']} of 3" in output
    assert read_info(run).config.model.depth == probed["auto"]
    words = loracle("train", data, *flags, "--depth", "half", "-o", tmp_path / "no", code=2).stderr
    assert has_facts(words, "--depth", "'half'")


def test_check_reports_contents(tmp_path):
    rows = [*labelled(30), *labelled(3), {"text": "", "label": "pos"}]
    done = loracle("check", write(tmp_path / "data.csv", rows))
    assert "one label a text" in done.stdout
    assert "rows without a text" in done.stdout
    assert "rows that repeat an earlier text: 3 (rows 32, 33, 34)" in done.stdout


@pytest.mark.slow
def test_check_does_not_import_torch(tmp_path):
    data = write(tmp_path / "data.csv", labelled())
    script = f"import sys; from loracle.cli import main; main(['check', {str(data)!r}], standalone_mode=False)\n"
    script += "print(*sorted({'torch', 'transformers', 'peft'} & set(sys.modules)), 'end')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1].split() == ["end"], done.stderr


def test_check_is_equal_for_all_formats(tmp_path):
    rows = labelled(30)
    write(tmp_path / "a.csv", rows)
    write(tmp_path / "b.tsv", rows)
    write(tmp_path / "c.json", rows)
    write(tmp_path / "d.jsonl", rows)
    polars.DataFrame(rows).write_parquet(tmp_path / "e.parquet")
    (tmp_path / "f.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    outputs = {loracle("check", path).stdout for path in sorted(tmp_path.iterdir())}
    assert len(outputs) == 1
