"""The model card of a run: what it does, what it is worth, where it comes from and how it is opened."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from loracle import hubs
from loracle.config import RunConfig
from loracle.formatting import markdown_table
from loracle.reporting.terminal import ceiling_line, result_rows
from loracle.runs.folder import RunInfo

LABELS = 50  # that are named


def model_card(
    name: str, info: RunInfo, metrics: Mapping[str, Any], *, place: str | None = None, licence: str | None = None
) -> str:
    """README.md of a run folder.

    Args:
        name: of the run. metrics: what metrics.json holds.
        place: ``hf:owner/name`` or ``modelscope:owner/name`` where it is pushed to; None on this disk.
        licence: of the base model.
    """
    kept, base = info.config.model, info.base
    full, output = info.config.lora.full, info.task.output
    linear = (kept.head, kept.pooling) == ("linear", "last")
    plain = not full and linear and kept.depth is None
    verb = output.command
    opened = [f"loracle {verb} {name} …"] if place is None else [
        f"loracle pull {place} -o runs/{name}", f"loracle {verb} runs/{name} …"]  # fmt: skip
    lines = [
        "---",
        *_front_matter(info),
        "---",
        f"# {name}",
        "",
        f"Task: {output.describe(info.task)}. Trained by loracle on top of {base['source']}"
        + (f" ({base['note']}: so are all figures below)" if base.get("note") else "")
        + ".",
        "",
        markdown_table(result_rows(metrics, info.task)),
        "",
        *([ceiling, ""] if (ceiling := ceiling_line(metrics["test"])) else []),
        "Intervals are 95 % bootstrap intervals on the test side.",
        "",
        "```",
        *opened,
        "```",
        "",
    ]
    if plain:
        lines += ["Plain PEFT opens it too:", "", "```python", *_peft_lines(place), "```"]
    else:
        lines.append(
            "It loads through loracle; plain PEFT does not know this head." if not full else "It loads through loracle."
        )
    if linear:
        lines += [
            "",
            f"`loracle export runs/{name} --to transformers` makes a folder for plain transformers.",
        ]
    lines += ["", "## Where it comes from", "", markdown_table(_facts(info, licence))]
    lines += ["", "## Settings", "", markdown_table(_settings(info.config)), ""]
    return "\n".join(lines)


def _front_matter(info: RunInfo) -> list[str]:
    """What the hubs read: Hugging Face knows the base by its id there, ModelScope by the same key."""
    from huggingface_hub import ModelCardData

    base = hubs.remote_source(info.base["source"])
    data = ModelCardData(
        library_name="transformers" if info.config.lora.full else "peft",
        pipeline_tag=info.task.output.pipeline_tag,
        base_model=base.id if base is not None else None,
        tags=["loracle"],
    )
    return data.to_yaml().splitlines()


def _facts(info: RunInfo, licence: str | None) -> list[list[str]]:
    """A row each: base model, data, task."""
    base, known = info.base, info.provenance
    names = info.task.label_names
    shown = ", ".join(names[:LABELS]) + (f" and {len(names) - LABELS} more" if len(names) > LABELS else "")
    counts = ", ".join(f"{count:,} {side}" for side, count in known.get("counts", {}).items())
    rows = [
        ["", ""],
        ["task", info.task.output.describe(info.task)],
        ["labels", shown],
        ["base model", base["source"]],
        ["its revision", base.get("revision") or ""],
        ["its weights, SHA-256", base["sha256"]],
        [
            "its licence",
            f"{licence}; it binds what is made of the model too" if licence else "not known here: see its own card",
        ],
        ["data", ", ".join(filter(None, (info.config.data.data, info.config.data.test)))],
        *([f"{side} data, SHA-256", digest] for side, digest in known.get("data", {}).items()),
        ["columns", ", ".join(f"{role}: {column}" for role, column in known.get("columns", {}).items())],
        ["examples", counts],
        ["versions", ", ".join(f"{package} {version}" for package, version in known.get("versions", {}).items())],
    ]
    return [[name, _cell(value)] for i, (name, value) in enumerate(rows) if value or i == 0]


def _settings(config: RunConfig) -> list[list[str]]:
    """What was set otherwise than by default, and the few that everybody asks for."""
    default = RunConfig()
    rows = [["", ""]]
    for section in ("model", "lora", "train"):
        for f in dataclasses.fields(getattr(config, section)):
            value = getattr(getattr(config, section), f.name)
            if value != getattr(getattr(default, section), f.name) or f.name in (
                "r",
                "alpha",
                "epochs",
                "batch",
                "seed",
            ):
                rows.append([f.name, _cell(str(value))])
    return rows


def _cell(text: str) -> str:
    """A text inside a table of Markdown."""
    return " ".join(text.split()).replace("|", "\\|")


def _peft_lines(place: str | None) -> list[str]:
    source = hubs.parse(place) if place is not None else None
    client = hubs.HUBS[source.hub].client if source is not None else None
    folder = ["folder = '.'  # this one"] if source is None or client is None else [
        f"from {client} import snapshot_download", "", f"folder = snapshot_download({source.id!r})"]  # fmt: skip
    return [
        "import pathlib, tomllib",
        "from peft import AutoPeftModelForSequenceClassification",
        "from transformers import AutoTokenizer",
        *([""] if client is None else []),
        *folder,
        "load_kwargs = tomllib.loads(pathlib.Path(folder, 'run.toml').read_text())['load_kwargs']",
        "model = AutoPeftModelForSequenceClassification.from_pretrained(folder, **load_kwargs).eval()",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "scores = model(**tokenizer(['a text', 'another'], truncation=True, padding=True, return_tensors='pt')).logits",
    ]
