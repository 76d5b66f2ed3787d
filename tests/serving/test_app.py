"""HTTP answers: equal to ``Predictor``'s whatever arrives beside them, and as the document says."""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import schemathesis
from asking import RUNS, SHOWN, TEXTS, client_of, figures, post, refused, running
from hypothesis import HealthCheck, Phase, given, settings
from safetensors.torch import load_file
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from small import QUICK, labelled, write

from loracle import pipeline
from loracle.config import RunConfig, ServeConfig
from loracle.evaluation import drift
from loracle.models.build import share_weights
from loracle.runs.predictor import Predictor
from loracle.serving import app
from loracle.serving.server import load

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
    predictors = load([folder / name for name in RUNS], log=lambda line: None)
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
    pipeline.train(RunConfig.from_flat(config), log=lambda line: None, quiet=True)
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
    assert post(client, "/classify", model="moods", input=TEXTS[0])["data"][0]["probs"] == pytest.approx(
        proba[0], abs=1e-6
    )


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_rerank_as_vllm_says_it(client, folder, path):
    expected = Predictor(folder / "clicks").rank(SHOWN, "an article")
    found = post(client, path, model="clicks", query="an article", documents=SHOWN, top_n=2)
    assert [(r["index"], r["document"]["text"]) for r in found["results"]] == [(e.index, e.text) for e in expected[:2]]
    assert [r["relevance_score"] for r in found["results"]] == pytest.approx([e.score for e in expected[:2]], abs=1e-6)
    assert len(post(client, path, model="clicks", query="", documents=SHOWN)["results"]) == 3


@pytest.mark.parametrize("top_n", [True, "1", 1.5, -1, None])
def test_rerank_wants_a_whole_number(client, top_n):
    asked = {"model": "clicks", "query": "", "documents": SHOWN, "top_n": top_n}
    assert "top_n" in refused(client.post("/v2/rerank", json=asked), 422)


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


# --- metrics, documents, page -----------------------------------------------------------------------------------------


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


def test_drift_is_far_for_other_texts_and_within_chance_for_the_same(predictors, monkeypatch):
    """Against a reference of some texts, as training keeps one: the same texts again, then others."""
    usual = [f"{word} number {i}" + " and more" * (i % 4) for i in range(40) for word in ("good", "bad", "so")]
    other = ["so " * 40 + str(i) for i in range(240)]
    known = {}
    for run in ("several", "pairs"):
        predictor = predictors[run]
        lengths = [e.tokens for e in predictor.encode(usual)]
        known[run] = drift.reference(lengths, predictor.scores(usual), predictor.task, predictor.calibration)
        monkeypatch.setattr(predictor, "reference", known[run])
    with client_of(predictors) as client:
        before = figures(client)
        post(client, "/v1/classify", run="several", texts=usual)
        post(client, "/v1/rank", run="pairs", titles=usual)
        same = figures(client)
        post(client, "/classify", model="several", input=other)
        post(client, "/rerank", model="pairs", query="", documents=other)
        far = figures(client)
    for run, of in (
        ("several", "tokens"),
        ("several", "score"),
        ("several", "labels"),
        ("pairs", "tokens"),
        ("pairs", "score"),
    ):
        index, limit = ("loracle_drift_psi", of, run), ("loracle_drift_psi_limit", of, run)
        assert np.isnan(before[index])
        assert same[index] < 0.01 < same[limit]
        assert far[index] > far[limit] or of == "labels"
    tokens = known["pairs"].tokens
    both = (*tokens.counts[:-1], tokens.counts[-1] + len(other))  # the others are longer than any
    for name, counts in (("trained", tokens.counts), ("seen", both)):
        shown = [far[f"loracle_drift_{name}_bucket", f"{edge:.1f}", "tokens", "pairs"] for edge in tokens.edges]
        assert shown == np.cumsum(counts)[:-1].tolist()
        assert far[f"loracle_drift_{name}_count", "tokens", "pairs"] == sum(counts)
    given = [far["loracle_drift_trained_labels", label, "several"] for label in predictors["several"].task.label_names]
    assert given == list(known["several"].labels)


def test_a_run_from_before_there_was_a_reference_is_served_without(predictors, monkeypatch):
    monkeypatch.setattr(predictors["moods"], "reference", None)
    with client_of({"moods": predictors["moods"]}) as client:
        post(client, "/v1/classify", texts=["good"])
        assert not [name for name in figures(client) if "drift" in str(name)]


def test_an_old_change_is_forgotten(monkeypatch):
    from loracle.serving import metrics

    monkeypatch.setattr(metrics, "RECENT", 4)
    seen = metrics.Seen(3)
    seen.add([0, 0, 1, 2, 2, 2], total=7.0)
    assert (seen.all, seen.recent, seen.total) == ([2, 1, 3], [0, 1, 3], 7.0)


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


@pytest.mark.repeated
@pytest.mark.parametrize("run", ["moods", "clicks"])
def test_nothing_that_the_document_allows_or_forbids_breaks_anything(predictors, run, record_property):
    """Schemathesis, cut to a few seconds: no answer is a 5xx, and each is one that the document describes. ``make soak`` asks
    LORACLE_CASES of each kind, others every time.
    """
    application = app.create_app({run: predictors[run]}, ServeConfig(max_texts=8, max_chars=500))
    statuses = Counter()
    cases = os.environ.get("LORACLE_CASES")

    def check(operation, mode):
        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=int(cases or 10), deadline=None, derandomize=cases is None, database=None,
                  phases=[Phase.generate], suppress_health_check=list(HealthCheck))  # fmt: skip
        def tried(case):
            answer = case.call()
            statuses[answer.status_code] += 1
            # What is of the right shape may still be too much, or a question for another kind of run.
            case.validate_response(answer, excluded_checks=[positive_data_acceptance])

        tried()

    with running(application) as address:
        for found in schemathesis.openapi.from_url(f"{address}/openapi.json").get_all_operations():
            operation = found.ok()
            check(operation, GenerationMode.POSITIVE)
            if operation.method == "post":
                check(operation, GenerationMode.NEGATIVE)
    record_property("answers", str(dict(sorted(statuses.items()))))
    assert {200, 422} <= statuses.keys()


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


@pytest.mark.browser
def test_the_page_shows_hostile_labels_and_titles_as_they_are(browser, predictors, tiny_model, tmp_path):
    hostile = "<img src=x onerror=console.error(1)>"
    rows = [row | {"label": hostile if row["label"] == "pos" else row["label"]} for row in labelled()]
    config = QUICK | {"data": str(write(tmp_path / "a.jsonl", rows)), "model": str(tiny_model("qwen2")), "epochs": 6.0}
    run = pipeline.train(
        RunConfig.from_flat(config | {"out": str(tmp_path / "run")}), log=lambda line: None, quiet=True
    )
    application = app.create_app({"clicks": predictors["clicks"], "run": Predictor(run)}, ServeConfig(), token="token")
    with running(application) as address:
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
