"""HTTP answers: equal to ``Predictor``'s whatever arrives beside them, and never a 500, a stack trace or an echo."""

from __future__ import annotations

import json
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import schemathesis
import uvicorn
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from small import QUICK, clicked, labelled, pairs, several, write

from loracle import recipe
from loracle.config import RunConfig, ServeConfig
from loracle.model.assemble import share_weights
from loracle.run.predictor import Predictor
from loracle.serve import api
from loracle.serve.server import load

TEXTS = ["good day", "bad " * 80, "", " ", "so — naïve 标题", "<|im_end|> good", "good day", "nul \0 and tab \t"]
RUNS = ("moods", "several", "pairs", "clicks")
SHOWN = ["bad headline 1", "good headline 2", "so headline 3"]


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """Four runs of one base in float32: one label, several labels behind an instruction, a ranker, one that saw clicks."""
    root = tmp_path_factory.mktemp("runs")

    def learn(name, rows, **more):
        data = write(root / f"{name}.jsonl", rows)
        config = QUICK | {"data": str(data), "model": str(tiny_model("qwen2")), "dtype": "float32", "max_length": 48}
        config |= {"out": str(root / name), **more}
        recipe.train(RunConfig.from_flat(config), say=lambda line: None, quiet=True)

    learn("moods", labelled())
    learn("several", several(), template="Instruction: sort what follows by topic.\nTitle: {text}\nTopic:")
    learn("pairs", pairs())
    learn("clicks", clicked(), group="site,day", text="headline", clicks="clicks", impressions="impressions")
    return root


@pytest.fixture(scope="module")
def predictors(folder):
    return load([folder / name for name in RUNS], say=lambda line: None)


@contextmanager
def client_of(predictors, token=None, headers=None, **settings):
    app = api.create_app(predictors, ServeConfig(**settings), token=token)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False, headers=headers) as client:
        yield client


@pytest.fixture(scope="module")
def client(predictors):
    with client_of(predictors) as client:
        yield client


@pytest.fixture
def one(predictors):
    return {"moods": predictors["moods"]}


