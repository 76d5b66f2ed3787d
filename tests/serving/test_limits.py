"""What a server refuses, and how: never a 500, a stack trace or an echo of what was sent."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from asking import client_of, figures, post, refused
from small import QUICK, pairs, write

from loracle import pipeline
from loracle.config import RunConfig
from loracle.runs.predictor import Predictor
from loracle.serving import app

# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"texts": ["a"] * 5}, "at most 4 texts"),
        ({"texts": ["a", "secret" * 20]}, "at most 100 characters a text; one has 120"),
        ({"texts": ["a"], "contexts": ["secret" * 20]}, "at most 100 characters"),
        ({"texts": ["a"], "contexts": ["b", "secret"]}, "one context for each of 1 texts; there are 2"),
        ({"texts": []}, "texts: List should have at least 1 item"),
        ({}, "texts: Field required"),
        ({"texts": "secret"}, "texts: Input should be a valid list"),
        ({"texts": ["a", {"secret": 1}]}, "texts.1: Input should be a valid string"),
        ({"texts": ["a"], "secret": 1}, "a field that is not known"),
        ({"texts": ["a"], "run": ["secret"]}, "run: Input should be a valid string"),
    ],
)
def test_what_is_not_expected_is_refused_without_repeating_it(one, caplog, body, words):
    with client_of(one, max_texts=4, max_chars=100) as client:
        answer = client.post("/v1/classify", json=body)
    assert words in refused(answer, 422)
    assert "secret" not in answer.text + caplog.text


def test_a_template_with_a_context_wants_one(tiny_model, tmp_path):
    rows = [{"prompt": f"article {i // 2}", **row} for i, row in enumerate(pairs())]
    config = QUICK | {"data": str(write(tmp_path / "a.jsonl", rows)), "model": str(tiny_model("qwen2"))}
    config |= {"out": str(tmp_path / "briefed"), "template": "Brief: {context} Title: {text}", "max_steps": 1}
    pipeline.train(RunConfig.from_flat(config), log=lambda line: None, quiet=True)
    with client_of({"briefed": Predictor(tmp_path / "briefed")}) as client:
        words = refused(client.post("/v1/rank", json={"titles": ["secret"]}), 422)
        assert "a context for every text" in words
        assert len(post(client, "/v1/rank", titles=["a", "b"], context="c")["results"]) == 2


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_is_too_large_is_refused_before_it_is_parsed(one, announced):
    body = json.dumps({"texts": ["secret " * 300]}).encode()
    content = body if announced else (body[i : i + 100] for i in range(0, len(body), 100))
    with client_of(one, max_body=1000) as client:
        answer = client.post("/v1/classify", content=content, headers={"Content-Type": "application/json"})
        assert refused(answer, 413) == "a request has at most 1,000 bytes"
        lying = {"Content-Type": "application/json", "Content-Length": "9" * 5000}
        assert refused(client.post("/v1/classify", content=b"{}", headers=lying), 413)
        assert post(client, "/v1/classify", texts=["a"])


def test_the_largest_body_that_may_be_is_taken(one):
    body = b'{"texts": ["a"]}'
    with client_of(one, max_body=len(body)) as client:
        kind = {"Content-Type": "application/json"}
        assert client.post("/v1/classify", content=body, headers=kind).status_code == 200
        assert client.post("/v1/classify", content=body + b" ", headers=kind).status_code == 413


class Held:
    """Keeps the worker at a gate."""

    def __init__(self, monkeypatch):
        self.gate, self.inside, true_score = threading.Event(), threading.Event(), app.score

        def score(*args, **more):
            self.inside.set()
            assert self.gate.wait(20)
            return true_score(*args, **more)

        monkeypatch.setattr(app, "score", score)


def test_a_context_counts_with_every_title(predictors):
    with client_of({"pairs": predictors["pairs"]}, max_body=1000, max_chars=500) as client:
        words = refused(client.post("/v1/rank", json={"titles": ["a"] * 4, "context": "c" * 300}), 422)
        assert words == "at most 1,000 characters, the context counted with each text"
        assert post(client, "/v1/rank", titles=["a"] * 3, context="c" * 300)


@pytest.mark.parametrize("limit", [{"queue": 1}, {"queue_texts": 1, "max_texts": 1}, {"queue_tokens": 3}])
def test_what_finds_no_room_is_told_to_come_again(one, monkeypatch, limit):
    with client_of(one, **limit) as client, ThreadPoolExecutor(1) as pool:
        held = Held(monkeypatch)
        first = pool.submit(post, client, "/v1/classify", texts=["good"])
        assert held.inside.wait(10)
        answer = client.post("/v1/classify", json={"texts": ["good"]})
        assert "try again" in refused(answer, 429)
        assert int(answer.headers["Retry-After"]) >= 1
        assert client.get("/healthz").status_code == 200
        held.gate.set()
        assert first.result(10)["results"]
        assert post(client, "/v1/classify", texts=["good"])


def test_who_finds_no_room_is_refused_unread(one, monkeypatch):
    """Under overload most of the work is to refuse: what is asked is not even looked at."""
    broken = {"content": b"{", "headers": {"Content-Type": "application/json"}}
    with client_of(one, queue_texts=1, max_texts=1) as client, ThreadPoolExecutor(1) as pool:
        assert client.post("/v1/classify", **broken).status_code == 422
        held = Held(monkeypatch)
        first = pool.submit(post, client, "/v1/classify", texts=["good"])
        assert held.inside.wait(10)
        assert "too much to do" in refused(client.post("/v1/classify", **broken), 429)
        held.gate.set()
        assert first.result(10)["results"]


def test_the_first_request_is_not_the_first_round(one):
    """Each run has had a round before the server is ready, of which the metrics of texts know nothing."""
    with client_of(one) as client:
        seen = figures(client)
        assert seen["loracle_rounds"] >= 1
        assert seen["loracle_queue_seconds"] == 0
        assert not any(key[0] == "loracle_texts_total" for key in seen if isinstance(key, tuple))


def test_what_is_not_answered_in_time_is_given_up(one, monkeypatch):
    with client_of(one, deadline=0.2, queue=1) as client:
        held = Held(monkeypatch)
        answer = client.post("/v1/classify", json={"texts": ["good"]})
        assert "within 0.2 seconds" in refused(answer, 503)
        assert answer.headers["Retry-After"]
        time.sleep(0.1)  # the worker began a moment after the request did
        assert refused(client.get("/readyz"), 503)
        assert figures(client)["loracle_queue_texts"] == 0
        held.gate.set()
        assert post(client, "/v1/classify", texts=["good"])
        assert client.get("/readyz").json() == {"status": "ok"}


def test_while_a_long_text_is_encoded_short_ones_wait_and_the_loop_does_not(one, monkeypatch):
    """Also if whoever sent it has been given up: the tokenizer is at it all the same."""
    free, where, own = threading.Event(), [], one["moods"].encode

    def encode(texts, contexts=None):
        where.append(threading.current_thread().name.startswith("loracle-encoder"))
        assert len(texts[0]) <= 4096 or free.wait(20)
        return own(texts, contexts)

    monkeypatch.setattr(one["moods"], "encode", encode)
    with client_of(one, deadline=0.3) as client:

        def ask(text):
            return client.post("/v1/classify", json={"texts": [text]}).status_code

        assert ask("good") == 200
        assert ask("good " * 1000) == 503
        assert ask("bad") == 503
        assert client.get("/healthz").status_code == 200
        assert where == [False, True]
        free.set()
        until = time.monotonic() + 20
        while ask("so") != 200 or where[-1]:
            assert time.monotonic() < until


def test_a_crash_answers_503_and_the_next_request_is_served(one, monkeypatch, caplog):
    true_score, broken = app.score, [RuntimeError("secret")]

    def score(*args, **more):
        if broken:
            raise broken.pop()
        return true_score(*args, **more)

    with client_of(one) as client:
        monkeypatch.setattr(app, "score", score)
        answer = client.post("/v1/classify", json={"texts": ["a secret text"]})
        assert "not scored" in refused(answer, 503)
        assert post(client, "/v1/classify", texts=["good"])
        assert client.get("/readyz").status_code == 200
        assert figures(client)["loracle_rounds_failed"] == 1
    assert "RuntimeError" in caplog.text
    assert "secret" not in answer.text + caplog.text


def test_a_bug_is_a_500_that_tells_the_client_nothing(one, monkeypatch, caplog):
    def broken(*args):
        raise KeyError("secret")

    monkeypatch.setattr(app, "probabilities", broken)
    with client_of(one) as client:
        answer = client.post("/v1/classify", json={"texts": ["a secret text"]})
    assert "a bug" in refused(answer, 500)
    assert "KeyError in" in caplog.text
    assert Path(__file__).name in caplog.text
    assert "secret" not in answer.text + caplog.text
    assert "Traceback" not in answer.text + caplog.text


# --- who may come in --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked(predictors):
    with client_of(predictors, token="token") as client:
        yield client


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Bearer tok", "Bearer token2", "Basic token", "token", "Bearer tökén"]
)
def test_without_the_token_nobody_comes_in(locked, header):
    headers = {} if header is None else {"Authorization": header.encode()}
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
        answer = locked.get(path, headers=headers)
        assert "token" in refused(answer, 401)
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert refused(locked.post("/v1/score", json={"run": "moods", "texts": ["a"]}, headers=headers), 401)


def test_with_the_token_all_is_there_and_probes_need_none(locked):
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
def test_without_a_token_only_loopback_names_are_answered(client, host, status):
    assert client.get("/healthz", headers={"Host": host}).status_code == status


def test_a_form_of_another_site_cannot_ask(client):
    """Browsers send what is no JSON without asking first; it is not read as JSON then."""
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
def test_hostile_input_gets_a_clear_answer(client, name):
    body, status = HOSTILE[name]
    for path in ("/v1/score", "/classify", "/rerank", "/v1/rank"):
        answer = client.post(path, content=body, headers=JSON)
        assert answer.status_code < 500, (path, answer.text)
        assert len(answer.content) < 1000
    answer = client.post("/v1/score", content=body, headers=JSON)
    if name != "infinity":
        assert answer.status_code == status, answer.text
    assert client.get("/readyz").status_code == 200


def test_a_lone_surrogate_is_replaced_as_the_predictor_does(client, folder):
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


def test_a_hundred_thousand_letters_are_scored_where_they_may_be(one, folder):
    with client_of(one, max_chars=200_000) as client:
        found = post(client, "/v1/score", texts=["a" * 100_000])["scores"]
    np.testing.assert_allclose(found, Predictor(folder / "moods").scores(["a" * 100_000]), atol=1e-6)
