"""Scoring on a CPU in 8-bit integers, by OpenVINO: a run's model with merged adapters, converted once, opened without its base.

Weights are rounded once, with a scale for each output. Inputs are rounded in groups of ``GROUP`` numbers of one token. So a
text's score does not depend on its neighbours. OpenVINO's attention takes rectangles. So texts are padded,
sorted by length, and an instruction before them is computed for each. Of the measured ways (dev/LOG.md, 2026-11-25) it is the
fastest one that keeps the labels.

Shapes: N rows of a rectangle, L tokens of its longest, H hidden size, C labels.
"""

from __future__ import annotations

import functools
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loracle.errors import UserError
from loracle.models.architectures import is_encoder
from loracle.models.loading import load_config
from loracle.models.scorer import by_text, rectangle
from loracle.text.packing import PackedBatch, pack
from loracle.text.tokenize import Encoded

MODEL = "openvino_model.xml"
GROUP = 64  # numbers of a token that share a scale
HINTS = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": str(GROUP)}


def convert(model: Any, folder: Path, *, pooling: str) -> None:
    """Write a transformers sequence classifier, adapters merged, as ``openvino_model.xml`` and ``.bin``, and its config.

    Raises:
        UserError: OpenVINO is not installed.
    """
    openvino = _package()
    model.set_attn_implementation("sdpa")
    padded = _Padded(model.float().eval(), pooling)
    example = {name: torch.ones(2, 7, dtype=torch.long) for name in padded.inputs}
    example |= {name: torch.tensor([at, at + 1]) for name, at in (("pool_from", 0), ("read_at", 5)) if name in example}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's tracer prints many
        converted = openvino.convert_model(padded, example_input=example)
    for port, name in zip(converted.inputs, padded.inputs, strict=True):
        port.get_tensor().set_names({name})
    _round_weights(converted, openvino.opset13, labels=model.config.num_labels)
    openvino.save_model(converted, folder / MODEL)
    model.config.save_pretrained(folder)


def _round_weights(converted: Any, ops: Any, *, labels: int) -> None:
    """Replace each matrix of the backbone by ``int8 [out, in] · scale [out]``, which OpenVINO computes as it is."""
    for node in converted.get_ordered_ops():
        matrix = node.input_value(1).get_node() if node.get_type_name() == "MatMul" else None
        if (
            matrix is None
            or matrix.get_type_name() != "Constant"
            or len(matrix.shape) != 2
            or matrix.shape[0] == labels
        ):
            continue
        weight = matrix.data
        scale = np.maximum(np.abs(weight).max(1, keepdims=True), np.finfo(np.float32).tiny) / 127
        whole = ops.convert(ops.constant(np.rint(weight / scale).astype(np.int8)), "f32")
        node.input(1).replace_source_output(ops.multiply(whole, ops.constant(scale.astype(np.float32))).output(0))


class Int8Scorer(nn.Module):
    """Like ``Scorer``, for a folder with a converted model: packed batches in, float32 scores out."""

    packed = sharded = False
    share_from = None
    max_micro_batch = 1024  # tokens at a time: rectangles of 4,096 take half as long again (dev/LOG.md)

    def __init__(self, folder: Path, *, pad_token_id: int):
        super().__init__()
        self.lock = threading.RLock()
        self.compiled = _core().compile_model(
            folder / MODEL, "CPU", HINTS | {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
        )
        self.inputs = [port.get_any_name() for port in self.compiled.inputs]
        self.encoder = is_encoder(load_config(folder))
        self.pad_token_id = pad_token_id
        self.device = torch.device("cpu")

    def pack(self, texts: list[Encoded]) -> PackedBatch:
        """Pack texts. Equal texts are computed once; nothing else is shared."""
        return pack(texts, share_from=self.share_from)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Scores of the batch's texts, ``float32 [E, C]``."""
        inputs = rectangle(batch, self.pad_token_id)
        begin = batch.start[batch.scored]
        inputs["pool_from"] = torch.from_numpy(batch.pool_from - begin)
        inputs["read_at"] = torch.from_numpy(batch.read_at - begin)
        scores = self.compiled({name: inputs[name].numpy() for name in self.inputs})[0]
        return by_text(torch.from_numpy(scores.copy()), batch)


class _Padded(nn.Module):
    """The model for OpenVINO's tracer: a rectangle in, scores out, pooled as in the run.

    A decoder's tokens attend to nothing on their right, so padding there needs no mask.
    """

    def __init__(self, model: Any, pooling: str):
        super().__init__()
        self.model, self.mean = model, pooling == "mean"
        if is_encoder(model.config):
            typed = getattr(model.config, "type_vocab_size", 0) > 1
            self.inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if typed else [])]
        else:
            self.inputs = ["input_ids", *(["pool_from"] if self.mean else []), "read_at"]

    def forward(  # every input by name, because OpenVINO's tracer ignores **
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pool_from: Tensor | None = None,
        read_at: Tensor | None = None,
    ) -> Tensor:
        if read_at is None:
            types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **types).logits
        mask = torch.ones_like(input_ids)
        states = self.model.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
        at, last = torch.arange(input_ids.shape[1])[None], read_at[:, None]
        pooled = at == last if pool_from is None else (at >= pool_from[:, None]) & (at <= last)
        return self.model.score((states * pooled[..., None]).sum(1) / pooled.sum(1, keepdim=True))


@functools.cache
def _core() -> Any:
    """OpenVINO's core, one for the process and never freed.

    Each core installs a stack for signals. Freeing one before a later one leaves a signal without a stack, which ends in a
    segmentation fault (OpenVINO 2026.4).
    """
    return _package().Core()


def _package() -> Any:
    try:
        import openvino
        import openvino.opset13
    except ImportError as e:
        raise UserError(
            "int8 needs the package openvino, which is not installed.", "Run pip install 'loracle[int8]'."
        ) from e
    return openvino
