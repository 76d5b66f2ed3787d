"""The model families: one table. To add a family, add a row here and its tiny model in ``tests/conftest.py``.

``tests/models/test_exact.py`` checks that packable families score packed texts exactly. Any other family that transformers can
classify with is padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from loracle.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A row of ``ARCHITECTURES``."""

    name: str  # in messages
    decoder: bool = True  # whether a token attends only to those before it
    packable: bool = True  # whether texts score the same packed as alone
    layers: str = "layers"  # path of the list of layers in the base model
    norm: str = "norm"  # of a decoder: the norm after the last layer
    row_wise: tuple[str, ...] = ("self_attn.o_proj", "mlp")  # of a decoder's layer: parts that compute each row alone
    head: str = "score"  # the module that gives the scores
    few_targets: str = "q_proj,v_proj"  # linear layers of a small adapter
    same_input: tuple[tuple[str, ...], ...] = (
        ("q_proj", "k_proj", "v_proj"),
        ("gate_proj", "up_proj"),
    )  # linear layers
    after_padding: bool = False  # whether positions start behind the padding id

    @property
    def layer_list(self) -> str:
        """A regular expression for the name of the list of layers."""
        return self.layers.rpartition(".")[2] if self.packable else LAYER_LISTS

    def first_position(self, config: Any) -> int:
        """The position of a text's first token."""
        return config.pad_token_id + 1 if self.after_padding else 0


LAYER_LISTS = "layers?|h|block"  # names of such lists in other families
ENCODER: dict[str, Any] = {
    "decoder": False, "layers": "encoder.layer", "head": "classifier", "few_targets": "query,value",
    "same_input": (("query", "key", "value"),),
}  # fmt: skip
# By transformers' model_type.
ARCHITECTURES: dict[str, Architecture] = {
    "qwen2": Architecture(name="Qwen2.5"),
    "qwen3": Architecture(name="Qwen3"),
    "llama": Architecture(name="Llama, SmolLM2"),
    "mistral": Architecture(name="Mistral"),
    "gemma3_text": Architecture(name="Gemma 3 text"),
    "bert": Architecture(name="BERT", **ENCODER),
    "roberta": Architecture(name="RoBERTa", **ENCODER, after_padding=True),
    "xlm-roberta": Architecture(name="XLM-R", **ENCODER, after_padding=True),
    # Padded, but their positions start behind the padding id as well.
    "roberta-prelayernorm": Architecture(name="RoBERTa-PreLayerNorm", **ENCODER, after_padding=True, packable=False),
    "xlm-roberta-xl": Architecture(name="XLM-R XL", **ENCODER, after_padding=True, packable=False),
}
SUPPORTED = ", ".join(row.name for row in ARCHITECTURES.values() if row.packable)


def architecture_of(config: Any) -> Architecture:
    """The row of a model's config. A family without a row is padded, and is an encoder if it is a masked language model."""
    model_type = config.model_type
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    same_input = tuple(dict.fromkeys(names for row in ARCHITECTURES.values() for names in row.same_input))
    if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return Architecture(name=model_type, packable=False, **ENCODER | {"same_input": same_input})
    return Architecture(name=model_type, packable=False, same_input=same_input)


def is_encoder(config: Any) -> bool:
    """Whether a model attends in both directions, as BERT does."""
    return not architecture_of(config).decoder


def is_packable_decoder(config: Any) -> bool:
    """Whether a model is a packable decoder, whose layers can be dropped, cached, quantised and read one by one."""
    row = architecture_of(config)
    return row.decoder and row.packable


def layers_of(base: Any) -> Any:
    """The list of layers of a base model; None where it is unknown."""
    module: Any = base
    for part in architecture_of(base.config).layers.split("."):
        module = getattr(module, part, None)
    return module


def set_layers(base: Any, layers: Any) -> None:
    """Replace the list of layers of a base model."""
    owner, _, name = architecture_of(base.config).layers.rpartition(".")
    setattr(base.get_submodule(owner), name, layers)


def positions(config: Any) -> int:
    """The number of tokens that a model has positions for."""
    total = getattr(config, "max_position_embeddings", None) or 2**31
    return total - architecture_of(config).first_position(config)


def needs_decoder(setting: str, config: Any) -> UserError:
    """The error for a setting that needs a packable decoder."""
    return UserError(
        f"{setting} needs a decoder, and the model is a {config.model_type}.", f"Leave out {setting.split()[0]}."
    )
