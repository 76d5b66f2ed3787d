"""What a training will take, estimated before it begins: tokens, memory and time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loracle.config import RunConfig
from loracle.errors import Log
from loracle.models.memory import free_memory, out_of_memory, release, training_need, training_rate
from loracle.tasks.dataset import Data
from loracle.text import packing
from loracle.text.tokenize import Encoded
from loracle.training import distributed
from loracle.training.batches import MIN_TOKENS_PER_MICRO_BATCH, total_steps
from loracle.training.prepare import PreparedModel
from loracle.training.progress import duration
from loracle.training.scoring import encode_examples

SAMPLE_BATCHES = 16  # from which the tokens of an epoch are estimated
TIMED_TOKENS = 512  # with which a CPU is timed
USABLE = 0.9  # of the free memory


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """The settled size of micro-batches."""

    tokens_per_micro_batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSample:
    """A few seeded batches: their tokens, and texts to time the model with."""

    useful: int  # tokens of text
    padded: int  # tokens if each text was padded to the longest of its batch
    computed: list[int]  # tokens that each batch computes
    largest: int  # tokens of the largest example, which a micro-batch must hold
    timed: list[Encoded]
    scale: float  # training examples over sampled ones


def estimate_cost(config: RunConfig, model: PreparedModel, data: Data, log: Log) -> TrainingPlan:
    """Print tokens, memory and time of the training, and settle on micro-batches that fit the memory.

    Tokens come from a few seeded batches, memory and operations from the model's shapes, speed from a timed micro-batch.
    """
    sample = sample_batches(config, model, data)
    log(
        f"an epoch: {sample.useful * sample.scale:,.0f} tokens of text, {sum(sample.computed) * sample.scale:,.0f} to "
        f"compute; padding to the longest text of a batch would make it {sample.padded * sample.scale:,.0f}"
    )
    tokens = _fit_memory(config, model, sample, log)
    _estimate_time(config, model, data, sample, log)
    return TrainingPlan(tokens_per_micro_batch=tokens)


def sample_batches(config: RunConfig, model: PreparedModel, data: Data) -> BatchSample:
    """Encode and pack a few batches in the order of a seed."""
    scorer, settings = model.scorer, config.train
    order = np.random.default_rng(settings.seed).permutation(len(data.train))[: SAMPLE_BATCHES * settings.batch]
    useful, padded, largest, computed = 0, 0, 0, []
    timed: list[Encoded] = []
    for start in range(0, len(order), settings.batch):
        units = encode_examples(model.encoder, [data.train[i] for i in order[start : start + settings.batch]])
        texts = [e for unit in units for e in unit]
        packed = scorer.pack(texts)
        useful, padded = useful + packed.useful_tokens, padded + len(texts) * max(e.tokens for e in texts)
        computed.append(packed.tokens)
        largest = max(largest, *(packing.rows(unit, share_from=scorer.share_from) for unit in units))
        if not timed:  # on a GPU a whole micro-batch, on a CPU what takes a few seconds
            enough = settings.tokens_per_micro_batch if scorer.device.type == "cuda" else TIMED_TOKENS
            first = next(packing.micro_batches(units, enough, share_from=scorer.share_from))
            timed = [e for i in first for e in units[i]]
    scale = len(data.train) / len(order)
    return BatchSample(useful=useful, padded=padded, computed=computed, largest=largest, timed=timed, scale=scale)


def _fit_memory(config: RunConfig, model: PreparedModel, sample: BatchSample, log: Log) -> int:
    """Tokens of a micro-batch: as configured, or fewer where these do not fit the free memory."""
    scorer, wanted = model.scorer, config.train.tokens_per_micro_batch
    need, free = training_need(scorer, config.lora.adapt_top), int(USABLE * free_memory(scorer.device))
    tokens = max(sample.largest, min(wanted, max(sample.computed)))
    log(
        f"memory: {need.bytes(tokens) / 1e9:.1f} GB for micro-batches of {tokens:,} tokens; {free / 1e9:.1f} GB are free"
    )
    if need.bytes(tokens) <= free:
        return wanted
    quantizable = scorer.device.type == "cuda" and not (config.model.quantize or config.lora.full or scorer.encoder)
    less = "--quantize nf4 or a smaller --model takes" if quantizable else "A smaller --model takes"
    fits = max(MIN_TOKENS_PER_MICRO_BATCH, need.tokens(free))
    if need.bytes(smallest := max(MIN_TOKENS_PER_MICRO_BATCH, sample.largest)) > free:
        log(
            f"note: memory may be too small even for micro-batches of {smallest:,} tokens, which one text or group needs. "
            f"{less} less, and so does a smaller --max-length."
        )
    else:
        log(f"note: micro-batches of {fits:,} tokens instead; steps and results stay the same. {less} less.")
    return fits


def _estimate_time(config: RunConfig, model: PreparedModel, data: Data, sample: BatchSample, log: Log) -> None:
    scorer, settings = model.scorer, config.train
    steps = total_steps(settings, len(data.train))
    need = training_need(scorer, config.lora.adapt_top)
    passes = max(1.0, steps * settings.batch / len(data.train))
    cached = need.lower_flops * (1 - 1 / passes) if scorer.lower is not None else 0.0
    operations = (need.flops_per_token - cached) * float(np.mean(sample.computed)) * steps
    try:
        rate = training_rate(scorer, scorer.pack(sample.timed))
    except (RuntimeError, MemoryError) as e:  # training makes its micro-batches smaller until they fit
        if not out_of_memory(e) or scorer.sharded:
            raise
        release(scorer)
        log(f"the time of {steps:,} steps is unknown: memory is too small for {len(sample.timed):,} texts at once")
        return
    processes = distributed.start(scorer.device).num_processes
    seconds = operations / (need.flops_per_token * rate * processes)
    log(f"about {duration(seconds)} for {steps:,} steps, at the present {rate:,.0f} tokens/s")
