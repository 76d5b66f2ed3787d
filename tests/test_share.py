"""loracle push and pull against two hubs on this machine (fake_hubs.py), by the hubs' own clients."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from fake_hubs import REPOS, SHA
from small import labelled, write

from loracle.cli import main
from loracle.config import RunConfig
from loracle.recipe import train
from loracle.run.predictor import Predictor

TEXTS = ["good number 7", "bad number 8", "something else"]
LEFT_OUT = {"report.html", "report.json", "predictions.csv", "log.jsonl", "tensorboard"}


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """A trained classifier, and the folder of its base model, which says its licence."""
    root = tmp_path_factory.mktemp("share")
    base = root / "base"
    shutil.copytree(tiny_model("qwen2"), base)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# tiny\n")
    data = write(root / "reviews.csv", labelled())
    settings = {"data": str(data), "model": str(base), "out": str(root / "topics"), "epochs": 1.0, "batch": 8}
    return train(RunConfig.from_flat({**settings, "test_share": 0.2, "validation_share": 0.2, "baselines": False}),
                 say=lambda line: None, quiet=True)  # fmt: skip


def base_of(run):
    return str(run.parent / "base")


def cli(hubs, *args, code=0, **env):
    done = hubs.run("-m", "loracle.cli", *map(str, args), **env)
    assert done.returncode == code, (done.stdout, done.stderr)
    return done


TOKEN = {"hf": {"HF_TOKEN": "secret"}, "modelscope": {"MODELSCOPE_API_TOKEN": "secret"}}


@pytest.mark.parametrize("where", ["hf", "modelscope"])
def test_a_run_goes_to_a_hub_and_comes_back_the_same(hubs, run, tmp_path, where):
    if where == "modelscope":
        pytest.importorskip("modelscope")
    spec, token = f"{where}:me/topics", TOKEN[where]
    done = cli(hubs, "push", run, spec, "--private", **token)
    assert "note: the base model is a folder of this machine" in done.stdout
    (left,) = (line for line in done.stdout.splitlines() if line.startswith("left out"))
    assert all(name in left for name in LEFT_OUT)

    kept = hubs.pushed["models/me/topics"]
    assert kept["private"]
    commits = [files for files in kept["commits"].values() if files]
    assert len(commits) == 1, "whole or absent: one commit"
    (files,) = commits
    assert files.keys() >= {"adapter_model.safetensors", "tokenizer.json", "run.toml", "README.md", "manifest.json"}
    assert not files.keys() & LEFT_OUT
    assert "PUT a blob" in hubs.log  # the weights went by LFS
    for name, content in files.items():
        for text in (r["text"] for r in labelled()):
            assert text.encode() not in content, (name, text)
        assert str(run.parent).encode() not in content, f"{name} tells where it was trained"

    card = files["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["library_name"], front["pipeline_tag"]) == ("peft", "text-classification")
    facts = (f"loracle pull {spec}", "| loracle |", "apache-2.0", "reviews.csv", "mid, neg, pos", "[")
    assert all(words in card for words in facts)
    info = json.loads((run / "manifest.json").read_text())
    assert Predictor(run, base=base_of(run)).info.base["sha256"] in card
    assert info["adapter_model.safetensors"] == json.loads(files["manifest.json"])["adapter_model.safetensors"]

    hubs.log.clear()
    back = tmp_path / "back"
    assert "weights of SHA-256" in cli(hubs, "pull", spec, "-o", back, **token).stdout
    ours, theirs = (Predictor(folder, base=base_of(run)).predict_proba(TEXTS) for folder in (run, back))
    assert np.array_equal(ours, theirs)
    elsewhere = {"HF_HOME": str(tmp_path / "hf2"), "MODELSCOPE_CACHE": str(tmp_path / "ms2")}  # no copy, no token
    refused = cli(hubs, "pull", spec, "-o", tmp_path / "no", code=2, **elsewhere)
    assert refused.stderr.splitlines()[-1].startswith(f"loracle: expected a run {spec}")
    assert not (tmp_path / "no").exists()

    nowhere = {"HF_HUB_OFFLINE": "1"} if where == "hf" else {"MODELSCOPE_ENDPOINT": "http://127.0.0.1:9"}
    hubs.log.clear()
    cli(hubs, "pull", spec, "-o", tmp_path / "again", **nowhere)
    assert not [line for line in hubs.log if "adapter_model" in line]
    assert (tmp_path / "again" / "run.toml").read_bytes() == (back / "run.toml").read_bytes()

    hubs.log.clear()
    refused = cli(hubs, "push", run, spec, code=2)  # no token
    assert refused.stderr.startswith(f"loracle: expected leave to write to {spec}; found the hub saying 401.")
    assert len(kept["commits"]) == 2, "nothing was added"


def test_a_pulled_run_says_what_it_lacks(hubs, run, tmp_path):
    cli(hubs, "push", run, "hf:me/topics", "--revision", "v2", HF_TOKEN="secret")
    kept = hubs.pushed["models/me/topics"]
    assert kept["branches"]["v2"] != kept["branches"]["main"]
    back = tmp_path / "back"
    cli(hubs, "pull", "hf:me/topics@v2", "-o", back)
    new = write(tmp_path / "new.csv", [{"text": "good"}])
    for args, words in (
        (["predict", back, new], "pass --base with the weights of SHA-256"),
        (["pull", "hf:me/topics@v2", "-o", back], "pick another one"),
        (["pull", "me/topics"], "expected hf:owner/name or modelscope:owner/name to pull"),
        (["push", back, "topics"], "expected hf:owner/name or modelscope:owner/name to push to"),
    ):
        done = CliRunner().invoke(main, [str(a) for a in args])
        assert (done.exit_code, words.lower() in done.stderr.lower()) == (2, True), (args, done.stderr, done.exception)
    told = cli(hubs, "export", back, "--to", "openvino", "--base", base_of(run), "-o", tmp_path / "int8")
    assert "made-up texts" in told.stdout, "no test text is ever pushed"
    public = cli(hubs, "push", run, "hf:me/topics", "--private", code=2, HF_TOKEN="secret")
    assert "found one that is there and may be public" in public.stderr


def test_what_is_not_as_it_was_pushed_leaves_nothing(hubs, run, tmp_path, monkeypatch):
    cli(hubs, "push", run, "hf:me/topics", HF_TOKEN="secret")
    (good,) = (files for files in hubs.pushed["models/me/topics"]["commits"].values() if files)
    listed = json.loads(good["manifest.json"])
    spoilt = {
        "bytes": good | {"metrics.json": b"{}"},
        "gone": {name: content for name, content in good.items() if name != "calibration.json"},
        "odd": good | {"manifest.json": json.dumps(listed | {"../evil.py": "0"}).encode()},
        "none": {"README.md": b"hello"},
    }
    words = {"bytes": "found other bytes", "gone": "the file calibration.json in hf:tiny/gone", "odd": "'../evil.py'",
             "none": "expected a run of loracle at hf:tiny/none"}  # fmt: skip
    for name, files in spoilt.items():
        monkeypatch.setitem(REPOS, f"models/tiny/{name}", {SHA["main"]: files})
        done = cli(hubs, "pull", f"hf:tiny/{name}", "-o", tmp_path / name, code=2)
        assert words[name] in done.stderr
        assert len(done.stderr.strip().splitlines()[-1:]) == 1
        assert "Traceback" not in done.stderr
        assert not list(tmp_path.glob(f"*{name}*"))
