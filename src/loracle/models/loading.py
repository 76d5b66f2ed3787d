"""Base models: from a hub, a folder, a GGUF file or the embedded model to a transformers folder, and into memory.

A base is always a folder of ``config.json``, ``*.safetensors`` and a tokenizer. Code in the folder is never run, and pickled
weights are never opened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loracle import hubs
from loracle.errors import UserError
from loracle.models.architectures import SUPPORTED
from loracle.models.gguf import demo_model_folder, gguf_model_folder, read_conversion
from loracle.models.quiet import quiet_transformers

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]  # of transformers


# --- which base -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model on this disk, and where it came from.

    Attributes:
        folder: config.json, safetensors and tokenizer.
        source: the spec that finds it again: "hf:owner/name", "modelscope:owner/name", an absolute path, "demo".
        revision: the hub's commit (ModelScope: branch or tag).
        note: a sentence for every figure made with this model, or None.
    """

    folder: Path
    source: str
    revision: str | None = None
    note: str | None = None

    @property
    def peft_name(self) -> str:
        """The name of the base in PEFT's files: an id that plain PEFT can fetch, else the folder."""
        source = hubs.remote_source(self.source)
        return source.id if source and hubs.HUBS[source.hub].known_to_peft else str(self.folder)

    def checksum(self) -> str:
        """SHA-256 of config.json and the weights; of a converted GGUF file the SHA-256 of that file."""
        if conversion := read_conversion(self.folder):
            return conversion["gguf_sha256"]
        whole = hashlib.sha256()
        for path in [self.folder / "config.json", *sorted(self.folder.glob("*.safetensors"))]:
            whole.update(f"{path.name} {hubs.checksum(path)}\n".encode())
        return whole.hexdigest()


def resolve_base(spec: str, revision: str | None = None) -> BaseModel:
    """Find the base model that ``spec`` names and fetch it to this disk.

    Args:
        spec: hub id, ``hf:owner/name``, ``modelscope:owner/name``, folder, .gguf file, or ``demo``.
        revision: branch, tag or commit of a hub's model.

    Raises:
        UserError: it cannot be fetched, or is no model that can be opened safely.
    """
    if spec == hubs.DEMO and revision is None:
        folder = demo_model_folder()  # does not need the GGUF file once it is converted
        return BaseModel(folder, spec, note=read_conversion(folder).get("note"))
    path, source = hubs.fetch(spec, repo_type="model", revision=revision), str(hubs.parse(spec))
    folder = gguf_model_folder(path) if path.is_file() else path
    hubs.check_model_folder(folder, spec)
    return BaseModel(folder, source, hubs.revision_of(folder), note=read_conversion(folder).get("note"))


# --- tokenizer, device, dtype -----------------------------------------------------------------------------------------


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder, as the generic fast class.

    ``tokenizer.json`` alone defines the tokens. The families' own classes rebuild parts of it from other files when they load,
    so a saved tokenizer may differ after loading.

    Raises:
        UserError: the folder has none, or only one that needs its own code.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if (folder / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not isinstance(loaded, PreTrainedTokenizerFast):
            raise ValueError(f"{type(loaded).__name__} has no fast version")
    except Exception as error:  # missing, broken and foreign tokenizers raise anything from OSError to pyo3's Exception
        raise UserError(
            f"{folder} has no tokenizer that can be read: {hubs.first_line(error)}.",
            "Add the tokenizer.json of the model.",
        ) from error
    specials = {name: token for name, token in loaded.special_tokens_map.items() if isinstance(token, str)}
    return PreTrainedTokenizerFast(
        tokenizer_object=loaded.backend_tokenizer,
        model_max_length=loaded.model_max_length,
        padding_side=loaded.padding_side,
        chat_template=loaded.chat_template,
        **specials,
    )


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

    A new head is drawn from torch's global generator, without transformers' report about it. Any other missing weight is
    an error, since a random layer in the middle would only lower the scores.

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
        raise UserError(
            f"transformers cannot classify with a {config.model_type} model ({folder}).",
            f"Use another --model. Supported: {SUPPORTED}.",
        )
    config.num_labels, config.pad_token_id, config.problem_type = num_labels, pad_token_id, problem_type
    if label_names:
        config.id2label = dict(enumerate(label_names))
        config.label2id = {name: i for i, name in enumerate(label_names)}
    try:
        with quiet_transformers():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # a head may differ; _check_complete checks the body
                output_loading_info=True,
            )
    except Exception as error:  # a broken file raises SafetensorError, OSError, RuntimeError, KeyError or ValueError
        raise _explain_weights(folder, error) from error
    _check_complete(model, report, folder)
    return model


def load_config(folder: Path) -> PretrainedConfig:
    """The model's config, checked early, as the model itself would fail late and unclearly.

    Raises:
        UserError: broken, unknown, multimodal, quantised, or in need of code that the folder brings along.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    raw = hubs.read_json(folder / "config.json", f"the model {folder}")
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        own = isinstance(raw, dict) and "auto_map" in raw
        why = " It needs code of its own (auto_map), and such code is never run." if own else ""
        raise UserError(
            f"transformers does not know the model_type {model_type!r} of {folder}.{why}",
            f"Use another --model. Supported: {SUPPORTED}.",
        )
    if "vision_config" in raw or "audio_config" in raw:
        raise UserError(
            f"{folder} is a multimodal {model_type}, not a text model.",
            "Use its text-only version (Gemma 3: google/gemma-3-270m or google/gemma-3-1b-it).",
        )
    if "quantization_config" in raw:
        raise UserError(f"The weights in {folder} are quantised.", "Use the model that they were made from.")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # each config class raises errors of its own
        reason = hubs.first_line(error)
        raise UserError(
            f"config.json of {folder} does not fit {model_type}: {reason}.", "Fetch the model again."
        ) from error


def head_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Modules between the last hidden state and the scores: ("score",), ("classifier",), ("classifier", "bert.pooler").

    They are trained and saved whole.
    """
    backbone = model.base_model_prefix
    names = [n for n, m in model.named_children() if n != backbone and any(True for _ in m.parameters())]
    if getattr(getattr(model, backbone), "pooler", None) is not None:
        names.append(f"{backbone}.pooler")
    return tuple(names)


def _check_complete(model: PreTrainedModel, report: dict[str, Any], folder: Path) -> None:
    head = tuple(f"{name}." for name in head_names(model))
    misfits = [key for key, *_ in report["mismatched_keys"] if not key.startswith(head)]
    missing = [key for key in report["missing_keys"] if not key.startswith(head)]
    for gaps, problem in ((misfits, "of another shape than in config.json"), (missing, "missing")):
        if gaps:
            raise UserError(
                f"{len(gaps)} weights of {model.config.model_type} in {folder} are {problem}, among them {sorted(gaps)[0]}.",
                "Fetch the model again.",
            )


def _explain_weights(folder: Path, error: Exception) -> UserError:
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except Exception as damage:  # safetensors raises one error class for any damage
            return UserError(f"{path} is damaged: {damage}.", "Fetch the model again.")
    reason = hubs.first_line(error)
    return UserError(f"The weights in {folder} do not fit config.json: {reason}.", "Fetch the model again.")
