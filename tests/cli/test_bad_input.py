"""Bad files, names and values: an error of one or two lines, exit code 2, and nothing left behind."""

from __future__ import annotations

import gzip
import subprocess
import sys

import pytest
from cli_runner import error_of
from small import has_facts, labelled, write


def _written(path, content):
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
def test_bad_file_is_an_error_and_leaves_nothing(tiny_model, tmp_path, name):
    content, words = BAD_FILES[name]
    data = _written(tmp_path / name, content)
    flags = ["--group", "g"] if name == "clicks.csv" else []
    assert (
        words.lower() in error_of("train", data, "--model", tiny_model("qwen2"), "-o", tmp_path / "run", *flags).lower()
    )
    assert not (tmp_path / "run").exists()


def test_bad_names_are_errors(tiny_model, tmp_path):
    data, model = write(tmp_path / "data.csv", labelled()), tiny_model("qwen2")
    assert "did you mean" in error_of("train", data, "--text", "txt").lower()
    assert "missing.csv" in error_of("train", tmp_path / "missing.csv")
    assert "no-such" in error_of("train", data, "--model", tmp_path / "no-such", "-o", tmp_path / "run")
    assert "targets" in error_of("train", data, "--model", model, "--targets", "nothing", "-o", tmp_path / "run")
    assert "loss" in error_of("train", data, "--model", model, "--loss", "margin", "-o", tmp_path / "run")
    assert "--resume" in error_of("train", data, "--resume", tmp_path)
    assert "run.toml" in error_of("train", "--resume", tmp_path)
    assert str(tmp_path / "nowhere") in error_of("predict", tmp_path / "nowhere", data)
    (tmp_path / "full").mkdir()
    _written(tmp_path / "full" / "x", "x")
    assert "--out" in error_of("train", data, "--model", model, "-o", tmp_path / "full")
    assert not (tmp_path / "run").exists()


BAD_VALUES = [
    ("--r", 0), ("--alpha", 0), ("--dropout", 1), ("--seed", -1), ("--lr", -1), ("--lr", 0), ("--epochs", "nan"),
    ("--epochs", "inf"), ("--max-steps", 0), ("--warmup", 2), ("--clip", 0), ("--patience", -1),
    ("--template", "{text} of {context}"), ("--template", "{context} {context} {text}"), ("--template", "no text"),
]  # fmt: skip


@pytest.mark.parametrize(("flag", "value"), BAD_VALUES)
def test_bad_value_is_an_error(tmp_path, flag, value):
    data = write(tmp_path / "data.csv", labelled())
    assert flag in error_of("train", data, flag, value, "-o", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_no_network_is_an_error(tmp_path):
    data = write(tmp_path / "data.csv", labelled())
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-m", "loracle", "train", str(data), "--model", "nobody/nothing"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)
    assert done.returncode == 2
    assert "Error: " in done.stderr
    assert has_facts(done.stderr, "nobody/nothing", "127.0.0.1:9")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
