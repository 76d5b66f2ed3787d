"""HTTP answers equal those of ``Predictor``, also under concurrency, and match the OpenAPI document."""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from safetensors.torch import load_file
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serving_client import RUNS, TEXTS, TITLES, client_for, error_of, post, read_metrics, serve_on_port
from small import QUICK, labelled, write

from loracle import pipeline
from loracle.config import RunConfig, ServeConfig
from loracle.models.build import share_weights
from loracle.runs.predictor import Predictor
from loracle.serving import app
from loracle.serving.server import load

# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("run", ["moods", "several"])
def test_classify_equals_predictor(client, folder, run):
    alone = Predictor(folder / run)
    expected = [alone.predict_proba([text])[0] for text in TEXTS]
    results = post(client, "/v1/classify", run=run, texts=TEXTS)["results"]
    assert all(tuple(r["probabilities"]) == alone.task.label_names for r in results)
    np.testing.assert_allclose([list(r["probabilities"].values()) for r in results], expected, rtol=0, atol=1e-6)
    names = alone.predict(TEXTS)
    assert [r["labels"] for r in results] == [[n] if isinstance(n, str) else n for n in names]
    assert [r["truncated"] for r in results] == [len(text) > 200 for text in TEXTS]
    assert np.ptp(expected, axis=0).max() > 0.01  # a constant model would agree with anything


@pytest.mark.slow
@pytest.mark.parametrize("run", ["pairs", "clicks"])
def test_rank_equals_predictor(client, folder, run):
    expected = Predictor(folder / run).rank(TITLES, "a context")
    answer = post(client, "/v1/rank", run=run, titles=TITLES, context="a context")
    assert answer["run"] == run
    for place, (r, e) in enumerate(zip(answer["results"], expected, strict=True), 1):
        assert (r["rank"], r["title"], TITLES[r["index"]]) == (place, e.text, e.text)
        assert r["score"] == pytest.approx(e.score, abs=1e-5)
        if run == "pairs":
            assert r["lift"] is r["lift_low"] is r["lift_high"] is r["beats"] is None
        else:
            values = [r["lift"], r["lift_low"], r["lift_high"], *r["beats"]]
            assert values == pytest.approx([e.lift, e.lift_low, e.lift_high, *e.beats], abs=1e-5)


def test_equal_titles_keep_their_order(client):
    results = post(client, "/v1/rank", run="pairs", titles=["same", "good title", "same"])["results"]
    assert [r["index"] for r in results if r["title"] == "same"] == [0, 2]


@pytest.mark.parametrize("run", ["moods", "several", "pairs", "clicks"])
def test_score_equals_raw_scores_of_any_run(client, folder, run):
    alone = Predictor(folder / run)
    contexts = [None, "one", *[None] * (len(TEXTS) - 2)]
    answer = post(client, "/v1/score", run=run, texts=TEXTS, contexts=contexts)
    expected = np.concatenate([alone.scores([t], [c]) for t, c in zip(TEXTS, contexts, strict=True)])
    np.testing.assert_allclose(answer["scores"], expected, rtol=1e-5, atol=1e-5)  # float32, in other micro-batches
    assert answer["labels"] == list(alone.task.label_names)


