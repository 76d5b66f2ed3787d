"""Every setting of loracle: default, unit, help and allowed values. No other file holds a default.

One frozen, keyword-only dataclass for each concern. The command line, recipe files and ``run.toml`` are made from them, so
a name means the same in all three. Classes elsewhere take plain arguments, never a config.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from loracle.errors import UserError
from loracle.settings import Checked, setting


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(Checked):
    """Where the examples are and what their columns mean."""

    GROUP: ClassVar = "Data"
    COMMON: ClassVar = False

    data: str = setting("", "file, folder, hf:owner/name or modelscope:owner/name", path=True)
    test: str | None = setting(None, "file with test examples; else a random part of the data", common=True, path=True)
    task: str = setting(
        "auto", "single_label, multi_label, ranking or click_ranking; auto infers it from the data", common=True
    )
    text: str | None = setting(None, "column with the text (the title, in ranking)", unit="column", common=True)
    label: str | None = setting(None, "column with the label, or a list of labels", unit="column", common=True)
    group: str | None = setting(
        None, "columns, joined by commas, that identify a group of titles", unit="columns", common=True
    )
    context: str | None = setting(None, "column with the context: brief, product, query", unit="column", common=True)
    clicks: str | None = setting(None, "column with the number of clicks", unit="column", common=True)
    impressions: str | None = setting(None, "column with the number of impressions", unit="column", common=True)
    clicked: str | None = setting(None, "column with 0 or 1, in logs with one impression a row", unit="column")
    compare_within: str | None = setting(
        None, "columns (image, position) in which compared titles must be equal", unit="columns"
    )
    grade: str | None = setting(None, "column with a graded relevance, for ranking", unit="column")
    weight: str | None = setting(None, "column with the weight of an example (of a group, in ranking)", unit="column")
    slice: str | None = setting(None, "columns that slice a classifier's report (default: source)", unit="columns")
    date: str | None = setting(
        None, "column with the date of a group (2014-11-03, 201446); the latest groups become the test", unit="column"
    )
    label_delimiter: str | None = setting(None, "separator of labels in one cell; means multi_label", unit="text")
    min_impressions: int = setting(
        100, "titles of a click log with fewer impressions are left out and counted", unit="impressions", minimum=0
    )
    test_share: float = setting(
        0.1,
        "share of the examples (groups, in ranking) to test on when there is no --test",
        unit="share",
        above=0,
        below=1,
    )
    validation_share: float = setting(
        0.1, "share of the training examples to validate on; never trained on", unit="share", above=0, below=1
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(Checked):
    """The base model, the template around each text, and the head that reads its states."""

    GROUP: ClassVar = "Model"
    COMMON: ClassVar = False

    model: str = setting(
        "demo",
        "base model: hub id, hf:owner/name, modelscope:owner/name, folder, .gguf file, or demo (embedded)",
        common=True,
        path=True,
    )
    revision: str | None = setting(None, "branch, tag or commit of the base model", unit="revision")
    template: str | None = setting(
        None, "'chat', or a text with {text} and perhaps {context}: instruction before, cue after", common=True
    )
    max_length: int = setting(512, "longest text, with its template", unit="tokens", common=True)
    long: str = setting("cut", "longer texts are cut, or split in chunks with averaged scores", ("cut", "chunk"))
    depth: int | str | None = setting(
        None,
        "keep only this many lower layers of a decoder; auto: probe each layer and choose",
        unit="layers|auto",
        minimum=1,
    )
    pooling: str = setting("last", "state that the head reads (encoders: their first token)", ("last", "mean"))
    head: str = setting("linear", "network on top of the pooled state", ("linear", "mlp"))
    head_init: str = setting(
        "random",
        "start of a linear head; names: the base model's states of the label names, for few examples",
        ("random", "names"),
    )
    dtype: str = setting(
        "auto",
        "of the frozen decoder; auto: bfloat16 where the device supports it, float32 with --full and for encoders",
        ("auto", "bfloat16", "float32"),
    )
    quantize: str | None = setting(
        None, "nf4 stores the frozen decoder in 4 bits (QLoRA): a third of the memory, slower steps", ("nf4",)
    )
    shard: bool = setting(False, "split frozen layers across processes (FSDP2), for bases larger than one GPU")
    device: str = setting("auto", "cpu, cuda, mps or auto", common=True)

    def __post_init__(self) -> None:
        if self.template and self.template != "chat" and (count := self.template.count("{text}")) != 1:
            raise UserError(
                f"--template must be 'chat' or contain {{text}} once, but {self.template!r} has it {count} times.",
                "For example --template 'Topic of this headline: {text}'.",
            )
        before, _, after = (self.template or "").partition("{text}")
        if before.count("{context}") + 2 * after.count("{context}") > 1:
            raise UserError(
                f"--template may contain {{context}} once, before {{text}}, unlike {self.template!r}.",
                "For example --template 'Brief: {context} Title: {text}'.",
            )
        if isinstance(self.depth, str) and self.depth != "auto":
            raise UserError(f"--depth must be a number of layers or auto, not {self.depth!r}.")
        if self.head_init == "names" and self.head != "linear":
            raise UserError(f"--head-init names needs a linear head, not --head {self.head}.", "Leave one of them out.")
        if self.max_length < 8:
            raise UserError(f"--max-length {self.max_length} is too short: a text needs 8 tokens.")
        Checked.__post_init__(self)

    @property
    def layers(self) -> int | None:
        """The depth as a number; ``--depth auto`` must be settled before."""
        assert not isinstance(self.depth, str), "--depth auto is settled before a model is made"
        return self.depth


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig(Checked):
    """The adapter (Hu et al. 2021, arXiv:2106.09685)."""

    GROUP: ClassVar = "Adapter"
    COMMON: ClassVar = False

    r: int = setting(16, "rank of the adapters", unit="rank", minimum=1)
    alpha: float = setting(32, "scale of the adapters: alpha/r, or alpha/sqrt(r) with --rslora", above=0)
    dropout: float = setting(0.05, "dropout before the adapters", unit="share", minimum=0, below=1)
    targets: str = setting("all-linear", "linear layers with an adapter: all-linear, or names such as q_proj,v_proj")
    adapt_top: int | None = setting(
        None, "adapters on the top layers only; states below are cached", unit="layers", minimum=1
    )
    rslora: bool = setting(False, "rank-stabilised scaling (arXiv:2312.03732)")
    full: bool = setting(False, "train every weight instead of adapters; best for encoders of BERT's size", common=True)

    def __post_init__(self) -> None:
        Checked.__post_init__(self)
        if self.full and self.adapt_top is not None:
            raise UserError("--full and --adapt-top exclude each other.", "Leave one of them out.")


SATURATING = ("list", "dirichlet", "binomial")  # losses in which the weight of a group of clicks saturates
LOSS_NAMES = (
    "auto", "cross-entropy", "binary", "bradley-terry", "margin", "list", "dirichlet", "binomial", "soft-bradley-terry"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(Checked):
    """Length, step size and loss of the training."""

    GROUP: ClassVar = "Training"
    COMMON: ClassVar = False

    epochs: float = setting(3.0, "passes over the training examples", unit="epochs", above=0, common=True)
    max_steps: int | None = setting(None, "stop after this many optimizer steps", unit="steps", minimum=1)
    batch: int = setting(
        16, "examples (groups, in ranking) in an optimizer step", unit="examples", above=0, common=True
    )
    lr: float | None = setting(
        None, "peak learning rate; by default computed from the model's width", unit="rate", above=0, common=True
    )
    warmup: float = setting(
        0.06,
        "share of the steps in which the learning rate rises; a cosine then lowers it to 0",
        unit="share",
        minimum=0,
        below=1,
    )
    weight_decay: float = setting(0.0, "decoupled weight decay of AdamW, on matrices", minimum=0)
    clip: float = setting(1.0, "largest gradient norm", unit="norm", above=0)
    loss: str = setting(
        "auto",
        "auto chooses by task; for clicks it is list, or binomial above a click rate of 10 %",
        LOSS_NAMES,
        common=True,
    )
    margin: float = setting(
        1.0, "score difference that the margin loss wants, where the data give none", unit="score", minimum=0
    )
    class_weights: str = setting("none", "balanced: weight classes by inverse frequency", ("none", "balanced"))
    target_precision: float | None = setting(
        None, "multi_label: precision of a label on validation texts (default: best F1)", unit="share", above=0, below=1
    )
    saturation: float | None = setting(
        None,
        "m0: a group with m clicks weighs m/(1 + m/m0); by default fitted on validation groups",
        unit="clicks",
        above=0,
    )
    evals_per_epoch: int = setting(
        1, "validation evaluations in an epoch; the best weights are kept", unit="evaluations", above=0
    )
    patience: int = setting(3, "evaluations without progress until it stops; 0: never", unit="evaluations", minimum=0)
    save_steps: int = setting(50, "steps between checkpoints", unit="steps", above=0)
    cache_gb: float = setting(
        10.0, "disk for cached states below --adapt-top, all runs together; 0 disables it", unit="GB", minimum=0
    )
    tokens_per_micro_batch: int = setting(
        4096, "tokens that go through the model at once; lower it to save memory", unit="tokens", above=0
    )
    texts: bool = setting(
        True, "keep texts of the data in the run folder (predictions, report); else row numbers", group="Output"
    )
    track: str | None = setting(
        None, "also log to this service, installed and logged in", ("wandb", "mlflow", "swanlab"), group="Output"
    )
    seed: int = setting(0, "random seed of splits, order, dropout and head", minimum=0, common=True)

    def __post_init__(self) -> None:
        Checked.__post_init__(self)
        if self.saturation is not None and self.loss not in ("auto", *SATURATING):
            raise UserError(
                f"--saturation needs the loss list, dirichlet or binomial, not --loss {self.loss}.",
                "Leave --saturation out.",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig(Checked):
    """A future click log, as ``loracle simulate`` draws it."""

    GROUP: ClassVar = "Click log"

    tests: int = setting(500, "tests (groups of titles)", minimum=2, below=1e12)
    arms: int = setting(4, "titles in a test", unit="titles", minimum=2, below=1001)
    impressions_per_title: int = setting(3000, "impressions of each title", unit="impressions", minimum=1, below=1e12)
    rate: float = setting(0.015, "click rate", unit="share", above=0, below=1)
    spread: float = setting(
        0.3, "standard deviation of the true log-odds within a test", unit="log-odds", minimum=0, below=100
    )
    seed: int = setting(0, "random seed of the draws", minimum=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareConfig(Checked):
    """What ``loracle compare`` trains beside ``--model``, on the same split."""

    GROUP: ClassVar = "Comparison"

    against: str = setting(
        "tfidf,linear-probe",
        "joined by commas: tfidf, linear-probe (on --model), linear-probe:NAME, base models; "
        "NAME@depth=12 (auto, full) sets a depth",
        unit="names",
    )
    price_per_hour: float | None = setting(
        None, "price of an hour of this machine; without it the table shows hours", unit="price", above=0
    )
    encoder_full: bool = setting(True, "train every weight of encoders, whatever decoders get")
    encoder_lr: float | None = setting(
        None, "peak learning rate of encoders; by default computed from the model's width", unit="rate", above=0
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidateConfig(Checked):
    """How often ``loracle validate`` repeats the training."""

    GROUP: ClassVar = "Repeats"

    folds: int | None = setting(None, "parts of the data; each is the test of one run", unit="folds", minimum=2)
    seeds: int | None = setting(
        None, "runs on one split with the seeds --seed, --seed + 1, ...", unit="runs", minimum=2
    )

    def __post_init__(self) -> None:
        Checked.__post_init__(self)
        if self.folds is None and self.seeds is None:
            raise UserError("validate needs --folds or --seeds.", "For example --folds 5.")
        if self.folds is not None and self.seeds is not None:
            raise UserError("--folds and --seeds exclude each other.", "Leave one of them out.")


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneConfig(Checked):
    """How long ``loracle tune`` searches."""

    GROUP: ClassVar = "Search"

    trials: int = setting(20, "trainings; the first third varies --lr alone", unit="trials", minimum=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig(Checked):
    """Address and limits of ``loracle serve``."""

    GROUP: ClassVar = "Service"

    host: str = setting("127.0.0.1", "address to listen at; an address that other machines can reach requires a token")
    port: int = setting(8000, "port to listen at; 0 picks a free one", minimum=0, below=65536)
    token_file: str | None = setting(
        None, "file with the token that requests must send; by default the variable LORACLE_TOKEN"
    )
    max_body: int = setting(
        1_000_000, "bytes in a request; also characters, with the context counted once for each text", minimum=1
    )
    max_texts: int = setting(256, "texts (titles) in a request", minimum=1)
    max_chars: int = setting(20_000, "characters in a text, a title or a context", minimum=1)
    queue: int = setting(128, "requests in progress at once; further ones get 429", minimum=1)
    queue_texts: int = setting(1024, "texts that wait or are being scored; requests beyond that get 429", minimum=1)
    queue_tokens: int = setting(
        262_144, "tokens that wait or are being scored; requests beyond that get 429", minimum=1
    )
    tokens_per_micro_batch: int = setting(
        512, "tokens that go through the model at once; more raise throughput and latency", minimum=1
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
        Checked.__post_init__(self)
        if self.max_texts > self.queue_texts:
            raise UserError(
                f"--max-texts {self.max_texts} exceeds --queue-texts {self.queue_texts}, "
                "so the queue has no room for the largest request.",
                "Raise --queue-texts.",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig(Checked):
    """A whole run: the settings in ``run.toml``."""

    GROUP: ClassVar = "Output"

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    out: str | None = setting(None, "run folder; by default runs/NAME of the data", unit="folder", path=True)
    baselines: bool = setting(True, "also fit the baselines: majority, length, tfidf, linear-probe, zero-shot")

    SECTIONS: ClassVar = ("data", "model", "lora", "train")

    def __post_init__(self) -> None:
        Checked.__post_init__(self)
        if self.model.quantize and self.lora.full:
            raise UserError("--quantize and --full exclude each other: 4-bit weights do not train.")
        if self.model.shard:
            others = {
                "--full": self.lora.full,
                "--quantize": self.model.quantize,
                "--depth auto": self.model.depth == "auto",
            }
            if flags := [flag for flag, value in others.items() if value]:
                raise UserError(f"--shard and {flags[0]} exclude each other.", "Leave one of them out.")

    @classmethod
    def from_flat(cls, values: dict[str, Any]) -> RunConfig:
        """A run from ``{field: value}``, as the command line has it. Field names are unique across the sections."""
        values = dict(values)
        sections = {}
        for name, section in zip(cls.SECTIONS, (DataConfig, ModelConfig, LoraConfig, TrainConfig), strict=True):
            names = [f.name for f in dataclasses.fields(section) if f.name in values]
            sections[name] = section(**{name: values.pop(name) for name in names})
        return cls(**sections, **values)
