"""States of lower layers, computed once: the same scores and gradients, shared by processes, bounded, and safe from a kill."""

from __future__ import annotations

import multiprocessing
import shutil

import numpy as np
import pytest
import small
import torch

from loracle.errors import UserError
from loracle.models import hidden_state_cache, scoring
from loracle.models.attention.interface import plan_attention
from loracle.models.hidden_state_cache import INDEX, RECORD, STATES, StateCache, keep_lower, segment_digests
from loracle.tasks import Task
from loracle.text.tokenize import Encoded

TASK = Task(name="single_label", label_names=("a", "b", "c"))
BEFORE = tuple(range(20, 40))
TEXTS = [Encoded(chunks=((*BEFORE, *range(50, 50 + n)),), starts=(20,)) for n in (5, 2, 9, 5)]
OTHERS = [Encoded(chunks=((*BEFORE, *range(60, 60 + n)),), starts=(20,)) for n in (3, 7)]
KINDS = ["qwen2", "qwen3", "llama", "mistral", "gemma3_text"]
ABOUT = {"base": "tiny"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORACLE_CACHE", str(tmp_path / "cache"))


def made(folder, *, top=1, lora=True, dtype=torch.float32, **options):
    adapters = {"r": 4, "alpha": 8.0, "dropout": 0.0, "adapt_top": top} if lora else None
    scorer = small.new_scorer(
        folder, TASK, pad_token_id=1, dtype=dtype, device=torch.device("cpu"), lora=adapters, **options
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in scorer.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return scorer


def gradients(scorer, texts):
    scorer.zero_grad()
    scores = scorer(scorer.pack(texts))
    scores.square().sum().backward()
    return scores.detach(), {n: p.grad.clone() for n, p in scorer.named_parameters() if p.grad is not None}


def cached(scorer, below=None, **options):
    below = below or scorer.inner.config.num_hidden_layers - 1
    scorer.lower = keep_lower(scorer.inner.base_model, below, ABOUT, **({"limit": 10**9} | options))
    return scorer


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_cached_scores_and_gradients_equal_uncached(tiny_model, kind, pooling):
    scorer = made(tiny_model(kind), pooling=pooling)
    wanted, slopes = gradients(scorer, TEXTS)
    cached(scorer)
    for round_ in range(2):  # the first fills the cache, the second reads it
        found, own = gradients(scorer, TEXTS)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert own.keys() == slopes.keys()
        for name, slope in slopes.items():
            torch.testing.assert_close(own[name], slope, rtol=1e-5, atol=1e-5)
        assert scorer.lower.computed == 1, round_
    assert max(s.abs().max() for s in slopes.values()) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_cached_bfloat16_states_equal_uncached(tiny_model, kind):
    """They are what the upper layers would have been given, bit for bit; so scores and gradients are the same."""
    scorer = made(tiny_model(kind), dtype=torch.bfloat16)
    wanted, slopes = gradients(scorer, TEXTS)
    cached(scorer)
    assert scorer.lower.cache.dtype == torch.bfloat16
    for _ in range(2):
        found, own = gradients(scorer, TEXTS)
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)
        for name, slope in slopes.items():
            assert (own[name] - slope).norm() <= 0.02 * slope.norm(), name
    assert max(s.abs().max() for s in slopes.values()) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_backward_stops_below_lowest_adapter(tiny_model, kind):
    scorer, recorded = made(tiny_model(kind), top=1).train(), []
    for layer in scorer.inner.base_model.layers:
        layer.register_forward_hook(lambda module, inputs, out: recorded.append(out.requires_grad))
    scorer(scorer.pack(TEXTS))
    assert recorded == [False] * (len(recorded) - 1) + [True]
    assert len(recorded) > 1


def test_only_the_top_layers_have_adapters(tiny_model):
    names = [n for n, p in made(tiny_model("qwen2"), top=1).named_parameters() if "lora_" in n]
    last = made(tiny_model("qwen2"), top=1).inner.config.num_hidden_layers - 1
    assert names
    assert all(f".layers.{last}." in n for n in names)


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_depth_drops_layers_above_it(tiny_model, kind):
    """With the states that the whole model has there, through the final norm."""
    shallow, whole = (made(tiny_model(kind), depth=d, lora=False) for d in (1, None))
    original = small.new_scorer(tiny_model(kind), TASK, pad_token_id=1, dtype=torch.float32, device=torch.device("cpu"))
    for scorer in (shallow, whole):
        scorer.load_state_dict(original.state_dict(), strict=scorer is whole)
    batch, below = whole.pack(TEXTS), []
    whole.inner.base_model.layers[1].register_forward_pre_hook(lambda _, x: below.append(x[0]))
    whole.states(batch)
    wanted = whole.inner.base_model.norm(below[0])[0]
    torch.testing.assert_close(shallow.states(batch), wanted, rtol=1e-5, atol=1e-5)
    assert shallow.inner.config.num_hidden_layers == 1 < whole.inner.config.num_hidden_layers


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_layer_features_equal_cut_models(tiny_model, kind):
    whole = made(tiny_model(kind), lora=False)
    found = scoring.layer_features(whole, TEXTS)
    layers = whole.inner.config.num_hidden_layers
    assert found.shape[:2] == (len(TEXTS), layers)
    for kept in range(1, layers + 1):
        cut = made(tiny_model(kind), depth=kept, lora=False)
        cut.load_state_dict(whole.state_dict(), strict=False)
        np.testing.assert_allclose(found[:, kept - 1], scoring.features(cut, TEXTS), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[:, -1], scoring.features(whole, TEXTS), rtol=1e-6, atol=1e-6)


def test_layer_features_ignore_the_cache(tiny_model):
    """Two of three layers are read from the cache by a training; asked for their features, they are run."""
    scorer = made(tiny_model("qwen2"))
    wanted = scoring.layer_features(scorer, TEXTS)
    assert np.abs(wanted[:, 0] - wanted[:, 2]).max() > 1e-2
    cached(scorer)
    kept = scorer.lower
    for _ in range(2):
        np.testing.assert_allclose(scoring.layer_features(scorer, TEXTS, [0, 2]), wanted[:, [0, 2]], atol=1e-6)
        scoring.score(scorer, TEXTS)
    assert scorer.lower is kept


@pytest.mark.parametrize(("kind", "wanted", "words"), [
    ("qwen2", 99, "--depth is 99"), ("bert", 1, "--depth needs a decoder"),
])  # fmt: skip
def test_invalid_depth_raises(tiny_model, kind, wanted, words):
    with pytest.raises(UserError, match=words):
        made(tiny_model(kind), depth=wanted, lora=False)


# --- the store --------------------------------------------------------------------------------------------------------


def store(limit=10**9, **about):
    return StateCache(ABOUT | about, hidden=4, dtype=torch.float32, limit=limit)


def rows(count, value):
    return np.full((count, 16), value, dtype=np.uint8)


def test_other_caches_read_put_segments():
    one, other = store(), store()
    one.put({b"a" * 16: rows(2, 1), b"b" * 16: rows(3, 2)})
    assert other.get(b"b" * 16) is None
    other.refresh()
    np.testing.assert_array_equal(other.get(b"b" * 16), rows(3, 2))
    other.put({b"a" * 16: rows(2, 9), b"c" * 16: rows(1, 3)})  # a is there, so it stays
    for c in (one, store()):
        c.refresh()
        assert [int(c.get(d * 16)[0, 0]) for d in (b"a", b"b", b"c")] == [1, 2, 3]


def test_other_depths_have_other_folders():
    store(depth=3).put({b"a" * 16: rows(1, 1)})
    assert store(depth=4).get(b"a" * 16) is None


def test_kill_while_writing_loses_only_that_segment():
    one = store()
    one.put({b"a" * 16: rows(2, 1)})
    with (one.folder / STATES).open("ab") as f:
        f.write(b"\7" * 21)  # a row and a bit
    with (one.folder / INDEX).open("ab") as f:
        f.write(RECORD.pack(b"z" * 16, 0, 1)[:11])
    np.testing.assert_array_equal(store().get(b"a" * 16), rows(2, 1))  # before anybody mends it
    again = store()
    again.put({b"b" * 16: rows(2, 2)})
    fresh = store()
    np.testing.assert_array_equal(fresh.get(b"a" * 16), rows(2, 1))
    np.testing.assert_array_equal(fresh.get(b"b" * 16), rows(2, 2))
    assert fresh.get(b"z" * 16) is None


def test_cache_stays_within_limit():
    old = store(depth=1)
    old.put({bytes([i]) * 16: rows(100, i) for i in range(10)})
    size = sum(e.size for e in hidden_state_cache.entries())
    new = store(limit=size // 2, depth=2)
    assert not old.folder.exists()
    for i in range(100):
        new.put({bytes([i]) * 16: rows(100, i)})
    assert 0 < sum(e.size for e in hidden_state_cache.entries()) <= size // 2
    np.testing.assert_array_equal(new.get(bytes([0]) * 16), rows(100, 0))


def test_unused_folders_are_removed_first(caplog):
    """A cache that another model has filled serves the next one too, at the same limit."""
    store(depth=1).put({bytes([i]) * 16: rows(100, i) for i in range(10)})
    limit = sum(e.size for e in hidden_state_cache.entries()) + 1000
    first, second = store(limit=limit, depth=2), store(limit=limit, depth=3)
    for i in range(4):
        for one in (first, second):
            one.put({bytes([i]) * 16: rows(100, i)})
    assert sorted(e.about["depth"] for e in hidden_state_cache.entries()) == [2, 3]
    assert not caplog.text
    for i in range(4, 20):
        first.put({bytes([i]) * 16: rows(100, i)})
    assert second.get(bytes([3]) * 16) is not None
    assert sum(e.size for e in hidden_state_cache.entries()) <= limit
    assert caplog.text.count("the cache of states is full") == 1


def test_clearing_under_running_process_is_harmless():
    one = store()
    one.put({b"a" * 16: rows(2, 1)})
    np.testing.assert_array_equal(one.get(b"a" * 16), rows(2, 1))
    assert hidden_state_cache.clear() > 0
    np.testing.assert_array_equal(one.get(b"a" * 16), rows(2, 1))
    one.put({b"b" * 16: rows(1, 2)})
    np.testing.assert_array_equal(store().get(b"b" * 16), rows(1, 2))


def test_cleared_folder_is_noticed():
    one = store()
    one.put({b"a" * 16: rows(1, 1), b"x" * 16: rows(9, 1)})
    assert one.get(b"a" * 16) is not None
    hidden_state_cache.clear()
    store().put({b"b" * 16: rows(1, 2), b"c" * 16: rows(30, 3)})
    one.refresh()
    assert one.get(b"a" * 16) is None
    np.testing.assert_array_equal(one.get(b"c" * 16), rows(30, 3))
    one.put({b"a" * 16: rows(1, 1)})
    np.testing.assert_array_equal(store().get(b"a" * 16), rows(1, 1))


def test_cleared_folder_stays_listed_and_bounded():
    one = store(limit=2000)
    hidden_state_cache.clear()
    for i in range(50):
        one.put({bytes([i]) * 16: rows(10, i)})
    (entry,) = hidden_state_cache.entries()
    assert 1000 < entry.size <= 2000


@pytest.mark.parametrize("text", ["", "{", None])
def test_broken_notes_are_skipped(text):
    broken = hidden_state_cache.cache_root() / "broken"
    broken.mkdir(parents=True)
    if text is not None:
        (broken / hidden_state_cache.ABOUT).write_text(text)
    store().put({b"a" * 16: rows(1, 1)})
    assert len(hidden_state_cache.entries()) == 1


def test_full_disk_stops_caching_only(monkeypatch, caplog):
    one = store()

    def full(new):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(one, "_append", full)
    one.put({b"a" * 16: rows(1, 1)})
    assert "No space left" in caplog.text
    assert one.get(b"a" * 16) is None


def _write(start):
    mine = store()
    for i in range(start, start + 100):
        mine.put({i.to_bytes(16, "little"): rows(i % 5 + 1, i % 256)})


@pytest.mark.slow
def test_processes_write_at_once():
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write, args=(start,)) for start in (0, 50)]
    for w in workers:
        w.start()
    reader, seen = store(), 0
    while any(w.is_alive() for w in workers):  # whoever reads meanwhile sees whole segments
        reader.refresh()
        for i in range(150):
            if (part := reader.get(i.to_bytes(16, "little"))) is not None:
                np.testing.assert_array_equal(part, rows(i % 5 + 1, i % 256))
                seen += 1
    assert seen
    found = store()
    for i in range(150):
        np.testing.assert_array_equal(found.get(i.to_bytes(16, "little")), rows(i % 5 + 1, i % 256))
    assert (found.folder / INDEX).stat().st_size == hidden_state_cache.NAME + 150 * RECORD.size


