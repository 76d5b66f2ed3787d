"""The only place where a prompt is composed: the template is baked into the tokenizer that a run saves.

Training, prediction, serving and every export read the same tokenizer, so they cannot see other token ids. The prompt is

    text alone            before  text  after
    context and text      before  context  between  text  after

where ``before`` holds what the model's own tokenizer puts first (``<bos>``) and the instruction, and ``after`` the cue or,
without one, a single read token. The last token of ``after`` is the one whose state a decoder's head reads; it is never the
pad id, since ``…ForSequenceClassification`` finds it as the last token that is not padding.

Type ids tell the parts apart: 0 for what may be shared between texts (before, context, between), 1 for the text and what
follows it. Encoders keep their tokenizer's own type ids, which they were trained with.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loracle.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_MARK = "\x02text\x03"  # stands for the text while a chat template is rendered


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """Token ids around a text. ``after`` is never empty; ``after[-1]`` is read by decoders."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    needs_context: bool = False


def needs_context(template: str | None) -> bool:
    """Whether every text must come with a context: the template says where it stands."""
    return template is not None and "{context}" in template


def check_contexts(template: str | None, contexts: Iterable[str | None]) -> None:
    """That there is a context wherever the template wants one.

    Raises:
        UserError: there is none for some text.
    """
    if needs_context(template) and (missing := sum(context is None for context in contexts)):
        raise UserError(
            f"{missing} texts have no context, which the template {template!r} needs.",
            "Name its column with --context, or train with a template without {context}.",
        )


def install_template(
    tokenizer: PreTrainedTokenizerFast, template: str | None, max_length: int, *, encoder: bool = False
):
    """Return a tokenizer that composes the prompt by itself: ``tokenizer(text, truncation=True)`` is all there is to call.

    ``template`` is None (the text and a read token), ``"chat"`` (the model's own chat template) or a string with ``{text}``
    and perhaps ``{context}``. Texts that spell a special token are split into ordinary ones. Truncation at ``max_length``
    cuts the text, never the template.

    Raises:
        UserError: no chat template, no token to read or to pad with, or a template that leaves no room for a text.
    """
    pad, backend = _pad_token(tokenizer), _copy(tokenizer)
    if encoder:
        around = _encoder_template(tokenizer, backend, template)
    else:
        around = _decoder_template(tokenizer, backend, template, pad)
    fixed = len(around.before) + len(around.between) + len(around.after)
    if fixed + 4 > max_length:
        raise UserError(
            f"The template has {fixed} tokens, which leaves no room for the text in --max-length {max_length}.",
            f"Use --max-length {max(64, 2 * fixed)} or a shorter template.",
        )
    return _with_processor(tokenizer, backend, around, pad, max_length, encoder)


def _decoder_template(tokenizer, backend, template: str | None, pad: int) -> Template:
    if template == "chat":
        start, before, between, after = [], *_chat_parts(tokenizer)
    else:
        start, (before, between, after) = _own_specials(tokenizer, backend)[0], _string_parts(template)
    ids = [_encode(backend, part, specials=template == "chat") for part in (before, between, after)]
    # A cue is what the head reads at; without one, a single token marks that the text is over.
    ids[2] = ids[2] or [_read_token(tokenizer, backend, pad)]
    if ids[2][-1] == pad:
        raise UserError(
            f"The template ends in the padding token: {tokenizer.decode(ids[2])!r}.", "End --template in other words."
        )
    return Template(
        before=(*start, *ids[0]),
        between=tuple(ids[1]),
        after=tuple(ids[2]),
        needs_context=needs_context(template),
    )


def _encoder_template(tokenizer, backend, template: str | None) -> Template:
    """``[CLS] before text after [SEP]``, and between a context and the text what the tokenizer itself puts there."""
    start, end = _own_specials(tokenizer, backend)
    bare, pair = len(_encode(backend, "x")), tokenizer("x", "x").input_ids
    before, between, after = (_encode(backend, part) for part in _string_parts(template, between=""))
    separators = pair[len(start) + bare : len(pair) - bare - len(end)]
    return Template(
        before=(*start, *before),
        between=(*separators, *between),
        after=(*after, *end),
        needs_context=needs_context(template),
    )


