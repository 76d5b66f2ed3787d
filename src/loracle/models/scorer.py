"""Backbone, pooling and head: a packed batch becomes float32 scores.

Inside stands an ordinary ``…ForSequenceClassification`` model of transformers, perhaps with PEFT's adapters in it. Its
backbone is run on the packed rows and its own head on the rows that are read, so what is trained here is what any other
loader of the folder computes.

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
from loracle.models.attention import tree
from loracle.models.attention.cuda_graphs import Recordings, recordable
from loracle.models.attention.kernels import fuse
from loracle.models.attention.tree import Sequences
from loracle.models.hidden_state_cache import LowerLayers
from loracle.models.memory import release
from loracle.text.packing import SHARE_FROM, PackedBatch, pack
from loracle.text.tokenize import Encoded

logger = logging.getLogger(__name__)

HIDDEN = (1024, 512)  # the MLP head of the original recipe


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
        architecture = architecture_of(inner.config)
        self.encoder = not architecture.decoder
        self.packed = architecture.packable
        if self.packed:
            inner.set_attn_implementation(tree.NAME)
            fuse(inner)
        self.lower: LowerLayers | None = None  # set where the states of frozen layers are to be kept
        self.one_at_a_time = threading.RLock()  # a forward leaves notes on its modules, which another one would read
        self.sharded = False  # whether each of several processes holds but a part of the frozen layers
        self.announce: Callable[..., Any] | None = None  # tells those who then have to run them along
        self._width = 0
        self.recordings: Recordings | None = None
        self._rows: Tensor | None = None  # while a batch runs whose other rows nobody reads after the last attention
        if architecture.decoder and architecture.packable:
            last = layers_of(inner.base_model)[-1]
            for module in (last.self_attn.o_proj, last.mlp):
                module.register_forward_pre_hook(self._take_rows)
                module.register_forward_hook(self._put_rows)
        self.first_position = architecture.first_position(inner.config)
        self.share_from = None if self.encoder or not self.packed else SHARE_FROM

    @property
    def inner(self) -> Any:
        """The transformers model, with or without PEFT around it (``Any``: models differ in what they name their parts)."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def pack(self, texts: Sequence[Encoded]) -> PackedBatch:
        """Pack texts the way this model can take them."""
        return pack(texts, share_from=self.share_from, first_position=self.first_position)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Scores of the batch's texts, ``float32 [E, C]``; a chunked text gets the mean of its chunks."""
        if not self.packed:
            return by_text(_wide(self._padded(batch)), batch)
        if self.recordings is not None and not torch.is_grad_enabled():
            known = self.recordings.scores(batch)
            if known is not None:
                return by_text(known, batch)
        only = None if self.encoder or self.pooling == "mean" else tree.to_device(batch.read_at, self.device)
        return by_text(_wide(self._head(self._pool(self.states(batch, only), batch))), batch)

    def record(self) -> bool:
        """Record forwards of short batches, where this model and its device allow it; whether they do.

        Only scores gain by it, and only until ``train`` or ``eval`` of the scorer is called: whoever changes a weight calls one
        of them.
        """
        dtype = self.inner.base_model.get_input_embeddings().weight.dtype
        plain = self.packed and not self.encoder and self.pooling == "last" and self.lower is None and not self.sharded
        plain = plain and not self.training and not getattr(self.inner, "is_loaded_in_4bit", False)
        if plain and recordable(self.inner.config, self.device, dtype):
            with self.one_at_a_time:
                try:
                    self.recordings = Recordings(self._laid_out, self.device)
                except RuntimeError as e:  # too little memory for all sizes, say; one at a time they may yet fit
                    release(self)
                    logger.warning("forwards are not recorded: %s", str(e).partition("\n")[0])
        return self.recordings is not None

    def train(self, mode: bool = True) -> Scorer:
        """As any module; recordings are of weights that no longer change, so they are let go."""
        self.recordings = None
        return super().train(mode)

    def features(self, batch: PackedBatch) -> Tensor:
        """Mean last hidden state of each text, ``float32 [E, H]``: what the frozen-feature baseline learns from."""
        if self.packed:
            return by_text(_mean(self.states(batch), batch), batch)
        inputs = self._rectangle(batch)
        mask = inputs["attention_mask"]
        states = self.inner.base_model(**inputs).last_hidden_state.float()
        return by_text((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), batch)

    def layer_features(self, batch: PackedBatch, layers: Sequence[int] | None = None) -> Tensor:
        """The same after each layer of a decoder, or some of them, as if it were the last one, ``float32 [E, L, H]``."""
        decoder, kept = self.inner.base_model, []
        chosen = range(len(decoder.layers)) if layers is None else layers

        def keep(module: nn.Module, inputs: Any, states: Tensor) -> None:
            kept.append(by_text(_mean(decoder.norm(states)[0], batch), batch))

        hooks = [decoder.layers[layer].register_forward_hook(keep) for layer in chosen]
        lower, self.lower = self.lower, None  # layers whose states are read from the cache are not run
        try:
            self.states(batch)
        finally:
            self.lower = lower
            for hook in hooks:
                hook.remove()
        return torch.stack(kept, dim=1)

    def states(self, batch: PackedBatch, only: Tensor | None = None) -> Tensor:
        """Last hidden states ``[T, H]``. With ``only [S]`` those rows alone are right, and the last layer does less."""
        tokens, device = batch.tokens, self.device
        if only is not None:
            only = only.to(device)  # the others are told of rows in the CPU's memory: their device is another one
        if self.announce is not None:
            self.announce(batch, None if only is None else only.cpu())
        more = tree.rows_for(tokens, device) - tokens  # rows that nobody attends to or reads

        def put(a: np.ndarray) -> Tensor:
            return tree.to_device(np.pad(a, (0, more)), device)[None]

        types = {} if batch.token_types is None else {"token_type_ids": put(batch.token_types)}
        caching = {} if self.encoder else {"use_cache": False}
        positions, plan = put(batch.position_ids), tree.plan(batch, device)

        def run(**inputs: Tensor) -> Any:
            return self.inner.base_model(position_ids=positions, tree=plan, **inputs, **types, **caching)

        ids = put(batch.input_ids)
        if self.lower is not None:
            below = F.pad(self.lower.states(batch, lambda: run(input_ids=ids)), (0, 0, 0, more))[None]
        with self._reading(only):
            if self.lower is None:
                return run(input_ids=ids).last_hidden_state[0, :tokens]
            with self.lower.upper():
                return run(inputs_embeds=below).last_hidden_state[0, :tokens]

    def _laid_out(self, ids: Tensor, positions: Tensor, plan: Sequences, read: Tensor) -> Tensor:
        """Scores ``float32 [N, C]`` at the rows to ``read [N]`` of ids and positions ``[R]``, with no look at any number."""
        inputs = {"input_ids": ids[None], "position_ids": positions[None]}
        with self._reading(read):
            states = self.inner.base_model(**inputs, tree=plan, use_cache=False).last_hidden_state[0]
        return _wide(self._head(states[read]))

    @contextlib.contextmanager
    def _reading(self, only: Tensor | None) -> Iterator[None]:
        """While a batch runs of which only those rows are read."""
        self._rows = only
        try:
            yield
        finally:
            self._rows = None

    def _take_rows(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Before a part of the last layer: the rows that are read, of ``x [1, T, X]``."""
        if self._rows is None:
            return None
        self._width = inputs[0].shape[1]
        return (inputs[0][:, self._rows], *inputs[1:])

    def _put_rows(self, module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        """After it: its output where they stand, and nothing added to the residual of the others."""
        if self._rows is None:
            return None
        return out.new_zeros(1, self._width, out.shape[-1]).index_copy(1, self._rows, out)

    def pooled(self, batch: PackedBatch) -> Tensor:
        """What the head reads of each text, ``float32 [E, H]``."""
        return by_text(_wide(self._pool(self.states(batch), batch)), batch)

    def _pool(self, states: Tensor, batch: PackedBatch) -> Tensor:
        if self.pooling == "mean":
            return _mean(states, batch)
        rows = batch.start[batch.scored] if self.encoder else batch.read_at
        return states[tree.to_device(rows, states.device)]

    def _head(self, pooled: Tensor) -> Tensor:
        """The model's own head on what is read of S texts ``[S, H]``, ``[S, C]``."""
        inner = self.inner
        if not self.encoder:
            return inner.score(pooled.to(_dtype(inner.score)))
        first = pooled[:, None].to(_dtype(inner.classifier))
        if (pooler := getattr(inner.base_model, "pooler", None)) is not None:
            first = inner.dropout(pooler(first))
        return inner.classifier(first)

    def _padded(self, batch: PackedBatch) -> Tensor:
        """The model's own forward on a padded rectangle, for architectures that nobody has proven packable."""
        return self.model(**self._rectangle(batch)).logits

    def _rectangle(self, batch: PackedBatch) -> dict[str, Tensor]:
        """What transformers' own forward takes of ``rectangle``: token types only where the model knows them."""
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
    """Mean state of each scored segment's own text, ``float32 [S, H]``; what stands before the text is left out."""
    counts = batch.read_at + 1 - batch.pool_from
    rows = torch.cat([torch.arange(a, a + n) for a, n in zip(batch.pool_from.tolist(), counts.tolist(), strict=True)])
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.from_numpy(counts))
    rows, owner = (tree.to_device(x.numpy(), states.device) for x in (rows, owner))
    total = _wide(states[:1]).new_zeros(len(counts), states.shape[1]).index_add(0, owner, _wide(states[rows]))
    return total / tree.to_device(counts, states.device)[:, None]


def by_text(values: Tensor, batch: PackedBatch) -> Tensor:
    """Values of segments ``[S, X]`` to values of texts ``[E, X]``: equal texts read the same row, chunks are averaged."""
    chunks = values[tree.to_device(batch.chunk_segment, values.device)]
    if len(batch.chunk_text) == batch.texts:
        return chunks
    owner, counts = (tree.to_device(x, values.device) for x in (batch.chunk_text, np.bincount(batch.chunk_text)))
    total = values.new_zeros(batch.texts, values.shape[1]).index_add(0, owner, chunks)
    return total / counts[:, None]


def _wide(x: Tensor) -> Tensor:
    """At least float32: sums and scores are never kept in bfloat16."""
    return x if x.dtype == torch.float64 else x.float()


def trained_copy(module: nn.Module) -> Any:
    """A head as it is trained: PEFT keeps the untouched original, in the base's dtype, beside that copy."""
    copies = getattr(module, "modules_to_save", None)
    return module if copies is None else copies["default"]


def _dtype(module: nn.Module) -> torch.dtype:
    """What a head computes in."""
    return next(trained_copy(module).parameters()).dtype
