"""Log-likelihood of texts, and of label names after a text, under the base model.

Shapes: T rows of a batch, S scored segments, E encoded texts, K own tokens of all segments, H hidden size, V vocabulary, C
labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from loracle.models.build import ScorerSpec, new_scorer
from loracle.models.loading import load_config
from loracle.models.scorer import Scorer, by_text
from loracle.models.scoring import in_micro_batches
from loracle.text.packing import ROOT, PackedBatch
from loracle.text.tokenize import Encoded, Encoder

TEXTS_AT_ONCE = 256  # whose label names are encoded together
LOGIT_ROWS = 512  # in memory at once: 100 MB with a vocabulary of 50,000


class NoLikelihoodError(ValueError):
    """The model does not predict the next token, or this module does not know how."""


def log_likelihood(scorer: Scorer, texts: Sequence[Encoded], folder: Path, *, after: int) -> np.ndarray:
    """Mean log-likelihood of each text's own tokens given the tokens before them, ``float32 [E]``.

    The template around the text conditions the likelihood and is not scored. A first token with nothing before it has no
    likelihood. A text without any other token gets 0.

    For a scorer without the upper layers the whole base model is loaded meanwhile.

    Args:
        scorer: an untuned decoder. folder: of the base model, for the output embedding that a classifier does without.
        after: tokens of the template after a text.

    Raises:
        NoLikelihoodError: the model does not predict the next token, or is not computed packed.
    """
    scorer, embedding = _whole(scorer, folder)
    return _likelihoods(scorer, embedding, texts, after)


def names_template(names: Sequence[str]) -> str:
    """A template that lists the labels. Its text is a label name, and its context is the text to classify."""
    listed = ", ".join(name.replace("{", "(").replace("}", ")") for name in names)
    return f"Labels: {listed}.\nText: {{context}}\nLabel: {{text}}"


def name_pairs(encoder: Encoder, texts: Sequence[str], names: Sequence[str]) -> list[Encoded]:
    """Every name after every text, a text's names together. ``encoder`` has the ``names_template`` installed."""
    return encoder([*names] * len(texts), [text for text in texts for _ in names])


def name_scores(
    scorer: Scorer, texts: Sequence[str], names: Sequence[str], folder: Path, encoder: Encoder
) -> np.ndarray:
    """How much a text raises the likelihood of each label name, ``float32 [E, C]``: log p(name | text) − log p(name | no text).

    Without the second term a short and common name would win everywhere (Holtzman et al. 2021, arXiv:2104.08315).

    Args:
        scorer, folder: as in ``log_likelihood``.

    Raises:
        NoLikelihoodError: as ``log_likelihood``.
    """
    scorer, embedding = _whole(scorer, folder)

    def summed(window: Sequence[str]) -> np.ndarray:
        pairs = name_pairs(encoder, window, names)
        counts = np.array([e.tokens - e.starts[0] - encoder.after for e in pairs])
        return (_likelihoods(scorer, embedding, pairs, encoder.after) * counts).reshape(len(window), len(names))

    windows = (texts[i : i + TEXTS_AT_ONCE] for i in range(0, len(texts), TEXTS_AT_ONCE))
    return np.concatenate([summed(window) for window in windows]) - summed([""])


def _whole(scorer: Scorer, folder: Path) -> tuple[Scorer, Tensor]:
    """The scorer with all layers of the base model, and the output embedding."""
    if scorer.encoder or not scorer.packed:
        raise NoLikelihoodError(f"{scorer.inner.config.model_type} has no likelihood of a next token")
    if scorer.inner.config.num_hidden_layers < load_config(folder).num_hidden_layers:
        if scorer.sharded:
            raise NoLikelihoodError("the base is sharded, so the whole of it may not fit")
        dtype = next(scorer.inner.base_model.parameters()).dtype
        pad = scorer.inner.config.pad_token_id
        spec = ScorerSpec(base=folder, outputs=1, pad_token_id=pad, dtype=dtype, device=scorer.device)
        scorer = new_scorer(spec)
    return scorer, output_embedding(scorer, folder)


def _likelihoods(scorer: Scorer, embedding: Tensor, texts: Sequence[Encoded], after: int) -> np.ndarray:
    def function(batch: PackedBatch) -> Tensor:
        return by_text(_segment_likelihood(scorer.states(batch), batch, embedding, after)[:, None], batch)

    return in_micro_batches(scorer, function, texts)[:, 0]


def output_embedding(scorer: Scorer, folder: Path) -> Tensor:
    """The output embedding ``[V, H]``: the input embedding where the two are tied, else ``lm_head.weight`` of the folder."""
    if scorer.inner.config.tie_word_embeddings:
        return scorer.inner.get_input_embeddings().weight
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            if "lm_head.weight" in tensors.keys():  # noqa: SIM118 - not a mapping
                like = scorer.inner.get_input_embeddings().weight
                return tensors.get_tensor("lm_head.weight").to(like.device, like.dtype)
    raise NoLikelihoodError(f"no lm_head.weight in {folder}")


def _segment_likelihood(states: Tensor, batch: PackedBatch, embedding: Tensor, after: int) -> Tensor:
    """Mean log-likelihood of each segment, ``float32 [S]``.

    A token's likelihood is read one row before it. For the first row of a segment that is its parent's last row.
    """
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
        (states[at[i : i + LOGIT_ROWS]] @ embedding.T)
        .float()
        .log_softmax(1)
        .gather(1, target[i : i + LOGIT_ROWS, None])[:, 0]
        for i in range(0, len(at), LOGIT_ROWS)
    ]
    total = torch.zeros(len(batch.scored), device=states.device)
    total = total.index_add(0, belongs, torch.cat(parts)) if parts else total
    return total / torch.bincount(belongs, minlength=len(batch.scored)).clamp(min=1)
