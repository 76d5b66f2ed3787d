"""What the untuned language model thinks of a text: its mean token log-likelihood, the baseline that needs no data.

Shapes: T rows of a batch, S scored segments, E encoded texts, K own tokens of all segments, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from loracle.model.assemble import in_rounds
from loracle.model.backbone import load_config
from loracle.model.scorer import Scorer, by_text
from loracle.text.encode import Encoded
from loracle.text.packing import ROOT, PackedBatch

ROWS = 512  # of logits held at once: 100 MB with a vocabulary of 50,000


def log_likelihood(scorer: Scorer, texts: Sequence[Encoded], folder: Path, *, after: int) -> np.ndarray | None:
    """Mean log-likelihood of each text's own tokens given what stands before them, ``float32 [E]``.

    The template around the text is given, not scored. A first token that nothing precedes has no likelihood; a text
    without any other gets 0.

    Args:
        folder: of the base model, for the output embedding that a classifier does without. after: tokens behind a text.

    Returns:
        None for models that do not predict the next token: encoders, and those whose upper layers were dropped.
    """
    dropped = scorer.inner.config.num_hidden_layers < load_config(folder).num_hidden_layers
    if scorer.encoder or not scorer.packed or dropped:
        return None
    embedding = output_embedding(scorer, folder)
    if embedding is None:
        return None

    def function(batch: PackedBatch) -> Tensor:
        return by_text(_segment_likelihood(scorer.states(batch), batch, embedding, after)[:, None], batch)

    return in_rounds(scorer, function, texts)[:, 0]


def output_embedding(scorer: Scorer, folder: Path) -> Tensor | None:
    """``[V, H]``: the input embedding where the two are tied, else the tensor that the folder calls ``lm_head.weight``."""
    if scorer.inner.config.tie_word_embeddings:
        return scorer.inner.get_input_embeddings().weight
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            if "lm_head.weight" in tensors.keys():  # noqa: SIM118 - not a mapping
                like = scorer.inner.get_input_embeddings().weight
                return tensors.get_tensor("lm_head.weight").to(like.device, like.dtype)
    return None


def _segment_likelihood(states: Tensor, batch: PackedBatch, embedding: Tensor, after: int) -> Tensor:
    """``float32 [S]``. A token's likelihood is read one row before it; before a segment's first row ends its parent."""
    tokens, before, owner = [], [], []
    for s, segment in enumerate(batch.scored):
        start, parent = batch.start[segment], batch.parent[segment]
        rows = np.arange(batch.pool_from[s], batch.read_at[s] + 1 - after)
        above = rows - 1
        if len(rows) and rows[0] == start:
            if parent == ROOT:
                rows, above = rows[1:], above[1:]
            else:
                above[0] = batch.start[parent] + batch.length[parent] - 1
        tokens.append(batch.input_ids[rows])
        before.append(above)
        owner.append(np.full(len(rows), s))
    target, at, belongs = (torch.from_numpy(np.concatenate(x)).to(states.device) for x in (tokens, before, owner))
    parts = [
        (states[at[i : i + ROWS]] @ embedding.T).float().log_softmax(1).gather(1, target[i : i + ROWS, None])[:, 0]
        for i in range(0, len(at), ROWS)
    ]
    total = torch.zeros(len(batch.scored), device=states.device)
    total = total.index_add(0, belongs, torch.cat(parts)) if parts else total
    return total / torch.bincount(belongs, minlength=len(batch.scored)).clamp(min=1)
