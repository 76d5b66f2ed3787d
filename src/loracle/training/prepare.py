"""The model of a run before training: base, tokenizer with the template, scorer, loss and learning rate."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loracle.config import RunConfig
from loracle.errors import Log, UserError
from loracle.examples import texts_of
from loracle.models import build, scoring
from loracle.models.architectures import is_encoder, positions
from loracle.models.devices import pick_device, pick_dtype
from loracle.models.hidden_state_cache import LowerLayers, keep_lower
from loracle.models.loading import BaseModel, load_config, load_tokenizer, resolve_base
from loracle.models.memory import free_memory, weight_bytes
from loracle.models.scorer import Scorer
from loracle.tasks import Task
from loracle.tasks.dataset import Data
from loracle.text.template import check_contexts, install_template
from loracle.text.tokenize import Encoder
from loracle.training import distributed, tracking
from loracle.training.losses import Loss, choose_loss
from loracle.training.optimizer import default_lr
from loracle.training.probe import lowest_good_depth, probe_depths, subsample
from loracle.training.scoring import encode_examples, encode_texts

HEAD_TEXTS = 512  # training texts whose states scale a head that starts from the label names


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The base model of a run and its tokenizer, with the template installed."""

    source: BaseModel
    config: Any  # transformers' config
    tokenizer: Any
    max_tokens: int  # of a text, template included


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCounts:
    """Tokens of all texts, template included."""

    texts: dict[str, float]  # count, tokens, mean, max, over_length: of all three splits, for metrics.json
    train: list[int]  # of each training text


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedModel:
    """Everything that training needs beside the data."""

    base: Base
    depth: int | None  # layers that are kept; None: all
    scorer: Scorer
    encoder: Encoder
    loss: Loss
    loss_settings: dict[str, Any]  # its name and, of clicks, its saturation
    lr: float
    tokens: TokenCounts


def prepare_model(config: RunConfig, data: Data, log: Log) -> PreparedModel:
    """Load the base, install the template, build head and adapters, choose loss and learning rate.

    Raises:
        UserError: a model or settings that do not fit the data or the memory.
    """
    tracking.check_installed(config.train.track)
    model, device = config.model, pick_device(config.model.device)
    world = distributed.start(device)
    loss, loss_settings = choose_loss(data, config.train)
    if world.num_processes > 1:
        log(f"{world.num_processes} processes share each batch of {config.train.batch}")
    log(", ".join(f"{len(items):,} {name}" for name, items in data.splits.items()) + f" {data.task.unit}")
    log("loss: " + ", ".join(f"{v}" if k == "name" else f"{k} {v:,.4g}" for k, v in loss_settings.items()))
    with world.local_main_process_first():  # the others then find the downloaded files
        base = open_base(config, data, log)
    depth = settle_depth(config, data, loss, base, log)
    prepared = make_model(config, data, base, depth, (loss, loss_settings))
    _describe(prepared, model.long, log)
    return prepared


def make_model(
    config: RunConfig, data: Data, base: Base, depth: int | None, loss: tuple[Loss, dict[str, Any]],
    tokens: TokenCounts | None = None,
) -> PreparedModel:  # fmt: skip
    """A fresh model on an open base. ``loss`` is what ``choose_loss`` returned; ``tokens`` are counted unless given."""
    scorer, encoder = new_model(config, data.task, base, depth)
    if config.model.shard:
        distributed.shard(scorer, pick_device(config.model.device))
    distributed.on_main(lambda: init_head(config, scorer, encoder, data), along=scorer)
    return PreparedModel(
        base=base,
        depth=depth,
        scorer=scorer,
        encoder=encoder,
        loss=loss[0],
        loss_settings=loss[1],
        lr=learning_rate(config, base.config),
        tokens=tokens or count_tokens(encoder, data),
    )


