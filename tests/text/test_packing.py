"""The token tree: the drawing in the docstring, what is shared, and that nothing of a text is lost in it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracle.text import packing
from loracle.text.packing import ROOT, ancestors, micro_batches, pack
from loracle.text.tokenize import Encoded


def text(own: tuple[int, ...], *above: tuple[int, ...], types: tuple[int, ...] | None = None) -> Encoded:
    """A text of one chunk: its own tokens behind what stands before it."""
    before = sum(above, ())
    return Encoded(chunks=((*before, *own),), starts=(len(before),), types=types and (types,))


def drawing() -> np.ndarray:
    """The matrix in the docstring of ``packing.py``: a 1 under the last letter of a name."""
    lines = packing.__doc__.splitlines()
    top = next(i for i, line in enumerate(lines) if line.split() == ["P0", "P1", "a0", "a1", "b0"])
    ends = [lines[top].index(name) + 1 for name in lines[top].split()]
    rows = [line.ljust(ends[-1] + 1) for line in lines[top + 1 : top + 6]]
    return np.array([[row[end] == "1" for end in ends] for row in rows])


P, A, B = (1, 2), (3, 4), (5,)


def test_the_docstring_is_true():
    batch = pack([text(A, P), text(B, P)], share_from=2)
    assert batch.input_ids.tolist() == [*P, *A, *B]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 2]
    assert drawing().sum() == 13
    np.testing.assert_array_equal(batch.visible(), drawing())


def test_where_the_scores_are_read():
    batch = pack([text(B, P), text(A, P)], share_from=2)
    assert batch.parent.tolist() == [ROOT, 0, 0]
    assert batch.input_ids[batch.read_at].tolist() == [5, 4]
    assert batch.input_ids[batch.pool_from].tolist() == [5, 3]
    assert batch.useful_tokens == 7
    assert batch.tokens == 5


def test_nothing_is_shared_where_sharing_is_off():
    batch = pack([text(A, P), text(B, P)], share_from=None)
    assert batch.input_ids.tolist() == [*P, *A, *P, *B]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.parent.tolist() == [ROOT, ROOT]
    assert batch.pool_from.tolist() == [2, 6]


def test_a_start_shorter_than_share_from_is_repeated():
    assert pack([text(A, P), text(B, P)], share_from=3).parent.tolist() == [ROOT, ROOT]


def test_equal_texts_are_one_segment():
    batch = pack([text(A, P), text(B, P), text(A, P)], share_from=2)
    assert batch.tokens == 5
    assert batch.texts == 3
    assert batch.scored[batch.chunk_segment].tolist() == [1, 2, 1]
    assert batch.useful_tokens == 11


def test_equal_ids_that_begin_elsewhere_are_not_the_same_text():
    batch = pack([text((2, 3, 4), (1,)), text((3, 4), (1, 2))], share_from=None)
    assert (batch.read_at + 1 - batch.pool_from)[batch.chunk_segment].tolist() == [3, 2]


def test_a_text_that_is_the_start_of_another_is_not_its_parent():
    batch = pack([text((3,), P), text((3, 4), P)], share_from=1)
    assert batch.parent.tolist() == [ROOT, 0, 0]


def test_instruction_and_contexts_are_shared_on_two_levels():
    one, two = (7, 7, 7), (8, 8, 8)
    batch = pack([text(A, P, one), text(B, P, one), text(A, P, two), text(B, P, two)], share_from=2)
    assert batch.input_ids.tolist() == [*P, *one, *A, *B, *two, *A, *B]
    assert batch.parent.tolist() == [ROOT, 0, 1, 1, 0, 4, 4]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 5, 2, 3, 4, 5, 6, 5]


def test_a_context_of_one_text_is_no_segment_of_its_own():
    batch = pack([text(A, P, (7, 7)), text(B, P, (8, 8))], share_from=2)
    assert batch.parent.tolist() == [ROOT, 0, 0]


def test_positions_may_begin_elsewhere():
    assert pack([text(A)], first_position=2).position_ids.tolist() == [2, 3]


def test_token_types_go_along():
    batch = pack([text(A, types=(0, 1)), text(B, types=(1,)), text(B, types=(0,))], share_from=None)
    assert batch.token_types.tolist() == [0, 1, 1, 0]


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="nothing to pack"):
        pack([])


tokens = st.lists(st.integers(0, 2), max_size=4).map(tuple)
own = st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple)


@st.composite
def batches(draw):
    """Texts of one or more chunks behind one instruction and a few contexts, from so few tokens that much is equal."""
    instruction = draw(tokens)
    contexts = draw(st.lists(tokens, min_size=1, max_size=3))
    texts = []
    for pieces in draw(st.lists(st.lists(own, min_size=1, max_size=2), min_size=1, max_size=8)):
        before = instruction + draw(st.sampled_from(contexts))
        texts.append(Encoded(chunks=tuple(before + p for p in pieces), starts=(len(before),) * len(pieces)))
    return texts


@given(batches(), st.sampled_from([None, 1, 2, 3]), st.sampled_from([0, 2]))
def test_every_chunk_comes_out_of_the_tree_as_it_went_in(texts, share_from, first_position):
    batch = pack(texts, share_from=share_from, first_position=first_position)
    chunks = [(i, chunk, start) for i, e in enumerate(texts) for chunk, start in zip(e.chunks, e.starts, strict=True)]
    seen = batch.visible()
    assert batch.chunk_text.tolist() == [i for i, _, _ in chunks]
    assert batch.useful_tokens == sum(e.tokens for e in texts) >= batch.tokens == batch.length.sum()
    for (_, chunk, start), s in zip(chunks, batch.chunk_segment, strict=True):
        n, last = batch.scored[s], batch.read_at[s]
        path = [*ancestors(batch.parent, n), n]
        rows = np.concatenate([np.arange(batch.start[a], batch.start[a] + batch.length[a]) for a in path])
        assert tuple(batch.input_ids[rows]) == chunk
        assert batch.position_ids[rows].tolist() == list(range(first_position, first_position + len(chunk)))
        assert np.flatnonzero(seen[last]).tolist() == rows.tolist()  # all of its own text, nothing of another
        assert tuple(batch.input_ids[batch.pool_from[s] : last + 1]) == chunk[start:]


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(1, 20))
def test_rounds_keep_order_and_budget(sizes, budget):
    units = [[text(tuple(100 * i + k for k in range(size)))] for i, size in enumerate(sizes)]
    rounds = list(micro_batches(units, budget))
    totals = [sum(sizes[i] for i in chosen) for chosen in rounds]
    assert [i for chosen in rounds for i in chosen] == list(range(len(sizes)))
    assert all(total <= budget or len(chosen) == 1 for total, chosen in zip(totals, rounds, strict=True))
    # None could have taken the next round's first unit.
    assert all(t + sizes[after[0]] > budget for t, after in zip(totals, rounds[1:], strict=False))


@given(batches(), st.sampled_from([None, 1, 2, 3]), st.integers(1, 20))
def test_what_a_round_shares_counts_once(texts, share_from, budget):
    rounds = list(micro_batches([[e] for e in texts], budget, share_from=share_from))
    assert [i for chosen in rounds for i in chosen] == list(range(len(texts)))
    packed = [pack([texts[i] for i in chosen], share_from=share_from).tokens for chosen in rounds]
    assert all(n <= budget or len(chosen) == 1 for n, chosen in zip(packed, rounds, strict=True))


def test_a_long_instruction_does_not_fill_the_rounds():
    instruction = tuple(range(100, 300))
    texts = [text((i, i + 1), instruction) for i in range(0, 60, 2)]
    assert len(list(micro_batches([[e] for e in texts], 300))) == 1
    assert len(list(micro_batches([[e] for e in texts], 300, share_from=None))) == 30
