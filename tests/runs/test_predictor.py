"""From a folder to scores: the same in another process, with a moved base, and never with a wrong one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from small import QUICK, labelled, pairs, several, write

from loracle import pipeline
from loracle.config import RunConfig
from loracle.errors import UserError
from loracle.examples import RankGroup
from loracle.runs.folder import checksum
from loracle.runs.predictor import Predictor

TEXTS = ["good day", "bad " * 30, "", "so — naïve 标"]


def learn(folder, model, rows, **more):
    data = write(folder / "a.jsonl", rows)
    config = QUICK | {"data": str(data), "model": str(model), "out": str(folder / "run")} | more
    return pipeline.train(RunConfig.from_flat(config), log=lambda line: None, quiet=True)


@pytest.fixture(scope="module")
def base(tiny_model, tmp_path_factory):
    """A base model that a test may move for a while."""
    return shutil.copytree(tiny_model("qwen2"), tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def classifier(base, tmp_path_factory):
    return learn(tmp_path_factory.mktemp("classifier"), base, labelled(), epochs=6)


@pytest.fixture(scope="module")
def ranker(base, tmp_path_factory):
    return learn(tmp_path_factory.mktemp("ranker"), base, pairs(), epochs=6)


OTHERS = {
    "float32": {"dtype": "float32"}, "mlp and mean": {"pooling": "mean", "head": "mlp"}, "full": {"full": True},
    "chunks": {"long": "chunk", "max_length": 16}, "template": {"template": "Mood of {text}: "}, "rslora": {"rslora": True},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("how", OTHERS)
def test_every_kind_of_run_reloads(base, tmp_path, how):
    """``verify_reload`` compares scores within 1e-6, and raises; here the folder is opened once more."""
    folder = learn(tmp_path, base, labelled(), **OTHERS[how])
    proba = Predictor(folder).predict_proba(TEXTS)
    assert proba.shape == (4, 3)
    np.testing.assert_allclose(proba.sum(1), 1)


@pytest.mark.slow
def test_an_encoder_with_every_weight_trained_reloads(tiny_model, tmp_path):
    assert Predictor(learn(tmp_path, tiny_model("bert"), labelled(), full=True)).scores(TEXTS).shape == (4, 3)


@pytest.mark.slow
def test_another_process_gives_the_same_scores(classifier):
    script = "import json, sys; from loracle.runs.predictor import Predictor; print(json.dumps(" \
        "Predictor(sys.argv[1]).scores(json.loads(sys.argv[2])).tolist()))"  # fmt: skip
    command = [sys.executable, "-c", script, str(classifier), json.dumps(TEXTS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    np.testing.assert_allclose(Predictor(classifier).scores(TEXTS), json.loads(done.stdout), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_names_follow_probabilities(classifier):
    predictor = Predictor(classifier)
    proba = predictor.predict_proba(TEXTS)
    assert predictor.predict(TEXTS) == [("mid", "neg", "pos")[i] for i in proba.argmax(1)]
    assert predictor.predict(["good number 3", "bad number 4", "so number 5"]) == ["pos", "neg", "mid"]


@pytest.mark.slow
def test_several_labels_are_those_above_their_stored_thresholds(base, tmp_path):
    folder = learn(tmp_path, base, several(), lr=1e-3)
    predictor = Predictor(folder)
    price, quality = json.loads((folder / "calibration.json").read_text())["thresholds"]
    proba = np.array([[price + 1e-6, quality + 1e-6], [price - 1e-6, 0], [0, quality + 1e-6]])
    assert predictor.names(proba) == [["price", "quality"], [], ["quality"]]
    assert predictor.predict_proba(TEXTS).shape == (4, 2)


def test_probabilities_are_those_of_scores_at_the_stored_temperature(classifier):
    """And the scores themselves, which plain PEFT gives too, are left alone."""
    predictor = Predictor(classifier)
    temperature = json.loads((classifier / "calibration.json").read_text())["temperature"]
    assert temperature != 1
    powers = np.exp(predictor.scores(TEXTS).astype(np.float64) / temperature)
    np.testing.assert_allclose(predictor.predict_proba(TEXTS), powers / powers.sum(1, keepdims=True), rtol=1e-6)


@pytest.mark.slow
def test_a_ranker_ranks_best_first(ranker):
    ranked = Predictor(ranker).rank(["bad title 1", "good title 2", "bad title 3"])
    assert ranked[0].text == "good title 2"
    assert [r.score for r in ranked] == sorted((r.score for r in ranked), reverse=True)


@pytest.mark.slow
def test_groups_are_ranked_as_each_alone(ranker, monkeypatch):
    monkeypatch.setattr("loracle.runs.predictor.WINDOW", 5)
    groups = [
        RankGroup(group=str(i), texts=titles[: 1 + i % 3], rows=(1, 2, 3)[: 1 + i % 3], context=context)
        for i, context in enumerate(["brief 1", "brief 1", None, "brief 2"] * 2)
        for titles in [(f"good {i}", f"bad {i}", f"so {i}")]
    ]
    predictor = Predictor(ranker)
    found = list(predictor.rank_groups(groups))
    assert [group for group, _ in found] == groups
    for group, ranked in found:
        alone = predictor.rank(group.texts, group.context)
        assert [(r.text, r.index) for r in ranked] == [(r.text, r.index) for r in alone]
        assert [r.score for r in ranked] == pytest.approx([r.score for r in alone], abs=1e-2)  # bfloat16


@pytest.mark.slow
def test_threads_may_share_a_predictor(base, tmp_path):
    predictor = Predictor(learn(tmp_path, base, labelled(), dtype="float32"))
    asked = [
        [f"{word} {'long ' * (i % 7)}{i}" for i in range(n, n + 1 + n % 5)]
        for n, word in enumerate(["good", "so"] * 20)
    ]
    expected = [predictor.scores(texts) for texts in asked]
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(predictor.scores, asked * 3), expected * 3, strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.slow
def test_equal_titles_keep_their_order(ranker):
    assert [r.text for r in Predictor(ranker).rank(["same", "same"])] == ["same", "same"]


def test_no_texts_have_no_scores(classifier):
    assert Predictor(classifier).scores([]).shape == (0, 3)
    assert Predictor(classifier).predict([]) == []


@pytest.mark.parametrize(
    ("kind", "call", "words"),
    [
        ("classifier", lambda p: p.rank(["a"]), "does not rank"),
        ("classifier", lambda p: next(p.rank_groups([])), "does not rank"),
        ("ranker", lambda p: p.predict(["a"]), "does not predict"),
        ("ranker", lambda p: p.rank([]), "no titles to rank"),
    ],
)
def test_the_wrong_question_is_refused(kind, call, words, request):
    with pytest.raises(UserError, match=words):
        call(Predictor(request.getfixturevalue(kind)))


def test_a_moved_base_is_one_argument(classifier, base, tmp_path):
    expected = Predictor(classifier).scores(TEXTS)
    moved = base.rename(tmp_path / "elsewhere")
    try:
        with pytest.raises(UserError, match="model"):
            Predictor(classifier)
        np.testing.assert_array_equal(Predictor(classifier, base=str(moved)).scores(TEXTS), expected)
    finally:
        moved.rename(base)


@pytest.mark.parametrize("kind", ["qwen3", "bert"])
def test_a_wrong_base_is_refused(classifier, tiny_model, kind):
    with pytest.raises(UserError, match=r"other weights"):
        Predictor(classifier, base=str(tiny_model(kind)))


def test_a_pickle_in_place_of_the_adapter_is_not_opened(classifier, tmp_path):
    """PEFT would take adapter_model.bin where there is no other, and ask a hub where there is neither."""
    run = shutil.copytree(classifier, tmp_path / "run")
    weights = run / "adapter_model.safetensors"
    opened = tmp_path / "opened"
    (run / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(opened).encode() + b"'\ntR.")
    sums = json.loads((run / "manifest.json").read_text())
    del sums[weights.name]
    sums["adapter_model.bin"] = checksum(run / "adapter_model.bin")
    (run / "manifest.json").write_text(json.dumps(sums))
    weights.unlink()
    with pytest.raises(UserError, match=weights.name):
        Predictor(run)
    assert not opened.exists()


def test_an_unfinished_run_is_refused(classifier, tmp_path):
    run = shutil.copytree(classifier, tmp_path / "run")
    (run / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"not finished.* loracle train --resume"):
        Predictor(run)
