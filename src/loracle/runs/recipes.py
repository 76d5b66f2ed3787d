"""Recipes: settings in TOML, in the sections of ``config.py``. A run's ``run.toml`` is a recipe too."""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from pathlib import Path
from typing import Any

import tomli_w

from loracle.config import CompareConfig, RunConfig
from loracle.errors import UserError, near

PACKAGED = Path(__file__).parents[1] / "recipes"
OTHER_SECTIONS = {"compare": CompareConfig}  # sections of commands other than train
TYPE_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def recipe_names() -> list[str]:
    """Names of the packaged recipes."""
    return sorted(path.stem for path in PACKAGED.glob("*.toml"))


def find_recipe(recipe: str | Path) -> Path:
    """Path of a recipe: a packaged one by its name, or any file by its path.

    Raises:
        UserError: there is no such recipe.
    """
    names, path = recipe_names(), Path(recipe)
    if str(recipe) in names:
        return PACKAGED / f"{recipe}.toml"
    if path.is_file():
        return path
    raise UserError(
        f"No recipe {recipe}{near(path.stem, names)}: there is no such file, nor a packaged recipe of this name.",
        f"Give the path of a TOML file, or one of {', '.join(names)}.",
    )


def read_recipe(recipe: str | Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Settings of a recipe: ``{field: value}`` for ``RunConfig.from_flat``, and the sections of other commands by name.

    ``recipe`` is a packaged name or a path. The output folder of a ``run.toml`` is left out.

    Raises:
        UserError: no such recipe, invalid TOML, a value of the wrong type, or an unknown section or key.
    """
    path = find_recipe(recipe)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"Cannot read the recipe {path}: {e.strerror or e}.", "Check its permissions.") from None
    except ValueError as e:  # invalid TOML, or bytes that are not UTF-8
        raise UserError(f"{path} is not valid TOML: {e}.", "Correct the file.") from None
    if "config" in document:
        document = {k: v for k, v in document["config"].items() if k != "out"}
    sections = _sections()
    flat: dict[str, Any] = {}
    others: dict[str, dict[str, Any]] = {name: {} for name in OTHER_SECTIONS}
    for name, value in document.items():
        if isinstance(value, dict):
            _check_name(name, tuple(sections), path)
            fields, target = sections[name], others.get(name, flat)
            for key, v in value.items():
                _check_name(key, fields, path, section=name)
                target[key] = _checked_value(key, _joined(v), path)
        else:
            _check_name(name, ("out", "baselines"), path)
            flat[name] = _checked_value(name, value, path)
    return flat, others


def write_recipe(path: Path, config: RunConfig, comments: tuple[str, ...] = ()) -> None:
    """Write a recipe that ``read_recipe`` reads, with comments on top. It omits settings that are None: TOML has no null."""
    document = {
        name: {k: v for k, v in dataclasses.asdict(getattr(config, name)).items() if v is not None}
        for name in RunConfig.SECTIONS
    }
    head = "".join(f"# {line}\n" for line in comments)
    path.write_text(f"{head}baselines = {str(config.baselines).lower()}\n\n{tomli_w.dumps(document)}", encoding="utf-8")


def _checked_value(key: str, value: Any, path: Path) -> Any:
    """The value, if it has the type of the setting; a whole number also passes as a number."""
    hint = next(h[key] for config in (*_configs().values(), RunConfig) if key in (h := typing.get_type_hints(config)))
    types = tuple(t for t in typing.get_args(hint) or (hint,) if t is not type(None))
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if type(value) not in types and not (is_whole and float in types):
        expected = " or ".join(TYPE_NAMES[t] for t in types)
        raise UserError(f"{key} in {path} must be {expected}, not {value!r}.", "Correct the file.")
    return value


def _joined(value: Any) -> Any:
    """A list as the comma-separated text that the flag takes."""
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _sections() -> dict[str, tuple[str, ...]]:
    return {name: tuple(f.name for f in dataclasses.fields(config)) for name, config in _configs().items()}


def _configs() -> dict[str, type]:
    return {name: type(getattr(RunConfig(), name)) for name in RunConfig.SECTIONS} | OTHER_SECTIONS


def _check_name(name: str, names: tuple[str, ...], path: Path, section: str = "") -> None:
    if name in names:
        return
    place = f"[{section}] of {path}" if section else f"{path}"
    other = next((f"It belongs in [{s}]." for s, fields in _sections().items() if name in fields), None)
    raise UserError(
        f"Unknown setting {name} in {place}{near(name, names)}.", other or f"Choose from {', '.join(names)}."
    )
