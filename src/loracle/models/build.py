"""A scorer for a new run, or the one that a run folder holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from loracle.errors import UserError
from loracle.models import quantization
from loracle.models.architectures import is_encoder, is_packable_decoder
from loracle.models.loading import head_names, load_config, load_sequence_classifier
from loracle.models.lora import add_lora, load_adapter, merge
from loracle.models.memory import out_of_memory, release
from loracle.models.openvino import Int8Scorer
from loracle.models.scorer import Scorer, mlp_head, trained_copy
from loracle.tasks import Task
from loracle.text.packing import PackedBatch, micro_batches, rectangles
from loracle.text.tokenize import Encoded

FULL_WEIGHTS = "model.safetensors"


def new_scorer(
    folder: Path,
    task: Task,
    *,
    pad_token_id: int,
    dtype: torch.dtype,
    device: torch.device,
    pooling: str = "last",
    head: str = "linear",
    depth: int | None = None,
    quantize: str | None = None,
    lora: dict | None = None,
    seed: int = 0,
) -> Scorer:
    """A base model with a fresh head and, unless ``lora`` is None (then every weight is trained), fresh adapters.

    Args:
        folder: of the base model. depth: layers that are kept. quantize: ``nf4`` or None. lora: keywords of ``add_lora``.
        seed: of head and adapters.

    Raises:
        UserError: the model cannot bear this head or these targets.
    """
    torch.manual_seed(seed)
    model = _bare(folder, task, pad_token_id, dtype, head, depth, quantize, device)
    model = add_lora(model, **lora) if lora is not None else model
    return Scorer(model.to(device), pooling=pooling)


def load_scorer(
    base: Path,
    run: Path,
    task: Task,
    *,
    pad_token_id: int,
    dtype: torch.dtype,
    device: torch.device,
    pooling: str,
    head: str,
    depth: int | None = None,
    quantize: str | None = None,
    merged: bool = False,
) -> Scorer:
    """The scorer that a run folder holds: adapter and head on the base, or the run's own full weights.

    ``merged``: adapters are added to the base's weights, and the sum is rounded to ``dtype``.

    Raises:
        UserError: they would have to be added to 4-bit ones.
    """
    if merged and quantize is not None:
        raise UserError("a run whose base is not in 4 bits for --merge", f"{quantize} in {run}", "leave out --merge")
    model = _saved(base, run, task, pad_token_id, head, depth, dtype=dtype, quantize=quantize, device=device)
    return Scorer((merge(model) if merged else model).to(device), pooling=pooling).eval()


def share_weights(models: Iterable[nn.Module]) -> int:
    """Keep equal weights of several models, as those of one base under several adapters are, in memory once.

    For models that are only read. Returns the bytes that were freed.
    """
    known: dict[tuple, Tensor] = {}
    freed = 0
    for model in models:
        for name, weight in model.named_parameters():
            if type(weight) is not nn.Parameter:  # 4-bit ones hold more than numbers
                continue
            key = (name.replace(".base_layer", ""), weight.shape, weight.dtype, weight.device)
            kept = known.setdefault(key, weight.data)
            if kept.data_ptr() != weight.data_ptr() and torch.equal(kept, weight.data):
                freed += weight.nbytes
                weight.data = kept
    return freed


def load_merged(
    base: Path,
    run: Path,
    task: Task,
    *,
    pad_token_id: int,
    head: str,
    depth: int | None = None,
    quantize: str | None = None,
) -> Any:
    """The same as a plain transformers model in float32: adapters added to the weights, the trained head in place."""
    cpu, plain = torch.device("cpu"), quantize is not None
    return merge(
        _saved(
            base, run, task, pad_token_id, head, depth, dtype=torch.float32, quantize=quantize, device=cpu, plain=plain
        )
    ).eval()


def _saved(
    base: Path,
    run: Path,
    task: Task,
    pad_token_id: int,
    head: str,
    depth: int | None,
    *,
    dtype: torch.dtype,
    quantize: str | None,
    device: torch.device,
    plain: bool = False,
) -> Any:
    """What a run holds, in ``dtype``; ``plain``: with 4-bit weights written out."""
    if (run / FULL_WEIGHTS).exists():
        model = _bare(run, task, pad_token_id, dtype, head, depth)
        model.load_state_dict(load_file(run / FULL_WEIGHTS))
        return model
    model = _bare(base, task, pad_token_id, dtype, head, depth, quantize, device)
    if plain:
        quantization.dequantise(model)
    return load_adapter(model, run)


def score(scorer: Scorer | Int8Scorer, texts: Sequence[Encoded], *, tokens_per_micro_batch: int = 4096) -> np.ndarray:
    """Scores of encoded texts, ``float32 [E, C]``: the one way to evaluate, predict and rank.

    Texts of similar length go together, which the attention likes; results come back in the order given.
    """
    return in_rounds(scorer, scorer.forward, texts, tokens_per_micro_batch)


def features(scorer: Scorer, texts: Sequence[Encoded], *, tokens_per_micro_batch: int = 4096) -> np.ndarray:
    """Mean last hidden states of encoded texts, ``float32 [E, H]``."""
    return in_rounds(scorer, scorer.features, texts, tokens_per_micro_batch)


def layer_features(scorer: Scorer, texts: Sequence[Encoded], layers: Sequence[int] | None = None) -> np.ndarray:
    """Mean hidden states of encoded texts after each of L layers of a decoder (by default all), ``float32 [E, L, H]``.

    ``layers`` are counted from 0 and ascend.

    Raises:
        UserError: the model is no decoder that can be packed.
    """
    if scorer.encoder or not scorer.packed:
        raise _no_decoder(scorer.inner.config)
    return in_rounds(scorer, lambda batch: scorer.layer_features(batch, layers), texts)


def head_from_names(scorer: Scorer, names: Sequence[Encoded], texts: Sequence[Encoded]) -> None:
    """Start a decoder's linear head at the states of the labels' names, so that it knows something before any training.

    The name that a text's state resembles is its label (dataless classification: Chang, Ratinov, Roth and Srikumar, AAAI
    2008). States are standardised by those of ``texts``, or a few large features would decide; names are centred and made
    equally long, so that none is favoured; and the head is made blind to the mean text, as it has no bias to take that off.

    Args:
        names: of C labels, encoded as texts are. texts: some of the training texts; their labels are not asked for. Logits
            of these get a mean square of 1 about their mean.

    Raises:
        UserError: the model is no decoder that can be packed.
    """
    if scorer.encoder or not scorer.packed:
        raise UserError("a decoder for --head-init names", f"{scorer.inner.config.model_type}", "leave out --head-init")
    known, seen = (in_rounds(scorer, scorer.pooled, some).astype(np.float64) for some in (names, texts))
    mean, spread = seen.mean(axis=0), np.concatenate([seen, known]).std(axis=0)
    scale = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 1e-6 * spread.max())
    towards = (known - known.mean(axis=0)) * scale
    towards /= np.maximum(np.linalg.norm(towards, axis=1, keepdims=True), 1e-12)
    weight = towards * scale
    weight -= np.outer(weight @ mean, mean) / max(float(mean @ mean), 1e-12)
    logits = seen @ weight.T
    weight /= max(float((logits - logits.mean(axis=1, keepdims=True)).std()), 1e-12)
    with torch.no_grad():
        own = trained_copy(scorer.inner.score).weight
        own.copy_(torch.from_numpy(weight).to(own))


def in_rounds(
    scorer: Scorer | Int8Scorer,
    function: Callable[[PackedBatch], Tensor],
    texts: Sequence[Encoded],
    tokens_per_micro_batch: int = 4096,
) -> np.ndarray:
    """What ``function`` gives for encoded texts, ``float32 [E, X]``, packed ``micro_tokens`` at a time (or as few as the
    scorer likes better), without gradients.

    Where memory runs out, rounds are halved. Threads that score with the same scorer wait for each other.

    Raises:
        UserError: memory runs out over one text alone.
    """
    with scorer.lock:
        return _in_rounds(scorer, function, texts, tokens_per_micro_batch)


def _in_rounds(
    scorer: Scorer | Int8Scorer,
    function: Callable[[PackedBatch], Tensor],
    texts: Sequence[Encoded],
    tokens_per_micro_batch: int,
) -> np.ndarray:
    was_training = scorer.training
    if was_training:
        scorer.eval()
    results: list[np.ndarray] = []
    order = _order(texts)
    limit = math.inf  # until memory runs out

    def run(part: list[int]) -> None:
        nonlocal limit
        tokens = sum(texts[order[i]].tokens for i in part)
        if tokens <= limit or len(part) == 1:
            try:
                results.append(function(scorer.pack([texts[order[i]] for i in part])).float().cpu().numpy())
                return
            except (RuntimeError, MemoryError) as e:
                if not out_of_memory(e) or scorer.sharded:  # then other processes wait in the midst of a layer
                    raise
            if len(part) == 1:  # outside of the handler, whose traceback holds the tensors of the round that failed
                raise UserError(
                    f"memory for a text of {tokens:,} tokens",
                    f"too little on {scorer.device}",
                    "score it on another --device, or train with a smaller --max-length",
                )
            limit = tokens // 2
            release(scorer)
        run(part[: len(part) // 2])
        run(part[len(part) // 2 :])

    # Gathered weights are used again by training, which may not touch what inference mode has made.
    with torch.no_grad() if scorer.sharded else torch.inference_mode():
        rounds = min(tokens_per_micro_batch, scorer.max_micro_batch)
        if scorer.packed:
            parts = micro_batches([[texts[i]] for i in order], rounds, share_from=scorer.share_from)
        else:
            parts = rectangles([texts[i] for i in order], rounds)
        for part in parts:
            run(part)
    if was_training:
        scorer.train()
    joined = np.concatenate(results)
    out = np.empty_like(joined)
    out[order] = joined
    return out


def _order(texts: Sequence[Encoded]) -> list[int]:
    """By what stands before the text, so that it is shared, then by length."""
    heads = [e.chunks[0][: e.starts[0]] for e in texts]
    return sorted(range(len(texts)), key=lambda i: (heads[i], texts[i].tokens))


def _bare(
    folder: Path,
    task: Task,
    pad_token_id: int,
    dtype: torch.dtype,
    head: str,
    depth: int | None = None,
    quantize: str | None = None,
    device: torch.device | None = None,
) -> Any:
    """The base with a head in float32, before PEFT copies it: a float32 head read into a bfloat16 copy loses its bits."""
    if not is_packable_decoder(load_config(folder)):
        dtype = torch.promote_types(
            dtype, torch.float32
        )  # its own forward hands states to the head, BERT's to the pooler
    model = load_sequence_classifier(
        folder,
        num_labels=task.learning.outputs(task),
        pad_token_id=pad_token_id,
        dtype=dtype,
        problem_type=task.learning.problem_type,
        label_names=task.label_names,
    )
    if depth is not None:
        _keep_layers(model, depth)
    if head == "mlp":
        if is_encoder(model.config) or not hasattr(model, "score"):
            raise UserError(
                "a decoder for --head mlp",
                f"{model.config.model_type}, which has a head of its own",
                "leave out --head",
            )
        model.score = mlp_head(model.config.hidden_size, task.learning.outputs(task))
    for name in head_names(model):
        model.get_submodule(name).to(torch.promote_types(dtype, torch.float32))
    if quantize is not None:
        if not is_packable_decoder(model.config):
            raise UserError("a decoder for --quantize", model.config.model_type, "leave out --quantize")
        quantization.quantise(model, device or torch.device("cpu"))
    return model


def _keep_layers(model: Any, depth: int) -> None:
    """Drop the layers of a decoder above ``depth``; its final norm then follows the last one that is left."""
    config, layers = model.config, getattr(model.base_model, "layers", None)
    if layers is None or is_encoder(config):
        raise _no_decoder(config)
    if depth > config.num_hidden_layers:
        raise UserError(
            f"--depth of {config.num_hidden_layers} or less, as this model has", str(depth), "pass a smaller one"
        )
    model.base_model.layers = layers[:depth]
    config.num_hidden_layers = depth
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:depth]


def _no_decoder(config: Any) -> UserError:
    return UserError("a decoder for --depth", f"{config.model_type}", "leave out --depth")
