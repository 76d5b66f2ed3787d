"""Limits and rejections: never a 500, a stack trace or an echo of the request."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from serving_client import client_for, error_of, post, read_metrics
from small import QUICK, pairs, write

from loracle import pipeline
from loracle.config import RunConfig
from loracle.runs.predictor import Predictor
from loracle.serving import app

# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "facts"),
    [
        ({"texts": ["a"] * 5}, ("4 texts", "5")),
        ({"texts": ["a", "secret" * 20]}, ("100 characters", "120")),
        ({"texts": ["a"], "contexts": ["secret" * 20]}, ("100 characters", "120")),
        ({"texts": ["a"], "contexts": ["b", "secret"]}, ("1 texts", "2 contexts")),
        ({"texts": []}, ("texts: List should have at least 1 item",)),
        ({}, ("texts: Field required",)),
        ({"texts": "secret"}, ("texts: Input should be a valid list",)),
        ({"texts": ["a", {"secret": 1}]}, ("texts.1: Input should be a valid string",)),
        ({"texts": ["a"], "secret": 1}, ("Unknown field",)),
        ({"texts": ["a"], "run": ["secret"]}, ("run: Input should be a valid string",)),
    ],
)
def test_invalid_request_is_rejected_without_echo(one, caplog, body, facts):
    with client_for(one, max_texts=4, max_chars=100) as client:
        answer = client.post("/v1/classify", json=body)
    message = error_of(answer, 422)
    assert all(fact in message for fact in facts)
    assert "secret" not in answer.text + caplog.text


@pytest.mark.slow
def test_missing_context_is_rejected_if_template_needs_it(tiny_model, tmp_path):
    rows = [{"prompt": f"article {i // 2}", **row} for i, row in enumerate(pairs())]
    config = QUICK | {"data": str(write(tmp_path / "a.jsonl", rows)), "model": str(tiny_model("qwen2"))}
    config |= {"out": str(tmp_path / "briefed"), "template": "Brief: {context} Title: {text}", "max_steps": 1}
    pipeline.train(RunConfig.from_flat(config), log=lambda line: None, quiet=True)
    with client_for({"briefed": Predictor(tmp_path / "briefed")}) as client:
        message = error_of(client.post("/v1/rank", json={"titles": ["secret"]}), 422)
        assert "context" in message
        assert "secret" not in message
        assert len(post(client, "/v1/rank", titles=["a", "b"], context="c")["results"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("announced", [True, False])
def test_too_large_body_is_rejected_before_parsing(one, announced):
    body = json.dumps({"texts": ["secret " * 300]}).encode()
    content = body if announced else (body[i : i + 100] for i in range(0, len(body), 100))
    with client_for(one, max_body=1000) as client:
        answer = client.post("/v1/classify", content=content, headers={"Content-Type": "application/json"})
        assert "1,000 bytes" in error_of(answer, 413)
        false_length = {"Content-Type": "application/json", "Content-Length": "9" * 5000}
        assert error_of(client.post("/v1/classify", content=b"{}", headers=false_length), 413)
        assert post(client, "/v1/classify", texts=["a"])


def test_body_of_exactly_max_size_is_accepted(one):
    body = b'{"texts": ["a"]}'
    with client_for(one, max_body=len(body)) as client:
        headers = {"Content-Type": "application/json"}
        assert client.post("/v1/classify", content=body, headers=headers).status_code == 200
        assert client.post("/v1/classify", content=body + b" ", headers=headers).status_code == 413


class BlockedScoring:
    """Blocks the worker inside ``score`` until ``gate`` is set."""

    def __init__(self, monkeypatch):
        self.gate, self.inside, true_score = threading.Event(), threading.Event(), app.score

        def score(*args, **more):
            self.inside.set()
            assert self.gate.wait(20)
            return true_score(*args, **more)

        monkeypatch.setattr(app, "score", score)


def test_context_counts_with_every_title(predictors):
    with client_for({"pairs": predictors["pairs"]}, max_body=1000, max_chars=500) as client:
        message = error_of(client.post("/v1/rank", json={"titles": ["a"] * 4, "context": "c" * 300}), 422)
        assert "1,000 characters" in message
        assert "1,204" in message
        assert post(client, "/v1/rank", titles=["a"] * 3, context="c" * 300)


@pytest.mark.parametrize("limit", [{"queue": 1}, {"queue_texts": 1, "max_texts": 1}, {"queue_tokens": 3}])
def test_full_queue_answers_429_with_retry_after(one, monkeypatch, limit):
    with client_for(one, **limit) as client, ThreadPoolExecutor(1) as pool:
        blocked = BlockedScoring(monkeypatch)
        first = pool.submit(post, client, "/v1/classify", texts=["good"])
        assert blocked.inside.wait(10)
        answer = client.post("/v1/classify", json={"texts": ["good"]})
        assert "Try again" in error_of(answer, 429)
        assert int(answer.headers["Retry-After"]) >= 1
        assert client.get("/healthz").status_code == 200
        blocked.gate.set()
        assert first.result(10)["results"]
        assert post(client, "/v1/classify", texts=["good"])


def test_overload_rejects_before_parsing(one, monkeypatch):
    broken = {"content": b"{", "headers": {"Content-Type": "application/json"}}
    with client_for(one, queue_texts=1, max_texts=1) as client, ThreadPoolExecutor(1) as pool:
        assert client.post("/v1/classify", **broken).status_code == 422
        blocked = BlockedScoring(monkeypatch)
        first = pool.submit(post, client, "/v1/classify", texts=["good"])
        assert blocked.inside.wait(10)
        assert "overloaded" in error_of(client.post("/v1/classify", **broken), 429)
        blocked.gate.set()
        assert first.result(10)["results"]


def test_runs_are_warm_before_first_request(one):
    """The micro-batches of the warm-up are not in the metrics of texts."""
    with client_for(one) as client:
        metrics = read_metrics(client)
        assert metrics["loracle_micro_batches"] >= 1
        assert metrics["loracle_queue_seconds"] == 0
        assert not any(key[0] == "loracle_texts_total" for key in metrics if isinstance(key, tuple))


def test_deadline_answers_503_and_frees_the_slot(one, monkeypatch):
    with client_for(one, deadline=0.2, queue=1) as client:
        blocked = BlockedScoring(monkeypatch)
        answer = client.post("/v1/classify", json={"texts": ["good"]})
        assert "within 0.2 seconds" in error_of(answer, 503)
        assert answer.headers["Retry-After"]
        time.sleep(0.1)  # the worker starts a moment after the request
        assert error_of(client.get("/readyz"), 503)
        assert read_metrics(client)["loracle_queue_texts"] == 0
        blocked.gate.set()
        assert post(client, "/v1/classify", texts=["good"])
        assert client.get("/readyz").json() == {"status": "ok"}


@pytest.mark.slow
def test_encoding_long_text_does_not_block_event_loop(one, monkeypatch):
    """Also after its request timed out, as the tokenizer goes on."""
    free, in_thread, encode_texts = threading.Event(), [], one["moods"].encode

    def encode(texts, contexts=None):
        in_thread.append(threading.current_thread().name.startswith("loracle-encoder"))
        assert len(texts[0]) <= 4096 or free.wait(20)
        return encode_texts(texts, contexts)

    monkeypatch.setattr(one["moods"], "encode", encode)
    with client_for(one, deadline=0.3) as client:

        def status_of(text):
            return client.post("/v1/classify", json={"texts": [text]}).status_code

        assert status_of("good") == 200
        assert status_of("good " * 1000) == 503
        assert status_of("bad") == 503
        assert client.get("/healthz").status_code == 200
        assert in_thread == [False, True]
        free.set()
        until = time.monotonic() + 20
        while status_of("so") != 200 or in_thread[-1]:
            assert time.monotonic() < until


def test_failed_scoring_answers_503_and_server_continues(one, monkeypatch, caplog):
    true_score, broken = app.score, [RuntimeError("secret")]

    def score(*args, **more):
        if broken:
            raise broken.pop()
        return true_score(*args, **more)

    with client_for(one) as client:
        monkeypatch.setattr(app, "score", score)
        answer = client.post("/v1/classify", json={"texts": ["a secret text"]})
        assert "Scoring failed" in error_of(answer, 503)
        assert post(client, "/v1/classify", texts=["good"])
        assert client.get("/readyz").status_code == 200
        assert read_metrics(client)["loracle_micro_batches_failed"] == 1
    assert "RuntimeError" in caplog.text
    assert "secret" not in answer.text + caplog.text


def test_bug_answers_500_without_details(one, monkeypatch, caplog):
    def broken(*args):
        raise KeyError("secret")

    monkeypatch.setattr(one["moods"], "values", broken)
    with client_for(one) as client:
        answer = client.post("/v1/classify", json={"texts": ["a secret text"]})
    assert "bug" in error_of(answer, 500)
    assert "KeyError in" in caplog.text
    assert Path(__file__).name in caplog.text
    assert "secret" not in answer.text + caplog.text
    assert "Traceback" not in answer.text + caplog.text


# --- callers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked(predictors):
    with client_for(predictors, token="token") as client:
        yield client


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Bearer tok", "Bearer token2", "Basic token", "token", "Bearer tökén"]
)
def test_wrong_or_missing_token_answers_401(locked, header):
    headers = {} if header is None else {"Authorization": header.encode()}
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
        answer = locked.get(path, headers=headers)
        assert "token" in error_of(answer, 401)
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert error_of(locked.post("/v1/score", json={"run": "moods", "texts": ["a"]}, headers=headers), 401)


def test_token_opens_routes_and_probes_need_none(locked):
    assert [locked.get(path).status_code for path in ("/", "/healthz", "/readyz")] == [200] * 3
    with_token = {"Authorization": "bearer token", "Host": "models.example.com"}
    answer = locked.post("/v1/score", json={"run": "moods", "texts": ["a"]}, headers=with_token)
    assert answer.status_code == 200
    assert locked.get("/metrics", headers=with_token).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:80", 200),
        ("evil.example", 403),
        ("10.0.0.1", 403),
        ("[", 403),
    ],
)
def test_without_token_only_loopback_hosts_are_answered(client, host, status):
    assert client.get("/healthz", headers={"Host": host}).status_code == status


def test_cross_site_form_is_rejected(client):
    """Browsers send plain text across sites without a preflight request. The server does not parse it as JSON."""
    answer = client.post(
        "/v1/score", content=b'{"run": "moods", "texts": ["a"]}', headers={"Content-Type": "text/plain"}
    )
    assert answer.status_code == 422
    assert "access-control-allow-origin" not in answer.headers


# --- hostile input ----------------------------------------------------------------------------------------------------

JSON = {"Content-Type": "application/json"}
HOSTILE = {
    "10 MB line": (b'{"run": "moods", "texts": ["' + b"a" * 10_000_000 + b'"]}', 413),
    "100,000 letters": (json.dumps({"run": "moods", "texts": ["a" * 100_000]}).encode(), 422),
    "empty": (b"", 422),
    "blank": (b"  \n", 422),
    "empty text": (b'{"run": "moods", "texts": [""]}', 200),
    "blank text": (b'{"run": "moods", "texts": [" \\n "]}', 200),
    "lone surrogate": (b'{"run": "moods", "texts": ["a \\ud800 b"]}', 200),
    "NUL": (b'{"run": "moods", "texts": ["a \\u0000 b"]}', 200),
    "raw NUL": (b'{"run": "moods", "texts": ["a \0 b"]}', 422),
    "invalid UTF-8": (b'{"run": "moods", "texts": ["a \xff\xfe b"]}', 400),
    "UTF-16": ('{"run": "moods", "texts": ["a"]}'.encode("utf-16"), 200),
    "deep": (b"[" * 100_000, 400),
    "long number": (b'{"run": "moods", "texts": [' + b"1" * 10_000 + b"]}", 400),
    "NaN": (b'{"run": "moods", "texts": [NaN]}', 422),
    "infinity": (b'{"model": "clicks", "query": "", "documents": ["a"], "top_n": 1e999}', 422),
    "list": (b"[1]", 422),
    "null": (b"null", 422),
    "cut off": (b'{"run": "moods", "texts": ["a', 422),
    "the same key twice": (b'{"run": "no", "run": "moods", "texts": ["a"]}', 200),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_input_gets_a_clear_error(client, name):
    body, status = HOSTILE[name]
    for path in ("/v1/score", "/classify", "/rerank", "/v1/rank"):
        answer = client.post(path, content=body, headers=JSON)
        assert answer.status_code < 500, (path, answer.text)
        assert len(answer.content) < 1000
    answer = client.post("/v1/score", content=body, headers=JSON)
    if name != "infinity":
        assert answer.status_code == status, answer.text
    assert client.get("/readyz").status_code == 200


def test_lone_surrogate_is_replaced_as_in_predictor(client, folder):
    body = b'{"run": "clicks", "titles": ["good \\ud800", "bad"], "context": "\\udfff"}'
    results = client.post("/v1/rank", content=body, headers=JSON).json()["results"]
    expected = Predictor(folder / "clicks").rank(["good \ud800", "bad"], "\udfff")
    assert {r["title"]: r["score"] for r in results} == pytest.approx(
        {e.text.replace("\ud800", "\ufffd"): e.score for e in expected}, abs=1e-5
    )
    for path in ("/rerank", "/classify"):
        body = b'{"model": "%s", "query": "\\ud800", "documents": ["\\ud800"]}' % (
            b"pairs" if path == "/rerank" else b"\\ud800"
        )
        assert client.post(path, content=body, headers=JSON).status_code == (200 if path == "/rerank" else 422)


def test_very_long_text_is_scored_if_allowed(one, folder):
    with client_for(one, max_chars=200_000) as client:
        scores = post(client, "/v1/score", texts=["a" * 100_000])["scores"]
    np.testing.assert_allclose(scores, Predictor(folder / "moods").scores(["a" * 100_000]), atol=1e-6)