def open_base(config: RunConfig, data: Data, log: Log) -> Base:
    """The base model, its config and its tokenizer with the template.

    Raises:
        UserError: the weights do not fit the memory, or the template needs contexts that are missing.
    """
    model = config.model
    source = resolve_base(model.model, model.revision)
    base_config = load_config(source.folder)
    _check_weights_fit(source, config)
    max_tokens = min(model.max_length, positions(base_config))
    if max_tokens < model.max_length:
        log(
            f"note: the model reads at most {max_tokens} tokens, so --max-length {model.max_length} becomes {max_tokens}"
        )
    check_contexts(model.template, (e.context for items in data.splits.values() for e in items))
    tokenizer = install_template(
        load_tokenizer(source.folder), model.template, max_tokens, encoder=is_encoder(base_config)
    )
    return Base(source=source, config=base_config, tokenizer=tokenizer, max_tokens=max_tokens)


def settle_depth(config: RunConfig, data: Data, loss: Loss, base: Base, log: Log) -> int | None:
    """The number of layers to keep: as configured, or with ``--depth auto`` the lowest that a probe finds good enough."""
    if config.model.depth != "auto":
        return config.model.layers
    log("a linear probe on every layer …")
    depths = distributed.on_main(lambda: probe_base(config, data, loss, base))
    chosen, line = lowest_good_depth(depths)
    log(line)
    return chosen


def probe_base(config: RunConfig, data: Data, loss: Loss, base: Base) -> list[Any]:
    """A linear probe on each layer of the untrained base, measured on validation examples."""
    plain = dataclasses.replace(config.model, head="linear", pooling="last", shard=False)
    lora = dataclasses.replace(config.lora, full=False)
    scorer, encoder = new_model(
        dataclasses.replace(config, model=plain, lora=lora), data.task, base, None, adapters=False
    )
    return probe_depths(scorer, encoder, data, loss, config.train.seed)


def new_model(
    config: RunConfig, task: Task, base: Base, depth: int | None, *, adapters: bool = True
) -> tuple[Scorer, Encoder]:
    """The base with a fresh head and, unless every weight trains, fresh adapters; and the encoder of its texts."""
    model, device = config.model, pick_device(config.model.device)
    spec = build.ScorerSpec(
        base=base.source.folder,
        outputs=task.learning.outputs(task),
        label_names=task.label_names,
        problem_type=task.learning.problem_type,
        pad_token_id=base.tokenizer.pad_token_id,
        dtype=pick_dtype(model.dtype, config.lora.full, device),
        device=torch.device("cpu") if model.shard else device,  # each process takes its parts from the CPU
        pooling=model.pooling,
        head=model.head,
        depth=depth,
        quantize=model.quantize,
    )
    lora = _adapter_settings(config) if adapters and not config.lora.full else None
    scorer = build.new_scorer(spec, lora=lora, seed=config.train.seed)
    return scorer, Encoder(base.tokenizer, long=model.long, encoder=scorer.encoder)


def _adapter_settings(config: RunConfig) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(config.lora).items() if name != "full"}


def init_head(config: RunConfig, scorer: Scorer, encoder: Encoder, data: Data) -> None:
    """With ``--head-init names``, start the head from the label names.

    Raises:
        UserError: there are no label names in words, or the model is no decoder.
    """
    if config.model.head_init != "names":
        return
    if not (words := data.task.learning.label_words(data.task)):
        raise UserError("--head-init names needs labels with names; these have none.", "Leave out --head-init.")
    sample = subsample(data.train, config.train.seed)[:HEAD_TEXTS]
    scoring.head_from_names(scorer, encoder(words), encode_texts(encoder, sample))


def learning_rate(config: RunConfig, base_config: Any) -> float:
    """The configured learning rate, or one derived from the model's width."""
    if config.train.lr is not None:
        return config.train.lr
    return default_lr(base_config.hidden_size, full=config.lora.full)


def count_tokens(encoder: Encoder, data: Data) -> TokenCounts:
    """Tokens and over-long texts of all three splits. Counted in windows, so that memory stays small."""
    tokens: list[int] = []
    over = 0
    examples = [e for items in data.splits.values() for e in items]
    for i in range(0, len(examples), 1024):
        encoded = [e for unit in encode_examples(encoder, examples[i : i + 1024]) for e in unit]
        tokens += [e.tokens for e in encoded]
        over += sum(e.cut for e in encoded)
    texts = {"count": len(tokens), "tokens": sum(tokens), "mean": sum(tokens) / len(tokens), "max": max(tokens)}
    train = sum(len(texts_of(e)) for e in data.train)
    return TokenCounts(texts={**texts, "over_length": over}, train=tokens[:train])


