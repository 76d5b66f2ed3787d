"""Build the scorer of a new run, or load the one in a run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from loracle.errors import UserError
from loracle.models import quantization
from loracle.models.architectures import is_encoder, is_packable_decoder, layers_of, needs_decoder, set_layers
from loracle.models.loading import ProblemType, head_names, load_config, load_sequence_classifier
from loracle.models.lora import add_lora, load_adapter, merge
from loracle.models.scorer import Scorer, mlp_head

FULL_WEIGHTS = "model.safetensors"
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerSpec:
    """What a scorer is made of.

    Attributes:
        base: folder of the base model.
        outputs: scores of a text. label_names: one for each, or none.
        problem_type: as transformers names it, kept in the config.
        pooling: ``last`` or ``mean``. head: ``linear`` or ``mlp``.
        depth: layers that are kept; None: all.
        quantize: ``nf4`` or None.
    """

    base: Path
    outputs: int
    pad_token_id: int
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    label_names: Sequence[str] = ()
    problem_type: ProblemType | None = None
    pooling: str = "last"
    head: str = "linear"
    depth: int | None = None
    quantize: str | None = None


def new_scorer(spec: ScorerSpec, *, lora: dict[str, Any] | None = None, seed: int = 0) -> Scorer:
    """A base model with a fresh head and fresh adapters.

    ``lora`` holds keywords of ``add_lora``. Without it every weight is trained.

    ``seed`` draws head and adapters.

    Raises:
        UserError: the model cannot have this head or these targets.
    """
    torch.manual_seed(seed)
    model = _base_with_head(spec)
    if lora is not None:
        model = add_lora(model, **lora)
    return Scorer(model.to(spec.device), pooling=spec.pooling)


def load_scorer(spec: ScorerSpec, run: Path, *, merged: bool = False) -> Scorer:
    """Load the scorer of a run folder: adapter and head on the base, or the run's own full weights.

    ``merged``: adapters are added to the base's weights, and the sum is rounded to ``spec.dtype``.

    Raises:
        UserError: adapters would have to be added to 4-bit weights.
    """
    if merged and spec.quantize is not None:
        raise UserError(
            f"The base of {run} has 4-bit weights ({spec.quantize}), which adapters cannot be added to.",
            "Leave out --merge.",
        )
    model = _saved_model(spec, run)
    if merged:
        model = merge(model)
    return Scorer(model.to(spec.device), pooling=spec.pooling).eval()


def load_merged(spec: ScorerSpec, run: Path) -> Any:
    """Load a run as a plain transformers model: adapters added to the weights, and the trained head in place."""
    return merge(_saved_model(spec, run, plain_weights=spec.quantize is not None)).eval()


def share_weights(models: Iterable[nn.Module]) -> int:
    """Keep equal weights of several models in memory once, as those of one base under several adapters.

    For models that are only read. Returns the bytes that were freed.
    """
    firsts: dict[tuple, Tensor] = {}
    freed = 0
    for model in models:
        for name, weight in model.named_parameters():
            if type(weight) is not nn.Parameter:  # 4-bit ones hold more than numbers
                continue
            key = (name.replace(".base_layer", ""), weight.shape, weight.dtype, weight.device)
            first = firsts.setdefault(key, weight.data)
            if first.data_ptr() != weight.data_ptr() and torch.equal(first, weight.data):
                freed += weight.nbytes
                weight.data = first
    return freed


def _saved_model(spec: ScorerSpec, run: Path, *, plain_weights: bool = False) -> Any:
    """The model of a run; ``plain_weights``: its 4-bit weights are written out in ``spec.dtype``."""
    if (run / FULL_WEIGHTS).exists():
        model = _base_with_head(dataclasses.replace(spec, base=run, quantize=None))
        model.load_state_dict(load_file(run / FULL_WEIGHTS))
        return model
    model = _base_with_head(spec)
    if plain_weights:
        quantization.dequantise(model)
    return load_adapter(model, run)


def _base_with_head(spec: ScorerSpec) -> Any:
    """The base with a float32 head, before PEFT copies it: a float32 head read into a bfloat16 copy loses its bits."""
    config, dtype = load_config(spec.base), spec.dtype
    if not is_packable_decoder(config):  # their own forward hands states to head or pooler in this dtype
        dtype = torch.promote_types(dtype, torch.float32)
    model = load_sequence_classifier(
        spec.base,
        num_labels=spec.outputs,
        pad_token_id=spec.pad_token_id,
        dtype=dtype,
        problem_type=spec.problem_type,
        label_names=spec.label_names,
    )
    if spec.depth is not None:
        _keep_layers(model, spec.depth)
    if spec.head == "mlp":
        if is_encoder(config) or not hasattr(model, "score"):
            raise needs_decoder("--head mlp", config)
        model.score = mlp_head(config.hidden_size, spec.outputs)
    for name in head_names(model):
        model.get_submodule(name).to(torch.promote_types(dtype, torch.float32))
    if spec.quantize is not None:
        if not is_packable_decoder(config):
            raise needs_decoder("--quantize", config)
        quantization.quantise(model, spec.device)
    return model


def _keep_layers(model: Any, depth: int) -> None:
    """Drop the layers of a decoder above ``depth``. Its final norm then follows the last remaining layer."""
    config, layers = model.config, layers_of(model.base_model)
    if layers is None or is_encoder(config):
        raise needs_decoder("--depth", config)
    if depth > config.num_hidden_layers:
        raise UserError(
            f"--depth is {depth}, but the model has {config.num_hidden_layers} layers.", "Give a smaller --depth."
        )
    set_layers(model.base_model, layers[:depth])
    config.num_hidden_layers = depth
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:depth]
