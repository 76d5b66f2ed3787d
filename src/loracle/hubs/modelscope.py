"""ModelScope. Its client honours ``MODELSCOPE_ENDPOINT`` and ``MODELSCOPE_CACHE``."""

from __future__ import annotations

from contextlib import suppress
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

INSTALL = "Install it with: pip install 'loracle[modelscope]'"


class ModelScope(Hub):
    """Repositories ``modelscope:owner/name``."""

    client = "modelscope"

    def fetch(self, repo: str, repo_type: RepoType, revision: str | None) -> Path:
        try:
            from modelscope.hub.snapshot_download import snapshot_download
        except ImportError as error:
            raise UserError(f"Fetching modelscope:{repo} needs the modelscope package.", INSTALL) from error
        options: dict[str, Any] = {"revision": revision, "repo_type": hosted_type(repo_type)}
        options |= {"allow_patterns": ALLOWED[repo_type], "ignore_patterns": IGNORED[repo_type] or None}
        try:
            return Path(snapshot_download(repo, **options))
        except Exception as error:  # the client passes on errors of any transport; they are distinguished below
            if isinstance(error, ConnectionError):
                with suppress(Exception):  # without a copy either, the first error is the one to explain
                    return Path(snapshot_download(repo, **options, local_files_only=True))
            raise _explain(error, repo, repo_type, revision) from error

    def upload(self, folder: Path, repo: str, options: UploadOptions) -> str:
        try:
            from modelscope.hub.api import HubApi
        except ImportError as error:
            raise UserError(f"Pushing to modelscope:{repo} needs the modelscope package.", INSTALL) from error
        api = HubApi()
        try:
            visibility = "private" if options.private else "public"
            licence = options.licence or "other"  # the client would write Apache-2.0 otherwise
            made = api.create_repo(repo, repo_type="model", exist_ok=True, visibility=visibility, license=licence)
            if options.private and made is None:  # it existed, and the client does not say who sees it
                raise not_private(f"modelscope:{repo}")
            message = {"commit_message": "Push a run of loracle"}
            api.upload_folder(repo, folder, revision=options.revision, use_cache=False, disable_tqdm=True, **message)
        except UserError:
            raise
        except Exception as error:  # as in fetch
            login = "Log in with `modelscope login`, or set MODELSCOPE_API_TOKEN to one that may write."
            raise upload_error(error, f"modelscope:{repo}", login) from error
        return f"{api.endpoint}/models/{repo}"

    def licence(self, repo: str, revision: str | None) -> str | None:
        from modelscope.hub.snapshot_download import snapshot_download

        return card_licence(Path(snapshot_download(repo, revision=revision, local_files_only=True)))


def _explain(error: Exception, repo: str, repo_type: RepoType, revision: str | None) -> UserError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403, 404) or "not exist" in str(error).lower():
        which = f" with revision {revision}" if revision else ""
        return UserError(
            f"There is no {repo_type} modelscope:{repo}{which}, or it is private.",
            "Check its spelling, or log in with: modelscope login",
        )
    if disk_is_full(error):
        hint = "Free some, or set MODELSCOPE_CACHE to another disk."
        return UserError(f"The disk is full: no space for modelscope:{repo}.", hint)
    reason = "no connection" if isinstance(error, ConnectionError) else first_line(error)
    return UserError(f"ModelScope did not answer about {repo}: {reason}.", "Check the network and MODELSCOPE_ENDPOINT.")