@pytest.mark.slow
def test_concurrent_clients_get_same_scores_as_alone(folder):
    """Sixteen clients send short, long and shared texts to all runs.

    Scores are in float64, so that rounding in matrix products of other sizes does not matter.
    """
    predictors = load([folder / name for name in RUNS], log=lambda line: None)
    for predictor in predictors.values():
        predictor.scorer.double()
    words = ["good", "bad", "so", "title", "headline", "number", "the", "news", "标题"]

    def requests(seed):
        rng = np.random.default_rng(seed)
        for _ in range(3):
            texts = [" ".join(rng.choice(words, rng.integers(0, 30))) for _ in range(rng.integers(1, 4))]
            yield str(rng.choice(RUNS)), texts, [None if rng.random() < 0.5 else "a context " * 5 for _ in texts]

    sent = {seed: list(requests(seed)) for seed in range(16)}
    expected = {
        seed: [
            np.concatenate([predictors[run].scores([t], [c]) for t, c in zip(texts, contexts, strict=True)])
            for run, texts, contexts in each
        ]
        for seed, each in sent.items()
    }
    with client_for(predictors, tokens_per_micro_batch=256) as client:
        together = threading.Barrier(16)

        def run_client(seed):
            together.wait(10)
            return [
                post(client, "/v1/score", run=run, texts=texts, contexts=contexts)["scores"]
                for run, texts, contexts in sent[seed]
            ]

        with ThreadPoolExecutor(16) as pool:
            for seed, answers in zip(sent, pool.map(run_client, sent), strict=True):
                for scores, alone in zip(answers, expected[seed], strict=True):
                    np.testing.assert_allclose(scores, alone, rtol=0, atol=1e-6)
        metrics = read_metrics(client)
    assert metrics["loracle_micro_batches"] < metrics["loracle_requests_total", "/v1/score", "200"] == 16 * 3


def test_runs_of_one_base_share_weights(predictors, folder, tiny_model):
    def size_of(scorers):
        return sum({w.data_ptr(): w.nbytes for s in scorers for w in s.parameters()}.values())

    base = sum(w.nbytes for n, w in load_file(tiny_model("qwen2") / "model.safetensors").items() if "layers" in n)
    apart = [Predictor(folder / name) for name in ("moods", "pairs")]
    assert base > 30_000
    assert (
        size_of(p.scorer for p in predictors.values())
        <= sum(size_of([p.scorer]) for p in predictors.values()) - 3 * base
    )
    before = size_of(p.scorer for p in apart)
    assert share_weights(p.scorer for p in apart) == before - size_of(p.scorer for p in apart) >= base
    expected = [predictors[name].scores(TEXTS) for name in ("moods", "pairs")]
    for predictor, scores in zip(apart, expected, strict=True):
        np.testing.assert_array_equal(predictor.scores(TEXTS), scores)
    assert not np.allclose(*(e[:, :1] for e in expected))  # each kept its own adapter and head


OTHER_RUNS = {"chunks": ("qwen2", {"long": "chunk", "max_length": 16}), "encoder": ("bert", {"full": True})}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_RUNS)
def test_chunked_and_encoder_runs_equal_predictor(tiny_model, tmp_path, name):
    base, more = OTHER_RUNS[name]
    config = QUICK | {"data": str(write(tmp_path / "a.jsonl", labelled())), "model": str(tiny_model(base))}
    config |= {"out": str(tmp_path / "run"), "dtype": "float32", **more}
    pipeline.train(RunConfig.from_flat(config), log=lambda line: None, quiet=True)
    predictor = Predictor(tmp_path / "run")
    with client_for({"run": predictor}, tokens_per_micro_batch=64) as client:
        scores = post(client, "/v1/score", texts=TEXTS)["scores"]
    expected = np.concatenate([predictor.scores([text]) for text in TEXTS])
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)


# --- vLLM's API -------------------------------------------------------------------------------------------------------


