"""Every dial of loracle, with its default and its unit: the only place where defaults are written down.

One frozen, keyword-only dataclass per concern. They feed the command line, recipe files and the ``run.toml`` that a run
leaves behind, so that a name means the same thing in all three. Classes elsewhere take plain arguments, never a config.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

from loracle.errors import UserError


def dial(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    """A config field: its default, what it does (shown by ``--help``) and, where it is an enumeration, its values."""
    return field(default=default, metadata={"help": help, "choices": choices})


def _check_choices(config: Any) -> None:
    for f in dataclasses.fields(config):
        choices = f.metadata.get("choices")
        if choices and (value := getattr(config, f.name)) not in choices:
            raise UserError(
                f"{f.name} to be one of {', '.join(choices)}", repr(value), f"pick one of these for --{f.name}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where the examples are and what their columns mean."""

    data: str = dial("", "file, hf:owner/name, modelscope:owner/name, or 'demo' data")
    test: str | None = dial(None, "file with the test examples; without it a seeded part of the data is held out")
    text: str | None = dial(None, "column with the text (a title, when ranking)")
    label: str | None = dial(None, "column with the label, or the list of labels")
    group: str | None = dial(None, "column, or several joined by commas, that say which titles compete")
    context: str | None = dial(None, "column with the context (brief, product, query, prompt) that a group shares")
    clicks: str | None = dial(None, "column with the number of clicks")
    impressions: str | None = dial(None, "column with the number of impressions")
    grade: str | None = dial(None, "column with a graded relevance, for ranking")
    label_delimiter: str | None = dial(None, "character between several labels of one cell; makes the task multi-label")
    min_impressions: int = dial(100, "titles of a click log shown less often are left out, and counted")
    test_share: float = dial(
        0.1, "share of the examples (of the groups, when ranking) held out when there is no --test"
    )
    validation_share: float = dial(0.1, "share of the training examples kept for early stopping, never trained on")

    def __post_init__(self) -> None:
        for name in ("test_share", "validation_share"):
            if not 0 < (value := getattr(self, name)) < 1:
                raise UserError(
                    f"a share between 0 and 1 for {name}", str(value), f"pass --{name.replace('_', '-')} 0.1"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The base model, how a text is put to it, and what is read from it."""

    model: str = dial("demo", "hub id, hf:owner/name, modelscope:owner/name, folder, .gguf file, or 'demo' (embedded)")
    revision: str | None = dial(None, "branch, tag or commit of the base model")
    template: str | None = dial(
        None, "'chat', or a text with {text} and perhaps {context}: instruction before, cue after"
    )
    max_length: int = dial(512, "tokens a text may take together with its template")
    long: str = dial("cut", "what happens to longer texts: cut, or chunk (scores averaged)", ("cut", "chunk"))
    pooling: str = dial("last", "which state the head reads (encoders: their own first token)", ("last", "mean"))
    head: str = dial("linear", "what stands on the pooled state", ("linear", "mlp"))
    dtype: str = dial(
        "auto", "dtype of the frozen base; auto is bfloat16, float32 with --full", ("auto", "bfloat16", "float32")
    )
    device: str = dial("auto", "cpu, cuda, mps, or auto")

    def __post_init__(self) -> None:
        if self.template and self.template != "chat" and self.template.count("{text}") != 1:
            raise UserError(
                "'chat' or a template with {text} in it exactly once",
                repr(self.template),
                "write for example --template 'Topic of this headline: {text}'",
            )
        if self.max_length < 8:
            raise UserError("room for at least 8 tokens", f"max_length {self.max_length}", "pass --max-length 512")
        _check_choices(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """The adapter (Hu et al. 2021, arXiv:2106.09685)."""

    r: int = dial(16, "rank of the adapters")
    alpha: float = dial(32, "scale of the adapters: they count alpha/r (alpha/sqrt(r) with --rslora)")
    dropout: float = dial(0.05, "dropout before the adapters")
    targets: str = dial(
        "all-linear", "which linear layers get one: all-linear, or names joined by commas (q_proj,v_proj)"
    )
    rslora: bool = dial(False, "rank-stabilised scaling (arXiv:2312.03732)")
    full: bool = dial(False, "train every weight and no adapter, which is what a BERT-size encoder wants")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How long, how fast and towards what."""

    epochs: float = dial(3.0, "passes over the training examples")
    max_steps: int | None = dial(None, "stop after this many optimizer steps, whatever the epochs")
    batch: int = dial(16, "examples (groups, when ranking) a step, however many tokens they hold")
    lr: float | None = dial(None, "peak learning rate; by default derived from the model's width and said aloud")
    warmup: float = dial(0.06, "share of the steps over which the learning rate rises; a cosine takes it to 0")
    weight_decay: float = dial(0.0, "decoupled weight decay of AdamW on matrices")
    clip: float = dial(1.0, "largest gradient norm")
    loss: str = dial(
        "auto",
        "auto picks by task; bradley-terry and margin learn from pairs, list from groups",
        ("auto", "cross-entropy", "binary", "bradley-terry", "margin", "list"),
    )
    margin: float = dial(
        1.0, "distance that the margin loss wants between chosen and rejected, where the data name none"
    )
    class_weights: str = dial(
        "none", "balanced weighs each class by the inverse of its frequency", ("none", "balanced")
    )
    saturation: float = dial(200.0, "m0: a group with m clicks weighs m/(1 + m/m0), since evidence saturates")
    evaluations: int = dial(1, "looks at the validation examples an epoch; the best one is kept")
    patience: int = dial(3, "looks without progress after which training stops; 0 never stops")
    save_steps: int = dial(50, "steps between checkpoints")
    micro_tokens: int = dial(4096, "tokens that go through the model at once; a step takes as many rounds as it needs")
    seed: int = dial(0, "seed of splits, order, dropout and head")

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "micro_tokens", "evaluations", "save_steps", "saturation"):
            if getattr(self, name) <= 0:
                raise UserError(
                    f"{name} above 0", str(getattr(self, name)), f"pass a positive --{name.replace('_', '-')}"
                )
        _check_choices(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A whole run: what ``run.toml`` holds."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    out: str | None = dial(None, "folder of the run; by default runs/<name of the data>")
    baselines: bool = dial(True, "fit majority, TF-IDF and frozen-feature baselines beside the model")

    SECTIONS: ClassVar = ("data", "model", "lora", "train")

    @classmethod
    def from_flat(cls, values: dict[str, Any]) -> RunConfig:
        """A run from ``{field: value}`` as the command line has it; field names are unique across the sections."""
        values = dict(values)
        sections = {}
        for name, kind in zip(cls.SECTIONS, (DataConfig, ModelConfig, LoraConfig, TrainConfig), strict=True):
            sections[name] = kind(**{f.name: values.pop(f.name) for f in dataclasses.fields(kind) if f.name in values})
        return cls(**sections, **values)
