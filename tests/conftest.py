"""Tiny random models and tokenizers of every family, made on first use and kept for the session.

    tiny_model("qwen2")       a folder as a hub might serve it: config.json, model.safetensors and a tokenizer
    tiny_tokenizer("llama3")  a tokenizer of that family, cut from the same cloth: a few hundred tokens

The models' weights are wide enough that attention matters: a wrong mask changes every score (tests/models/test_exact.py
holds them to that), and the windows of Mistral and Gemma are shorter than most texts.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from fake_hubs import hubs  # noqa: F401, a fixture
from small import CHINESE, ENGLISH, QUICK, labelled, write

# Tiny models gain nothing from a second thread, and lose much where something else runs; subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Whoever runs tests in the background of a script has Ctrl-C ignored, in all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

CORPUS = [
    "the quick brown fox jumps over the lazy dog and reads the news",
    "Classify the topic of this headline: markets fall as banks report losses",
    "one title was read by more people than another title of the same article",
    "Instruction: sort what follows by topic. Title: a river runs through it. Topic: nature",
] * 4
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
}
DECODER = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
# kind: (config class, settings, tokenizer family)
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "qwen2": ("Qwen2Config", DECODER, "qwen"),
    "qwen2-chinese": ("Qwen2Config", DECODER, "qwen-chinese"),
    "qwen3": ("Qwen3Config", DECODER, "qwen"),
    "llama": ("LlamaConfig", DECODER, "llama3"),
    "mistral": ("MistralConfig", DECODER | {"sliding_window": 6}, "mistral"),
    "gemma3_text": ("Gemma3TextConfig", DECODER | {"sliding_window": 6, "layer_types": WINDOWS}, "gemma"),
    "bert": ("BertConfig", SIZES, "bert"),
    "roberta": ("RobertaConfig", SIZES, "roberta"),
    "xlm-roberta": ("XLMRobertaConfig", SIZES, "roberta"),
    # Not proven packable, so padded: one that reads both ways, one that reads forward.
    "distilbert": ("DistilBertConfig", {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}, "bert"),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}, "qwen"),
}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Callable[[str], Path]:
    """kind (a key of ``MODELS``) -> folder of a tiny random base model with its tokenizer."""

    @cache
    def make(kind: str) -> Path:
        import torch
        import transformers

        config_class, settings, family = MODELS[kind]
        tokenizer = _TOKENIZERS[family]()
        config = getattr(transformers, config_class)(
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **settings,
        )
        masked = kind in ("bert", "roberta", "xlm-roberta", "distilbert")
        auto = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = auto.from_config(config)
            for weight in model.parameters():
                if weight.ndim == 1:  # biases and norms, which start as zeros and ones
                    weight.data += 0.1 * torch.randn_like(weight)
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def labelled_run(tiny_model, tmp_path_factory) -> Path:
    """A run on ``small.labelled``, two steps long, which tests read and do not write to."""
    from loracle import pipeline
    from loracle.config import RunConfig

    folder = tmp_path_factory.mktemp("labelled")
    data = write(folder / "data.csv", labelled())
    flat = QUICK | {"data": str(data), "model": str(tiny_model("qwen2")), "out": str(folder / "run"), "max_steps": 2}
    return pipeline.train(RunConfig.from_flat(flat), log=lambda line: None, quiet=True)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Callable[[str], Any]:
    """family -> a small tokenizer of it: qwen, llama3, gemma, mistral, bert, roberta."""
    return cache(lambda family: _TOKENIZERS[family]())


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The embedded model, SmolLM2-135M, as a transformers folder."""
    from loracle.models.gguf import demo_model_folder

    return demo_model_folder()


