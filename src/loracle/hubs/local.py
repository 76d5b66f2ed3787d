"""Folders and GGUF files on this disk."""

from __future__ import annotations

from pathlib import Path

from loracle.errors import UserError
from loracle.hubs.base import Hub, RepoType, card_licence


class Local(Hub):
    """Absolute paths."""

    remote = False

    def fetch(self, repo: str, repo_type: RepoType, revision: str | None) -> Path:
        return Path(repo)

    def licence(self, repo: str, revision: str | None) -> str | None:
        return card_licence(Path(repo))


def local_path(spec: str) -> Path | None:
    """The absolute path that ``spec`` names, or None where it may be a hub id.

    Raises:
        UserError: a path where nothing is, or a file that is no GGUF file.
    """
    if "\0" in spec:
        raise UserError(f"{spec!r} is no path and no hub id.", "Write for example Qwen/Qwen2.5-0.5B-Instruct.")
    path = Path(spec).expanduser()
    if path.is_dir() or (path.suffix.lower() == ".gguf" and path.is_file()):
        return path.resolve()
    if path.exists():
        raise UserError(f"{spec} is a file, but no .gguf file.", "Name the folder that it is in.")
    if spec.startswith((".", "/", "~")) or spec.endswith(("/", ".gguf")) or "\\" in spec or spec.count("/") > 1:
        raise UserError(f"There is no folder and no .gguf file at {spec}.", "Check the path.")
    return None
