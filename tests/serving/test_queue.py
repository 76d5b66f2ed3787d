"""The request queue, with a fake model whose scores are sums of token ids."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as Late
from types import SimpleNamespace

import numpy as np
import pytest

from loracle.serving.queue import QueueFull, RequestQueue, ScoringFailed
from loracle.text.packing import micro_batches, pack
from loracle.text.tokenize import Encoded


def text(*ids):
    return Encoded(chunks=(ids,), starts=(0,))


def of_length(n, seed=0):
    return text(*(1000 * seed + i for i in range(n)))


class Model:
    """Scores a text by the sum of its ids, waits at a gate, and records every micro-batch."""

    def __init__(self, *, open=True):
        self.gate, self.batches, self.threads = threading.Event(), [], set()
        self.inside = threading.Event()
        self.fail: BaseException | None = None
        if open:
            self.gate.set()

    def __call__(self, run, texts):
        self.inside.set()
        assert self.gate.wait(10)
        self.batches.append((run, texts))
        self.threads.add(threading.current_thread().name)
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error
        return np.array([[sum(e.chunks[0]), len(run)] for e in texts], dtype=np.float32)


def queue_for(model, **more):
    settings = {
        "tokens_per_micro_batch": 64,
        "max_texts": 100,
        "max_tokens": 10_000,
        "max_wait": 60.0,
        "drain_timeout": 5.0,
    } | more
    return RequestQueue(model, **settings)


def expected(texts, run="a"):
    return [[sum(e.chunks[0]), len(run)] for e in texts]


def test_each_request_gets_its_scores_in_order():
    model = Model(open=False)
    requests = [[of_length(1 + (7 * i + j) % 30, seed=i) for j in range(1 + i % 5)] for i in range(40)]
    with queue_for(model, max_texts=1000) as queue:
        futures = [queue.submit("a" * (1 + i % 2), texts) for i, texts in enumerate(requests)]
        model.gate.set()
        for i, (future, texts) in enumerate(zip(futures, requests, strict=True)):
            np.testing.assert_array_equal(future.result(10), expected(texts, "a" * (1 + i % 2)))
        assert (queue.texts, queue.tokens) == (0, 0)
    assert model.threads == {"loracle-scorer"}
    assert len(model.batches) < len(requests)  # requests shared micro-batches


def test_simultaneous_requests_share_a_micro_batch(monkeypatch):
    monkeypatch.setattr("loracle.serving.queue.QUIET_SECONDS", 0.5)
    monkeypatch.setattr("loracle.serving.queue.MAX_GATHER_SECONDS", 10.0)
    model = Model()
    with queue_for(model) as queue:
        futures = [queue.submit("a", [text(i)]) for i in range(3)]
        assert [f.result(5)[0, 0] for f in futures] == [0, 1, 2]
    assert len(model.batches) == 1


@pytest.mark.slow
def test_cancelling_while_gathering_keeps_worker_alive(monkeypatch):
    monkeypatch.setattr("loracle.serving.queue.QUIET_SECONDS", 0.2)
    monkeypatch.setattr("loracle.serving.queue.MAX_GATHER_SECONDS", 10.0)
    model = Model()
    with queue_for(model) as queue:
        assert queue.submit("a", [text(1)]).cancel()
        time.sleep(0.5)
        assert queue.ready(1)
        assert queue.submit("a", [text(2)]).result(5)[0, 0] == 2
    assert len(model.batches) == 1


def test_micro_batches_fill_but_never_exceed_budget():
    model = Model(open=False)
    with queue_for(model) as queue:
        futures = [queue.submit("a", [of_length(10, seed=10 * i + j) for j in range(3)]) for i in range(20)]
        futures.append(queue.submit("a", [of_length(200, seed=500)]))
        model.gate.set()
        for future in futures:
            future.result(10)
    sizes = [pack(texts).tokens for _, texts in model.batches]
    assert sum(sizes) == 20 * 3 * 10 + 200
    assert all(size <= 64 or len(texts) == 1 for size, (_, texts) in zip(sizes, model.batches, strict=True))
    assert sorted(sizes)[2:-1] == [60] * (len(sizes) - 3)


def test_shared_prefix_counts_once_in_budget():
    before = tuple(range(5000, 5040))
    texts = [Encoded(chunks=((*before, i, i + 1),), starts=(40,)) for i in range(0, 20, 2)]
    model = Model(open=False)
    with queue_for(model) as queue:
        first = queue.submit("a", [text(1)])
        assert model.inside.wait(5)
        future = queue.submit("a", texts)
        model.gate.set()
        first.result(5)
        np.testing.assert_array_equal(future.result(5), expected(texts))
    assert [len(texts) for _, texts in model.batches] == [1, 10]  # 40 + 20 rows for 420 tokens


def test_micro_batch_holds_one_run_only():
    model = Model(open=False)
    with queue_for(model) as queue:
        futures = [queue.submit("ab"[i % 2], [text(i)]) for i in range(10)]
        model.gate.set()
        assert [f.result(5)[0, 0] for f in futures] == list(range(10))
    assert len(model.batches) <= 4
    assert {len(texts) for run, texts in model.batches if run == "b"} == {5}


def test_large_request_does_not_delay_small_one():
    model = Model(open=False)
    ends = []
    with queue_for(model) as queue:
        large = queue.submit("a", [of_length(60, seed=i) for i in range(20)])
        large.add_done_callback(lambda _: ends.append("large"))
        small = queue.submit("a", [text(1, 2)])
        small.add_done_callback(lambda _: ends.append("small"))
        model.gate.set()
        large.result(10)
        small.result(10)
    assert ends == ["small", "large"]
    assert [len(texts) for _, texts in model.batches[:2]] != [
        1,
        1,
    ]  # the small one shared a micro-batch with the large one


@pytest.mark.parametrize("limit", [{"max_texts": 4}, {"max_tokens": 40}])
def test_full_queue_rejects_until_there_is_room(limit):
    model = Model(open=False)
    with queue_for(model, **limit) as queue:
        futures = [queue.submit("a", [of_length(10, seed=i)]) for i in range(4)]
        assert model.inside.wait(5)
        with pytest.raises(QueueFull):
            queue.submit("a", [of_length(10, seed=9)])
        assert queue.has_room(1) == ("max_tokens" in limit)
        assert queue.texts == 4
        model.gate.set()
        for future in futures:
            future.result(5)
        assert queue.submit("a", [text(3)]).result(5)[0, 0] == 3


def slow(seconds, model, monkeypatch):
    """The model with a fake clock: each micro-batch takes ``seconds``, a number or one for each micro-batch."""
    clock = [0.0]
    monkeypatch.setattr("loracle.serving.queue.time", SimpleNamespace(monotonic=lambda: clock[0]))
    each = itertools.repeat(seconds) if isinstance(seconds, float) else iter(seconds)

    def score(run, texts):
        clock[0] += next(each)
        return model(run, texts)

    return score


def test_request_beyond_max_wait_is_rejected(monkeypatch):
    """At 120 rows/s. A large request delays others by one micro-batch, and the first one does not set the speed."""
    model = Model()
    with queue_for(slow(0.5, model, monkeypatch), max_wait=1.2) as queue:
        queue.submit("a", [text(1)]).result(5)
        assert queue.expected_wait() == 0
        queue.submit("a", [of_length(60)]).result(5)
        model.gate.clear()
        model.inside.clear()
        futures = [queue.submit("a", [of_length(60, seed=1)])]
        assert model.inside.wait(5)
        assert queue.expected_wait() == pytest.approx(0.5)
        futures.append(queue.submit("a", [of_length(60, seed=i) for i in range(2, 9)]))
        assert queue.expected_wait() == pytest.approx(0.5 + 64 / 120)
        futures.append(queue.submit("a", [of_length(30, seed=9)]))
        assert queue.expected_wait() == pytest.approx(0.5 + 64 / 120 + 30 / 120)
        assert not queue.has_room(1)
        with pytest.raises(QueueFull):
            queue.submit("a", [text(2)])
        model.gate.set()
        for future in futures:
            future.result(5)
        assert queue.has_room(1)


def test_slow_model_may_fill_one_micro_batch(monkeypatch):
    """A micro-batch takes 10 s, so every wait exceeds the limit of 0.5 s."""
    model = Model()
    with queue_for(slow(10.0, model, monkeypatch), max_wait=0.5) as queue:
        for _ in range(2):
            queue.submit("a", [of_length(64)]).result(5)
        model.gate.clear()
        model.inside.clear()
        futures = [queue.submit("a", [of_length(4, seed=1)])]
        assert model.inside.wait(5)
        futures += [queue.submit("a", [of_length(20, seed=i)]) for i in range(2, 6)]
        with pytest.raises(QueueFull):
            queue.submit("a", [of_length(20, seed=6)])
        model.gate.set()
        for future in futures:
            future.result(5)


def test_expected_wait_counts_computed_rows(monkeypatch):
    """A context of 40 tokens that ten titles share counts once, also in the speed."""
    before = tuple(range(5000, 5040))
    titles = [Encoded(chunks=((*before, i, i + 1),), starts=(40,)) for i in range(0, 20, 2)]
    model = Model()
    with queue_for(slow(0.5, model, monkeypatch)) as queue:
        for _ in range(2):
            queue.submit("a", titles).result(5)
        model.gate.clear()
        model.inside.clear()
        futures = [queue.submit("a", titles)]
        assert model.inside.wait(5)
        futures.append(queue.submit("a", titles))
        assert queue.expected_wait() == pytest.approx(2 * 0.5)  # two micro-batches of 60 rows at 120 rows/s
        model.gate.set()
        for future in futures:
            np.testing.assert_array_equal(future.result(5), expected(titles))


def test_small_micro_batches_can_raise_low_speed(monkeypatch):
    """Otherwise too low a speed would admit only small micro-batches and stay too low."""
    model = Model()
    with queue_for(slow([9.0, 10.0, 10.0, 0.01, 0.1], model, monkeypatch), max_wait=60.0) as queue:
        speeds = []
        for n in (60, 60, 4, 4, 4):
            queue.submit("a", [of_length(n)]).result(5)
            speeds.append(queue._speed)
    assert speeds == [None, pytest.approx(6), pytest.approx(6), pytest.approx(400), pytest.approx(400)]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError()])
def test_error_while_batching_fails_waiting_requests_only(monkeypatch, error):
    model = Model()
    broken = True

    def fail_once(*args):
        if broken:
            raise error
        return micro_batches(*args)

    monkeypatch.setattr("loracle.serving.queue.micro_batches", fail_once)
    with queue_for(model) as queue:
        with pytest.raises(ScoringFailed):
            queue.submit("a", [text(1)]).result(5)
        broken = False
        assert queue.submit("a", [text(2)]).result(5)[0, 0] == 2
        assert (queue.failed_batches, queue.texts, queue.ready(1)) == (1, 0, True)


def test_oversized_request_is_accepted_when_queue_is_empty():
    with queue_for(Model(), max_tokens=8) as queue:
        assert queue.submit("a", [of_length(20)]).result(5).shape == (1, 2)


def test_cancelled_request_frees_slot_and_is_not_scored():
    model = Model(open=False)
    with queue_for(model, max_texts=2) as queue:
        first = queue.submit("a", [text(1)])
        assert model.inside.wait(5)
        late = queue.submit("a", [text(2)])
        with pytest.raises(Late):
            late.result(0.05)
        assert late.cancel()
        other = queue.submit("a", [text(3)])
        model.gate.set()
        assert (first.result(5)[0, 0], other.result(5)[0, 0]) == (1, 3)
        with pytest.raises(CancelledError):
            late.result()
        assert queue.texts == 0
    assert [e.chunks for _, texts in model.batches for e in texts] == [((1,),), ((3,),)]


@pytest.mark.parametrize("error", [RuntimeError("secret text"), MemoryError(), SystemExit(3)])
def test_failed_micro_batch_does_not_affect_the_next(error, caplog):
    model = Model(open=False)
    with queue_for(model) as queue:
        first = queue.submit("a", [text(1)])
        assert model.inside.wait(5)
        model.fail = error
        neighbour = queue.submit("a", [text(2)])  # in the next micro-batch
        model.gate.set()
        with pytest.raises(ScoringFailed):
            first.result(5)
        assert neighbour.result(5)[0, 0] == 2
        assert queue.submit("a", [text(3)]).result(5)[0, 0] == 3
        assert (queue.failed_batches, queue.batches, queue.texts) == (1, 3, 0)
        assert queue.ready(1)
    assert type(error).__name__ in caplog.text
    assert "secret" not in caplog.text


def test_request_of_many_micro_batches_fails_whole():
    model = Model(open=False)
    with queue_for(model) as queue:
        future = queue.submit("a", [of_length(60, seed=i) for i in range(5)])
        assert model.inside.wait(5)
        model.fail = RuntimeError()
        model.gate.set()
        with pytest.raises(ScoringFailed):
            future.result(5)
        assert queue.submit("a", [text(7)]).result(5)[0, 0] == 7
    assert len(model.batches) == 2  # the other four texts are not scored


@pytest.mark.parametrize("scores", [np.full((1, 1), np.nan), np.zeros((2, 1)), np.zeros((0, 1)), None])
def test_invalid_scores_fail_the_request(scores):
    with queue_for(lambda run, texts: scores) as queue:
        for _ in range(2):  # the worker goes on
            with pytest.raises(ScoringFailed):
                queue.submit("a", [text(1)]).result(5)


def test_stop_finishes_waiting_and_rejects_new_requests():
    model = Model(open=False)
    queue = queue_for(model)
    queue.start()
    futures = [queue.submit("a", [of_length(60, seed=i)]) for i in range(5)]
    threading.Timer(0.1, model.gate.set).start()
    queue.stop()
    np.testing.assert_array_equal([f.result(0) for f in futures], [expected([of_length(60, seed=i)]) for i in range(5)])
    with pytest.raises(ScoringFailed, match="stopping"):
        queue.submit("a", [text(1)])
    assert not queue.ready(1)


def test_stop_gives_up_after_drain_timeout():
    model = Model(open=False)
    queue = queue_for(model, drain_timeout=0.1)
    queue.start()
    futures = [queue.submit("a", [of_length(60, seed=i)]) for i in range(3)]
    begun = time.monotonic()
    queue.stop()
    assert time.monotonic() - begun < 2
    for future in futures:  # the running one and the waiting ones
        with pytest.raises(ScoringFailed):
            future.result(0)
    model.gate.set()


def test_stuck_worker_is_not_ready():
    model = Model(open=False)
    with queue_for(model) as queue:
        assert queue.ready(0.05)
        future = queue.submit("a", [text(1)])
        assert model.inside.wait(5)
        time.sleep(0.1)
        assert queue.ready(10)
        assert not queue.ready(0.05)
        model.gate.set()
        future.result(5)
        assert queue.ready(0.05)


def test_empty_request_is_an_error():
    with queue_for(Model()) as queue, pytest.raises(ValueError, match="no texts"):
        queue.submit("a", [])