@contextmanager
def running(app):
    """An application behind uvicorn, as it is served."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


def post(client, path, **body):
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(answer, status):
    """The words of an answer that is none."""
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["code"] == status
    return answer.json()["error"]["message"]


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["moods", "several"])
def test_classify_says_what_the_predictor_says(client, folder, run):
    alone = Predictor(folder / run)
    expected = [alone.predict_proba([text])[0] for text in TEXTS]
    results = post(client, "/v1/classify", run=run, texts=TEXTS)["results"]
    assert all(tuple(r["probabilities"]) == alone.task.label_names for r in results)
    np.testing.assert_allclose([list(r["probabilities"].values()) for r in results], expected, rtol=0, atol=1e-6)
    names = alone.predict(TEXTS)
    assert [r["labels"] for r in results] == [[n] if isinstance(n, str) else n for n in names]
    assert [r["cut"] for r in results] == [len(text) > 200 for text in TEXTS]
    assert np.ptp(expected, axis=0).max() > 0.01  # a constant model would agree with anything


@pytest.mark.parametrize("run", ["pairs", "clicks"])
def test_rank_says_what_the_predictor_says(client, folder, run):
    expected = Predictor(folder / run).rank(SHOWN, "a context")
    found = post(client, "/v1/rank", run=run, titles=SHOWN, context="a context")
    assert found["run"] == run
    for place, (r, e) in enumerate(zip(found["results"], expected, strict=True), 1):
        assert (r["rank"], r["title"], SHOWN[r["index"]]) == (place, e.text, e.text)
        assert r["score"] == pytest.approx(e.score, abs=1e-5)
        if run == "pairs":
            assert r["lift"] is r["lift_low"] is r["lift_high"] is r["beats"] is None
        else:
            told = [r["lift"], r["lift_low"], r["lift_high"], *r["beats"]]
            assert told == pytest.approx([e.lift, e.lift_low, e.lift_high, *e.beats], abs=1e-5)


def test_equal_titles_keep_their_places(client):
    results = post(client, "/v1/rank", run="pairs", titles=["same", "good title", "same"])["results"]
    assert [r["index"] for r in results if r["title"] == "same"] == [0, 2]


@pytest.mark.parametrize("run", ["moods", "several", "pairs", "clicks"])
def test_score_gives_the_raw_scores_of_any_run(client, folder, run):
    alone = Predictor(folder / run)
    contexts = [None, "one", *[None] * (len(TEXTS) - 2)]
    found = post(client, "/v1/score", run=run, texts=TEXTS, contexts=contexts)
    expected = np.concatenate([alone.scores([t], [c]) for t, c in zip(TEXTS, contexts, strict=True)])
    np.testing.assert_allclose(found["scores"], expected, rtol=1e-5, atol=1e-5)  # float32, in other company
    assert found["labels"] == list(alone.task.label_names)


def test_sixteen_clients_at_once_get_what_each_would_get_alone(folder):
    """Texts of all runs, short, long, shared and their own, meet in rounds; nothing rubs off.

    In float64, so that what is left is no rounding of matrix products of another size.
    """
    predictors = load([folder / name for name in RUNS], say=lambda line: None)
    for predictor in predictors.values():
        predictor.scorer.double()
    words = ["good", "bad", "so", "title", "headline", "number", "the", "news", "标题"]

    def requests(seed):
        rng = np.random.default_rng(seed)
        for _ in range(3):
            texts = [" ".join(rng.choice(words, rng.integers(0, 30))) for _ in range(rng.integers(1, 4))]
            yield str(rng.choice(RUNS)), texts, [None if rng.random() < 0.5 else "a context " * 5 for _ in texts]

    asked = {seed: list(requests(seed)) for seed in range(16)}
    expected = {
        seed: [
            np.concatenate([predictors[run].scores([t], [c]) for t, c in zip(texts, contexts, strict=True)])
            for run, texts, contexts in each
        ]
        for seed, each in asked.items()
    }
    with client_of(predictors, round_tokens=256) as client:
        together = threading.Barrier(16)

        def run_client(seed):
            together.wait(10)
            return [
                post(client, "/v1/score", run=run, texts=texts, contexts=contexts)["scores"]
                for run, texts, contexts in asked[seed]
            ]

        with ThreadPoolExecutor(16) as pool:
            for seed, found in zip(asked, pool.map(run_client, asked), strict=True):
                for scores, known in zip(found, expected[seed], strict=True):
                    np.testing.assert_allclose(scores, known, rtol=0, atol=1e-6)
        seen = figures(client)
    assert seen["loracle_rounds"] < seen["loracle_requests_total", "/v1/score", "200"] == 16 * 3


def test_runs_of_one_base_hold_it_once(predictors, folder, tiny_model):
    def held(scorers):
        return sum({w.data_ptr(): w.nbytes for s in scorers for w in s.parameters()}.values())

    base = sum(w.nbytes for n, w in load_file(tiny_model("qwen2") / "model.safetensors").items() if "layers" in n)
    apart = [Predictor(folder / name) for name in ("moods", "pairs")]
    assert base > 30_000
    assert held(p.scorer for p in predictors.values()) <= sum(held([p.scorer]) for p in predictors.values()) - 3 * base
    before = held(p.scorer for p in apart)
    assert share_weights(p.scorer for p in apart) == before - held(p.scorer for p in apart) >= base
    expected = [predictors[name].scores(TEXTS) for name in ("moods", "pairs")]
    for predictor, scores in zip(apart, expected, strict=True):
        np.testing.assert_array_equal(predictor.scores(TEXTS), scores)
    assert not np.allclose(*(e[:, :1] for e in expected))  # each kept its own adapter and head


OTHERS = {"chunks": ("qwen2", {"long": "chunk", "max_length": 16}), "encoder": ("bert", {"full": True})}


@pytest.mark.parametrize("how", OTHERS)
def test_other_kinds_of_runs_are_served_alike(tiny_model, tmp_path, how):
    base, more = OTHERS[how]
    config = QUICK | {"data": str(write(tmp_path / "a.jsonl", labelled())), "model": str(tiny_model(base))}
    config |= {"out": str(tmp_path / "run"), "dtype": "float32", **more}
    recipe.train(RunConfig.from_flat(config), say=lambda line: None, quiet=True)
    predictor = Predictor(tmp_path / "run")
    with client_of({"run": predictor}, round_tokens=64) as client:
        found = post(client, "/v1/score", texts=TEXTS)["scores"]
    expected = np.concatenate([predictor.scores([text]) for text in TEXTS])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# --- vLLM's words -----------------------------------------------------------------------------------------------------


def test_classify_as_vllm_says_it(client, folder):
    alone = Predictor(folder / "moods")
    found = post(client, "/classify", model="moods", input=TEXTS[:2])
    proba = alone.predict_proba(TEXTS[:2])
    assert [(d["index"], d["label"], d["num_classes"]) for d in found["data"]] == [
        (i, label, 3) for i, label in enumerate(alone.predict(TEXTS[:2]))
    ]
    np.testing.assert_allclose([d["probs"] for d in found["data"]], proba, atol=1e-6)
    tokens = sum(len(alone.encoder.tokenizer(t, truncation=True)["input_ids"]) for t in TEXTS[:2])
    assert (found["object"], found["model"], found["usage"]["prompt_tokens"]) == ("list", "moods", tokens)
    assert re.fullmatch(r"classify-[0-9a-f]{32}", found["id"])
    assert post(client, "/classify", model="moods", input=TEXTS[0])["data"][0]["probs"] == pytest.approx(proba[0])


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_rerank_as_vllm_says_it(client, folder, path):
    expected = Predictor(folder / "clicks").rank(SHOWN, "an article")
    found = post(client, path, model="clicks", query="an article", documents=SHOWN, top_n=2)
    assert [(r["index"], r["document"]["text"]) for r in found["results"]] == [(e.index, e.text) for e in expected[:2]]
    assert [r["relevance_score"] for r in found["results"]] == pytest.approx([e.score for e in expected[:2]], abs=1e-6)
    assert len(post(client, path, model="clicks", query="", documents=SHOWN)["results"]) == 3


# --- which run --------------------------------------------------------------------------------------------------------


def test_one_run_needs_no_name_and_several_do(client, one):
    assert "name one of moods, several, pairs, clicks" in refused(client.post("/v1/score", json={"texts": ["a"]}), 422)
    with client_of(one) as alone:
        assert post(alone, "/v1/classify", texts=["a"])["run"] == "moods"


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/classify", {"run": "other", "texts": ["a"]}, 404, "there is moods"),
        ("/classify", {"model": "../moods", "input": "a"}, 404, "there is moods"),
        ("/v1/classify", {"run": "pairs", "texts": ["a"]}, 422, "pairs can rank"),
        ("/v1/rank", {"run": "moods", "titles": ["a"]}, 422, "moods can classify"),
        ("/rerank", {"model": "moods", "query": "q", "documents": ["a"]}, 422, "moods can classify"),
    ],
)
def test_another_run_or_question_is_refused(client, path, body, status, words):
    assert words in refused(client.post(path, json=body), status)


def test_the_runs_are_listed(client, tiny_model):
    models = client.get("/v1/models").json()["data"]
    assert [(m["id"], m["kind"]) for m in models] == [
        ("moods", "single"), ("several", "multi"), ("pairs", "rank"), ("clicks", "rank"),
    ]  # fmt: skip
    assert (models[0]["labels"], models[0]["base"]) == (["mid", "neg", "pos"], str(tiny_model("qwen2")))


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
    recipe.train(RunConfig.from_flat(config), say=lambda line: None, quiet=True)
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
        self.gate, self.inside, true_score = threading.Event(), threading.Event(), api.score

        def score(*args, **more):
            self.inside.set()
            assert self.gate.wait(20)
            return true_score(*args, **more)

        monkeypatch.setattr(api, "score", score)


def test_a_context_counts_with_every_title(predictors):
    with client_of({"pairs": predictors["pairs"]}, max_body=1000, max_chars=500) as client:
        words = refused(client.post("/v1/rank", json={"titles": ["a"] * 4, "context": "c" * 300}), 422)
        assert words == "at most 1,000 characters, the context counted with each text"
        assert post(client, "/v1/rank", titles=["a"] * 3, context="c" * 300)


@pytest.mark.parametrize("limit", [{"queue": 1}, {"queue_texts": 1, "max_texts": 1}, {"queue_tokens": 3}])
def test_what_finds_no_room_is_told_to_come_again(one, monkeypatch, limit):
    held = Held(monkeypatch)
    with client_of(one, **limit) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, client, "/v1/classify", texts=["good"])
        assert held.inside.wait(10)
        answer = client.post("/v1/classify", json={"texts": ["good"]})
        assert "try again" in refused(answer, 429)
        assert int(answer.headers["Retry-After"]) >= 1
        assert client.get("/healthz").status_code == 200
        held.gate.set()
        assert first.result(10)["results"]
        assert post(client, "/v1/classify", texts=["good"])


def test_what_is_not_answered_in_time_is_given_up(one, monkeypatch):
    held = Held(monkeypatch)
    with client_of(one, deadline=0.2, queue=1) as client:
        answer = client.post("/v1/classify", json={"texts": ["good"]})
        assert "within 0.2 seconds" in refused(answer, 503)
        assert answer.headers["Retry-After"]
        assert refused(client.get("/readyz"), 503)
        assert figures(client)["loracle_queue_texts"] == 0
        held.gate.set()
        assert post(client, "/v1/classify", texts=["good"])
        assert client.get("/readyz").json() == {"status": "ok"}


def test_a_crash_answers_503_and_the_next_request_is_served(one, monkeypatch, caplog):
    true_score, broken = api.score, [RuntimeError("secret")]

    def score(*args, **more):
        if broken:
            raise broken.pop()
        return true_score(*args, **more)

    monkeypatch.setattr(api, "score", score)
    with client_of(one) as client:
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

    monkeypatch.setattr(api, "probabilities", broken)
    with client_of(one) as client:
        answer = client.post("/v1/classify", json={"texts": ["a secret text"]})
    assert "a bug" in refused(answer, 500)
    assert "KeyError in" in caplog.text
    assert "test_routes.py" in caplog.text
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


# --- metrics, documents, page -----------------------------------------------------------------------------------------


def figures(client):
    """Samples of /metrics: by name, or by name and labels where there are some."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [s for family in families for s in family.samples]
    return {(s.name, *(v for _, v in sorted(s.labels.items()))) if s.labels else s.name: s.value for s in samples}


