"""Every dial of loracle, with its default and its unit: the only place where defaults are written down.

One frozen, keyword-only dataclass per concern. They feed the command line, recipe files and the ``run.toml`` that a run
leaves behind, so that a name means the same thing in all three. Classes elsewhere take plain arguments, never a config.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from loracle.errors import UserError


def setting(
    default: Any,
    help: str,
    choices: tuple[str, ...] = (),
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
) -> Any:
    """A config field: its default, what it does (shown by ``--help``) and which values it may take.

    ``choices`` of an enumeration; of a number, that it is more than ``above``, ``least`` or more, and less than ``below``.
    """
    return field(
        default=default, metadata={"help": help, "choices": choices, "above": above, "least": least, "below": below}
    )


def _check(config: Any) -> None:
    """Refuse values outside of what the fields allow."""
    for f in dataclasses.fields(config):
        value, may, flag = getattr(config, f.name), f.metadata, "--" + f.name.replace("_", "-")
        if value is None or not may:
            continue
        if may["choices"] and value not in may["choices"]:
            listed = ", ".join(may["choices"])
            raise UserError(f"{f.name} to be one of {listed}", repr(value), f"pick one of these for {flag}")
        if isinstance(value, str):
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"a finite number for {f.name}", str(value), f"pass another {flag}")
        if may["above"] is not None and value <= may["above"]:
            raise UserError(f"{f.name} above {may['above']:g}", str(value), f"pass a positive {flag}")
        if may["least"] is not None and value < may["least"]:
            raise UserError(f"{f.name} of {may['least']:g} or more", str(value), f"pass a larger {flag}")
        if may["below"] is not None and value >= may["below"]:
            raise UserError(f"{f.name} below {may['below']:g}", str(value), f"pass a smaller {flag}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where the examples are and what their columns mean."""

    data: str = setting("", "file, folder, hf:owner/name or modelscope:owner/name")
    test: str | None = setting(None, "file with the test examples; without it a seeded part of the data is held out")
    task: str = setting(
        "auto", "what to learn: single_label, multi_label, ranking, click_ranking; auto tells it from the data"
    )
    text: str | None = setting(None, "column with the text (a title, when ranking)")
    label: str | None = setting(None, "column with the label, or the list of labels")
    group: str | None = setting(None, "column, or several joined by commas, that say which titles compete")
    compare_within: str | None = setting(
        None, "column, or several joined by commas (image, position), in which titles must be equal to be compared"
    )
    context: str | None = setting(None, "column with the context (brief, product, query, prompt) that a group shares")
    clicks: str | None = setting(None, "column with the number of clicks")
    impressions: str | None = setting(None, "column with the number of impressions")
    clicked: str | None = setting(
        None, "column that says of one impression, a row each, whether it was clicked (0 or 1)"
    )
    grade: str | None = setting(None, "column with a graded relevance, for ranking")
    weight: str | None = setting(None, "column with the weight of an example (one a group, when ranking)")
    slice: str | None = setting(
        None,
        "column, or several joined by commas, by whose values the report of a classifier is sliced; "
        "by default one that is called source, where there is one",
    )
    date: str | None = setting(
        None, "column with the date (2014-11-03, 201446) of a group; held out are then the latest, not random ones"
    )
    label_delimiter: str | None = setting(
        None, "character between several labels of one cell; makes the task multi-label"
    )
    min_impressions: int = setting(100, "titles of a click log shown less often are left out, and counted", least=0)
    test_share: float = setting(
        0.1, "share of the examples (of the groups, when ranking) held out when there is no --test"
    )
    validation_share: float = setting(0.1, "share of the training examples kept for early stopping, never trained on")

    def __post_init__(self) -> None:
        for name in ("test_share", "validation_share"):
            if not 0 < (value := getattr(self, name)) < 1:
                raise UserError(
                    f"a share between 0 and 1 for {name}", str(value), f"pass --{name.replace('_', '-')} 0.1"
                )
        _check(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The base model, how a text is put to it, and what is read from it."""

    model: str = setting(
        "demo", "hub id, hf:owner/name, modelscope:owner/name, folder, .gguf file, or 'demo' (embedded)"
    )
    revision: str | None = setting(None, "branch, tag or commit of the base model")
    template: str | None = setting(
        None, "'chat', or a text with {text} and perhaps {context}: instruction before, cue after"
    )
    max_length: int = setting(512, "tokens a text may take together with its template")
    long: str = setting("cut", "what happens to longer texts: cut, or chunk (scores averaged)", ("cut", "chunk"))
    depth: int | str | None = setting(
        None,
        "lowest layers of a decoder that are kept, for good; auto: as many as a probe of each layer calls for",
        least=1,
    )
    pooling: str = setting("last", "which state the head reads (encoders: their own first token)", ("last", "mean"))
    head: str = setting("linear", "what stands on the pooled state", ("linear", "mlp"))
    head_init: str = setting(
        "random",
        "how a linear head starts; names: towards the untuned model's states of the labels' names, for few examples",
        ("random", "names"),
    )
    dtype: str = setting(
        "auto",
        "dtype of a frozen decoder; auto is bfloat16 where the device multiplies it; float32 else, with --full, for encoders",
        ("auto", "bfloat16", "float32"),
    )
    quantize: str | None = setting(
        None, "nf4 keeps the frozen decoder in 4 bits (QLoRA): a third of the memory, slower steps", ("nf4",)
    )
    shard: bool = setting(
        False, "each of several processes holds a part of every frozen layer (FSDP2): for a base larger than one GPU"
    )
    device: str = setting("auto", "cpu, cuda, mps, or auto")

    def __post_init__(self) -> None:
        if self.template and self.template != "chat" and self.template.count("{text}") != 1:
            raise UserError(
                "'chat' or a template with {text} in it exactly once",
                repr(self.template),
                "write for example --template 'Topic of this headline: {text}'",
            )
        before, _, after = (self.template or "").partition("{text}")
        if before.count("{context}") + 2 * after.count("{context}") > 1:
            raise UserError(
                "{context} at most once in --template, and before {text}",
                repr(self.template),
                "write for example --template 'Brief: {context} Title: {text}'",
            )
        if isinstance(self.depth, str) and self.depth != "auto":
            raise UserError(
                "a number of layers for --depth, or auto", repr(self.depth), "pass for example --depth auto"
            )
        if self.head_init == "names" and self.head != "linear":
            raise UserError("a linear head for --head-init names", f"--head {self.head}", "leave one of them out")
        if self.max_length < 8:
            raise UserError("room for at least 8 tokens", f"max_length {self.max_length}", "pass --max-length 512")
        _check(self)

    @property
    def layers(self) -> int | None:
        """The depth, once it is settled."""
        assert not isinstance(self.depth, str), "--depth auto is settled before a model is made"
        return self.depth


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """The adapter (Hu et al. 2021, arXiv:2106.09685)."""

    r: int = setting(16, "rank of the adapters", least=1)
    alpha: float = setting(32, "scale of the adapters: they count alpha/r (alpha/sqrt(r) with --rslora)", above=0)
    dropout: float = setting(0.05, "dropout before the adapters", least=0, below=1)
    targets: str = setting(
        "all-linear", "which linear layers get one: all-linear, or names joined by commas (q_proj,v_proj)"
    )
    adapt_top: int | None = setting(
        None, "adapters on the top K of the kept layers only; backward stops below", least=1
    )
    rslora: bool = setting(False, "rank-stabilised scaling (arXiv:2312.03732)")
    full: bool = setting(False, "train every weight and no adapter, which is what a BERT-size encoder wants")

    def __post_init__(self) -> None:
        _check(self)
        if self.full and self.adapt_top is not None:
            raise UserError("--full or --adapt-top", "both", "leave one of them out")


SATURATING = ("list", "dirichlet", "binomial")  # losses in which the weight of a group of clicks saturates


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How long, how fast and towards what."""

    epochs: float = setting(3.0, "passes over the training examples", above=0)
    max_steps: int | None = setting(None, "stop after this many optimizer steps, whatever the epochs", least=1)
    batch: int = setting(16, "examples (groups, when ranking) a step, however many tokens they hold", above=0)
    lr: float | None = setting(
        None, "peak learning rate; by default derived from the model's width and said aloud", above=0
    )
    warmup: float = setting(
        0.06, "share of the steps over which the learning rate rises; a cosine takes it to 0", least=0, below=1
    )
    weight_decay: float = setting(0.0, "decoupled weight decay of AdamW on matrices", least=0)
    clip: float = setting(1.0, "largest gradient norm", above=0)
    loss: str = setting(
        "auto",
        "auto picks by task; of a click log the list likelihood, or binomial above a click rate of 10 %",
        (
            "auto",
            "cross-entropy",
            "binary",
            "bradley-terry",
            "margin",
            "list",
            "dirichlet",
            "binomial",
            "soft-bradley-terry",
        ),
    )
    margin: float = setting(
        1.0, "distance that the margin loss wants between chosen and rejected, where the data name none", least=0
    )
    class_weights: str = setting(
        "none", "balanced weighs each class by the inverse of its frequency", ("none", "balanced")
    )
    target_precision: float | None = setting(
        None,
        "of several labels a text, each is given only where validation texts say it is right this often; "
        "by default where its F1 is highest",
        above=0,
        below=1,
    )
    saturation: float | None = setting(
        None,
        "m0: a group with m clicks weighs m/(1 + m/m0), since evidence saturates; by default fitted on validation groups",
        above=0,
    )
    evals_per_epoch: int = setting(1, "looks at the validation examples an epoch; the best one is kept", above=0)
    patience: int = setting(3, "looks without progress after which training stops; 0 never stops", least=0)
    save_steps: int = setting(50, "steps between checkpoints", above=0)
    cache_gb: float = setting(
        10.0, "GB of disk for states of the layers below --adapt-top, all runs together; 0 keeps none", least=0
    )
    tokens_per_micro_batch: int = setting(
        4096, "tokens that go through the model at once; a step takes as many rounds as it needs", above=0
    )
    texts: bool = setting(
        True, "keep texts of the data in the run folder (predictions, report); --no-texts: rows instead of texts"
    )
    track: str | None = setting(
        None, "also log to this service, whose package is installed and logged in", ("wandb", "mlflow", "swanlab")
    )
    seed: int = setting(0, "seed of splits, order, dropout and head", least=0)

    def __post_init__(self) -> None:
        _check(self)
        if self.saturation is not None and self.loss not in ("auto", *SATURATING):
            raise UserError(
                "--saturation with the loss list, dirichlet or binomial",
                f"--loss {self.loss}",
                "leave --saturation out",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """A click log to come, as ``loracle simulate`` draws it."""

    tests: int = setting(500, "tests (groups of titles)", least=2, below=1e12)
    arms: int = setting(4, "titles a test", least=2, below=1001)
    shown: int = setting(3000, "impressions a title", least=1, below=1e12)
    rate: float = setting(0.015, "click rate", above=0, below=1)
    spread: float = setting(0.3, "standard deviation of the true log-odds within a test", least=0, below=100)
    seed: int = setting(0, "seed of the draws", least=0)

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareConfig:
    """Who else is trained on the same split, as ``loracle compare`` does it."""

    against: str = setting(
        "tfidf,frozen",
        "joined by commas: tfidf, frozen (features of --model, untrained), frozen:NAME, and names of base models, each "
        "perhaps with a depth of its own: NAME@depth=12, NAME@depth=auto, NAME@depth=full",
    )
    price_per_hour: float | None = setting(
        None, "what an hour of this machine costs; without it the table has hours per million texts", above=0
    )
    encoder_full: bool = setting(True, "train every weight of BERT-type encoders, whatever the decoders get")
    encoder_lr: float | None = setting(
        None, "peak learning rate of encoders with --encoder-full; by default derived from the model's width", above=0
    )

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidateConfig:
    """How often a training is repeated, as ``loracle validate`` does it."""

    folds: int | None = setting(None, "parts of the data, each held out once as the test side of a run", least=2)
    seeds: int | None = setting(
        None, "runs on one split that differ by their seed alone: --seed and those after it", least=2
    )

    def __post_init__(self) -> None:
        _check(self)
        if (self.folds is None) == (self.seeds is None):
            found = "neither" if self.folds is None else "both"
            raise UserError("--folds or --seeds", found, "pass for example --folds 5")


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneConfig:
    """How long ``loracle tune`` searches."""

    trials: int = setting(
        20, "trainings, those that were stopped early included; the first third sweeps --lr alone", least=1
    )

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """Address and limits of ``loracle serve``."""

    host: str = setting("127.0.0.1", "address to listen at; an address that other machines can reach requires a token")
    port: int = setting(8000, "port to listen at; 0 picks a free one", least=0, below=65536)
    token_file: str | None = setting(
        None, "file with the token that requests must send; by default the variable LORACLE_TOKEN"
    )
    max_body: int = setting(
        1_000_000, "bytes in a request; also characters, with the context counted once for each text", least=1
    )
    max_texts: int = setting(256, "texts (titles) in a request", least=1)
    max_chars: int = setting(20_000, "characters in a text, a title or a context", least=1)
    queue: int = setting(128, "requests in progress at once; further ones get 429", least=1)
    queue_texts: int = setting(1024, "texts that wait or are being scored; requests beyond that get 429", least=1)
    queue_tokens: int = setting(262_144, "tokens that wait or are being scored; requests beyond that get 429", least=1)
    tokens_per_micro_batch: int = setting(
        512, "tokens that go through the model at once; more raise throughput and latency", least=1
    )
    max_wait: float = setting(
        0.5,
        "expected seconds in the queue beyond which a request gets 429; one full micro-batch is always allowed",
        above=0,
    )
    deadline: float = setting(30.0, "seconds until a request without an answer gets 503", above=0)
    merge: bool = setting(
        False, "merge each run's adapter into its own copy of the base: faster, but in 16 bits scores differ slightly"
    )

    def __post_init__(self) -> None:
        _check(self)
        if self.max_texts > self.queue_texts:
            raise UserError(
                f"--max-texts {self.max_texts} exceeds --queue-texts {self.queue_texts}, "
                "so the queue has no room for the largest request.",
                "Raise --queue-texts.",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A whole run: what ``run.toml`` holds."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    out: str | None = setting(None, "folder of the run; by default runs/<name of the data>")
    baselines: bool = setting(
        True, "fit majority, TF-IDF and frozen-feature baselines beside the model, and ask it untuned"
    )

    SECTIONS: ClassVar = ("data", "model", "lora", "train")

    def __post_init__(self) -> None:
        if self.model.quantize and self.lora.full:
            raise UserError("--quantize or --full", "both: 4-bit weights do not train", "leave one of them out")
        if self.model.shard:
            others = {
                "--full": self.lora.full,
                "--quantize": self.model.quantize,
                "--depth auto": self.model.depth == "auto",
            }
            if given := [flag for flag, value in others.items() if value]:
                raise UserError("--shard alone, or another flag", f"{given[0]} with it", "leave one of them out")

    @classmethod
    def from_flat(cls, values: dict[str, Any]) -> RunConfig:
        """A run from ``{field: value}`` as the command line has it; field names are unique across the sections."""
        values = dict(values)
        sections = {}
        for name, kind in zip(cls.SECTIONS, (DataConfig, ModelConfig, LoraConfig, TrainConfig), strict=True):
            sections[name] = kind(**{f.name: values.pop(f.name) for f in dataclasses.fields(kind) if f.name in values})
        return cls(**sections, **values)
