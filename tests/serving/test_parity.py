"""One text, one answer: in training, reloaded, merged, by a pipeline of transformers, over HTTP, and nearly so in 8 bits.

Real sentences in English and Chinese, short ones and ones of which the end is lost. What is compared is what a user reads:
calibrated probabilities, or a ranker's scores. (Qwen2.5's own tokenizer: tests/text/test_template.py.)
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from asking import client_of, post
from small import CHINESE, ENGLISH, QUICK, write

from loracle import pipeline
from loracle.config import RunConfig
from loracle.runs.export import export
from loracle.runs.predictor import Predictor
from loracle.training import scoring

LENGTH = 48  # tokens a text may have
ASKED = {
    "english, short": ENGLISH,
    "chinese, short": CHINESE,
    "english, over-long": tuple(" ".join([f"{s}."] * 12) for s in ENGLISH),
    "chinese, over-long": tuple(f"{s}。" * 12 for s in CHINESE),
}
KINDS = ("softmax", "sigmoid", "ranker")
# What each way may differ by. Scores of this model spread over several units; int8 rounds 32 states a token.
WAYS = {"reloaded": 1e-6, "merged": 1e-4, "pipeline": 1e-4, "http": 1e-5, "http as vLLM": 1e-5,
        "http, merged": 1e-5, "int8": 0.1}  # fmt: skip


def rows(kind, texts):
    """Labels that follow from the place of a text, so that words predict them."""
    if kind == "ranker":
        return [{"chosen": a, "rejected": b} for a, b in zip(texts[::2], texts[1::2], strict=True)]
    if kind == "sigmoid":
        return [{"text": t, "labels": ["odd"] * (i % 2) + ["third"] * (i % 3 == 0)} for i, t in enumerate(texts)]
    return [{"text": t, "label": ("one", "two", "three")[i % 3]} for i, t in enumerate(texts)]


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """kind -> run folder, the texts that were asked, and what the model in memory made of them before anything was saved."""

    @cache
    def train(kind):
        folder = tmp_path_factory.mktemp(kind)
        learnt = [f"{sentence} {n}" for n in range(5) for sentence in (*ENGLISH, *CHINESE)]
        config = QUICK | {
            "epochs": 2.0,
            "dtype": "float32",
            "max_length": LENGTH,
            "model": str(tiny_model("qwen2-chinese")),
        }
        config |= {"data": str(write(folder / "train.jsonl", rows(kind, learnt)))}
        config |= {"test": str(write(folder / "test.jsonl", rows(kind, [t for some in ASKED.values() for t in some])))}
        config = RunConfig.from_flat(config)
        data = pipeline.read_data(config, lambda line: None)
        run = pipeline.train_on(config, data, folder / "run", log=lambda line: None, quiet=True, keep_scores=True)
        scores = np.concatenate(scoring.read_scores(run, data.test))
        texts = [t for e in data.test for t in (e.texts if kind == "ranker" else (e.text,))]
        return run, texts, answers(Predictor(run), scores)

    return train


@pytest.fixture(scope="module")
def found(trained, tmp_path_factory):
    """kind, way -> what it answers ``[N, C]``."""

    @cache
    def plain(kind):
        return export(trained(kind)[0], tmp_path_factory.mktemp("plain") / kind, "transformers", log=lambda line: None)

    @cache
    def eight(kind):
        return export(trained(kind)[0], tmp_path_factory.mktemp("eight") / kind, "openvino", log=lambda line: None)

    @cache
    def ask(kind, way):
        run, texts, _ = trained(kind)
        known = Predictor(run, merged=way == "http, merged")
        if way == "merged":
            return merged(known, plain(kind), texts)
        if way == "pipeline":
            return piped(known, plain(kind), texts)
        if way.startswith("http"):
            with client_of({"run": known}, round_tokens=256) as client:
                return over_http(client, known, texts, vllm=way == "http as vLLM")
        known = Predictor(eight(kind)) if way == "int8" else known
        return answers(known, known.scores(texts))

    return ask


def answers(predictor, scores):
    return predictor.values(scores)


def merged(predictor, folder, texts):
    """The plain class, padded on the left in one batch; the temperature is in its head already."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    given = tokenizer(texts, truncation=True, padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = AutoModelForSequenceClassification.from_pretrained(folder).eval()(**given).logits.numpy()
    return predictor.task.output.values(logits, predictor.task, None)


def piped(predictor, folder, texts):
    from transformers import pipeline

    scorer = pipeline("text-classification", model=str(folder), device="cpu")
    names = predictor.task.label_names or ("LABEL_0",)
    said = [{d["label"]: d["score"] for d in of} for of in scorer(texts, truncation=True, top_k=None, batch_size=4)]
    return np.array([[of[name] for name in names] for of in said])


def over_http(client, predictor, texts, *, vllm):
    """Through the routes that a client of that kind of run would take."""
    if predictor.task.kind == "rank":
        body = {"query": "", "documents": texts} if vllm else {"titles": texts}
        found = post(client, "/rerank" if vllm else "/v1/rank", **body)["results"]
        score = {r["index"]: r["relevance_score" if vllm else "score"] for r in found}
        return np.array([[score[i]] for i in range(len(texts))])
    if vllm:
        return np.array([d["probs"] for d in post(client, "/classify", input=texts)["data"]])
    found = post(client, "/v1/classify", texts=texts)["results"]
    assert [r["cut"] for r in found] == [len(t) > 80 for t in texts]
    return np.array([list(r["probabilities"].values()) for r in found])


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_answers_as_the_model_that_was_trained(trained, found, kind, way, asked):
    if way == "int8":
        pytest.importorskip("openvino", reason="the extra int8 is not installed")
    _, texts, expected = trained(kind)
    here = [i for i, text in enumerate(texts) if text in ASKED[asked]]
    assert len(here) == len(ASKED[asked])
    got, expected = found(kind, way)[here], expected[here]
    assert np.ptp(expected, axis=0).max() > 0.05  # a constant model would agree with anything
    np.testing.assert_allclose(got, expected, rtol=WAYS[way], atol=WAYS[way])
    if kind != "ranker":  # and so it gives the same labels, wherever what it may differ by does not decide
        clear = np.abs(expected - 0.5).min(axis=1) > WAYS[way]
        assert ((got > 0.5) == (expected > 0.5))[clear].all()


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_what_calibration_found_is_in_the_export(trained, tmp_path, kind):
    import json

    run, _, _ = trained(kind)
    calibration = Predictor(run).calibration
    if kind == "softmax":
        assert calibration.temperature != 1  # folded in, or the probabilities above would differ
        return
    out = export(run, tmp_path / "plain", "transformers", log=lambda line: None)
    thresholds = json.loads((out / "config.json").read_text())["thresholds"]
    assert list(thresholds.values()) == list(calibration.thresholds)
