"""Find the splits of a folder or hub snapshot: from its README, else from file and folder names."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from loracle.data.formats import format_of, suffix_list
from loracle.errors import UserError

SPLIT_WORDS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
BESIDE_DATA = {  # JSON that describes a data set
    "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json", "configuration.json",
}  # fmt: skip


def find_splits(folder: Path, spec: str, config: str) -> tuple[dict[str, list[Path]], dict[str, tuple[str, ...]]]:
    """``{split: files}`` and ``{column: label names}`` of a folder.

    Raises:
        UserError: there is no data file; the README cannot be read, or names missing files or configs.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file() and _is_data(p.relative_to(folder)))
    readme = _readme(folder, spec)
    splits = _declared_splits(folder, readme, spec, config) or _named_splits(folder, files)
    if not splits:
        raise UserError(
            f"No data file in {spec}: no name in this folder ends in {suffix_list()}.",
            "Name a folder or data set with data files.",
        )
    order = dict.fromkeys([*SPLIT_WORDS.values(), *splits])
    return {s: splits[s] for s in order if s in splits}, _declared_labels(readme, config)


def _is_data(path: Path) -> bool:
    return (
        format_of(path) is not None
        and path.name not in BESIDE_DATA
        and not any(part.startswith((".", "__")) for part in path.parts)
    )


def _readme(folder: Path, spec: str) -> dict[str, Any]:
    """The YAML at the head of a data set's README."""
    if not (path := folder / "README.md").is_file():
        return {}
    import yaml
    from huggingface_hub import metadata_load

    try:
        return metadata_load(path) or {}
    except (ValueError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"Cannot read the YAML of README.md in {spec}: {reason}.", "Name a data file.") from None


def _declared_splits(folder: Path, readme: dict[str, Any], spec: str, config: str) -> dict[str, list[Path]]:
    """``configs: [{config_name, data_files: [{split, path}]}]`` of a README, in the forms Hugging Face documents."""
    configs = {str(c.get("config_name", "default")): c for c in readme.get("configs") or [] if c.get("data_files")}
    if not configs and not config:
        return {}
    chosen = config or next((name for name, c in configs.items() if c.get("default") or name == "default"), "")
    if not chosen and len(configs) == 1:
        chosen = next(iter(configs))
    if chosen not in configs:
        names = ", ".join(configs) or "none"
        problem = f"{spec} has no config called '{config}'" if config else f"{spec} has several configs"
        raise UserError(f"{problem} (configs: {names}).", f"Write {spec.partition('#')[0]}#NAME.")
    declared = configs[chosen]["data_files"]
    if not (isinstance(declared, list) and all(isinstance(entry, dict) for entry in declared)):
        declared = [{"split": "train", "path": declared}]
    return {str(entry["split"]): _matching(folder, entry["path"], spec) for entry in declared}


def _matching(folder: Path, patterns: str | list[str], spec: str) -> list[Path]:
    matches: dict[Path, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if Path(pattern).is_absolute() or ".." in Path(pattern).parts or "://" in pattern:
            raise UserError(
                f"README.md of {spec} names '{pattern}', which is not inside the data set.", "Name a data file."
            )
        files = sorted(p for p in folder.glob(pattern) if p.is_file())
        if not files:
            raise UserError(f"README.md of {spec} names '{pattern}', but no file matches it.", "Name a data file.")
        matches |= dict.fromkeys(files)
    return list(matches)


def _named_splits(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Splits by words in file names, then in folder names; everything is train if no name has such a word.

    Only files of the most frequent format count, as for Hugging Face, because many folders hold their data twice.
    """
    if not files:
        return {}
    [(most_frequent, _)] = Counter(map(format_of, files)).most_common(1)
    files = [p for p in files if format_of(p) is most_frequent]
    splits: dict[str, list[Path]] = {}
    for path in files:
        if split := _split_word(path.relative_to(folder)):
            splits.setdefault(split, []).append(path)
    return splits or {"train": files}


def _split_word(path: Path) -> str | None:
    for part in reversed(path.parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return None


def _declared_labels(readme: dict[str, Any], config: str) -> dict[str, tuple[str, ...]]:
    """Label names from ``dataset_info: features: [{name, dtype: {class_label: {names: {'0': ...}}}}]`` of a README."""
    infos = readme.get("dataset_info") or []
    infos = infos if isinstance(infos, list) else [infos]
    labels = {}
    for info in infos:
        if len(infos) > 1 and str(info.get("config_name")) != config:
            continue
        for feature in info.get("features") or []:
            dtype = feature.get("dtype") or feature.get("sequence") or feature.get("list")
            names = (dtype.get("class_label") or {}).get("names") if isinstance(dtype, dict) else None
            if names:
                labels[str(feature.get("name"))] = tuple(map(str, names.values() if isinstance(names, dict) else names))
    return labels
