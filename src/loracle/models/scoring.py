"""Scores and hidden states of encoded texts, without gradients.

Shapes: E encoded texts, C labels (1 when ranking), H hidden size, L layers, X columns of a result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loracle.errors import UserError
from loracle.models.architectures import needs_decoder
from loracle.models.memory import out_of_memory, release
from loracle.models.openvino import Int8Scorer
from loracle.models.scorer import Scorer, trained_copy
from loracle.text.packing import PackedBatch, micro_batches, rectangles
from loracle.text.tokenize import Encoded


def score(scorer: Scorer | Int8Scorer, texts: Sequence[Encoded], *, tokens_per_micro_batch: int = 4096) -> np.ndarray:
    """Scores of encoded texts, ``float32 [E, C]``: the one way to evaluate, predict and rank.

    Texts of similar length go together, which is faster. Results have the order of the texts.
    """
    return in_micro_batches(scorer, scorer.forward, texts, tokens_per_micro_batch)


def features(scorer: Scorer, texts: Sequence[Encoded], *, tokens_per_micro_batch: int = 4096) -> np.ndarray:
    """Mean last hidden states of encoded texts, ``float32 [E, H]``."""
    return in_micro_batches(scorer, scorer.features, texts, tokens_per_micro_batch)


def layer_features(scorer: Scorer, texts: Sequence[Encoded], layers: Sequence[int] | None = None) -> np.ndarray:
    """Mean hidden states of encoded texts after each of L layers of a decoder (by default all), ``float32 [E, L, H]``.

    ``layers`` are counted from 0 and ascend.

    Raises:
        UserError: the model is no decoder that can be packed.
    """
    if scorer.encoder or not scorer.packed:
        raise needs_decoder("--depth", scorer.inner.config)
    return in_micro_batches(scorer, lambda batch: scorer.layer_features(batch, layers), texts)


def head_from_names(scorer: Scorer, names: Sequence[Encoded], texts: Sequence[Encoded]) -> None:
    """Start a decoder's linear head at the states of the label names, so that it is useful before any training.

    A text gets the label whose name has the most similar state (dataless classification: Chang, Ratinov, Roth and
    Srikumar, AAAI 2008). States are standardised by those of ``texts``; otherwise a few large features decide. Names are
    centred and scaled to equal length, to favour none. The head has no bias, so the mean text is projected out.

    Args:
        names: of C labels, encoded as texts are.
        texts: a sample of the training texts, without labels. Their logits get a mean square of 1 about their mean.

    Raises:
        UserError: the model is no decoder that can be packed.
    """
    if scorer.encoder or not scorer.packed:
        raise needs_decoder("--head-init names", scorer.inner.config)
    of_names, of_texts = (in_micro_batches(scorer, scorer.pooled, items).astype(np.float64) for items in (names, texts))
    mean, spread = of_texts.mean(axis=0), np.concatenate([of_texts, of_names]).std(axis=0)
    varies, scale = spread > 1e-6 * spread.max(), np.zeros_like(spread)
    scale[varies] = 1.0 / spread[varies]
    towards = (of_names - of_names.mean(axis=0)) * scale
    towards /= np.maximum(np.linalg.norm(towards, axis=1, keepdims=True), 1e-12)
    weight = towards * scale
    weight -= np.outer(weight @ mean, mean) / max(float(mean @ mean), 1e-12)
    logits = of_texts @ weight.T
    weight /= max(float((logits - logits.mean(axis=1, keepdims=True)).std()), 1e-12)
    with torch.no_grad():
        trained = trained_copy(scorer.inner.score).weight
        trained.copy_(torch.from_numpy(weight).to(trained))


def in_micro_batches(
    scorer: Scorer | Int8Scorer,
    function: Callable[[PackedBatch], Tensor],
    texts: Sequence[Encoded],
    tokens_per_micro_batch: int = 4096,
) -> np.ndarray:
    """Results of ``function`` for encoded texts, ``float32 [E, X]``, without gradients.

    A micro-batch has at most ``tokens_per_micro_batch`` tokens, and fewer where the scorer is faster with fewer. If memory runs
    out, micro-batches are halved. Threads that use the same scorer wait for each other.

    Raises:
        UserError: memory runs out over one text alone.
    """
    with scorer.lock:
        return _run_in_micro_batches(scorer, function, texts, tokens_per_micro_batch)


def _run_in_micro_batches(
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
                if not out_of_memory(e) or scorer.sharded:  # other processes of a sharded model wait inside a layer
                    raise
            if len(part) == 1:  # raise outside of the handler, whose traceback keeps the failed tensors in memory
                raise UserError(
                    f"There is too little memory on {scorer.device} for a text of {tokens:,} tokens.",
                    "Use another --device, or train with a smaller --max-length.",
                )
            limit = tokens // 2
            release(scorer)
        run(part[: len(part) // 2])
        run(part[len(part) // 2 :])

    # Training uses gathered weights again, and may not use tensors made in inference mode.
    without_gradients: Any = torch.no_grad() if scorer.sharded else torch.inference_mode()
    with without_gradients:
        limit_tokens = min(tokens_per_micro_batch, scorer.max_micro_batch)
        if scorer.packed:
            parts = micro_batches([[texts[i]] for i in order], limit_tokens, share_from=scorer.share_from)
        else:
            parts = rectangles([texts[i] for i in order], limit_tokens)
        for part in parts:
            run(part)
    if was_training:
        scorer.train()
    joined = np.concatenate(results)
    out = np.empty_like(joined)
    out[order] = joined
    return out


def _order(texts: Sequence[Encoded]) -> list[int]:
    """Sorted by the tokens before the text, so that these are shared, then by length."""
    prefixes = [e.chunks[0][: e.starts[0]] for e in texts]
    return sorted(range(len(texts)), key=lambda i: (prefixes[i], texts[i].tokens))
