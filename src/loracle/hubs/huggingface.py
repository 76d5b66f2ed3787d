"""Hugging Face. Its client honours ``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HOME`` and ``HF_HUB_OFFLINE``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loracle.errors import UserError
from loracle.hubs.base import (
    ALLOWED,
    IGNORED,
    Hub,
    RepoType,
    UploadOptions,
    card_licence,
    disk_is_full,
    first_line,
    hosted_type,
    not_private,
    upload_error,
)


class HuggingFace(Hub):
    """Repositories ``hf:owner/name``. An upload is one commit, whole or absent."""

    known_to_peft = True
    client = "huggingface_hub"

    def fetch(self, repo: str, repo_type: RepoType, revision: str | None) -> Path:
        import huggingface_hub

        try:
            files = {"allow_patterns": ALLOWED[repo_type], "ignore_patterns": IGNORED[repo_type]}
            fetch: Any = huggingface_hub.snapshot_download  # mypy cannot choose an overload from **files
            return Path(fetch(repo, repo_type=hosted_type(repo_type), revision=revision, **files))
        except Exception as error:  # the client passes on errors of any transport; they are distinguished below
            raise _explain(error, repo, repo_type, revision) from error

    def upload(self, folder: Path, repo: str, options: UploadOptions) -> str:
        import huggingface_hub

        api, revision = huggingface_hub.HfApi(), options.revision
        try:
            url = api.create_repo(repo, private=options.private or None, exist_ok=True)
            if options.private and not api.repo_info(repo).private:
                raise not_private(f"hf:{repo}")
            if revision:
                api.create_branch(repo, branch=revision, exist_ok=True)
            files = [huggingface_hub.CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir())]
            api.create_commit(repo, files, commit_message="Push a run of loracle", revision=revision)
        except UserError:
            raise
        except Exception as error:  # as in fetch
            login = "Log in with `hf auth login`, or set HF_TOKEN to one that may write."
            raise upload_error(error, f"hf:{repo}", login) from error
        return str(url)

    def licence(self, repo: str, revision: str | None) -> str | None:
        from huggingface_hub import snapshot_download

        return card_licence(Path(snapshot_download(repo, revision=revision, local_files_only=True)))


def _explain(error: Exception, repo: str, repo_type: RepoType, revision: str | None) -> UserError:
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{'datasets/' if hosted_type(repo_type) == 'dataset' else ''}{repo}"
    if isinstance(error, errors.GatedRepoError):
        return UserError(f"hf:{repo} is a gated repository.", f"Accept its terms at {page} and set HF_TOKEN.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(
            f"There is no {repo_type} hf:{repo} at {constants.ENDPOINT}, or it is private.",
            "Check its spelling, or set HF_TOKEN.",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"hf:{repo} has no branch, tag or commit {revision}.", f"Look it up at {page}.")
    if disk_is_full(error):
        return UserError(f"The disk is full: no space for hf:{repo}.", "Free some, or set HF_HOME to another disk.")
    if constants.HF_HUB_OFFLINE:
        return UserError(
            f"HF_HUB_OFFLINE is set, and there is no complete copy of hf:{repo} in the cache.",
            "Fetch it once with HF_HUB_OFFLINE=0.",
        )
    reason = first_line(error.__cause__ or error)  # the cause is the transport's own message
    local = "file" if hosted_type(repo_type) == "dataset" else "folder"
    return UserError(
        f"{constants.ENDPOINT} did not answer about hf:{repo}: {reason}.",
        f"Check the network, set HF_ENDPOINT to a mirror, or name a local {local}.",
    )
