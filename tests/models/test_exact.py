"""Rule 1: a text's score and gradient are the same alone, padded on either side, packed, prefix-shared, shuffled.

The reference is always transformers' own forward, with its own attention.
"""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import small
import torch
from small import facts
from transformers import AutoModelForSequenceClassification, masking_utils

from loracle.errors import UserError
from loracle.models.architectures import ARCHITECTURES
from loracle.models.attention import interface, plan
from loracle.models.loading import load_config, load_tokenizer
from loracle.models.scorer import Scorer
from loracle.tasks import Task
from loracle.text.packing import SHARE_FROM
from loracle.text.template import install_template
from loracle.text.tokenize import Encoded, Encoder

TASK = Task(name="single_label", label_names=("a", "b", "c"))
CPU = torch.device("cpu")
PAD = 1  # of every tiny model here: what random texts never hold
DECODERS = [name for name, row in ARCHITECTURES.items() if row.packable and row.decoder]
ENCODERS = [name for name, row in ARCHITECTURES.items() if row.packable and not row.decoder]
PADDED = ("distilbert", "gpt2")
LORA = {"r": 4, "alpha": 8.0, "dropout": 0.0}


def scorer(folder, *, lora=None) -> Scorer:
    made = small.new_scorer(folder, TASK, pad_token_id=PAD, dtype=torch.float32, device=CPU, lora=lora, seed=1)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "lora_B" in name:  # born zero, which would hide A
                weight.normal_(0, 0.2)
    return made.eval()


def plain(made: Scorer, folder, attn: str = "sdpa") -> torch.nn.Module:
    """The same weights in transformers' own model, untouched by ours."""
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=3, pad_token_id=PAD, attn_implementation=attn
    )
    model.load_state_dict(made.inner.state_dict())
    return model.to(next(made.parameters()).dtype).eval()


def padded(texts: list[Encoded], side: str) -> dict[str, torch.Tensor]:
    """A batch as transformers wants it, positions counted by the attention mask."""
    width = max(e.tokens for e in texts)
    gap = lambda e, fill: [fill] * (width - e.tokens)  # noqa: E731
    put = lambda real, e, fill: gap(e, fill) + real if side == "left" else real + gap(e, fill)  # noqa: E731
    mask = torch.tensor([put([1] * e.tokens, e, 0) for e in texts])
    ids = torch.tensor([put(list(e.chunks[0]), e, PAD) for e in texts])
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def alone(model, texts: list[Encoded]) -> torch.Tensor:
    return torch.cat([model(input_ids=torch.tensor([e.chunks[0]])).logits for e in texts])


