"""GGUF files, among them the embedded model, as plain transformers folders in the cache."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracle import hubs
from loracle.errors import UserError
from loracle.models.quiet import quiet_transformers

if TYPE_CHECKING:
    from gguf import GGUFReader

CONVERSION = "conversion.json"  # in a converted folder: the file it came from, and the checksums of its own files


def demo_model_folder() -> Path:
    """The embedded model, SmolLM2-135M-Instruct (Apache-2.0), as a plain transformers folder in the cache.

    It is converted from a 4-bit GGUF file in a wheel, so it is a little worse than the original. ``BaseModel.note`` says so for
    every figure made with it. The conversion takes half a minute, once.

    Raises:
        UserError: the wheel cannot be fetched.
    """
    folder = _unpacked_folder(hubs.DEMO_SHA256)
    if not is_intact(folder):
        _unpack(hubs.fetch(hubs.DEMO, repo_type="model"), hubs.DEMO_SHA256)
    return folder


def gguf_model_folder(gguf: Path) -> Path:
    """Any GGUF file, dequantised, as a plain transformers folder in the cache. Its key is the file's content.

    The weights pass through float32, so that the result does not depend on the reader's version, and are stored in bfloat16. A
    parameter takes four bytes of memory during the conversion and two on disk.

    Raises:
        UserError: the file is broken, a part of several, or of an architecture that transformers cannot read.
    """
    sha256 = hubs.checksum(gguf)
    folder = _unpacked_folder(sha256)
    if not is_intact(folder):
        _unpack(gguf, sha256)
    return folder


def _unpacked_folder(sha256: str) -> Path:
    return hubs.cache_dir() / "models" / f"gguf-{sha256[:16]}-1"  # -1: raise it when the conversion changes


def _unpack(gguf: Path, sha256: str) -> None:
    folder = _unpacked_folder(sha256)
    with hubs.building(folder) as scratch:
        if not is_intact(folder):  # another process may have been faster
            note = _dequantise(gguf, scratch)
            files = {path.name: _fingerprint(path) for path in sorted(scratch.iterdir())}
            conversion = {"note": note, "gguf_sha256": sha256, "files": files}
            (scratch / CONVERSION).write_text(json.dumps(conversion, indent=2), encoding="utf-8")


def _fingerprint(path: Path) -> dict[str, Any]:
    stat = path.stat()
    return {"sha256": hubs.checksum(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def is_intact(folder: Path) -> bool:
    """Whether the files are unchanged. They are read only if size or time have changed, so this is cheap."""
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
    """Write ``gguf`` as a transformers folder; returns the note for every figure of this model."""
    model, tokenizer, reader = _read_gguf(gguf)
    model.config.__dict__.pop("_model_name_or_path", None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if _field(reader, "tokenizer.ggml.pre") == "smollm":
        _split_digits(tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    with quiet_transformers():
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
        raise UserError(
            f"{gguf.name} is one of several parts of a GGUF model.", "Join them with llama-gguf-split --merge."
        )
    # Later versions may keep the weights packed, which can be neither trained nor saved as safetensors.
    packed = hasattr(transformers, "GgufConfig")
    options: dict[str, Any] = {"quantization_config": transformers.GgufConfig(dequantize=True)} if packed else {}
    try:
        with quiet_transformers():
            reader = GGUFReader(gguf)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False, **options
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                gguf.parent, gguf_file=gguf.name, trust_remote_code=False
            )
    except Exception as error:  # the readers raise anything on a broken or unknown file
        reason = hubs.first_line(error)
        raise UserError(f"transformers cannot read {gguf}: {reason}.", "Use the original model.") from error
    return model, tokenizer, reader


def _field(reader: GGUFReader, key: str) -> Any:
    return reader.fields[key].contents() if key in reader.fields else None


def _precision(reader: GGUFReader) -> str:
    """The format of most weights: "4-bit" for the block formats Q4_1, Q4_K or IQ4_XS, else its name, such as "F16"."""
    weights: Counter[str] = Counter()
    for tensor in reader.tensors:
        weights[tensor.tensor_type.name] += int(tensor.n_elements)
    name = weights.most_common(1)[0][0]
    bits = re.search(r"Q(\d)", name)
    return f"{bits[1]}-bit" if bits else name


def _split_digits(tokenizer: Any) -> None:
    """Give SmolLM2 its own pre-tokenizer, which makes every digit a token. transformers' GGUF reader does not know it.

    Without it "a  7" (two blanks) gets other tokens than in pretraining.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def read_conversion(folder: Path) -> dict[str, Any]:
    """The record of a converted folder; empty for any other."""
    path = folder / CONVERSION
    return hubs.read_json(path, str(folder)) if path.is_file() else {}
