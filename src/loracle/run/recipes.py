"""Recipe files: settings in TOML, in the sections of ``config.py``; a run's own ``run.toml`` is one too."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import tomli_w

from loracle.config import CompareConfig, RunConfig
from loracle.errors import UserError, near

EXTRA = {"compare": CompareConfig}  # what a command beside train has of its own


def read_recipe(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """``{field: value}`` of a run as ``RunConfig.from_flat`` takes it, and that of each section which is another command's.

    Of a ``run.toml`` its settings are taken, all but the folder it went to, which is full.

    Raises:
        UserError: no such file, no TOML, or a section or key that means nothing, with the nearest that does.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"a recipe at {path}", e.strerror or str(e), "check the path") from None
    except ValueError as e:  # broken TOML, or bytes that are no UTF-8
        raise UserError(f"TOML in {path}", str(e), "mend the file") from None
    if "config" in document:
        document = {k: v for k, v in document["config"].items() if k != "out"}
    sections = _sections()
    flat: dict[str, Any] = {}
    extra: dict[str, dict[str, Any]] = {name: {} for name in EXTRA}
    for name, value in document.items():
        if not isinstance(value, dict):
            flat[_known(name, ("out", "baselines"), path)] = value
            continue
        fields = sections[_known(name, tuple(sections), path)]
        into = extra.get(name, flat)
        into |= {_known(key, fields, path, section=name): _joined(v) for key, v in value.items()}
    return flat, extra


def write_recipe(path: Path, config: RunConfig, comments: tuple[str, ...] = ()) -> None:
    """A recipe that ``read_recipe`` takes, with comments above it. TOML has no null, so what is None is left out."""
    document = {
        name: {k: v for k, v in dataclasses.asdict(getattr(config, name)).items() if v is not None}
        for name in RunConfig.SECTIONS
    }
    head = "".join(f"# {line}\n" for line in comments)
    path.write_text(f"{head}baselines = {str(config.baselines).lower()}\n\n{tomli_w.dumps(document)}", encoding="utf-8")


def _joined(value: Any) -> Any:
    """Lists, which read better in a file, as the flags have them."""
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _sections() -> dict[str, tuple[str, ...]]:
    kinds = {name: type(getattr(RunConfig(), name)) for name in RunConfig.SECTIONS} | EXTRA
    return {name: tuple(f.name for f in dataclasses.fields(kind)) for name, kind in kinds.items()}


def _known(name: str, names: tuple[str, ...], path: Path, section: str = "") -> str:
    if name in names:
        return name
    other = next((f"it stands in [{s}]" for s, fields in _sections().items() if name in fields), None)
    where = f"[{section}] of {path}" if section else f"{path}"
    raise UserError(f"a dial of loracle in {where}", name + near(name, names), other or f"pick from {', '.join(names)}")
