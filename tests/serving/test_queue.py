"""The queue in front of the models, with scores that a sum gives away: no model is loaded here."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as Late
from types import SimpleNamespace

import numpy as np
import pytest

from loracle.serving.queue import Batcher, Failed, Full
from loracle.text.packing import micro_batches, pack
from loracle.text.tokenize import Encoded


def text(*ids):
    return Encoded(chunks=(ids,), starts=(0,))


def of_length(n, seed=0):
    return text(*(1000 * seed + i for i in range(n)))


class Model:
    """Scores a text by the sum of its ids; waits at a gate, and notes every round."""

    def __init__(self, *, open=True):
        self.gate, self.rounds, self.threads = threading.Event(), [], set()
        self.inside = threading.Event()
        self.fail: BaseException | None = None
        if open:
            self.gate.set()

    def __call__(self, run, texts):
        self.inside.set()
        assert self.gate.wait(10)
        self.rounds.append((run, texts))
        self.threads.add(threading.current_thread().name)
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error
        return np.array([[sum(e.chunks[0]), len(run)] for e in texts], dtype=np.float32)


def batcher(model, **more):
    settings = {
        "round_tokens": 64,
        "queue_texts": 100,
        "queue_tokens": 10_000,
        "max_wait": 60.0,
        "patience": 5.0,
    } | more
    return Batcher(model, **settings)


def expected(texts, run="a"):
    return [[sum(e.chunks[0]), len(run)] for e in texts]


def test_each_request_gets_its_own_scores_in_its_own_order():
    model = Model(open=False)
    requests = [[of_length(1 + (7 * i + j) % 30, seed=i) for j in range(1 + i % 5)] for i in range(40)]
    with batcher(model, queue_texts=1000) as queue:
        futures = [queue.submit("a" * (1 + i % 2), texts) for i, texts in enumerate(requests)]
        model.gate.set()
        for i, (future, texts) in enumerate(zip(futures, requests, strict=True)):
            np.testing.assert_array_equal(future.result(10), expected(texts, "a" * (1 + i % 2)))
        assert (queue.texts, queue.tokens) == (0, 0)
    assert model.threads == {"loracle-batcher"}
    assert len(model.rounds) < len(requests)  # they met


def test_who_asks_at_the_same_time_shares_a_round(monkeypatch):
    monkeypatch.setattr("loracle.serving.queue.QUIET", 0.5)
    monkeypatch.setattr("loracle.serving.queue.GATHERED", 10.0)
    model = Model()
    with batcher(model) as queue:
        futures = [queue.submit("a", [text(i)]) for i in range(3)]
        assert [f.result(5)[0, 0] for f in futures] == [0, 1, 2]
    assert len(model.rounds) == 1


def test_who_leaves_while_others_are_let_in_does_not_end_the_worker(monkeypatch):
    monkeypatch.setattr("loracle.serving.queue.QUIET", 0.2)
    monkeypatch.setattr("loracle.serving.queue.GATHERED", 10.0)
    model = Model()
    with batcher(model) as queue:
        assert queue.submit("a", [text(1)]).cancel()
        time.sleep(0.5)
        assert queue.ready(1)
        assert queue.submit("a", [text(2)]).result(5)[0, 0] == 2
    assert len(model.rounds) == 1


def test_no_round_is_over_the_budget_and_all_but_few_are_near_it():
    model = Model(open=False)
    with batcher(model) as queue:
        futures = [queue.submit("a", [of_length(10, seed=10 * i + j) for j in range(3)]) for i in range(20)]
        futures.append(queue.submit("a", [of_length(200, seed=500)]))
        model.gate.set()
        for future in futures:
            future.result(10)
    sizes = [pack(texts).tokens for _, texts in model.rounds]
    assert sum(sizes) == 20 * 3 * 10 + 200
    assert all(size <= 64 or len(texts) == 1 for size, (_, texts) in zip(sizes, model.rounds, strict=True))
    assert sorted(sizes)[2:-1] == [60] * (len(sizes) - 3)


def test_what_is_shared_counts_once_against_the_budget():
    before = tuple(range(5000, 5040))
    texts = [Encoded(chunks=((*before, i, i + 1),), starts=(40,)) for i in range(0, 20, 2)]
    model = Model(open=False)
    with batcher(model) as queue:
        first = queue.submit("a", [text(1)])
        assert model.inside.wait(5)
        future = queue.submit("a", texts)
        model.gate.set()
        first.result(5)
        np.testing.assert_array_equal(future.result(5), expected(texts))
    assert [len(texts) for _, texts in model.rounds] == [1, 10]  # 40 + 20 rows, though 420 tokens


def test_a_round_holds_texts_of_one_run_only():
    model = Model(open=False)
    with batcher(model) as queue:
        futures = [queue.submit("ab"[i % 2], [text(i)]) for i in range(10)]
        model.gate.set()
        assert [f.result(5)[0, 0] for f in futures] == list(range(10))
    assert len(model.rounds) <= 4
    assert {len(texts) for run, texts in model.rounds if run == "b"} == {5}


def test_a_large_request_does_not_hold_up_a_small_one():
    model = Model(open=False)
    ends = []
    with batcher(model) as queue:
        large = queue.submit("a", [of_length(60, seed=i) for i in range(20)])
        large.add_done_callback(lambda _: ends.append("large"))
        small = queue.submit("a", [text(1, 2)])
        small.add_done_callback(lambda _: ends.append("small"))
        model.gate.set()
        large.result(10)
        small.result(10)
    assert ends == ["small", "large"]
    assert [len(texts) for _, texts in model.rounds[:2]] != [1, 1]  # the small one went with a part of the large one


@pytest.mark.parametrize("limit", [{"queue_texts": 4}, {"queue_tokens": 40}])
def test_a_full_queue_refuses_and_takes_again_once_there_is_room(limit):
    model = Model(open=False)
    with batcher(model, **limit) as queue:
        futures = [queue.submit("a", [of_length(10, seed=i)]) for i in range(4)]
        assert model.inside.wait(5)
        with pytest.raises(Full):
            queue.submit("a", [of_length(10, seed=9)])
        assert queue.has_room(1) == ("queue_tokens" in limit)
        assert queue.texts == 4
        model.gate.set()
        for future in futures:
            future.result(5)
        assert queue.submit("a", [text(3)]).result(5)[0, 0] == 3


def taking(seconds, model, monkeypatch):
    """The model, each of whose rounds takes so long: a number, or one for each round."""
    clock = [0.0]
    monkeypatch.setattr("loracle.serving.queue.time", SimpleNamespace(monotonic=lambda: clock[0]))
    each = itertools.repeat(seconds) if isinstance(seconds, float) else iter(seconds)

    def score(run, texts):
        clock[0] += next(each)
        return model(run, texts)

    return score


def test_who_would_wait_too_long_for_a_turn_is_refused(monkeypatch):
    """At 120 rows/s; a request of many rounds is only one round before the others, and a first round says nothing."""
    model = Model()
    with batcher(taking(0.5, model, monkeypatch), max_wait=1.2) as queue:
        queue.submit("a", [text(1)]).result(5)
        assert queue.wait() == 0
        queue.submit("a", [of_length(60)]).result(5)
        model.gate.clear()
        model.inside.clear()
        futures = [queue.submit("a", [of_length(60, seed=1)])]
        assert model.inside.wait(5)
        assert queue.wait() == pytest.approx(0.5)
        futures.append(queue.submit("a", [of_length(60, seed=i) for i in range(2, 9)]))
        assert queue.wait() == pytest.approx(0.5 + 64 / 120)
        futures.append(queue.submit("a", [of_length(30, seed=9)]))
        assert queue.wait() == pytest.approx(0.5 + 64 / 120 + 30 / 120)
        assert not queue.has_room(1)
        with pytest.raises(Full):
            queue.submit("a", [text(2)])
        model.gate.set()
        for future in futures:
            future.result(5)
        assert queue.has_room(1)


def test_a_slow_models_next_round_may_be_filled(monkeypatch):
    """A round takes 10 s, so whoever has to wait for one waits longer than the bound; but nobody gains by an empty round."""
    model = Model()
    with batcher(taking(10.0, model, monkeypatch), max_wait=0.5) as queue:
        for _ in range(2):
            queue.submit("a", [of_length(64)]).result(5)
        model.gate.clear()
        model.inside.clear()
        futures = [queue.submit("a", [of_length(4, seed=1)])]
        assert model.inside.wait(5)
        futures += [queue.submit("a", [of_length(20, seed=i)]) for i in range(2, 6)]
        with pytest.raises(Full):
            queue.submit("a", [of_length(20, seed=6)])
        model.gate.set()
        for future in futures:
            future.result(5)


def test_a_wait_is_reckoned_in_rows_that_are_computed(monkeypatch):
    """A context of 40 tokens counts once, before ten titles and in the speed."""
    before = tuple(range(5000, 5040))
    titles = [Encoded(chunks=((*before, i, i + 1),), starts=(40,)) for i in range(0, 20, 2)]
    model = Model()
    with batcher(taking(0.5, model, monkeypatch)) as queue:
        for _ in range(2):
            queue.submit("a", titles).result(5)
        model.gate.clear()
        model.inside.clear()
        futures = [queue.submit("a", titles)]
        assert model.inside.wait(5)
        futures.append(queue.submit("a", titles))
        assert queue.wait() == pytest.approx(2 * 0.5)  # two rounds of 60 rows, at 120 rows/s
        model.gate.set()
        for future in futures:
            np.testing.assert_array_equal(future.result(5), expected(titles))


def test_a_speed_that_was_noted_too_low_rises_with_small_rounds(monkeypatch):
    """Below it only small rounds would be admitted, and nothing would ever tell that the machine is faster."""
    model = Model()
    with batcher(taking([9.0, 10.0, 10.0, 0.01, 0.1], model, monkeypatch), max_wait=60.0) as queue:
        speeds = []
        for n in (60, 60, 4, 4, 4):
            queue.submit("a", [of_length(n)]).result(5)
            speeds.append(queue._speed)
    assert speeds == [None, pytest.approx(6), pytest.approx(6), pytest.approx(400), pytest.approx(400)]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError()])
def test_a_round_that_cannot_be_made_up_fails_who_waits_and_the_next_one_works(monkeypatch, error):
    model = Model()
    broken = True

    def cut(*args):
        if broken:
            raise error
        return micro_batches(*args)

    monkeypatch.setattr("loracle.serving.queue.micro_batches", cut)
    with batcher(model) as queue:
        with pytest.raises(Failed):
            queue.submit("a", [text(1)]).result(5)
        broken = False
        assert queue.submit("a", [text(2)]).result(5)[0, 0] == 2
        assert (queue.failures, queue.texts, queue.ready(1)) == (1, 0, True)


def test_a_request_larger_than_the_queue_is_taken_when_nothing_else_waits():
    with batcher(Model(), queue_tokens=8) as queue:
        assert queue.submit("a", [of_length(20)]).result(5).shape == (1, 2)


def test_who_loses_patience_gives_the_place_back_and_is_not_scored():
    model = Model(open=False)
    with batcher(model, queue_texts=2) as queue:
        held = queue.submit("a", [text(1)])
        assert model.inside.wait(5)
        late = queue.submit("a", [text(2)])
        with pytest.raises(Late):
            late.result(0.05)
        assert late.cancel()
        other = queue.submit("a", [text(3)])
        model.gate.set()
        assert (held.result(5)[0, 0], other.result(5)[0, 0]) == (1, 3)
        with pytest.raises(CancelledError):
            late.result()
        assert queue.texts == 0
    assert [e.chunks for _, texts in model.rounds for e in texts] == [((1,),), ((3,),)]


@pytest.mark.parametrize("error", [RuntimeError("secret text"), MemoryError(), SystemExit(3)])
def test_a_broken_round_fails_what_it_held_and_the_next_one_works(error, caplog):
    model = Model(open=False)
    with batcher(model) as queue:
        first = queue.submit("a", [text(1)])
        assert model.inside.wait(5)
        model.fail = error
        neighbour = queue.submit("a", [text(2)])  # waits for the next round
        model.gate.set()
        with pytest.raises(Failed):
            first.result(5)
        assert neighbour.result(5)[0, 0] == 2
        assert queue.submit("a", [text(3)]).result(5)[0, 0] == 3
        assert (queue.failures, queue.rounds, queue.texts) == (1, 3, 0)
        assert queue.ready(1)
    assert type(error).__name__ in caplog.text
    assert "secret" not in caplog.text


def test_a_request_of_many_rounds_fails_as_a_whole():
    model = Model(open=False)
    with batcher(model) as queue:
        future = queue.submit("a", [of_length(60, seed=i) for i in range(5)])
        assert model.inside.wait(5)
        model.fail = RuntimeError()
        model.gate.set()
        with pytest.raises(Failed):
            future.result(5)
        assert queue.submit("a", [text(7)]).result(5)[0, 0] == 7
    assert len(model.rounds) == 2  # the other four texts were not scored for nobody


@pytest.mark.parametrize("scores", [np.full((1, 1), np.nan), np.zeros((2, 1)), np.zeros((0, 1)), None])
def test_scores_that_are_none_are_no_answer(scores):
    with batcher(lambda run, texts: scores) as queue:
        for _ in range(2):  # the worker lives on
            with pytest.raises(Failed):
                queue.submit("a", [text(1)]).result(5)


def test_stopping_finishes_what_waits_and_takes_nothing_more():
    model = Model(open=False)
    queue = batcher(model)
    queue.start()
    futures = [queue.submit("a", [of_length(60, seed=i)]) for i in range(5)]
    threading.Timer(0.1, model.gate.set).start()
    queue.stop()
    np.testing.assert_array_equal([f.result(0) for f in futures], [expected([of_length(60, seed=i)]) for i in range(5)])
    with pytest.raises(Failed, match="stopping"):
        queue.submit("a", [text(1)])
    assert not queue.ready(1)


def test_stopping_does_not_wait_for_ever():
    model = Model(open=False)
    queue = batcher(model, patience=0.1)
    queue.start()
    futures = [queue.submit("a", [of_length(60, seed=i)]) for i in range(3)]
    begun = time.monotonic()
    queue.stop()
    assert time.monotonic() - begun < 2
    for future in futures:  # the one at work as well as those behind it
        with pytest.raises(Failed):
            future.result(0)
    model.gate.set()


def test_a_worker_that_does_not_get_on_is_not_ready():
    model = Model(open=False)
    with batcher(model) as queue:
        assert queue.ready(0.05)
        future = queue.submit("a", [text(1)])
        assert model.inside.wait(5)
        time.sleep(0.1)
        assert queue.ready(10)
        assert not queue.ready(0.05)
        model.gate.set()
        future.result(5)
        assert queue.ready(0.05)


def test_nothing_cannot_be_scored():
    with batcher(Model()) as queue, pytest.raises(ValueError, match="nothing"):
        queue.submit("a", [])
