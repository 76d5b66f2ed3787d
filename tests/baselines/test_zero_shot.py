"""The likelihood of a text is what the causal language model itself says, packed, behind a prefix, or chunked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small import new_scorer
from transformers import AutoModelForCausalLM

from loracle.models.likelihood import log_likelihood, name_scores, names_template
from loracle.models.loading import load_tokenizer
from loracle.tasks import Task
from loracle.text.template import install_template
from loracle.text.tokenize import Encoder

TEXTS = ["a plain title", "x", "", "Ünïcode — 标题", "a plain title"]
PROMPT = "Which of these titles will more of our readers click on today? {text}\nAnswer:"


def by_hand(model, encoded, after):
    """Mean log probability of the text's own tokens, one text at a time."""
    ids, start = torch.tensor(encoded.chunks[0]), encoded.starts[0]
    with torch.no_grad():
        log_p = model(ids[None]).logits[0].log_softmax(-1)
    own = range(max(start, 1), len(ids) - after)
    return float(np.mean([log_p[i - 1, ids[i]] for i in own])) if own else 0.0


@pytest.mark.parametrize(("template", "depth"), [(None, None), (PROMPT, None), (None, 1)])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma3_text"])
def test_it_is_that_of_the_causal_model(tiny_model, tmp_path, kind, template, depth):
    """Of the whole one, where the scorer's upper layers were dropped."""
    folder = tmp_path / "base"
    source = tiny_model(kind)
    causal = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    if not causal.config.tie_word_embeddings:  # or both would be one tensor
        torch.nn.init.normal_(causal.lm_head.weight, std=0.5, generator=torch.Generator().manual_seed(3))
    causal.save_pretrained(folder)
    tokenizer = install_template(load_tokenizer(source), template, 128)
    scorer = new_scorer(
        folder, Task(name="click_ranking"), pad_token_id=tokenizer.pad_token_id, dtype=torch.float32,
        device=torch.device("cpu"), lora={"r": 2, "alpha": 4, "dropout": 0.0}, depth=depth,
    )  # fmt: skip
    encoder = Encoder(tokenizer)
    encoded = encoder(TEXTS)
    found = log_likelihood(scorer, encoded, folder, after=encoder.after)
    expected = [by_hand(causal, e, encoder.after) for e in encoded]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert len(set(np.round(expected, 3))) >= 3


def test_an_encoder_has_none(tiny_model):
    tokenizer = install_template(load_tokenizer(tiny_model("bert")), None, 64, encoder=True)
    scorer = new_scorer(
        tiny_model("bert"), Task(name="click_ranking"), pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32, device=torch.device("cpu"), lora=None,
    )  # fmt: skip
    with pytest.raises(ValueError, match="bert has no likelihood of a next token"):
        log_likelihood(scorer, Encoder(tokenizer, encoder=True)(["a"]), tiny_model("bert"), after=1)


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma3_text"])
def test_names_are_scored_by_what_the_text_adds(tiny_model, kind):
    """Against the causal model itself, one name behind one text at a time, and behind none."""
    source, names = tiny_model(kind), ["sea", "open sky", "a {b} field"]
    causal = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = install_template(load_tokenizer(source), names_template(names), 256)
    scorer = new_scorer(
        source, Task(name="single_label", label_names=tuple(names)), pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32, device=torch.device("cpu"), lora={"r": 2, "alpha": 4, "dropout": 0.0},
    )  # fmt: skip
    encoder, texts = Encoder(tokenizer), TEXTS[:4]
    found = name_scores(scorer, texts, names, source, encoder)

    def summed(text, name):
        (encoded,) = encoder([name], [text])
        own = encoded.tokens - encoded.starts[0] - encoder.after
        return own * by_hand(causal, encoded, encoder.after)

    expected = [[summed(text, name) - summed("", name) for name in names] for text in texts]
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert np.abs(found).max() > 0.05
    asked = tokenizer.decode(encoder(["sea"], ["a text"])[0].chunks[0])
    assert "Labels: sea, open sky, a (b) field." in asked
    assert asked.index("a text") < asked.rindex("Label:") < asked.rindex("sea")
