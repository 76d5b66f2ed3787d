"""Base models of every supported family, tiny and random, as folders that the hubs might have served."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import timeit
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small import has_facts

from loracle import hubs
from loracle.errors import UserError
from loracle.models import devices, loading
from loracle.models import gguf as gguf_reading

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
DECODER = SMALL | {"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "tie_word_embeddings": True}
FAMILIES = {
    "qwen2": transformers.Qwen2Config(**DECODER),
    "qwen3": transformers.Qwen3Config(**DECODER),
    "llama": transformers.LlamaConfig(**DECODER | {"tie_word_embeddings": False}),
    "mistral": transformers.MistralConfig(**DECODER),
    "gemma3_text": transformers.Gemma3TextConfig(**DECODER, layer_types=["sliding_attention", "full_attention"]),
    "bert": transformers.BertConfig(**SMALL),
    "roberta": transformers.RobertaConfig(**SMALL),
    "xlm-roberta": transformers.XLMRobertaConfig(**SMALL),
}


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """family -> folder of a base model, with the language-model head it was pretrained with."""
    folders = {}
    for family, config in FAMILIES.items():
        torch.manual_seed(0)
        kind = transformers.AutoModel if family == "bert" else transformers.AutoModelForCausalLM
        kind = transformers.AutoModelForMaskedLM if "roberta" in family else kind
        folders[family] = tmp_path_factory.mktemp(family)
        kind.from_config(config).save_pretrained(folders[family])
    return folders


@pytest.fixture
def folder(families, tmp_path):
    """A Qwen2 folder that a test may spoil."""
    for path in families["qwen2"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def load(folder: Path, **options):
    options = {"num_labels": 3, "pad_token_id": 0, "dtype": torch.float32} | options
    return loading.load_sequence_classifier(folder, **options)


def refusal(function, *args, **options) -> str:
    with pytest.raises(UserError) as refused:
        function(*args, **options)
    return str(refused.value)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- into memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_silently(families, family, capfd):
    model = load(families[family], label_names=("a", "b", "c"), problem_type="single_label_classification")
    assert capfd.readouterr() == ("", "")
    assert type(model).__name__.endswith("ForSequenceClassification")
    saved = load_file(families[family] / "model.safetensors")
    body = dict(model.named_parameters())
    same = [name for name in body if name in saved or name.partition(".")[2] in saved]
    assert len(same) >= len(body) - 4, "only the head may be new"
    for name in same:
        torch.testing.assert_close(body[name], saved.get(name, saved.get(name.partition(".")[2])), rtol=0, atol=0)
    config = model.config
    assert (config.num_labels, config.pad_token_id, config.problem_type) == (3, 0, "single_label_classification")
    assert (config.id2label, config.label2id) == ({0: "a", 1: "b", 2: "c"}, {"a": 0, "b": 1, "c": 2})
    assert model(torch.tensor([[5, 6, 7]])).logits.shape == (1, 3)


@pytest.mark.slow
def test_head_names(families):
    heads = {family: loading.head_names(load(families[family])) for family in FAMILIES}
    decoders = dict.fromkeys(("qwen2", "qwen3", "llama", "mistral", "gemma3_text"), ("score",))
    encoders = {"bert": ("classifier", "bert.pooler"), "roberta": ("classifier",), "xlm-roberta": ("classifier",)}
    assert heads == decoders | encoders


def test_new_head_follows_the_seed(families):
    def head(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return load(families["qwen2"]).score.weight.detach()

    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))


def test_head_of_another_size_is_replaced(families, tmp_path):
    trained = load(families["qwen2"])
    trained.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path).score.weight, trained.score.weight)
    assert load(tmp_path, num_labels=5).score.weight.shape == (5, 16)


def test_bert_without_pooler_gets_a_new_one(families, tmp_path):
    weights = load_file(families["bert"] / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "pooler" not in k}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((families["bert"] / "config.json").read_bytes())
    assert "bert.pooler" in loading.head_names(load(tmp_path))


def test_dtype(families):
    assert {p.dtype for p in load(families["qwen2"], dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_missing_weights_raise(folder):
    weights = load_file(folder / "model.safetensors")
    gone = [name for name in weights if "layers.1.mlp" in name]
    for name in gone:
        del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert has_facts(refusal(load, folder), f"{len(gone)} weights", str(folder))


def test_weights_of_another_shape_raise(folder):
    edit(folder / "config.json", intermediate_size=48)
    assert has_facts(refusal(load, folder), "6 weights", "config.json", "model.layers.0.mlp.down_proj.weight")


@pytest.mark.parametrize("keep", [0, 7, 300, -50])
def test_truncated_weights_name_the_file(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "safetensors" in refusal(load, folder)


def test_unusable_configs_raise(folder, families):
    config = folder / "config.json"
    original = config.read_text()
    own_code = {"AutoConfig": "own.Config", "AutoModelForSequenceClassification": "own.Model"}
    for changes, words in [
        ({"model_type": "own", "auto_map": own_code}, "'own' | auto_map"),
        ({"model_type": "own"}, "'own'"),
        ({"model_type": None}, "None"),
        ({"model_type": "clip_vision_model"}, "clip_vision_model"),
        ({"model_type": "gemma3", "vision_config": {}}, "multimodal"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"hidden_size": "wide"}, "config.json"),
    ]:
        config.write_text(original)
        edit(config, **changes)
        assert has_facts(refusal(load, folder), *words.split(" | ")), changes
    config.write_text("[1]")
    assert has_facts(refusal(load, folder), "None", str(folder))
    config.write_text("{broken")
    assert "JSON: Expecting property name" in refusal(load, folder)
    config.unlink()
    assert "config.json" in refusal(load, folder)


def test_code_in_model_folder_never_runs(folder):
    trap = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"
    for name in ("own.py", "configuration_own.py", "tokenization_own.py"):
        (folder / name).write_text(trap)
    own = {"AutoConfig": "own.C", "AutoModelForSequenceClassification": "own.M", "AutoModel": "own.M"}
    edit(folder / "config.json", auto_map=own)
    save_tokenizer(folder)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.T", "own.T"]}, tokenizer_class="OwnT")
    assert type(load(folder)).__module__.startswith("transformers.")
    assert loading.load_tokenizer(folder)("b a").input_ids == [1, 0]
    assert not list(folder.rglob("ran"))


# --- tokenizer, device, dtype -----------------------------------------------------------------------------------------


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<pad>": 2, "</s>": 3}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    tokenizer.save_pretrained(folder)


def test_tokenizer_is_the_generic_fast_class(tmp_path, capfd):
    save_tokenizer(tmp_path)
    edit(tmp_path / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    tokenizer = loading.load_tokenizer(tmp_path)
    assert type(tokenizer) is transformers.PreTrainedTokenizerFast
    assert (tokenizer("b a").input_ids, tokenizer.pad_token_id, tokenizer.eos_token_id) == ([1, 0], 2, 3)
    assert capfd.readouterr() == ("", "")


def test_tokenizer_is_built_from_vocabulary(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "model_max_length": 32}')
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    tokenizer = loading.load_tokenizer(tmp_path)
    assert type(tokenizer) is transformers.PreTrainedTokenizerFast
    assert tokenizer("A b").input_ids == [2, 5, 6, 3]
    assert (tokenizer.pad_token_id, tokenizer.model_max_length) == (0, 32)


def test_unusable_tokenizers_raise(tmp_path):
    assert "tokenizer" in refusal(loading.load_tokenizer, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    assert "Add the tokenizer.json of the model." in refusal(loading.load_tokenizer, tmp_path)


def test_pick_device(monkeypatch):
    assert devices.pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert devices.pick_device("auto") == torch.device("cpu")
    for name in ("cuda", "mps", "tpu", "cuda:0", "cpu:x", ""):
        assert has_facts(refusal(devices.pick_device, name), f"'{name}'", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(devices.pick_device(name)) for name in ("auto", "cuda:1")] == ["cuda", "cuda:1"]
    assert "'cuda:2'" in refusal(devices.pick_device, "cuda:2")


def test_pick_dtype():
    cpu = torch.device("cpu")
    assert devices.pick_dtype("auto", True, cpu) == devices.pick_dtype("float32", False, cpu) == torch.float32
    assert devices.pick_dtype("bfloat16", True, cpu) == torch.bfloat16
    assert devices.pick_dtype("auto", False, torch.device("mps")) == torch.bfloat16
    assert has_facts(refusal(devices.pick_dtype, "float16", False, cpu), "--dtype")
    assert "'int8'" in refusal(devices.pick_dtype, "int8", False, cpu)


def test_auto_dtype_is_the_faster_one():
    def seconds(dtype):
        x, w = (torch.ones(512, 512, dtype=dtype) for _ in range(2))
        x @ w.t()
        return min(timeit.repeat(lambda: x @ w.t(), number=1, repeat=20))

    faster = min((torch.bfloat16, torch.float32), key=seconds)
    assert devices.pick_dtype("auto", False, torch.device("cpu")) == faster


# --- which base -------------------------------------------------------------------------------------------------------


def test_resolve_base_of_a_folder(folder):
    base = loading.resolve_base(str(folder))
    assert base == loading.BaseModel(folder, str(folder), revision=None, note=None)
    before = base.checksum()
    assert before == loading.resolve_base(str(folder)).checksum()
    (folder / "README.md").write_text("words change nothing")
    assert base.checksum() == before
    edit(folder / "config.json", rms_norm_eps=1e-3)
    assert base.checksum() != before
    assert has_facts(refusal(loading.resolve_base, str(folder), "main"), "--revision")


def test_pickles_and_missing_folders_raise(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pytorch" in refusal(loading.resolve_base, str(folder))
    assert "./nowhere" in refusal(loading.resolve_base, "./nowhere")


# --- GGUF -------------------------------------------------------------------------------------------------------------


def test_demo_model_loads(capfd):
    base = loading.resolve_base("demo")
    capfd.readouterr()  # making it, once for a machine, may take a while and says so
    assert base == loading.BaseModel(
        gguf_reading.demo_model_folder(), "demo", None, "SmolLM2-135M-Instruct, dequantised from a 4-bit GGUF file"
    )
    assert base.checksum() == hubs.DEMO_SHA256
    model = load(base.folder, dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.model.parameters()) == 134_515_008
    assert not hasattr(model.config, "quantization_config")
    tokenizer = loading.load_tokenizer(base.folder)
    assert tokenizer.tokenize("In  2024 it's") == ["In", "ĠĠ", "2", "0", "2", "4", "Ġit", "'s"]
    assert tokenizer.model_max_length == 8192
    assert tokenizer.chat_template
    assert "dequantised from a 4-bit GGUF file" in (base.folder / "README.md").read_text()
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_demo_model_knows_the_capital_of_france():
    """Weights, tokenizer and rotary layout fit each other; a permuted head would babble."""
    folder = gguf_reading.demo_model_folder()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = loading.load_tokenizer(folder)
    logits = model(torch.tensor([tokenizer("The capital of France is").input_ids])).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"


def write_gguf(path: Path) -> Path:
    """A random one-layer Llama with a byte-level tokenizer, as llama.cpp would write it."""
    from tokenizers.pre_tokenizers import ByteLevel

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_license("mit")
    sizes = {"context_length": 64, "embedding_length": 32, "block_count": 1, "feed_forward_length": 64}
    sizes |= {"head_count": 2, "head_count_kv": 1, "vocab_size": 261, "file_type": gguf.LlamaFileType.MOSTLY_Q4_0}
    for name, size in sizes.items():
        getattr(writer, f"add_{name}")(size)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    letters = sorted(ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*letters, "ab", "cd", "<s>", "</s>", "<pad>"])
    writer.add_token_types([1] * 258 + [3] * 3)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(258)
    writer.add_eos_token_id(259)
    writer.add_pad_token_id(260)
    torch.manual_seed(0)
    shapes = {"token_embd": (261, 32), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32)}
    shapes |= {"blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32)}
    shapes |= {"blk.0.ffn_down": (32, 64), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,), "output_norm": (32,)}
    for name, shape in shapes.items():
        weight = torch.randn(shape).numpy()
        if len(shape) == 2:
            packed = gguf.quantize(weight, gguf.GGMLQuantizationType.Q4_0)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
        else:
            writer.add_tensor(f"{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORACLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_gguf_file_is_converted_once(tmp_path, cache):
    path = write_gguf(tmp_path / "tiny-Q4_0.gguf")
    base = loading.resolve_base(str(path))
    assert (base.source, base.note) == (str(path), "tiny, dequantised from a 4-bit GGUF file")
    assert base.folder.is_relative_to(cache)
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_up.weight")
    expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type)).bfloat16()
    model = load(base.folder, dtype=torch.bfloat16)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, expected)
    assert loading.load_tokenizer(base.folder).tokenize("abba") == ["ab", "b", "a"]
    # Found again by its content under another name, and remade when the copy was damaged.
    renamed = path.rename(tmp_path / "other.gguf")
    made = (base.folder / "model.safetensors").stat().st_mtime_ns
    assert gguf_reading.gguf_model_folder(renamed) == base.folder
    assert (base.folder / "model.safetensors").stat().st_mtime_ns == made
    norm = model.model.norm.weight.clone()  # the loaded weights are the file's own pages
    weights = base.folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-2] + b"\0\1")
    assert gguf_reading.gguf_model_folder(renamed) == base.folder
    assert torch.equal(load(base.folder, dtype=torch.bfloat16).model.norm.weight, norm)
    assert loading.resolve_base(str(renamed)).checksum() == base.checksum()


def test_unusable_gguf_files_raise(tmp_path, cache):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF and no more")
    assert "transformers" in refusal(gguf_reading.gguf_model_folder, broken)
    part = tmp_path / "big-00001-of-00003.gguf"
    part.touch()
    assert has_facts(refusal(gguf_reading.gguf_model_folder, part), "00001", "00003", "--merge")
    assert not [p for p in (cache / "models").iterdir() if not p.name.endswith(".lock")]


@pytest.mark.slow
def test_two_processes_convert_one_file(tmp_path, cache):
    path = write_gguf(tmp_path / "tiny.gguf")
    script = f"from loracle.models import loading as b; print(b.resolve_base({str(path)!r}).folder)"
    command = [sys.executable, "-c", script]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) for _ in range(2)]
    folders = {process.communicate(timeout=120)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(folders) == 1
    assert load(Path(folders.pop().strip())).config.model_type == "llama"