def test_segment_key_includes_its_prefix(tiny_model):
    scorer = made(tiny_model("qwen2"))
    flat = Encoded(chunks=(tuple(range(50, 55)),), starts=(0,))
    shared, alone = scorer.pack(TEXTS), scorer.pack([flat])
    assert len(set(segment_digests(shared))) == len(shared.start)
    assert not set(segment_digests(shared)) & set(segment_digests(alone))
    assert set(segment_digests(scorer.pack(TEXTS[:2]))) < set(segment_digests(shared))


def test_cached_text_keeps_its_first_states(tiny_model):
    """Beside texts that are not there yet it is read all the same, so that a resumed run goes on bit for bit."""
    scorer = cached(made(tiny_model("qwen2")))
    scorer(scorer.pack(TEXTS))
    for digest, (first, count) in scorer.lower.cache._places.items():
        scorer.lower.cache.get(digest)  # mapped
        scorer.lower.cache._rows = scorer.lower.cache._rows.copy()
        scorer.lower.cache._rows[first : first + count] = 0
    batch = scorer.pack([*OTHERS, TEXTS[0]])
    below = scorer.lower.states(batch, lambda: scorer.inner.base_model(
        input_ids=torch.from_numpy(batch.input_ids)[None], position_ids=torch.from_numpy(batch.position_ids)[None],
        plan=plan_attention(batch, torch.device("cpu")), use_cache=False,
    ))  # fmt: skip
    segment = batch.scored[batch.chunk_segment[2]]
    own = slice(batch.start[segment], batch.start[segment] + batch.length[segment])
    assert not below[own].any()
    assert below[batch.start[batch.scored[batch.chunk_segment[0]]]].any()


def test_removed_cache_is_made_again(tiny_model):
    scorer = cached(made(tiny_model("qwen2")))
    wanted = scorer(scorer.pack(TEXTS)).detach()
    shutil.rmtree(hidden_state_cache.cache_root())
    torch.testing.assert_close(scorer(scorer.pack(OTHERS + TEXTS)).detach()[2:], wanted, rtol=1e-5, atol=1e-5)
    assert scorer.lower.computed == 2
