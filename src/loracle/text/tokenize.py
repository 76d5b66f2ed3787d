"""A text becomes token ids: by the baked tokenizer and by nothing else, so that every reader of the run folder sees the same.

What is cut is counted; what the head reads at is never cut, because the template is the tokenizer's own (``template.py``).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """One text as the model sees it.

    ``chunks`` holds the ids of each piece that is scored (one, unless a long text was chunked); ``starts[i]`` is the first
    token of chunk ``i`` that belongs to the text rather than to what may be shared before it (template and context).
    """

    chunks: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    types: tuple[tuple[int, ...], ...] | None = None  # token type ids, for encoders that have them
    cut: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of all chunks, shared ones included."""
        return sum(map(len, self.chunks))


class Encoder:
    """Encodes texts with a baked tokenizer.

    Args:
        tokenizer: what ``template.bake`` returned, or a run folder's tokenizer.
        long: ``cut`` keeps the start of a text that is longer than ``model_max_length``; ``chunk`` keeps all of it in pieces,
            each with the template around it.
        encoder: the model is of BERT's kind: nothing is shared, and token types may matter.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, long: str = "cut", encoder: bool = False):
        self.tokenizer, self.long, self.encoder = tokenizer, long, encoder
        self._typed = encoder and "token_type_ids" in tokenizer.model_input_names
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_padding()
        self._one_at_a_time = threading.Lock()  # training encodes the next batch while validation texts are encoded

    def __call__(self, texts: Sequence[str], contexts: Sequence[str | None] | None = None) -> list[Encoded]:
        """Encode a batch of texts, each with its context where there is one. Lone surrogates become U+FFFD."""
        if contexts is None:
            contexts = [None] * len(texts)
        inputs = [
            clean(text) if context is None else (clean(context), clean(text))
            for text, context in zip(texts, contexts, strict=True)
        ]
        with self._one_at_a_time:
            self._backend.enable_truncation(self.tokenizer.model_max_length)
            self._backend.encode_special_tokens = True
            encodings = self._backend.encode_batch(inputs)
        return [self._encoded(e) for e in encodings]

    @property
    def after(self) -> int:
        """Tokens that stand behind every text of a decoder: the cue, or the read token."""
        (alone,) = self([""])
        return alone.tokens - alone.starts[0]

    def _encoded(self, encoding) -> Encoded:
        start = _text_start(encoding, self.encoder)
        pieces = [encoding]
        if self.long == "chunk":
            # A context that is too long is cut, not chunked: only pieces behind the first one's context count.
            pieces += [p for p in encoding.overflowing if p.ids[:start] == encoding.ids[:start]]
        return Encoded(
            chunks=tuple(tuple(p.ids) for p in pieces),
            starts=(0 if self.encoder else start,) * len(pieces),
            types=tuple(tuple(p.type_ids) for p in pieces) if self._typed else None,
            cut=bool(encoding.overflowing),
        )


def _text_start(encoding, encoder: bool) -> int:
    """Where the text begins. Ask the first piece only: in the others of a single text, tokenizers leaves type ids 0."""
    if not encoder:
        return encoding.type_ids.index(1)
    sequence = encoding.sequence_ids
    last = 1 if 1 in sequence else 0
    return sequence.index(last) if last in sequence else 0


def clean(text: str) -> str:
    """The text in a form that UTF-8 can hold."""
    return text if text.isascii() else _SURROGATES.sub("\ufffd", text)