def test_metrics_count_what_was_asked_and_answered(predictors):
    with client_of(predictors) as client:
        found = post(client, "/v1/classify", run="several", texts=TEXTS)["results"]
        ranked = post(client, "/v1/rank", run="pairs", titles=SHOWN)["results"]
        client.post("/v1/classify", json={"run": "no", "texts": ["a"]})
        client.get("/secret")
        seen = figures(client)
        page = client.get("/metrics").text
    assert seen["loracle_requests_total", "/v1/classify", "200"] == 1
    assert seen["loracle_requests_total", "/v1/classify", "404"] == 1
    assert seen["loracle_requests_total", "other", "404"] == 1
    assert seen["loracle_request_seconds_count", "/v1/classify", "200"] == 1
    assert 0 < seen["loracle_request_seconds_sum", "/v1/classify", "200"] < 60
    assert (seen["loracle_texts_total", "several"], seen["loracle_texts_total", "pairs"]) == (len(TEXTS), len(SHOWN))
    encoded = predictors["several"].encode(TEXTS)
    assert seen["loracle_tokens_total", "several"] == sum(e.tokens for e in encoded)
    assert seen["loracle_texts_cut_total", "several"] == 1
    short = sum(e.tokens <= 32 for e in encoded)
    assert seen["loracle_text_tokens_bucket", "32.0", "several"] == short < len(TEXTS)
    sure = sum(max(r["probabilities"].values()) <= 0.6 for r in found)
    assert seen["loracle_top_probability_bucket", "0.6", "several"] == sure
    given = [label for r in found for label in r["labels"]]
    assert sum(v for k, v in seen.items() if k[0] == "loracle_labels_total") == len(given)
    assert seen["loracle_score_bucket", "0.0", "pairs"] == sum(r["score"] <= 0 for r in ranked)
    assert seen["loracle_queue_texts"] == seen["loracle_queue_tokens"] == seen["loracle_rounds_failed"] == 0
    assert "secret" not in page
    assert "good day" not in page


