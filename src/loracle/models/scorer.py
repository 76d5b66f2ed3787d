"""Backbone, pooling and head: a packed batch becomes float32 scores.

It wraps an ordinary ``…ForSequenceClassification`` model of transformers, with or without PEFT's adapters. The backbone runs on
the packed rows, and the model's own head on the rows that are read. So any other loader of the folder computes the same.

Shapes: T tokens, S scored segments, E encoded texts, H hidden size, C labels (1 when ranking).
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loracle.models.architectures import architecture_of, layers_of
from loracle.models.attention import interface, plan
from loracle.models.attention.cuda_graphs import CudaGraphs, supports_graphs
from loracle.models.attention.kernels import fuse
from loracle.models.attention.plan import AttentionPlan
from loracle.models.hidden_state_cache import LowerLayers
from loracle.models.memory import release
from loracle.text.packing import SHARE_FROM, PackedBatch, pack
from loracle.text.tokenize import Encoded

logger = logging.getLogger(__name__)

HIDDEN = (1024, 512)  # of the MLP head, as in the original recipe


class Scorer(nn.Module):
    """Scores packed batches.

    Args:
        model: a transformers sequence classifier, bare or wrapped by PEFT.
        pooling: ``last`` (decoders: the read token; encoders: their own first token) or ``mean`` over the text's own tokens.
    """

    max_micro_batch = 4096  # tokens at a time when scoring: larger micro-batches do not fit the processor caches

    def __init__(self, model: Any, *, pooling: str = "last"):
        super().__init__()
        self.model: Any = model
        self.pooling = pooling
        inner = self.inner
        self.architecture = architecture = architecture_of(inner.config)
        self.encoder = not architecture.decoder
        self.packed = architecture.packable
        if self.packed:
            inner.set_attn_implementation(interface.NAME)
            fuse(inner)
        self.lower: LowerLayers | None = None  # set while the states of frozen layers are cached
        self.lock = threading.RLock()  # a forward sets attributes of its modules, so only one may run at a time
        self.sharded = False  # whether each of several processes has only a part of the frozen layers
        self.announce: Callable[..., Any] | None = None  # sends a sharded forward to the other processes
        self.cuda_graphs: CudaGraphs | None = None
        self._width = 0
        self._rows: Tensor | None = (
            None  # the rows that are read, while a forward computes only those in its last layer
        )
        if architecture.decoder and architecture.packable:
            for name in architecture.row_wise:
                module = layers_of(inner.base_model)[-1].get_submodule(name)
                module.register_forward_pre_hook(self._take_rows)
                module.register_forward_hook(self._put_rows)
        self.first_position = architecture.first_position(inner.config)
        self.share_from = None if self.encoder or not self.packed else SHARE_FROM

    @property
    def inner(self) -> Any:
        """The transformers model without PEFT's wrapper (``Any``, as models name their parts differently)."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.model.parameters()).device

    def pack(self, texts: Sequence[Encoded]) -> PackedBatch:
        """Pack texts for this model."""
        return pack(texts, share_from=self.share_from, first_position=self.first_position)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Scores of the batch's texts, ``float32 [E, C]``. A text in chunks gets the mean of its chunks."""
        if not self.packed:
            return by_text(_wide(self._padded(batch)), batch)
        if self.cuda_graphs is not None and not torch.is_grad_enabled():
            scores = self.cuda_graphs.scores(batch)
            if scores is not None:
                return by_text(scores, batch)
        only = None if self.encoder or self.pooling == "mean" else plan.to_device(batch.read_at, self.device)
        return by_text(_wide(self._head(self._pool(self.states(batch, only), batch))), batch)

    def record(self) -> bool:
        """Record forwards of short batches as CUDA graphs; False where this model or its device does not allow it.

        They are used for scoring without gradients, until ``train`` or ``eval`` is called. Call one of them after you change a
        weight.
        """
        dtype = self.inner.base_model.get_input_embeddings().weight.dtype
        plain = self.packed and not self.encoder and self.pooling == "last" and self.lower is None and not self.sharded
        plain = plain and not self.training and not getattr(self.inner, "is_loaded_in_4bit", False)
        if plain and supports_graphs(self.inner.config, self.device, dtype):
            with self.lock:
                try:
                    self.cuda_graphs = CudaGraphs(self._layout_scores, self.device)
                except RuntimeError as e:  # for example too little memory for all sizes together
                    release(self)
                    logger.warning("CUDA graphs are not used: %s", str(e).partition("\n")[0])
        return self.cuda_graphs is not None

    def train(self, mode: bool = True) -> Scorer:
        """As any module. CUDA graphs are dropped, because weights may change."""
        self.cuda_graphs = None
        return super().train(mode)

    def features(self, batch: PackedBatch) -> Tensor:
        """Mean last hidden state of each text, ``float32 [E, H]``: the features of a linear probe."""
        if self.packed:
            return by_text(_mean(self.states(batch), batch), batch)
        inputs = self._rectangle(batch)
        mask = inputs["attention_mask"]
        states = self.inner.base_model(**inputs).last_hidden_state.float()
        return by_text((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), batch)

    def layer_features(self, batch: PackedBatch, layers: Sequence[int] | None = None) -> Tensor:
        """The same after each layer of a decoder (by default all), as if it were the last one, ``float32 [E, L, H]``."""
        decoder, means = self.inner.base_model, []
        all_layers, norm = layers_of(decoder), getattr(decoder, self.architecture.norm)

        def keep(module: nn.Module, inputs: Any, states: Tensor) -> None:
            means.append(by_text(_mean(norm(states)[0], batch), batch))

        hooks = [
            all_layers[i].register_forward_hook(keep) for i in (range(len(all_layers)) if layers is None else layers)
        ]
        lower, self.lower = self.lower, None  # layers with cached states would not run
        try:
            self.states(batch)
        finally:
            self.lower = lower
            for hook in hooks:
                hook.remove()
        return torch.stack(means, dim=1)

    def states(self, batch: PackedBatch, only: Tensor | None = None) -> Tensor:
        """Last hidden states ``[T, H]``. With ``only [S]`` just those rows are right, and the last layer computes less."""
        tokens, device = batch.tokens, self.device
        if only is not None:
            only = only.to(device)  # in another process it arrives in the CPU's memory
        if self.announce is not None:
            self.announce(batch, None if only is None else only.cpu())
        padding = plan.rows_for(tokens, device) - tokens  # rows that are neither attended to nor read

        def put(a: np.ndarray) -> Tensor:
            return plan.to_device(np.pad(a, (0, padding)), device)[None]

        types = {} if batch.token_types is None else {"token_type_ids": put(batch.token_types)}
        caching = {} if self.encoder else {"use_cache": False}
        positions, attention = put(batch.position_ids), interface.plan_attention(batch, device)

        def run(**inputs: Tensor) -> Any:
            return self.inner.base_model(position_ids=positions, plan=attention, **inputs, **types, **caching)

        ids = put(batch.input_ids)
        if self.lower is not None:
            below = F.pad(self.lower.states(batch, lambda: run(input_ids=ids)), (0, 0, 0, padding))[None]
        with self._reading(only):
            if self.lower is None:
                return run(input_ids=ids).last_hidden_state[0, :tokens]
            with self.lower.upper():
                return run(inputs_embeds=below).last_hidden_state[0, :tokens]

    def _layout_scores(self, ids: Tensor, positions: Tensor, attention: AttentionPlan, read: Tensor) -> Tensor:
        """Scores ``float32 [N, C]`` at rows ``read [N]`` of ids and positions ``[R]``. No control flow depends on a number."""
        inputs = {"input_ids": ids[None], "position_ids": positions[None]}
        with self._reading(read):
            states = self.inner.base_model(**inputs, plan=attention, use_cache=False).last_hidden_state[0]
        return _wide(self._head(states[read]))

    @contextlib.contextmanager
    def _reading(self, only: Tensor | None) -> Iterator[None]:
        """Compute only these rows in the last layer, as far as they do not depend on others."""
        self._rows = only
        try:
            yield
        finally:
            self._rows = None

    def _take_rows(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Before a part of the last layer: take the rows that are read from ``x [1, T, X]``."""
        if self._rows is None:
            return None
        self._width = inputs[0].shape[1]
        return (inputs[0][:, self._rows], *inputs[1:])

    def _put_rows(self, module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        """After it: put its output back at these rows. The residual of the others gets zeros."""
        if self._rows is None:
            return None
        return out.new_zeros(1, self._width, out.shape[-1]).index_copy(1, self._rows, out)

    def pooled(self, batch: PackedBatch) -> Tensor:
        """The head's input for each text, ``float32 [E, H]``."""
        return by_text(_wide(self._pool(self.states(batch), batch)), batch)

    def _pool(self, states: Tensor, batch: PackedBatch) -> Tensor:
        if self.pooling == "mean":
            return _mean(states, batch)
        rows = batch.start[batch.scored] if self.encoder else batch.read_at
        return states[plan.to_device(rows, states.device)]

    def _head(self, pooled: Tensor) -> Tensor:
        """The model's own head on pooled states ``[S, H]``, ``[S, C]``."""
        inner = self.inner
        head = getattr(inner, self.architecture.head)
        pooled = pooled.to(_dtype(head))
        if not self.encoder:
            return head(pooled)
        first = pooled[:, None]
        if (pooler := getattr(inner.base_model, "pooler", None)) is not None:
            first = inner.dropout(pooler(first))
        return head(first)

    def _padded(self, batch: PackedBatch) -> Tensor:
        """The model's own forward on a padded rectangle, for architectures that are not packable."""
        return self.model(**self._rectangle(batch)).logits

    def _rectangle(self, batch: PackedBatch) -> dict[str, Tensor]:
        """The inputs of transformers' own forward; token types only where the model has them."""
        inputs = rectangle(batch, self.inner.config.pad_token_id)
        if "token_type_ids" not in inspect.signature(self.inner.forward).parameters:
            inputs.pop("token_type_ids", None)
        return {name: x.to(self.device) for name, x in inputs.items()}


def rectangle(batch: PackedBatch, pad_token_id: int) -> dict[str, Tensor]:
    """The scored segments of a batch without shared ones, padded on the right: ids, mask and token types ``[S, L]``."""
    start, length = batch.start[batch.scored], batch.length[batch.scored]

    def padded(tokens: np.ndarray, fill: int) -> Tensor:
        rows = [torch.from_numpy(tokens[s : s + n]) for s, n in zip(start, length, strict=True)]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)

    inputs = {
        "input_ids": padded(batch.input_ids, pad_token_id),
        "attention_mask": padded(np.ones_like(batch.input_ids), 0),
    }
    if batch.token_types is not None:
        inputs["token_type_ids"] = padded(batch.token_types, 0)
    return inputs


