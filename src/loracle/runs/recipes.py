"""Recipe files: settings in TOML, in the sections of ``config.py``; a run's own ``run.toml`` is one too."""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from pathlib import Path
from typing import Any

import tomli_w

from loracle.config import CompareConfig, RunConfig
from loracle.errors import UserError, near

EXTRA = {"compare": CompareConfig}  # what a command beside train has of its own
WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def read_recipe(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """``{field: value}`` of a run as ``RunConfig.from_flat`` takes it, and that of each section which is another command's.

    Of a ``run.toml`` its settings are taken, all but the folder it went to, which is full.

    Raises:
        UserError: no such file, no TOML, a value of the wrong kind, or a section or key that means nothing, with the nearest
            that does.
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
        if isinstance(value, dict):
            fields = sections[_known(name, tuple(sections), path)]
            into = extra.get(name, flat)
            into |= {_known(key, fields, path, section=name): _typed(key, _joined(v), path) for key, v in value.items()}
        else:
            key = _known(name, ("out", "baselines"), path)
            flat[key] = _typed(key, value, path)
    return flat, extra


def write_recipe(path: Path, config: RunConfig, comments: tuple[str, ...] = ()) -> None:
    """A recipe that ``read_recipe`` takes, with comments above it. TOML has no null, so what is None is left out."""
    document = {
        name: {k: v for k, v in dataclasses.asdict(getattr(config, name)).items() if v is not None}
        for name in RunConfig.SECTIONS
    }
    head = "".join(f"# {line}\n" for line in comments)
    path.write_text(f"{head}baselines = {str(config.baselines).lower()}\n\n{tomli_w.dumps(document)}", encoding="utf-8")


def _typed(key: str, value: Any, path: Path) -> Any:
    """The value, if it is of the kind that the dial takes; a whole number will do for any number."""
    hint = next(h[key] for kind in (*_kinds().values(), RunConfig) if key in (h := typing.get_type_hints(kind)))
    kinds = tuple(k for k in typing.get_args(hint) or (hint,) if k is not type(None))
    whole = isinstance(value, int) and not isinstance(value, bool)
    if type(value) not in kinds and not (whole and float in kinds):
        wanted = " or ".join(WORDS[k] for k in kinds)
        raise UserError(f"{wanted} for {key} in {path}", repr(value), "mend the file")
    return value


def _joined(value: Any) -> Any:
    """Lists, which read better in a file, as the flags have them."""
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _sections() -> dict[str, tuple[str, ...]]:
    return {name: tuple(f.name for f in dataclasses.fields(kind)) for name, kind in _kinds().items()}


def _kinds() -> dict[str, type]:
    return {name: type(getattr(RunConfig(), name)) for name in RunConfig.SECTIONS} | EXTRA


def _known(name: str, names: tuple[str, ...], path: Path, section: str = "") -> str:
    if name in names:
        return name
    other = next((f"it stands in [{s}]" for s, fields in _sections().items() if name in fields), None)
    where = f"[{section}] of {path}" if section else f"{path}"
    raise UserError(f"a dial of loracle in {where}", name + near(name, names), other or f"pick from {', '.join(names)}")