def _string_parts(template: str | None, between: str = "\n") -> tuple[str, str, str]:
    """Split ``before {context} between {text} after``; without a template only the line break after a context is there."""
    if template is None:
        return "", between, ""
    if template == "chat":
        raise UserError("--template chat needs a decoder, and the model is an encoder.", "Leave out --template chat.")
    head, after = template.split("{text}")
    if "{context}" not in head:
        return head, between, after
    before, middle = head.split("{context}", 1)
    return before, middle, after


def _chat_parts(tokenizer) -> tuple[str, str, str]:
    if not tokenizer.chat_template:
        raise UserError(
            "The tokenizer of this model has no chat template.", "Write the template itself after --template."
        )
    messages = [{"role": "user", "content": _MARK}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, after = prompt.split(_MARK)
    return before, "\n", after


def _own_specials(tokenizer, backend) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and after any text by itself: ``<bos>``, or ``[CLS]`` and ``[SEP]``."""
    bare = _encode(backend, "x")
    full = tokenizer("x").input_ids
    at = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return full[:at], full[at + len(bare) :]


def _encode(backend, text: str, specials: bool = False) -> list[int]:
    """Ids of a piece of the template; only a chat template may spell special tokens."""
    backend.encode_special_tokens = not specials
    return backend.encode(text, add_special_tokens=False).ids


def _pad_token(tokenizer) -> int:
    """A pad id that is not the end-of-text token, which is read; many models of the family name the same token for both."""
    eos = tokenizer.eos_token_id
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != eos:
        return tokenizer.pad_token_id
    specials = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    named = [i for name, i in specials.items() if "pad" in name.lower()]
    others = [tokenizer.unk_token_id, *sorted(specials.values())]
    bos = tokenizer.bos_token_id
    for candidate in (*named, *others):
        if candidate is not None and candidate not in (eos, bos):
            return candidate
    raise UserError(
        "The tokenizer has no pad token and no special token that can replace it.", "Add a pad token to the tokenizer."
    )


def _read_token(tokenizer, backend, pad: int) -> int:
    """A line break: a language model sums up there what it has read. At its end-of-text token it forgets instead.

    Logistic regression on the untuned SmolLM2-135M's state at the read token, 700 N24News abstracts: 57 % at a line break,
    35 % at ``<|im_end|>``; LoRA starts from there (dev/LOG.md).
    """
    breaks = _encode(backend, "\n")
    if breaks and breaks[-1] not in (pad, tokenizer.unk_token_id):
        return breaks[-1]
    for name in ("eos_token_id", "sep_token_id", "bos_token_id"):
        if (token := getattr(tokenizer, name)) is not None and token != pad:
            return token
    raise UserError(
        "The tokenizer has no line break and no end-of-text token.", "End --template in a cue, such as ' Topic:'."
    )


def _with_processor(tokenizer, backend, around: Template, pad: int, max_length: int, encoder: bool):
    """The generic fast tokenizer with the template as its post-processor.

    A model's own tokenizer class may rebuild the post-processor on loading (``add_bos_token`` and its like), so the generic
    class is made, which leaves it as it stands in ``tokenizer.json``.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    token = tokenizer.convert_ids_to_tokens
    typed = not encoder or "token_type_ids" in tokenizer.model_input_names
    shared, own = (0, 1) if typed else (0, 0)
    alone = 0 if encoder else own  # BERT was trained with type 0 for a single text

    def part(name: str, type_id: int) -> list[str]:
        return [f"<{name}>:{type_id}"] if getattr(around, name) else []

    middle = part("between", shared)
    backend.post_processor = TemplateProcessing(
        single=[
            *part("before", shared),
            *(middle if around.needs_context else []),
            f"$A:{alone}",
            *part("after", alone),
        ],
        pair=[*part("before", shared), f"$A:{shared}", *middle, f"$B:{own}", *part("after", own)],
        special_tokens=[
            {"id": f"<{name}>", "ids": list(ids), "tokens": token(list(ids))}
            for name in ("before", "between", "after")
            if (ids := getattr(around, name))
        ],
    )
    names = ("bos_token", "eos_token", "unk_token", "sep_token", "cls_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{name: value for name in names if (value := getattr(tokenizer, name))},
        pad_token=token(pad),
        model_max_length=max_length,
        padding_side="right",
        truncation_side="right",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", *(["token_type_ids"] if encoder and typed else []), "attention_mask"],
    )


def _copy(tokenizer):
    """The Rust tokenizer under a transformers one, without the padding and truncation that some models ship in it."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    return backend
