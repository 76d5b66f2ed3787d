"""The example diffs of CONTRIBUTING.md: short, and against code that exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
# Registries that are still to come: their examples are checked as soon as the file names the registry.
REGISTRIES = {
    "A hub": ("hubs/__init__.py", "HUBS"),
    "A data format": ("data/formats/__init__.py", "FORMATS"),
    "An exporter": ("runs/export/__init__.py", "EXPORTERS"),
    "A model family": ("models/architectures.py", "ARCHITECTURES"),
}
DIFFS = dict(re.findall(r"^### (.+?)\n(?:(?!^### ).)*?```diff\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL))


def test_every_example_has_a_diff():
    assert list(DIFFS) == re.findall(r"^### (.+)$", PAGE, re.MULTILINE)


def is_pending(name: str) -> bool:
    file, registry = REGISTRIES.get(name, ("", ""))
    path = ROOT / "src/loracle" / file
    return bool(file) and not (path.is_file() and registry in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", DIFFS)
def test_diff_is_short_and_its_context_exists(name):
    if is_pending(name):
        pytest.skip("its registry does not exist yet")
    lines = DIFFS[name].splitlines()
    assert len(lines) < 30
    existing: list[str] = []
    for line in lines:
        if line.startswith("--- "):
            path = line.removeprefix("--- ").removeprefix("a/")
            existing = [] if path == "/dev/null" else (ROOT / path).read_text(encoding="utf-8").splitlines()
        elif not line.startswith("+"):
            assert line[1:] in existing, f"{path} has no line {line[1:]!r}"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`([\w/]+\.py)`", PAGE))))
def test_named_files_exist(path):
    if path in {file for name, (file, _) in REGISTRIES.items() if is_pending(name)}:
        pytest.skip("its registry does not exist yet")
    assert "NAME" in path or (ROOT / "src/loracle" / path).exists() or (ROOT / path).exists()