def some_texts(instruction: int = 0, contexts: int = 0, lengths=(9, 1, 23, 5, 14, 2, 31, 7), seed=0) -> list[Encoded]:
    """Random texts behind a shared instruction and, two and two, behind a context."""
    draw = np.random.default_rng(seed)
    ids = lambda n: tuple(draw.integers(10, 140, n).tolist())  # noqa: E731
    first, above = ids(instruction), [ids(contexts) for _ in lengths[::2]]
    texts = []
    for i, n in enumerate(lengths):
        before = first + above[i // 2]
        texts.append(Encoded(chunks=((*before, *ids(n)),), starts=(len(before),)))
    return texts


SHAPES = {
    "flat": some_texts(),
    "instruction": some_texts(instruction=20),
    "contexts": some_texts(contexts=18),
    "instruction and contexts": some_texts(instruction=19, contexts=17),
    "long": some_texts(lengths=(230, 5, 201)),
    "long behind an instruction": some_texts(instruction=20, lengths=(200, 3, 240, 12)),
    "behind a long instruction": some_texts(instruction=210, lengths=(3, 12, 6)),
}


def assert_same(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    worst = ((found - wanted).abs() / wanted.abs().clamp(min=1)).max().item()
    assert worst <= tolerance, worst


@pytest.mark.parametrize("kind", [*DECODERS, *ENCODERS])
def test_transformers_builds_no_mask(tiny_model, monkeypatch, kind):
    """Nor looks whether positions are those of packed texts, for which a GPU's work would be waited for."""
    made = scorer(tiny_model(kind))
    assert interface.NAME not in masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", None)
    assert made(made.pack(SHAPES["flat"])).isfinite().all()


@torch.inference_mode()
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", DECODERS)
def test_packed_scores_equal_scores_alone(tiny_model, kind, shape):
    texts = SHAPES[shape]
    made = scorer(tiny_model(kind))
    wanted = alone(plain(made, tiny_model(kind)), texts)
    batch = made.pack(texts)
    assert (batch.tokens < batch.useful_tokens) == ("instruction" in shape or "contexts" in shape)
    assert_same(made(batch), wanted, 1e-5)
    order = np.random.default_rng(1).permutation(len(texts))
    assert_same(made(made.pack([texts[i] for i in order])), wanted[order], 1e-5)
    assert_same(made(made.pack(texts[:1] + some_texts(seed=5)))[:1], wanted[:1], 1e-5)
    for wants, text in zip(wanted, texts, strict=True):
        assert_same(made(made.pack([text]))[0], wants, 1e-5)
    made.share_from = None
    assert_same(made(made.pack(texts)), wanted, 1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", DECODERS)
def test_packed_scores_equal_padded_scores(tiny_model, kind, side, attn):
    texts = SHAPES["instruction and contexts"]
    made = scorer(tiny_model(kind))
    reference = plain(made, tiny_model(kind), attn)
    assert_same(made(made.pack(texts)), reference(**padded(texts, side)).logits, 1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("fused_from", [1, 10_000])
@pytest.mark.parametrize("kind", DECODERS)
def test_fused_and_plain_blocks_agree(tiny_model, monkeypatch, kind, fused_from):
    monkeypatch.setattr(plan, "FUSED_FROM", fused_from)
    made = scorer(tiny_model(kind))
    for shape in ("instruction and contexts", "long behind an instruction"):
        assert_same(made(made.pack(SHAPES[shape])), alone(plain(made, tiny_model(kind)), SHAPES[shape]), 1e-5)


@contextmanager
def nothing_below_float64(monkeypatch):
    """Norms, RoPE and softmax that ask for float32 get float64."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        for name in ("float32", "float"):
            patch.setattr(torch, name, torch.float64)
        yield


@torch.inference_mode()
@pytest.mark.parametrize("kind", DECODERS)
def test_packed_scores_in_float64(tiny_model, monkeypatch, kind):
    made = scorer(tiny_model(kind)).double()
    reference = plain(made, tiny_model(kind), "eager")
    with nothing_below_float64(monkeypatch):
        for texts in SHAPES.values():
            assert_same(made(made.pack(texts)), alone(reference, texts), 1e-9)
        texts = SHAPES["instruction and contexts"]
        for side in ("left", "right"):
            assert_same(made(made.pack(texts)), reference(**padded(texts, side)).logits, 1e-9)


# --- gradients --------------------------------------------------------------------------------------------------------


def gradients(made: Scorer, scores) -> dict[str, torch.Tensor]:
    """Of a sum over texts whose weights differ, for every trained weight."""
    made.zero_grad()
    for i, row in scores:
        (row.square() * torch.tensor([1.0, -2.0, 0.5]) * (1 + i)).sum().backward(retain_graph=True)
    return {n: p.grad.clone() for n, p in made.named_parameters() if p.requires_grad}


def assert_same_gradients(found, wanted, tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, wants in wanted.items():
        assert wants.abs().max() > 0, name
        worst = ((found[name] - wants).norm() / wants.norm()).item()
        assert worst <= tolerance, (name, worst)


def each_alone(made: Scorer, texts):
    """Transformers' own attention and pooling around the same LoRA layers."""
    made.inner.set_attn_implementation("eager")
    for i, text in enumerate(texts):
        yield i, made.model(input_ids=torch.tensor([text.chunks[0]])).logits[0]
    made.inner.set_attn_implementation(interface.NAME)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["instruction and contexts", "long behind an instruction"])
@pytest.mark.parametrize("kind", DECODERS)
def test_packed_gradients_equal_gradients_alone(tiny_model, kind, shape):
    texts = SHAPES[shape][:5]
    made = scorer(tiny_model(kind), lora=LORA)
    wanted = gradients(made, each_alone(made, texts))
    assert {n.split(".")[-3] for n in wanted} > {"lora_A", "lora_B"}
    assert any("score" in n for n in wanted)
    for share_from in (SHARE_FROM, None):
        made.share_from = share_from
        # Of the whole gradient of a weight; q's is a small difference of large sums. In float64 it is 1e-9, below.
        assert_same_gradients(gradients(made, enumerate(made(made.pack(texts)))), wanted, 2e-5)


@pytest.mark.parametrize("kind", DECODERS)
def test_gradients_in_float64(tiny_model, monkeypatch, kind):
    texts = SHAPES["instruction and contexts"][:5]
    made = scorer(tiny_model(kind), lora=LORA).double()
    with nothing_below_float64(monkeypatch):
        wanted = gradients(made, each_alone(made, texts))
        assert_same_gradients(gradients(made, enumerate(made(made.pack(texts)))), wanted, 1e-9)


# --- guards against proving nothing -----------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("kind", [*DECODERS, *ENCODERS])
def test_tiny_models_react_to_wrong_masks(tiny_model, kind):
    """Scores differ between texts, and a text that sees its neighbour, or starts at another place, scores otherwise."""
    texts = SHAPES["flat"]
    made = scorer(tiny_model(kind))
    scores = made(made.pack(texts))
    assert scores.std(0).min() > 0.05
    glued = [Encoded(chunks=(texts[0].chunks[0] + texts[1].chunks[0],), starts=(0,))]
    assert (made(made.pack(glued))[0] - scores[1]).abs().max() > 1e-2
    halves = made.pack([Encoded(chunks=(texts[2].chunks[0][::-1],), starts=(0,))])
    assert (made(halves)[0] - scores[2]).abs().max() > 1e-2


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["mistral", "gemma3_text"])
def test_windows_are_shorter_than_texts(tiny_model, monkeypatch, kind):
    texts = SHAPES["instruction"]
    made = scorer(tiny_model(kind))
    scores = made(made.pack(texts))
    whole = plan.Block.mask
    monkeypatch.setattr(plan.Block, "mask", lambda self, causal, window: whole(self, causal, None))
    assert (made(made.pack(texts)) - scores).abs().max() > 1e-2


# --- encoders ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("kind", ENCODERS)
def test_packed_encoder_scores_equal_scores_alone(tiny_model, kind):
    encode = Encoder(install_template(load_tokenizer(tiny_model(kind)), None, 64, encoder=True), encoder=True)
    texts = encode(
        ["banks fall", "", "the quick brown fox " * 30, "news", "banks fall"], [None, "a", "b", "of foxes", None]
    )
    made = small.new_scorer(
        tiny_model(kind), TASK, pad_token_id=encode.tokenizer.pad_token_id, dtype=torch.float32, device=CPU, lora=LORA
    ).eval()
    found = made(made.pack(texts))
    made.inner.set_attn_implementation("sdpa")
    for score, text in zip(found, texts, strict=True):
        types = {"token_type_ids": torch.tensor([text.types[0]])} if text.types else {}
        assert_same(score[None], made.model(input_ids=torch.tensor([text.chunks[0]]), **types).logits, 1e-5)
    assert made.pack(texts).position_ids[0] == (encode.tokenizer.pad_token_id + 1 if "roberta" in kind else 0)
    assert (texts[3].types is not None) == (kind == "bert")


@torch.inference_mode()
def test_token_types_change_encoder_scores(tiny_model):
    made = scorer(tiny_model("bert"))
    ids = SHAPES["flat"][0].chunks[0]
    one, two = (Encoded(chunks=(ids,), starts=(0,), types=((t,) * len(ids),)) for t in (0, 1))
    first, second = made(made.pack([one, two]))
    assert (first - second).abs().max() > 1e-3


@torch.inference_mode()
def test_encoders_share_no_prefix(tiny_model):
    made = scorer(tiny_model("bert"))
    assert made.pack(SHAPES["instruction"]).tokens == made.pack(SHAPES["instruction"]).useful_tokens


@pytest.mark.parametrize("kind", ENCODERS)
def test_packed_encoder_gradients_equal_gradients_alone(tiny_model, kind):
    texts = some_texts(lengths=(5, 9, 3, 20))
    made = scorer(tiny_model(kind), lora=LORA)
    wanted = gradients(made, each_alone(made, texts))
    assert_same_gradients(gradients(made, enumerate(made(made.pack(texts)))), wanted, 1e-5)


# --- architectures that nobody has proven packable --------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("kind", PADDED)
def test_other_architectures_are_padded_and_exact(tiny_model, kind):
    assert load_config(tiny_model(kind)).model_type not in ARCHITECTURES
    made = scorer(tiny_model(kind))
    assert not made.packed
    texts = [*SHAPES["flat"], SHAPES["flat"][0]]
    assert_same(made(made.pack(texts)), alone(plain(made, tiny_model(kind)), texts), 1e-5)


# --- the embedded model -----------------------------------------------------------------------------------------------

HEADLINES = ["Markets fall as banks report losses", "A fox, and a dog", "你好 🙂", "Rates up", "Who won? " * 12]


@pytest.mark.slow
@torch.inference_mode()
def test_embedded_model_is_exact(demo_folder, record_property):
    """Float32 to 1e-4; in bfloat16 labels agree wherever the margin exceeds the measured noise."""
    instruction = "Sort the headline below by the topic of the article that it stands above in the newspaper.\n{text}"
    tokenizer = install_template(load_tokenizer(demo_folder), instruction, 128)
    texts = Encoder(tokenizer)(HEADLINES)
    made = small.new_scorer(
        demo_folder, TASK, pad_token_id=tokenizer.pad_token_id, dtype=torch.float32, device=CPU
    ).eval()
    batch = made.pack(texts)
    assert batch.tokens < batch.useful_tokens
    packed = made(batch)
    order = [3, 0, 4, 2, 1]
    assert_same(made(made.pack([texts[i] for i in order])), packed[order], 1e-4)
    made.share_from = None
    assert_same(made(made.pack(texts)), packed, 1e-4)
    made.inner.set_attn_implementation("sdpa")
    assert_same(packed, alone(made.inner, texts), 1e-4)
    made.inner.config.pad_token_id = PAD
    for side in ("left", "right"):
        assert_same(packed, made.inner(**padded(texts, side)).logits, 1e-4)
    made.inner.base_model.bfloat16()
    each = torch.cat([_bf16_alone(made, text) for text in texts])
    made.inner.set_attn_implementation(interface.NAME)
    low = made(batch)
    noise = (low - each).abs().max().item()
    record_property("bf16_noise", noise)
    top = packed.topk(2).values
    sure = (top[:, 0] - top[:, 1]) > 2 * max(noise, (low - packed).abs().max().item())
    assert 0 < noise < 0.5 * packed.std().item() + 0.5
    assert torch.equal(low.argmax(1)[sure], packed.argmax(1)[sure])


@pytest.mark.slow
def test_embedded_model_gradients_are_exact(demo_folder):
    """Adapters and head, two texts behind an instruction: packed and shared as alone through transformers' attention."""
    template = "Sort this headline by the topic of its article, please.\n{text}"
    tokenizer = install_template(load_tokenizer(demo_folder), template, 64)
    texts = Encoder(tokenizer)(HEADLINES[:2])
    made = scorer(demo_folder, lora=LORA)
    made.share_from = 8
    batch = made.pack(texts)
    assert batch.tokens < batch.useful_tokens
    weights = torch.tensor([[1.0, -2.0, 0.5], [0.3, 1.0, -1.0]])

    def gradients(scores):
        made.zero_grad()
        (scores * weights).sum().backward()
        return {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}

    ours = gradients(made(batch))
    made.inner.set_attn_implementation("sdpa")
    theirs = gradients(alone(made.inner, texts))
    assert ours.keys() == theirs.keys()
    assert any("lora_A" in name for name in ours)
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() <= 1e-4 * max(1e-3, gradient.abs().max()), name


def _bf16_alone(made: Scorer, text: Encoded) -> torch.Tensor:
    """Transformers' backbone on one text, our float32 head."""
    states = made.inner.base_model(input_ids=torch.tensor([text.chunks[0]])).last_hidden_state
    return made.inner.score(states[:, -1].float())


def test_capped_attention_logits_are_refused():
    """Gemma 2 hands a cap over, which the tree's attention does not compute: no score is better than another one."""
    states = torch.zeros(1, 2, 3, 4)
    with pytest.raises(UserError, match=facts("50")):
        interface.tree_attention(torch.nn.Module(), states, states, states, None, plan=None, softcap=50.0)
