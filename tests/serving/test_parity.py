"""A text gets the same answer everywhere: in training, reloaded, merged, in a transformers pipeline and over HTTP.

The int8 export agrees within its rounding. The texts are real sentences in English and Chinese, short ones and truncated ones.
The tests compare calibrated probabilities or a ranker's scores. (Qwen2.5's own tokenizer: tests/text/test_template.py.)
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from serving_client import client_for, post
from small import CHINESE, ENGLISH, QUICK, write

from loracle import pipeline
from loracle.config import RunConfig
from loracle.runs.export import export
from loracle.runs.predictor import Predictor
from loracle.training import scoring

MAX_LENGTH = 48  # tokens a text may have
TEXTS = {
    "english, short": ENGLISH,
    "chinese, short": CHINESE,
    "english, over-long": tuple(" ".join([f"{s}."] * 12) for s in ENGLISH),
    "chinese, over-long": tuple(f"{s}。" * 12 for s in CHINESE),
}
HEADS = ("softmax", "sigmoid", "ranker")
# Scores of this model spread over several units; int8 rounds 32 states a token.
TOLERANCES = {
    "reloaded": 1e-6,
    "merged": 1e-4,
    "pipeline": 1e-4,
    "http": 1e-5,
    "http as vLLM": 1e-5,
    "http, merged": 1e-5,
    "int8": 0.1,
}


def rows(head, texts):
    """Rows whose labels follow from a text's position, so that its words predict them."""
    if head == "ranker":
        return [{"chosen": a, "rejected": b} for a, b in zip(texts[::2], texts[1::2], strict=True)]
    if head == "sigmoid":
        return [{"text": t, "labels": ["odd"] * (i % 2) + ["third"] * (i % 3 == 0)} for i, t in enumerate(texts)]
    return [{"text": t, "label": ("one", "two", "three")[i % 3]} for i, t in enumerate(texts)]


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """head -> run folder, its test texts, and their values by the trained model before it was saved."""

    @cache
    def train(head):
        folder = tmp_path_factory.mktemp(head)
        train_texts = [f"{sentence} {n}" for n in range(5) for sentence in (*ENGLISH, *CHINESE)]
        config = QUICK | {
            "epochs": 2.0,
            "dtype": "float32",
            "max_length": MAX_LENGTH,
            "model": str(tiny_model("qwen2-chinese")),
        }
        config |= {"data": str(write(folder / "train.jsonl", rows(head, train_texts)))}
        config |= {
            "test": str(write(folder / "test.jsonl", rows(head, [t for texts in TEXTS.values() for t in texts])))
        }
        config = RunConfig.from_flat(config)
        data = pipeline.prepare_data(config, lambda line: None)
        run = pipeline.train_on(config, data, folder / "run", log=lambda line: None, quiet=True, keep_scores=True)
        scores = np.concatenate(scoring.read_scores(run, data.test))
        texts = [t for e in data.test for t in (e.texts if head == "ranker" else (e.text,))]
        return run, texts, Predictor(run).values(scores)

    return train


@pytest.fixture(scope="module")
def answers(trained, tmp_path_factory):
    """head, path -> values of the test texts ``[N, C]``."""

    @cache
    def plain(head):
        return export(trained(head)[0], tmp_path_factory.mktemp("plain") / head, "transformers", log=lambda line: None)

    @cache
    def int8(head):
        return export(trained(head)[0], tmp_path_factory.mktemp("int8") / head, "openvino", log=lambda line: None)

    @cache
    def ask(head, path):
        run, texts, _ = trained(head)
        predictor = Predictor(run, merged=path == "http, merged")
        if path == "merged":
            return merged_values(predictor, plain(head), texts)
        if path == "pipeline":
            return pipeline_values(predictor, plain(head), texts)
        if path.startswith("http"):
            with client_for({"run": predictor}, tokens_per_micro_batch=256) as client:
                return http_values(client, predictor, texts, vllm=path == "http as vLLM")
        predictor = Predictor(int8(head)) if path == "int8" else predictor
        return predictor.values(predictor.scores(texts))

    return ask


def merged_values(predictor, folder, texts):
    """Values by transformers' own class, padded on the left in one batch. Its head includes the temperature."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    inputs = tokenizer(texts, truncation=True, padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = AutoModelForSequenceClassification.from_pretrained(folder).eval()(**inputs).logits.numpy()
    return predictor.task.output.values(logits, predictor.task, None)


def pipeline_values(predictor, folder, texts):
    from transformers import pipeline

    scorer = pipeline("text-classification", model=str(folder), device="cpu")
    names = predictor.task.label_names or ("LABEL_0",)
    outputs = scorer(texts, truncation=True, top_k=None, batch_size=4)
    proba = [{d["label"]: d["score"] for d in output} for output in outputs]
    return np.array([[p[name] for name in names] for p in proba])


def http_values(client, predictor, texts, *, vllm):
    """Values by the routes that a client of such a run would use."""
    if predictor.task.output.command == "rank":
        body = {"query": "", "documents": texts} if vllm else {"titles": texts}
        results = post(client, "/rerank" if vllm else "/v1/rank", **body)["results"]
        score = {r["index"]: r["relevance_score" if vllm else "score"] for r in results}
        return np.array([[score[i]] for i in range(len(texts))])
    if vllm:
        return np.array([d["probs"] for d in post(client, "/classify", input=texts)["data"]])
    results = post(client, "/v1/classify", texts=texts)["results"]
    assert [r["truncated"] for r in results] == [len(t) > 80 for t in texts]
    return np.array([list(r["probabilities"].values()) for r in results])


@pytest.mark.slow
@pytest.mark.parametrize("group", TEXTS)
@pytest.mark.parametrize("path", TOLERANCES)
@pytest.mark.parametrize("head", HEADS)
def test_every_path_equals_the_trained_model(trained, answers, head, path, group):
    if path == "int8":
        pytest.importorskip("openvino", reason="the extra int8 is not installed")
    _, texts, expected = trained(head)
    selected = [i for i, text in enumerate(texts) if text in TEXTS[group]]
    assert len(selected) == len(TEXTS[group])
    values, expected = answers(head, path)[selected], expected[selected]
    assert np.ptp(expected, axis=0).max() > 0.05  # a constant model would agree with anything
    np.testing.assert_allclose(values, expected, rtol=TOLERANCES[path], atol=TOLERANCES[path])
    if head != "ranker":  # the labels agree too, except where the tolerance decides
        clear = np.abs(expected - 0.5).min(axis=1) > TOLERANCES[path]
        assert ((values > 0.5) == (expected > 0.5))[clear].all()


@pytest.mark.slow
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_export_contains_the_calibration(trained, tmp_path, head):
    import json

    run, _, _ = trained(head)
    calibration = Predictor(run).calibration
    if head == "softmax":
        assert calibration.temperature != 1  # part of the exported head, as the test above shows
        return
    out = export(run, tmp_path / "plain", "transformers", log=lambda line: None)
    thresholds = json.loads((out / "config.json").read_text())["thresholds"]
    assert list(thresholds.values()) == list(calibration.thresholds)
