"""Imports go one way, and what a user waits for (--help, check) does not wait for torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import loracle

ROOT = Path(loracle.__file__).parent
# Each room may import what stands left of it. `loracle/__init__.py`, the public names, may import them all.
ORDER = [
    "errors",
    "settings",
    "formatting",
    "config",
    "examples",
    "hubs",
    "data",
    "text",
    "evaluation",
    "tasks",
    "models",
    "training",
    "baselines",
    "reporting",
    "runs",
    "pipeline",
    "experiments",
    "serving",
    "studio",
    "titles",
    "api",
    "cli",
    "__main__",
]
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere in it: also inside functions, and for types only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively; write the name out"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    room = room_of(path)
    assert room in ORDER, f"give {room} a place in ORDER"
    rooms = {name.split(".")[1] for name in imports(path) if name.startswith("loracle.")}
    later = [other for other in rooms & set(ORDER) if ORDER.index(other) > ORDER.index(room)]
    assert not later, f"{path.relative_to(ROOT)} stands left of {', '.join(later)} and may not import it"


@pytest.mark.slow
def test_peft_has_one_door():
    importers = [str(path.relative_to(ROOT)) for path in FILES if any(n.split(".")[0] == "peft" for n in imports(path))]
    assert importers == ["models/lora.py"]


@pytest.mark.parametrize("module", ["loracle.cli", "loracle.hubs", "loracle.data.sources", "loracle.text.packing"])
def test_no_torch_before_it_is_needed(module):
    heavy = {"torch", "transformers", "peft", "accelerate"}
    script = f"import sys, {module}; print(*sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
