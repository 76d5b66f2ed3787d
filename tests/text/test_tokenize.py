"""Texts become ids: what is cut is counted, what is chunked is complete, and nothing a text holds breaks it."""

from __future__ import annotations

from itertools import chain

import pytest

from loracle.text.template import install_template
from loracle.text.tokenize import Encoder

CUE = "Sort this. Title: {text} Topic:"
LONG = "the quick brown fox jumps over 你好 🙂 and reads the news " * 12
DECODERS = ("qwen", "llama3", "gemma", "mistral")


@pytest.fixture
def encoder(tiny_tokenizer):
    def make(family="qwen", template=None, max_length=48, **options) -> Encoder:
        baked = install_template(tiny_tokenizer(family), template, max_length, encoder=options.get("encoder", False))
        return Encoder(baked, **options)

    return make


def own_tokens(encode: Encoder, piece: tuple[int, ...], start: int, empty: tuple[int, ...]) -> list[int]:
    """The ids of a chunk without the template, which must be whole."""
    after = empty[start:]
    assert piece[:start] == empty[:start]
    assert piece[len(piece) - len(after) :] == after
    return list(piece[start : len(piece) - len(after)])


@pytest.mark.parametrize("template", [None, CUE])
@pytest.mark.parametrize("family", DECODERS)
def test_chunks_hold_all_of_the_text_and_each_the_template(encoder, family, template):
    chunked, whole = encoder(family, template, long="chunk"), encoder(family, template, 10_000)
    empty = whole([""])[0].chunks[0]
    (all_of_it,), (pieces,) = whole([LONG]), chunked([LONG])
    assert pieces.cut
    assert len(pieces.chunks) > 2
    assert max(map(len, pieces.chunks)) == 48
    found = [own_tokens(chunked, *piece, empty) for piece in zip(pieces.chunks, pieces.starts, strict=True)]
    assert list(chain(*found)) == own_tokens(whole, all_of_it.chunks[0], all_of_it.starts[0], empty)


def test_chunks_of_a_text_with_a_context_have_the_context_each(encoder):
    chunked, whole = encoder(long="chunk"), encoder(max_length=10_000)
    context = "of foxes"
    empty = whole([""], [context])[0]
    (pieces,), (all_of_it,) = chunked([LONG], [context]), whole([LONG], [context])
    found = [own_tokens(chunked, *p, empty.chunks[0]) for p in zip(pieces.chunks, pieces.starts, strict=True)]
    assert list(chain(*found)) == own_tokens(whole, all_of_it.chunks[0], all_of_it.starts[0], empty.chunks[0])


def test_a_context_too_long_is_cut_and_not_chunked(encoder):
    pieces = encoder(long="chunk")([LONG], [LONG])[0]
    shared = {chunk[:start] for chunk, start in zip(pieces.chunks, pieces.starts, strict=True)}
    assert len(pieces.chunks) > 1
    assert len(shared) == 1


def test_an_encoder_is_chunked_too(encoder):
    chunked = encoder("bert", long="chunk", encoder=True)
    (pieces,) = chunked([LONG])
    cls, sep = chunked.tokenizer.cls_token_id, chunked.tokenizer.sep_token_id
    assert all((p[0], p[-1]) == (cls, sep) for p in pieces.chunks)
    assert len(pieces.chunks) == len(pieces.types) > 1
    (whole,) = encoder("bert", max_length=10_000, encoder=True)([LONG])
    assert sum(len(p) - 2 for p in pieces.chunks) == whole.tokens - 2


def test_cut_keeps_the_start_and_says_so(encoder):
    short, long = encoder()(["a title", LONG])
    assert (short.cut, long.cut) == (False, True)
    assert len(long.chunks) == 1
    assert long.tokens == 48
    whole = encoder(max_length=10_000)([LONG])[0].chunks[0]
    assert long.chunks[0] == (*whole[:47], whole[-1])


def test_starts_point_at_the_texts_own_first_token(encoder):
    encode = encoder("llama3", CUE)
    (e,) = encode(["fox"])
    before = encode.tokenizer.decode(e.chunks[0][: e.starts[0]])
    assert before == "<|begin_of_text|>Sort this. Title: "
    assert encode.tokenizer.decode(e.chunks[0][e.starts[0] :]) == "fox Topic:"


def test_a_context_belongs_to_what_may_be_shared(encoder):
    one, two = encoder()(["first title", "second title"], ["the same article"] * 2)
    assert one.chunks[0][: one.starts[0]] == two.chunks[0][: two.starts[0]]
    assert one.chunks[0] != two.chunks[0]


def test_texts_with_and_without_context_may_be_mixed(encoder):
    encode = encoder()
    mixed = encode(["a", "a"], [None, "of foxes"])
    assert mixed == [*encode(["a"]), *encode(["a"], ["of foxes"])]


def test_encoders_share_nothing_and_have_token_types(encoder):
    (e,) = encoder("bert", encoder=True)(["banks fall"], ["of money"])
    first = e.chunks[0].index(3) + 1  # [CLS] of money [SEP]
    assert e.starts == (0,)
    assert e.types == ((*[0] * first, *[1] * (len(e.chunks[0]) - first)),)
    (e,) = encoder("roberta", encoder=True)(["banks fall"], ["of money"])
    assert e.types is None


def test_a_lone_surrogate_is_replaced(encoder):
    encode = encoder()
    assert encode(["a \ud83d b"]) == encode(["a \ufffd b"])


def test_order_and_company_do_not_matter(encoder):
    encode, texts = encoder(), ["one", LONG, "", "of money"]
    assert encode(texts[::-1])[::-1] == encode(texts) == [encode([t])[0] for t in texts]


def test_lengths_count_all_chunks(encoder):
    encoded = encoder(long="chunk")(["one", LONG])
    assert [e.tokens for e in encoded] == [len(encoded[0].chunks[0]), sum(map(len, encoded[1].chunks))]
