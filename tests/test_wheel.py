"""The wheel outside a clone: it has every file of the package, starts, and finds its recipes by name."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "loracle"
RECIPES = sorted(path.stem for path in (PACKAGE / "recipes").glob("*.toml"))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", ROOT, "--no-build-isolation", "--no-deps", "--wheel-dir", folder)
    (path,) = folder.glob("loracle-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    pip("install", wheel, "--no-deps", "--target", folder)
    return folder


def pip(*args) -> None:
    command = [sys.executable, "-m", "pip", *map(str, args), "--no-index", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def outside(installed: Path, cwd: Path, *args) -> subprocess.CompletedProcess[str]:
    """Run python in an empty folder, with the installed package before that of the clone."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_wheel_contains_every_package_file(wheel):
    files = {p.relative_to(PACKAGE.parent).as_posix() for p in PACKAGE.rglob("*") if p.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == files
    assert {Path(name).suffix for name in packed} >= {".py", ".html", ".j2"}


def test_help_works_outside_a_clone(installed, tmp_path):
    where = outside(installed, tmp_path, "-c", "import loracle; print(loracle.__file__)")
    assert Path(where.stdout.strip()).is_relative_to(installed), where.stderr
    done = outside(installed, tmp_path, "-m", "loracle", "--help")
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


@pytest.mark.skipif(not RECIPES, reason="the recipes are not inside the package")
def test_recipes_are_found_by_name(installed, tmp_path):
    for name in RECIPES:  # the recipe is read first, so the error names the missing data only
        done = outside(installed, tmp_path, "-m", "loracle", "train", "missing.csv", "--recipe", name)
        assert done.returncode == 2, done.stderr
        assert "missing.csv" in done.stderr
        assert name not in done.stderr
    done = outside(installed, tmp_path, "-m", "loracle", "train", "missing.csv", "--recipe", "no-such-recipe")
    assert done.returncode == 2
    assert "no-such-recipe" in done.stderr