def test_every_route_of_the_document_has_an_example_and_its_problems(client):
    document = client.get("/openapi.json").json()
    assert len(document["paths"]) >= 10
    for path, routes in document["paths"].items():
        for method, route in routes.items():
            assert {"401", "413", "422", "429", "503"} <= route["responses"].keys(), path
            if method == "post":
                name = route["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
                (example,) = document["components"]["schemas"][name]["examples"]
                sent = example | {"model" if "model" in example else "run": "pairs" if "rank" in path else "moods"}
                assert client.post(path, json=sent).status_code == 200, path


@pytest.mark.parametrize("run", ["moods", "clicks"])
def test_nothing_that_the_document_allows_or_forbids_breaks_anything(predictors, run):
    """Schemathesis, cut to a few seconds: no answer is a 5xx, and each is one that the document describes."""
    app = api.create_app({run: predictors[run]}, ServeConfig(max_texts=8, max_chars=500))
    statuses = set()

    def check(operation, mode):
        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=10, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        def tried(case):
            answer = case.call()
            statuses.add(answer.status_code)
            # What is of the right shape may still be too much, or a question for another kind of run.
            case.validate_response(answer, excluded_checks=[positive_data_acceptance])

        tried()

    with running(app) as address:
        for found in schemathesis.openapi.from_url(f"{address}/openapi.json").get_all_operations():
            operation = found.ok()
            check(operation, GenerationMode.POSITIVE)
            if operation.method == "post":
                check(operation, GenerationMode.NEGATIVE)
    assert {200, 422} <= statuses


def test_the_page_is_one_file_that_asks_nobody_else(client):
    answer = client.get("/")
    assert answer.headers["Content-Type"].startswith("text/html")
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "'unsafe-inline'" not in policy.split("script-src")[1].split(";")[0]
    assert not re.search(
        r"https?:|//|innerHTML|insertAdjacentHTML|document\.write|eval\(", answer.text.split("// Labels")[0]
    )
    assert not re.search(r"https?:|innerHTML|insertAdjacentHTML|document\.write|eval\(", answer.text)


def test_the_page_shows_hostile_labels_and_titles_as_they_are(browser, predictors, tiny_model, tmp_path):
    hostile = "<img src=x onerror=console.error(1)>"
    rows = [row | {"label": hostile if row["label"] == "pos" else row["label"]} for row in labelled()]
    config = QUICK | {"data": str(write(tmp_path / "a.jsonl", rows)), "model": str(tiny_model("qwen2")), "epochs": 6.0}
    run = recipe.train(RunConfig.from_flat(config | {"out": str(tmp_path / "run")}), say=lambda line: None, quiet=True)
    app = api.create_app({"clicks": predictors["clicks"], "run": Predictor(run)}, ServeConfig(), token="token")
    with running(app) as address:
        page = browser.new_page()
        said, asked = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.get_by_role("alert").filter(has_text="send the token").wait_for()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.get_by_label("Token").fill("token")
        titles = page.locator("#text")
        titles.fill(f"{hostile}\n\na good headline")
        page.get_by_role("button", name="Go").click()
        page.get_by_role("cell", name=hostile, exact=True).wait_for()
        shown = page.locator("tr td:nth-child(2)").all_text_contents()
        assert shown == [r.text for r in predictors["clicks"].rank([hostile, "a good headline"])]
        page.locator("#run").select_option("run")
        titles.fill("good number 7")
        page.get_by_role("button", name="Go").click()
        page.get_by_role("cell", name=f"{hostile} ✓").wait_for()
        assert page.locator("tr").count() == 4
        assert page.locator("img").count() == 0
        assert said == []
        assert all(url.startswith(address) for url in asked)
        page.close()
