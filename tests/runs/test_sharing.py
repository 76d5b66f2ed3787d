"""push and pull with the hubs' own clients against two fake hubs on this machine (fake_hubs.py)."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from fake_hubs import REPOS, SHA
from small import has_facts, labelled, write

from loracle.cli import main
from loracle.config import RunConfig
from loracle.pipeline import train
from loracle.runs.predictor import Predictor

TEXTS = ["good number 7", "bad number 8", "something else"]
LEFT_OUT = {"report.html", "report.json", "predictions.csv", "log.jsonl", "tensorboard"}


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """A trained classifier beside the folder of its base model, which states a licence."""
    root = tmp_path_factory.mktemp("share")
    base = root / "base"
    shutil.copytree(tiny_model("qwen2"), base)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# tiny\n")
    data = write(root / "reviews.csv", labelled())
    settings = {"data": str(data), "model": str(base), "out": str(root / "topics"), "epochs": 1.0, "batch": 8}
    return train(RunConfig.from_flat({**settings, "test_share": 0.2, "validation_share": 0.2, "baselines": False}),
                 log=lambda line: None, quiet=True)  # fmt: skip


def base_of(run):
    return str(run.parent / "base")


def cli(hubs, *commands, code=0, **env):
    """Outputs of commands run one after another in a separate process: stdout, or stderr where ``code`` is not 0."""
    script = (
        "import json, sys\nfrom click.testing import CliRunner\nfrom loracle.cli import main\n"
        "for command in json.loads(sys.argv[1]):\n    done = CliRunner().invoke(main, command)\n"
        "    kept = done.exception and not isinstance(done.exception, SystemExit) and repr(done.exception)\n"
        "    print(json.dumps([done.exit_code, done.stdout, done.stderr, kept]))\n"
    )
    done = hubs.run("-c", script, json.dumps([[str(word) for word in command] for command in commands]), **env)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(exit_code, bug) for exit_code, _, _, bug in found] == [(code, None if not code else False)] * len(
        commands
    ), found
    return [stderr if code else stdout for _, stdout, stderr, _ in found]


TOKEN = {"hf": {"HF_TOKEN": "secret"}, "modelscope": {"MODELSCOPE_API_TOKEN": "secret"}}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["hf", "modelscope"])
def test_push_and_pull_round_trip(hubs, run, tmp_path, where):
    if where == "modelscope":
        pytest.importorskip("modelscope")
    spec, token = f"{where}:me/topics", TOKEN[where]
    back = tmp_path / "back"
    pushed, pulled = cli(hubs, ["push", run, spec, "--private"], ["pull", spec, "-o", back], **token)
    assert has_facts(pushed, "note: the base model is a folder on this machine", "--base")
    (left,) = (line for line in pushed.splitlines() if line.startswith("left out"))
    assert all(name in left for name in LEFT_OUT)

    kept = hubs.pushed["models/me/topics"]
    assert kept["private"]
    commits = [files for files in kept["commits"].values() if files]
    assert len(commits) == 1, "one commit, so that a push is complete or absent"
    (files,) = commits
    assert files.keys() >= {"adapter_model.safetensors", "tokenizer.json", "run.toml", "README.md", "manifest.json"}
    assert not files.keys() & LEFT_OUT
    assert "PUT a blob" in hubs.log  # the weights went by LFS
    for name, content in files.items():
        for text in (r["text"] for r in labelled()):
            assert text.encode() not in content, (name, text)
        assert str(run.parent).encode() not in content, f"{name} holds a path of this machine"

    card = files["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["library_name"], front["pipeline_tag"]) == ("peft", "text-classification")
    facts = (f"loracle pull {spec}", "| loracle |", "apache-2.0", "reviews.csv", "mid, neg, pos", "[")
    assert all(words in card for words in facts)
    info = json.loads((run / "manifest.json").read_text())
    assert Predictor(run, base=base_of(run)).info.base["sha256"] in card
    assert info["adapter_model.safetensors"] == json.loads(files["manifest.json"])["adapter_model.safetensors"]

    assert "weights of SHA-256" in pulled
    ours, theirs = (Predictor(folder, base=base_of(run)).predict_proba(TEXTS) for folder in (run, back))
    assert np.array_equal(ours, theirs)
    elsewhere = {"HF_HOME": str(tmp_path / "hf2"), "MODELSCOPE_CACHE": str(tmp_path / "ms2")}  # no copy, no token
    pull, push = cli(hubs, ["pull", spec, "-o", tmp_path / "no"], ["push", run, spec], code=2, **elsewhere)
    assert spec in pull
    assert has_facts(push, spec, "401")
    assert len(kept["commits"]) == 2, "nothing was added"
    assert not (tmp_path / "no").exists()

    nowhere = {"HF_HUB_OFFLINE": "1"} if where == "hf" else {"MODELSCOPE_ENDPOINT": "http://127.0.0.1:9"}
    hubs.log.clear()
    cli(hubs, ["pull", spec, "-o", tmp_path / "again"], **nowhere)
    assert not [line for line in hubs.log if "adapter_model" in line]
    assert (tmp_path / "again" / "run.toml").read_bytes() == (back / "run.toml").read_bytes()


@pytest.mark.slow
def test_pulled_run_needs_the_base_and_a_free_folder(hubs, run, tmp_path):
    back = tmp_path / "back"
    push = ["push", run, "hf:me/topics"]
    cli(hubs, [*push, "--revision", "v2"], ["pull", "hf:me/topics@v2", "-o", back], HF_TOKEN="secret")
    kept = hubs.pushed["models/me/topics"]
    assert kept["branches"]["v2"] != kept["branches"]["main"]
    new = write(tmp_path / "new.csv", [{"text": "good"}])
    for args, words in (
        (["predict", back, new], "--base"),
        (["pull", "hf:me/topics@v2", "-o", back], "--out"),
        (["pull", "me/topics"], "hf:owner/name or modelscope:owner/name"),
        (["push", back, "topics"], "hf:owner/name"),
    ):
        done = CliRunner().invoke(main, [str(a) for a in args])
        assert (done.exit_code, words.lower() in done.stderr.lower()) == (2, True), (args, done.stderr, done.exception)
    exporting = ["export", str(back), "--to", "openvino", "--base", str(base_of(run)), "-o", str(tmp_path / "int8")]
    exported = CliRunner().invoke(main, exporting)
    assert "random texts" in exported.stdout, "test texts are never pushed"
    (public,) = cli(hubs, [*push, "--private"], code=2, HF_TOKEN="secret")
    assert "public" in public


@pytest.mark.slow
def test_changed_or_foreign_files_leave_nothing(hubs, run, tmp_path, monkeypatch):
    cli(hubs, ["push", run, "hf:me/topics"], HF_TOKEN="secret")
    (good,) = (files for files in hubs.pushed["models/me/topics"]["commits"].values() if files)
    listed = json.loads(good["manifest.json"])
    spoilt = {
        "bytes": good | {"metrics.json": b"{}"},
        "gone": {name: content for name, content in good.items() if name != "calibration.json"},
        "odd": good | {"manifest.json": json.dumps(listed | {"../evil.py": "0"}).encode()},
        "none": {"README.md": b"hello"},
    }
    words = {"bytes": ("metrics.json", "hf:tiny/bytes"), "gone": ("calibration.json", "hf:tiny/gone"),
             "odd": ("'../evil.py'",), "none": ("hf:tiny/none", "run.toml")}  # fmt: skip
    for name, files in spoilt.items():
        monkeypatch.setitem(REPOS, f"models/tiny/{name}", {SHA["main"]: files})
    errors = cli(hubs, *(["pull", f"hf:tiny/{name}", "-o", tmp_path / name] for name in spoilt), code=2)
    for name, line in zip(spoilt, errors, strict=True):
        assert has_facts(line, *words[name])
        assert not list(tmp_path.glob(f"*{name}*"))
