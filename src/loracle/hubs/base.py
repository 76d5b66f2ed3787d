"""What every hub shares: its interface, the files that are fetched, the cache, and checks of fetched folders."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loracle.errors import UserError

RepoType = Literal["model", "dataset", "run"]

# All files of a run folder that are ever pushed or pulled: what predict needs, and where it comes from. No texts.
RUN_FILES = (
    "adapter_model.safetensors", "adapter_config.json", "model*.safetensors", "model.safetensors.index.json",
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template*",
    "openvino_model.xml", "openvino_model.bin", "run.toml", "metrics.json", "calibration.json", "reference.json",
    "README.md", "manifest.json",
)  # fmt: skip
ALLOWED = {
    "run": list(RUN_FILES),
    "model": ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*"],
    "dataset": [
        "*.csv", "*.tsv", "*.tab", "*.json", "*.jsonl", "*.ndjson", "*.parquet", "*.pq", "*.txt", "*.gz", "README.md",
    ],
}  # fmt: skip
# A model is at the top of its repository. Copies for other programs are beside or below it.
IGNORED = {"model": ["*/*", "consolidated*.safetensors"], "dataset": [], "run": ["*/*"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadOptions:
    """How a repository is written.

    ``private``: only its owner may see it. ``revision``: a branch. ``licence``: of what is uploaded.
    """

    private: bool = False
    revision: str | None = None
    licence: str | None = None


class Hub:
    """A place that models and data come from: one entry of ``HUBS``. A subclass defines at least ``fetch``."""

    remote = True  # whether its specs have a prefix, as in ``hf:owner/name``, and its repositories have revisions
    known_to_peft = False  # whether plain PEFT can fetch its repositories by their id
    client: str | None = None  # package whose ``snapshot_download`` fetches a repository, for code in model cards

    def fetch(self, repo: str, repo_type: RepoType, revision: str | None) -> Path:
        """Fetch a repository; returns its local folder or GGUF file. Raises ``UserError`` where there is none."""
        raise NotImplementedError

    def upload(self, folder: Path, repo: str, options: UploadOptions) -> str:
        """Put the files of a folder into a repository; returns its page."""
        raise UserError(f"Runs cannot be pushed to {repo!r}.", "Write for example hf:me/topics.")

    def licence(self, repo: str, revision: str | None) -> str | None:
        """The licence of a model, from the copy on this disk. Raises any error where there is no copy."""
        return None


def cache_dir() -> Path:
    """The folder for files that can be fetched or computed again: ``$LORACLE_CACHE``, else the user's cache folder."""
    if named := os.environ.get("LORACLE_CACHE"):
        return Path(named).expanduser().absolute()
    import platformdirs

    return platformdirs.user_cache_path("loracle")


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """Yield a path beside ``target`` to build a file or folder at. It becomes ``target`` in one step, or not at all.

    Processes that build the same target take turns, so check inside whether it exists already.
    """
    import filelock

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(target.with_name(f".{target.name}.lock")), _scratch_folder(target) as scratch:
            yield scratch / target.name
            if (scratch / target.name).exists():
                if target.is_dir():
                    target.rename(scratch / "replaced")  # os.replace cannot put one folder over another
                os.replace(scratch / target.name, target)
    except OSError as error:
        hint = "Set LORACLE_CACHE to another folder."
        if error.errno == errno.ENOSPC:
            raise UserError(f"The disk is full: no space for {target}.", f"Free some space. {hint}") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"Permission denied: cannot write {target} ({error}).", hint) from error
        raise


@contextmanager
def _scratch_folder(target: Path) -> Iterator[Path]:
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def checksum(path: Path) -> str:
    """The SHA-256 of a file, in hex. An unchanged file is read once a process."""
    stat = path.stat()
    return _checksum(path, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _checksum(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def card_licence(folder: Path) -> str | None:
    """The licence that the model card in a folder names."""
    from huggingface_hub import metadata_load

    card = metadata_load(folder / "README.md") or {}
    return str(card["license"]) if card.get("license") else None


def repo_id(repo: str, spec: str) -> str:
    """The id of a repository, checked.

    Raises:
        UserError: no hub has such ids.
    """
    if not re.fullmatch(r"(?:\w[\w.-]*/)?\w[\w.-]*", repo, re.ASCII) or ".." in repo:
        raise UserError(
            f"{spec!r} is no hub id and no existing folder.",
            "Check its spelling. A hub id is like Qwen/Qwen2.5-0.5B-Instruct.",
        )
    return repo


def hosted_type(repo_type: RepoType) -> str:
    """The type of a repository on the hubs. A run is stored as a model."""
    return "dataset" if repo_type == "dataset" else "model"


def check_model_folder(folder: Path, name: str) -> None:
    """Check that a folder is a model that can be read without unpickling, which can run any code.

    Raises:
        UserError: no readable config.json, no safetensors weights, or a part of them missing.
    """
    if not isinstance(read_json(folder / "config.json", f"the model {name}"), dict):
        raise UserError(f"config.json of {name} holds no settings.", "Fetch the model again.")
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        why = "Pickled .bin weights are not fetched, as opening them can run any code."
        if pickled:
            why = f"It has only {pickled[0]}, a pickle, and opening one can run any code."
        raise UserError(f"{name} has no weights in *.safetensors. {why}", "Use a safetensors version of the model.")
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        _check_parts(folder, read_json(index, f"the model {name}"), name)


def _check_parts(folder: Path, index: Any, name: str) -> None:
    try:
        parts = set(index["weight_map"].values())
        missing = sorted(part for part in parts if not (folder / part).is_file())
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"model.safetensors.index.json of {name} has no weight_map.", "Fetch the model again."
        ) from error
    if missing:
        raise UserError(f"{missing[0]} is missing, one of {len(parts)} parts of {name}.", "Fetch the model again.")


def read_json(path: Path, owner: str) -> Any:
    """The content of a JSON file of ``owner``.

    Raises:
        UserError: it is missing, or it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no {path.name} in {owner}.", "Check that this is the folder of a model.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path.name} of {owner} is no valid JSON: {error}.", "Fetch it again.") from error


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, means that the disk is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return True
        error = error.__cause__ or error.__context__
    return False


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def upload_error(error: Exception, spec: str, login: str) -> UserError:
    """Explain a failed upload. ``login`` is the hint where permission is missing."""
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status_code", None)
    if status in (401, 403, 404):
        return UserError(f"Permission denied: cannot write to {spec} (HTTP {status}).", login)
    reason = first_line(error.__cause__ or error)
    return UserError(f"{spec} did not take the files: {reason}.", "Check the network and push again.")


def not_private(spec: str) -> UserError:
    """The error for ``--private`` and a repository that exists and others may see."""
    return UserError(
        f"{spec} exists already and may be public, but --private was given.",
        "Make it private on the hub's page and push without --private, or push to a new name.",
    )
