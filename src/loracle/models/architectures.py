"""What is known of each model family: one table. To add a family, add a row and its tiny model in ``tests/conftest.py``.

A family in the table computes packed texts exactly (``tests/models/test_exact.py`` holds each to that). Any other family that
transformers can classify with is padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from loracle.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A row of ``ARCHITECTURES``."""

    name: str  # for people
    kind: Literal["decoder", "encoder"]
    packable: bool = True  # whether several texts in one row score as they do alone
    layers: str = "layers"  # where the base model keeps its list of layers
    few_targets: str = "q_proj,v_proj"  # the linear layers that a small adapter sits on
    after_padding: bool = False  # whether positions are counted from behind the padding id

    @property
    def decoder(self) -> bool:
        """Whether a token sees only those before it."""
        return self.kind == "decoder"

    def first_position(self, config: Any) -> int:
        """The position of a text's first token."""
        return config.pad_token_id + 1 if self.after_padding else 0


ENCODER: dict[str, Any] = {"kind": "encoder", "layers": "encoder.layer", "few_targets": "query,value"}
ARCHITECTURES: dict[str, Architecture] = {  # by transformers' model_type
    "qwen2": Architecture(name="Qwen2.5", kind="decoder"),
    "qwen3": Architecture(name="Qwen3", kind="decoder"),
    "llama": Architecture(name="Llama, SmolLM2", kind="decoder"),
    "mistral": Architecture(name="Mistral", kind="decoder"),
    "gemma3_text": Architecture(name="Gemma 3 text", kind="decoder"),
    "bert": Architecture(name="BERT", **ENCODER),
    "roberta": Architecture(name="RoBERTa", **ENCODER, after_padding=True),
    "xlm-roberta": Architecture(name="XLM-R", **ENCODER, after_padding=True),
}
SUPPORTED = ", ".join(row.name for row in ARCHITECTURES.values())


def architecture_of(config: Any) -> Architecture:
    """The row of a model's config. A family without a row is padded; it reads both ways if it is a masked model."""
    model_type = config.model_type
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    masked = model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return Architecture(name=model_type, kind="encoder" if masked else "decoder", packable=False)


def is_encoder(config: Any) -> bool:
    """Whether a model reads both ways, as BERT does: it can fill in masks."""
    return not architecture_of(config).decoder


def is_packable_decoder(config: Any) -> bool:
    """Whether a model is a decoder of the table, whose layers can be cut, cached, quantised and read one by one."""
    row = architecture_of(config)
    return row.decoder and row.packable


def layers_of(base: Any) -> Any:
    """The list of layers of a base model, None where it is unknown."""
    row = architecture_of(base.config)
    found: Any = base
    for part in row.layers.split("."):
        found = getattr(found, part, None)
    return found


def positions(config: Any) -> int:
    """The number of tokens that a model has positions for."""
    known = getattr(config, "max_position_embeddings", None) or 2**31
    return known - architecture_of(config).first_position(config)


def needs_decoder(setting: str, config: Any) -> UserError:
    """The error for a setting that only decoders of the table can have."""
    return UserError(
        f"{setting} needs a decoder, and the model is a {config.model_type}.", f"Leave out {setting.split()[0]}."
    )