def test_vllm_classify_equals_predictor(client, folder):
    alone = Predictor(folder / "moods")
    answer = post(client, "/classify", model="moods", input=TEXTS[:2])
    proba = alone.predict_proba(TEXTS[:2])
    assert [(d["index"], d["label"], d["num_classes"]) for d in answer["data"]] == [
        (i, label, 3) for i, label in enumerate(alone.predict(TEXTS[:2]))
    ]
    np.testing.assert_allclose([d["probs"] for d in answer["data"]], proba, atol=1e-6)
    tokens = sum(len(alone.encoder.tokenizer(t, truncation=True)["input_ids"]) for t in TEXTS[:2])
    assert (answer["object"], answer["model"], answer["usage"]["prompt_tokens"]) == ("list", "moods", tokens)
    assert re.fullmatch(r"classify-[0-9a-f]{32}", answer["id"])
    assert post(client, "/classify", model="moods", input=TEXTS[0])["data"][0]["probs"] == pytest.approx(
        proba[0], abs=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_vllm_rerank_equals_predictor(client, folder, path):
    expected = Predictor(folder / "clicks").rank(TITLES, "an article")
    answer = post(client, path, model="clicks", query="an article", documents=TITLES, top_n=2)
    assert [(r["index"], r["document"]["text"]) for r in answer["results"]] == [(e.index, e.text) for e in expected[:2]]
    assert [r["relevance_score"] for r in answer["results"]] == pytest.approx([e.score for e in expected[:2]], abs=1e-6)
    assert len(post(client, path, model="clicks", query="", documents=TITLES)["results"]) == 3


@pytest.mark.parametrize("top_n", [True, "1", 1.5, -1, None])
def test_rerank_rejects_invalid_top_n(client, top_n):
    body = {"model": "clicks", "query": "", "documents": TITLES, "top_n": top_n}
    assert "top_n" in error_of(client.post("/v2/rerank", json=body), 422)


# --- which run --------------------------------------------------------------------------------------------------------


def test_run_name_is_optional_for_one_run(client, one):
    message = error_of(client.post("/v1/score", json={"texts": ["a"]}), 422)
    assert all(run in message for run in RUNS)
    with client_for(one) as alone:
        assert post(alone, "/v1/classify", texts=["a"])["run"] == "moods"


@pytest.mark.parametrize(
    ("path", "body", "status", "facts"),
    [
        ("/v1/classify", {"run": "other", "texts": ["a"]}, 404, RUNS),
        ("/classify", {"model": "../moods", "input": "a"}, 404, RUNS),
        ("/v1/classify", {"run": "pairs", "texts": ["a"]}, 422, ("pairs", "rank")),
        ("/v1/rank", {"run": "moods", "titles": ["a"]}, 422, ("moods", "predict")),
        ("/rerank", {"model": "moods", "query": "q", "documents": ["a"]}, 422, ("moods", "predict")),
    ],
)
def test_unknown_run_or_wrong_command_is_rejected(client, path, body, status, facts):
    message = error_of(client.post(path, json=body), status)
    assert all(fact in message for fact in facts)


def test_models_lists_the_runs(client, tiny_model):
    models = client.get("/v1/models").json()["data"]
    assert [(m["id"], m["task"], m["command"]) for m in models] == [
        ("moods", "single_label", "predict"),
        ("several", "multi_label", "predict"),
        ("pairs", "ranking", "rank"),
        ("clicks", "click_ranking", "rank"),
    ]
    assert (models[0]["labels"], models[0]["base"]) == (["mid", "neg", "pos"], str(tiny_model("qwen2")))


# --- metrics, documents, page -----------------------------------------------------------------------------------------


def test_metrics_count_requests_texts_and_labels(predictors):
    with client_for(predictors) as client:
        classified = post(client, "/v1/classify", run="several", texts=TEXTS)["results"]
        ranked = post(client, "/v1/rank", run="pairs", titles=TITLES)["results"]
        client.post("/v1/classify", json={"run": "no", "texts": ["a"]})
        client.get("/secret")
        metrics = read_metrics(client)
        page = client.get("/metrics").text
    assert metrics["loracle_requests_total", "/v1/classify", "200"] == 1
    assert metrics["loracle_requests_total", "/v1/classify", "404"] == 1
    assert metrics["loracle_requests_total", "other", "404"] == 1
    assert metrics["loracle_request_seconds_count", "/v1/classify", "200"] == 1
    assert 0 < metrics["loracle_request_seconds_sum", "/v1/classify", "200"] < 60
    assert (metrics["loracle_texts_total", "several"], metrics["loracle_texts_total", "pairs"]) == (
        len(TEXTS),
        len(TITLES),
    )
    encoded = predictors["several"].encode(TEXTS)
    assert metrics["loracle_tokens_total", "several"] == sum(e.tokens for e in encoded)
    assert metrics["loracle_texts_truncated_total", "several"] == 1
    short = sum(e.tokens <= 32 for e in encoded)
    assert metrics["loracle_text_tokens_bucket", "32.0", "several"] == short < len(TEXTS)
    unsure = sum(max(r["probabilities"].values()) <= 0.6 for r in classified)
    assert metrics["loracle_top_probability_bucket", "0.6", "several"] == unsure
    labels = [label for r in classified for label in r["labels"]]
    assert sum(v for k, v in metrics.items() if k[0] == "loracle_labels_total") == len(labels)
    assert metrics["loracle_score_bucket", "0.0", "pairs"] == sum(r["score"] <= 0 for r in ranked)
    assert (
        metrics["loracle_queue_texts"]
        == metrics["loracle_queue_tokens"]
        == metrics["loracle_micro_batches_failed"]
        == 0
    )
    assert "secret" not in page
    assert "good day" not in page


@pytest.mark.slow
def test_drift_exceeds_limit_only_for_other_texts(predictors, monkeypatch):
    """Serve the texts of the reference again, then other texts."""
    usual = [f"{word} number {i}" + " and more" * (i % 4) for i in range(40) for word in ("good", "bad", "so")]
    other = ["so " * 40 + str(i) for i in range(240)]
    references = {}
    for run in ("several", "pairs"):
        predictor = predictors[run]
        lengths, scores, task = [e.tokens for e in predictor.encode(usual)], predictor.scores(usual), predictor.task
        references[run] = task.evaluation.reference(lengths, [scores], task, predictor.calibration)
        monkeypatch.setattr(predictor, "reference", references[run])
    with client_for(predictors) as client:
        before = read_metrics(client)
        post(client, "/v1/classify", run="several", texts=usual)
        post(client, "/v1/rank", run="pairs", titles=usual)
        same = read_metrics(client)
        post(client, "/classify", model="several", input=other)
        post(client, "/rerank", model="pairs", query="", documents=other)
        far = read_metrics(client)
    for run, feature in (
        ("several", "tokens"),
        ("several", "score"),
        ("several", "labels"),
        ("pairs", "tokens"),
        ("pairs", "score"),
    ):
        index, limit = ("loracle_drift_psi", feature, run), ("loracle_drift_psi_limit", feature, run)
        assert np.isnan(before[index])
        assert same[index] < 0.01 < same[limit]
        assert far[index] > far[limit] or feature == "labels"
    tokens = references["pairs"].tokens
    both = (*tokens.counts[:-1], tokens.counts[-1] + len(other))  # the others are longer than any
    for name, counts in (("trained", tokens.counts), ("served", both)):
        buckets = [far[f"loracle_drift_{name}_bucket", "tokens", f"{edge:.1f}", "pairs"] for edge in tokens.edges]
        assert buckets == np.cumsum(counts)[:-1].tolist()
        assert far[f"loracle_drift_{name}_count", "tokens", "pairs"] == sum(counts)
    names = predictors["several"].task.label_names
    labels = [far["loracle_drift_trained_labels", name, "several"] for name in names]
    assert labels == list(references["several"].labels)


def test_run_without_reference_has_no_drift_metrics(predictors, monkeypatch):
    monkeypatch.setattr(predictors["moods"], "reference", None)
    with client_for({"moods": predictors["moods"]}) as client:
        post(client, "/v1/classify", texts=["good"])
        assert not [name for name in read_metrics(client) if "drift" in str(name)]


def test_drift_forgets_old_values(monkeypatch):
    from loracle.serving import metrics

    monkeypatch.setattr(metrics, "RECENT", 4)
    counts = metrics.BinCounts(3)
    counts.add([0, 0, 1, 2, 2, 2], total=7.0)
    assert (counts.all, counts.recent, counts.total) == ([2, 1, 3], [0, 1, 3], 7.0)


def test_openapi_examples_work_and_errors_are_listed(client):
    document = client.get("/openapi.json").json()
    assert len(document["paths"]) >= 10
    for path, routes in document["paths"].items():
        for method, route in routes.items():
            assert {"401", "413", "422", "429", "503"} <= route["responses"].keys(), path
            if method == "post":
                name = route["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
                (example,) = document["components"]["schemas"][name]["examples"]
                body = example | {"model" if "model" in example else "run": "pairs" if "rank" in path else "moods"}
                assert client.post(path, json=body).status_code == 200, path


@pytest.mark.slow
@pytest.mark.repeated
@pytest.mark.parametrize("run", ["moods", "clicks"])
def test_generated_requests_never_cause_server_errors(predictors, run, record_property):
    """Schemathesis for a few seconds: each answer matches the document. ``make soak`` sends LORACLE_CASES random requests."""
    application = app.create_app({run: predictors[run]}, ServeConfig(max_texts=8, max_chars=500))
    statuses = Counter()
    cases = os.environ.get("LORACLE_CASES")

    def check(operation, mode):
        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=int(cases or 10), deadline=None, derandomize=cases is None, database=None,
                  phases=[Phase.generate], suppress_health_check=list(HealthCheck))  # fmt: skip
        def send(case):
            answer = case.call()
            statuses[answer.status_code] += 1
            # A request of the right shape may still be too large, or for another kind of run.
            case.validate_response(answer, excluded_checks=[positive_data_acceptance])

        send()

    with serve_on_port(application) as address:
        for result in schemathesis.openapi.from_url(f"{address}/openapi.json").get_all_operations():
            operation = result.ok()
            check(operation, GenerationMode.POSITIVE)
            if operation.method == "post":
                check(operation, GenerationMode.NEGATIVE)
    record_property("answers", str(dict(sorted(statuses.items()))))
    assert {200, 422} <= statuses.keys()


def test_page_loads_nothing_from_elsewhere(client):
    answer = client.get("/")
    assert answer.headers["Content-Type"].startswith("text/html")
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "'unsafe-inline'" not in policy.split("script-src")[1].split(";")[0]
    assert not re.search(
        r"https?:|//|innerHTML|insertAdjacentHTML|document\.write|eval\(", answer.text.split("// Labels")[0]
    )
    assert not re.search(r"https?:|innerHTML|insertAdjacentHTML|document\.write|eval\(", answer.text)


@pytest.mark.browser
def test_page_escapes_hostile_labels_and_titles(browser, predictors, tiny_model, tmp_path):
    hostile = "<img src=x onerror=console.error(1)>"
    rows = [row | {"label": hostile if row["label"] == "pos" else row["label"]} for row in labelled()]
    config = QUICK | {"data": str(write(tmp_path / "a.jsonl", rows)), "model": str(tiny_model("qwen2")), "epochs": 6.0}
    run = pipeline.train(
        RunConfig.from_flat(config | {"out": str(tmp_path / "run")}), log=lambda line: None, quiet=True
    )
    application = app.create_app({"clicks": predictors["clicks"], "run": Predictor(run)}, ServeConfig(), token="token")
    with serve_on_port(application) as address:
        page = browser.new_page()
        messages, urls = [], []
        page.on("request", lambda request: urls.append(request.url))
        page.goto(address)
        page.get_by_role("alert").filter(has_text="token").wait_for()
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.get_by_label("Token").fill("token")
        titles = page.locator("#text")
        titles.fill(f"{hostile}\n\na good headline")
        page.get_by_role("button", name="Go").click()
        page.get_by_role("cell", name=hostile, exact=True).wait_for()
        cells = page.locator("tr td:nth-child(2)").all_text_contents()
        assert cells == [r.text for r in predictors["clicks"].rank([hostile, "a good headline"])]
        page.locator("#run").select_option("run")
        titles.fill("good number 7")
        page.get_by_role("button", name="Go").click()
        page.get_by_role("cell", name=f"{hostile} ✓").wait_for()
        assert page.locator("tr").count() == 4
        assert page.locator("img").count() == 0
        assert messages == []
        assert all(url.startswith(address) for url in urls)
        page.close()