@pytest.fixture(scope="module")
def browser():
    """A real one: ``$LORACLE_BROWSER``, the one that ``dev/browser`` unpacks, or Playwright's own; without one the test that
    wants it is skipped.
    """
    from loracle.hubs import cache_dir

    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install 'loracle[browser]'")
    with playwright.sync_playwright() as started:
        places = (os.environ.get("LORACLE_BROWSER"), cache_dir() / "browser/chromium", started.chromium.executable_path)
        found = next((Path(place) for place in places if place and Path(place).exists()), None)
        if found is None:
            pytest.skip("no browser: dev/browser unpacks one, as does `playwright install chromium`")
        libraries = {**os.environ, "LD_LIBRARY_PATH": str(found.parent / "lib")}
        flags = [
            "--no-sandbox",
            "--use-gl=angle",
            "--use-angle=swiftshader",
        ]  # else one picture in 30 fails without a GPU
        opened = started.chromium.launch(executable_path=found, args=flags, env=libraries)
        yield opened
        opened.close()


# --- tokenizers -------------------------------------------------------------------------------------------------------


def _qwen():
    """Byte-level BPE, no token put before a text, pad and end-of-turn named, a chat template."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return _fast(_byte_level(specials), eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT)


def _qwen_chinese():
    """The same with tokens of several Chinese characters, as Qwen's own 151,643 have, and loaded in no time."""
    backend = _byte_level(["<|endoftext|>", "<|im_end|>"], [*ENGLISH, *CHINESE] * 4, size=800)
    return _fast(backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _llama3():
    """Byte-level BPE that puts ``<|begin_of_text|>`` first and names no pad token."""
    from tokenizers import processors

    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"]
    backend = _byte_level(names)
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{names[0]} $A", pair=f"{names[0]} $A {names[0]} $B", special_tokens=[(names[0], 0)]
            ),
        ]
    )
    return _fast(backend, bos_token=names[0], eos_token=names[1])


def _gemma():
    """SentencePiece's kind: blanks are ``▁``, unknown characters fall back to bytes, ``<bos>`` comes first."""
    from tokenizers import normalizers, pre_tokenizers

    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    backend = _sentencepiece(names, bos="<bos>")
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return _fast(backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def _mistral():
    """SentencePiece's older kind: a blank before the text, ``<s>`` first, ``<unk>`` but no pad token."""
    from tokenizers import normalizers

    backend = _sentencepiece(["<unk>", "<s>", "</s>"], bos="<s>")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = _fast(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.init_kwargs |= {"add_bos_token": True, "add_eos_token": False}  # as Mistral's tokenizer_config.json says
    return tokenizer


def _bert():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,:!?[]<>|_-/#"
    words = sorted(set(" ".join(CORPUS).lower().replace(":", "").split()))
    pieces = dict.fromkeys([*names, *letters, *words, *(f"##{c}" for c in letters)])
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return _fast(
        backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def _roberta():
    from tokenizers import processors

    backend = _byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return _fast(
        backend, bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>", pad_token="<pad>",
        unk_token="<unk>", mask_token="<mask>",
    )  # fmt: skip


_TOKENIZERS = {
    "qwen": _qwen,
    "qwen-chinese": _qwen_chinese,
    "llama3": _llama3,
    "gemma": _gemma,
    "mistral": _mistral,
    "bert": _bert,
    "roberta": _roberta,
}


def _fast(backend, **names):
    from transformers import PreTrainedTokenizerFast

    names = {"model_input_names": ["input_ids", "attention_mask"]} | names
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)


def _byte_level(specials: list[str], corpus: list[str] = CORPUS, size: int = 400):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(corpus, trainer)
    return backend


def _sentencepiece(specials: list[str], bos: str):
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors, trainers

    learnt = Tokenizer(models.BPE())
    learnt.train_from_iterator(
        [f"▁{line.replace(' ', '▁')}" for line in CORPUS],
        trainers.BpeTrainer(vocab_size=120, show_progress=False, max_token_length=8),
    )
    pieces = sorted(learnt.get_vocab(), key=learnt.get_vocab().__getitem__)
    names = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    merges = [tuple(pair) for pair in json.loads(learnt.to_str())["model"]["merges"]]
    backend = Tokenizer(
        models.BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in specials])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, names.index(bos))]
    )
    return backend
