"""hubs.py against two hubs on this machine (fake_hubs.py): the clients are the real ones, in a process of their own."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import sys
import tomllib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fake_hubs import LARGE, REPOS, SHA, WEIGHTS
from small import facts, has_facts

from loracle import hubs
from loracle.errors import UserError
from loracle.hubs import wheel


@pytest.mark.slow
def test_hf_model_without_code_pinned_by_commit(hubs):
    folder, revision = hubs.download("tiny/qwen")
    assert sorted(p.name for p in folder.rglob("*")) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert revision == SHA["main"]
    assert "broke off" in hubs.log  # and still the weights came whole


@pytest.mark.slow
def test_hf_resumes_half_a_file(hubs):
    folder, _ = hubs.download("tiny/large")
    assert (folder / "model.safetensors").read_bytes() == LARGE
    (went_on,) = (line for line in hubs.log if line.startswith("went on at "))
    assert int(went_on.split()[-1]) >= 10_000_000  # the pieces that came are not fetched again


@pytest.mark.slow
def test_hf_revision_and_offline_copy(hubs):
    folder, revision = hubs.download("hf:tiny/qwen", revision="v1")
    assert (json.loads((folder / "config.json").read_text())["word"], revision) == ("old", SHA["v1"])
    hubs.log.clear()
    assert hubs.download("hf:tiny/qwen", revision="v1", HF_HUB_OFFLINE="1") == (folder, revision)
    assert hubs.download("hf:tiny/qwen", revision="v1", HF_ENDPOINT="http://127.0.0.1:9") == (folder, revision)
    assert hubs.log == []
    assert has_facts(hubs.refusal("hf:tiny/qwen", HF_HUB_OFFLINE="1"), "hf:tiny/qwen", "HF_HUB_OFFLINE=0")


@pytest.mark.slow
def test_hf_token_is_sent(hubs):
    assert hubs.download("tiny/private", HF_TOKEN="secret")[1] == SHA["main"]
    assert "Check its spelling, or set HF_TOKEN." in hubs.refusal("tiny/private", revision="v1", HF_TOKEN="wrong")


@pytest.mark.slow
def test_hf_missing_gated_and_pickled_raise(hubs):
    assert has_facts(hubs.refusal("tiny/none"), "model hf:tiny/none", hubs.url, "private", "HF_TOKEN")
    assert has_facts(hubs.refusal("tiny/gated"), "hf:tiny/gated", "gated", f"{hubs.url}/tiny/gated", "HF_TOKEN")
    assert has_facts(hubs.refusal("tiny/qwen", revision="v9"), "hf:tiny/qwen", "v9", f"{hubs.url}/tiny/qwen")
    assert has_facts(hubs.refusal("tiny/pickled"), "hf:tiny/pickled", "*.safetensors", ".bin")
    refusal = hubs.refusal("tiny/qwen", HF_ENDPOINT="http://127.0.0.1:9")
    assert has_facts(refusal, "http://127.0.0.1:9", "hf:tiny/qwen", "111", "HF_ENDPOINT")


@pytest.mark.slow
def test_hf_dataset_without_code(hubs):
    folder, _ = hubs.download("hf:tiny/news", "dataset")
    assert [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()] == ["data/train.csv"]
    assert has_facts(hubs.refusal("hf:tiny/code", "dataset"), "hf:tiny/code", "CSV")


@pytest.mark.slow
@pytest.mark.parametrize("where", ["hf:", "modelscope:"])
def test_hub_ids_train_and_predict(hubs, tiny_model, tmp_path, monkeypatch, where):
    """The whole way from two ids to a scored file, the second part offline."""
    files = {path.name: path.read_bytes() for path in tiny_model("qwen2").iterdir()}
    rows = "".join(f"{'good' if i % 2 else 'bad'} number {i},{'pos' if i % 2 else 'neg'}\n" for i in range(60))
    table = {
        "data/train.csv": f"text,label\n{rows}".encode(),
        "data/test.csv": b"text,label\ngood day,pos\nbad day,neg\n",
    }
    monkeypatch.setitem(REPOS, "models/tiny/real", {SHA["main"]: files})
    monkeypatch.setitem(REPOS, "datasets/tiny/table", {SHA["main"]: table})
    run, new = tmp_path / "run", tmp_path / "new.csv"
    new.write_text("text\ngood day\n")
    flags = ["--epochs", "8", "--batch", "8", "--lr", "0.01", "--no-baselines", "--out", str(run)]
    done = hubs.run("-m", "loracle", "train", f"{where}tiny/table", "--model", f"{where}tiny/real", *flags)
    assert done.returncode == 0, done.stderr
    assert "2 test texts" in done.stdout
    base = tomllib.loads((run / "run.toml").read_text())["base"]
    assert base["source"] == f"{where}tiny/real"
    if where == "hf:":
        assert base["revision"] == SHA["main"]
        adapter = json.loads((run / "adapter_config.json").read_text())
        assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("tiny/real", SHA["main"])
    offline = {"HF_HUB_OFFLINE": "1"} if where == "hf:" else {}
    done = hubs.run("-m", "loracle", "predict", str(run), str(new), **offline)
    assert done.returncode == 0, done.stderr
    with (run / "predictions.csv").open() as f:  # what so few texts teach a random model differs between machines
        label = next(row["predicted"] for row in csv.DictReader(f) if row["text"] == "good day")
    assert done.stdout.splitlines()[1].startswith(f"good day,{label},")


@pytest.mark.slow
def test_modelscope_model_and_data(hubs):
    pytest.importorskip("modelscope")
    folder, revision = hubs.download("modelscope:tiny/qwen")
    assert {p.name for p in folder.iterdir() if p.is_file()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not list(folder.rglob("*.py")) + list(folder.rglob("*.bin")) + list(folder.rglob("onnx"))
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert revision == "master"
    assert has_facts(
        hubs.refusal("modelscope:tiny/none", revision="v2"), "modelscope:tiny/none", "v2", "modelscope login"
    )
    data, _ = hubs.download("modelscope:tiny/news", "dataset")
    assert (data / "data" / "train.csv").is_file()


@pytest.mark.slow
def test_modelscope_resumes_with_token_and_revision(hubs):
    pytest.importorskip("modelscope")
    token = {"MODELSCOPE_API_TOKEN": "secret"}
    folder, _ = hubs.download("modelscope:tiny/private", **token)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert {"broke off", f"went on at {len(WEIGHTS) // 2}"} <= set(hubs.log)
    folder, revision = hubs.download("modelscope:tiny/qwen", revision="v1")
    assert (json.loads((folder / "config.json").read_text())["word"], revision) == ("old", "v1")


@pytest.mark.slow
def test_modelscope_without_a_network(hubs):
    pytest.importorskip("modelscope")
    folder, _ = hubs.download("modelscope:tiny/qwen")
    nowhere = {"MODELSCOPE_ENDPOINT": "http://127.0.0.1:9"}
    assert hubs.download("modelscope:tiny/qwen", **nowhere) == (folder, "master")
    assert has_facts(hubs.refusal("modelscope:tiny/other", **nowhere), "tiny/other", "MODELSCOPE_ENDPOINT")


def test_modelscope_package_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    monkeypatch.setitem(sys.modules, "modelscope.hub.snapshot_download", None)
    with pytest.raises(UserError, match=r"Install it with: pip install 'loracle\[modelscope\]'") as refused:
        hubs.download("modelscope:a/b", repo_type="model")
    assert "modelscope:a/b" in refused.value.message


# --- parse ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "kind", "name"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", "hf", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("hf:fancyzhx/ag_news", "hf", "fancyzhx/ag_news"),
        ("bert-base-uncased", "hf", "bert-base-uncased"),
        ("modelscope:Qwen/Qwen2.5-7B-Instruct", "modelscope", "Qwen/Qwen2.5-7B-Instruct"),
        ("demo", "wheel", "demo"),
    ],
)
def test_parse(spec, kind, name):
    assert hubs.parse(spec) == hubs.Source(kind, name)
    assert hubs.parse(str(hubs.parse(spec))) == hubs.Source(kind, name)


def test_parse_prefers_what_is_on_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "x.GGUF").write_bytes(b"GGUF")
    assert hubs.parse("a/b") == hubs.Source("local", str(tmp_path / "a" / "b"))
    assert hubs.parse("hf:a/b") == hubs.Source("hf", "a/b")
    assert hubs.parse("x.GGUF") == hubs.Source("local", str(tmp_path / "x.GGUF"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("./none", "./none"),
        ("a/b/c", "a/b/c"),
        ("x.gguf", "x.gguf"),
        ("~/none", "~/none"),
        ("pyproject.toml", "pyproject.toml"),
        ("hf:../../etc", "hf:../../etc"),
        ("modelscope:", "'modelscope:'"),
        ("two words", "'two words'"),
        ("a\0b", "path"),
    ],
)
def test_invalid_specs_raise(spec, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").touch()
    with pytest.raises(UserError) as refused:
        hubs.parse(spec)
    assert has_facts(str(refused.value), *message.split(" | "))


def test_download_of_a_folder_raises(tmp_path):
    with pytest.raises(UserError, match="no hub id"):
        hubs.download(str(tmp_path), repo_type="dataset")


# --- model folders ----------------------------------------------------------------------------------------------------


def test_check_model_folder(tmp_path):
    def refusal() -> str:
        with pytest.raises(UserError) as refused:
            hubs.check_model_folder(tmp_path, "m")
        return str(refused.value)

    assert has_facts(refusal(), "config.json", "m")
    (tmp_path / "config.json").write_text("{")
    assert has_facts(refusal(), "config.json", "JSON")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    assert "pytorch" in refusal()
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert has_facts(refusal(), "model-00002-of-00002.safetensors")
    (tmp_path / "model-00002-of-00002.safetensors").touch()
    hubs.check_model_folder(tmp_path, "m")
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    assert has_facts(refusal(), "model.safetensors.index.json")


# --- wheels -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index that pip reads from a folder, with one wheel in it, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "loracle_test_wheel-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("pkg/a.txt", "alpha")
        wheel.writestr("pkg/data/b.txt", "beta")
        wheel.writestr("pkg/data/deep/c.txt", "gamma")
        wheel.writestr("evil/../../outside.txt", "out")
        wheel.writestr(
            "loracle_test_wheel-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: loracle-test-wheel\nVersion: 1.0\nRequires-Dist: no-such-thing\n",
        )
        wheel.writestr("loracle_test_wheel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("loracle_test_wheel-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("LORACLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.mark.slow
def test_wheel_member_is_fetched_once(index, tmp_path):
    sha256 = hashlib.sha256(b"alpha").hexdigest()
    path = hubs.fetch_wheel_member("loracle-test-wheel==1.0", "pkg/a.txt", sha256)
    assert path == tmp_path / "cache" / "wheels" / "loracle-test-wheel-1.0" / "pkg" / "a.txt"
    assert path.read_text() == "alpha"
    next(index.iterdir()).rename(tmp_path / "moved.whl")
    assert hubs.fetch_wheel_member("loracle-test-wheel==1.0", "pkg/a.txt", sha256) == path
    assert [p.name for p in path.parent.iterdir() if not p.name.endswith(".lock")] == ["a.txt"]


@pytest.mark.slow
def test_wheel_member_is_fetched_again_when_damaged(index):
    sha256 = hashlib.sha256(b"alpha").hexdigest()
    path = hubs.fetch_wheel_member("loracle-test-wheel==1.0", "pkg/a.txt", sha256)
    path.write_text("alphb")
    assert hubs.fetch_wheel_member("loracle-test-wheel==1.0", "pkg/a.txt", sha256).read_text() == "alpha"


def test_wheel_folder(index):
    folder = hubs.fetch_wheel_member("loracle-test-wheel==1.0", "pkg/data/")
    assert (folder / "b.txt").read_text() + (folder / "deep" / "c.txt").read_text() == "betagamma"


@pytest.mark.slow
def test_wheel_member_by_four_threads(index):
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(hubs.fetch_wheel_member, "loracle-test-wheel==1.0", "pkg/a.txt") for _ in range(4)]
        assert {task.result().read_text() for task in asked} == {"alpha"}


@pytest.mark.slow
def test_unusable_wheels_raise(index, tmp_path):
    with pytest.raises(UserError, match=facts("1.0")):
        hubs.fetch_wheel_member("loracle-test-wheel==1.0", "pkg/none")
    with pytest.raises(UserError, match=facts("a.txt", "256", "00", "8")):
        hubs.fetch_wheel_member("loracle-test-wheel==1.0", "pkg/a.txt", "00")
    with pytest.raises(UserError, match=facts("--no-deps", "2")):
        hubs.fetch_wheel_member("loracle-no==2", "a")
    with pytest.raises(UserError, match="outside its folder"):
        hubs.fetch_wheel_member("loracle-test-wheel==1.0", "evil/")
    assert not list(tmp_path.rglob("outside.txt"))


def test_installed_package_needs_same_version(monkeypatch, tmp_path):
    monkeypatch.setenv("LORACLE_CACHE", str(tmp_path))
    path = hubs.fetch_wheel_member(f"pytest=={pytest.__version__}", "pytest/py.typed")
    assert path == Path(pytest.__file__).parent / "py.typed"
    monkeypatch.setattr(wheel, "_download_wheel", lambda requirement, _: pytest.fail(f"asked for {requirement}"))
    with pytest.raises(pytest.fail.Exception, match="asked for pytest==0"):
        hubs.fetch_wheel_member("pytest==0", "pytest/py.typed")


def test_missing_pip_raises(monkeypatch, index):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=facts("pip", "loracle-test-wheel==1.0")):
        hubs.fetch_wheel_member("loracle-test-wheel==1.0", "pkg/a.txt")


# --- building ---------------------------------------------------------------------------------------------------------


def test_building_is_all_or_nothing(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(RuntimeError), hubs.building(target) as scratch:  # noqa: PT012
        scratch.mkdir()
        raise RuntimeError
    assert [p.name for p in target.iterdir()] == ["old"]
    with hubs.building(target) as scratch:
        scratch.mkdir()
        (scratch / "new").touch()
    assert [p.name for p in target.iterdir()] == ["new"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".target.lock", "target"]


def test_building_on_a_full_disk(tmp_path):
    words = "LORACLE"
    with pytest.raises(UserError, match=facts(*words.split(" | "))), hubs.building(tmp_path / "target"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [p.name for p in tmp_path.iterdir()] == [".target.lock"]


def test_building_in_read_only_folder(tmp_path):
    words = "Permission"
    with pytest.raises(UserError, match=facts(*words.split(" | "))), hubs.building(tmp_path / "target"):
        raise PermissionError(errno.EACCES, "Permission denied")