@contextmanager
def cached_lower_layers(config: RunConfig, model: PreparedModel, log: Log) -> Iterator[LowerLayers | None]:
    """Read the layers below the adapters from a cache on disk while training. The scorer is whole again afterwards."""
    cache = _lower_layers(config, model)
    if cache is None:
        yield None
        return
    size, limit = model.tokens.texts["tokens"] * cache.cache.width, cache.cache.limit
    log(f"states of the lower {cache.depth} layers, up to {size / 1e9:.2g} GB, are cached in {cache.cache.folder}")
    if size > limit:
        log(f"note: --cache-gb {limit / 1e9:g} may be too small; a batch with missing states is computed each time")
    model.scorer.lower = cache
    try:
        yield cache
    finally:
        model.scorer.lower = None


def _lower_layers(config: RunConfig, model: PreparedModel) -> LowerLayers | None:
    """The layers below the adapters, where there are some and their states never change."""
    scorer, base = model.scorer, model.base.source
    decoder = scorer.inner.base_model
    top, cache_gb = config.lora.adapt_top, config.train.cache_gb
    if top is None or config.lora.full or not cache_gb or scorer.encoder or not scorer.packed or scorer.sharded:
        return None
    if (below := decoder.config.num_hidden_layers - top) < 1:
        return None
    if getattr(decoder.config, "attention_dropout", 0.0):  # states then differ each time
        return None
    about = {"base": base.source, "revision": base.revision, "sha256": base.checksum()}
    about |= {"quantize": config.model.quantize} if config.model.quantize else {}
    return keep_lower(decoder, below, about, limit=int(cache_gb * 1e9))


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save the tokenizer under the class name that every version of transformers knows."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")


def _check_weights_fit(base: BaseModel, config: RunConfig) -> None:
    """Check that the weights fit the CPU's memory, through which they pass, and the device's."""
    model, device = config.model, pick_device(config.model.device)
    dtype = pick_dtype(model.dtype, config.lora.full, device)
    plain, four_bit = (weight_bytes(base.folder, dtype, four_bit=small) for small in (False, True))
    for place in {torch.device("cpu"), device}:
        size = four_bit if model.quantize and place.type != "cpu" else plain
        if model.shard and place.type != "cpu":
            size //= distributed.start(device).num_processes
        elif model.shard:  # each process of this machine reads all of them
            size *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if size > (free := free_memory(place)):
            quantizable = place.type == "cuda" and not model.quantize and four_bit < free
            first = f"Pass --quantize nf4 ({four_bit / 1e9:.1f} GB)" if quantizable else "Close other programs"
            raise UserError(
                f"The weights of {base.source} need {size / 1e9:.1f} GB on {place}, and {free / 1e9:.1f} GB are free.",
                f"{first}, or pass a smaller --model.",
            )


def _describe(model: PreparedModel, long: str, log: Log) -> None:
    scorer, counts = model.scorer, model.tokens.texts
    trained = sum(p.numel() for p in scorer.parameters() if p.requires_grad)
    weights = sum(p.numel() for p in scorer.parameters())
    dtype = str(next(scorer.inner.base_model.parameters()).dtype).removeprefix("torch.")
    log(
        f"model: {model.base.source.note or model.base.source.source}; {trained / 1e6:.2f} M of {weights / 1e6:.1f} M weights "
        f"trained; {dtype} on {scorer.device}; learning rate {model.lr:g}"
    )
    log(
        f"tokens a text: {counts['mean']:.0f} on average, at most {counts['max']}; {counts['over_length']:,} texts over "
        f"{model.base.max_tokens} ({'cut' if long == 'cut' else 'chunked'})"
    )
    if not scorer.packed:
        log(f"{model.base.config.model_type} is not proven packable: batches are padded, sorted by length")