def mlp_head(hidden: int, labels: int) -> nn.Sequential:
    """The head of the original recipe: hidden-1024-512-labels with ReLU and dropout 0.1."""
    sizes = (hidden, *HIDDEN)
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU(), nn.Dropout(0.1))]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], labels))


def _mean(states: Tensor, batch: PackedBatch) -> Tensor:
    """Mean state of each scored segment's own text, ``float32 [S, H]``, without the prefix before it."""
    counts = batch.read_at + 1 - batch.pool_from
    rows = torch.cat([torch.arange(a, a + n) for a, n in zip(batch.pool_from.tolist(), counts.tolist(), strict=True)])
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.from_numpy(counts))
    rows, owner = (plan.to_device(x.numpy(), states.device) for x in (rows, owner))
    total = _wide(states[:1]).new_zeros(len(counts), states.shape[1]).index_add(0, owner, _wide(states[rows]))
    return total / plan.to_device(counts, states.device)[:, None]


def by_text(values: Tensor, batch: PackedBatch) -> Tensor:
    """Values of segments ``[S, X]`` to values of texts ``[E, X]``. Equal texts read the same row, and chunks are averaged."""
    chunks = values[plan.to_device(batch.chunk_segment, values.device)]
    if len(batch.chunk_text) == batch.texts:
        return chunks
    owner, counts = (plan.to_device(x, values.device) for x in (batch.chunk_text, np.bincount(batch.chunk_text)))
    total = values.new_zeros(batch.texts, values.shape[1]).index_add(0, owner, chunks)
    return total / counts[:, None]


def _wide(x: Tensor) -> Tensor:
    """In float32 at least: sums and scores are never in bfloat16."""
    return x if x.dtype == torch.float64 else x.float()


def trained_copy(module: nn.Module) -> Any:
    """The trained copy of a head. PEFT also keeps the original, in the base's dtype."""
    copies = getattr(module, "modules_to_save", None)
    return module if copies is None else copies["default"]


def _dtype(module: nn.Module) -> torch.dtype:
    """The dtype that a head computes in."""
    return next(trained_copy(module).parameters()).dtype
