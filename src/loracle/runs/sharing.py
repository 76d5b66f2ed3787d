"""Push a run to a hub and pull one. The pushed copy holds no text of the data and no path of this machine."""

from __future__ import annotations

import dataclasses
import glob
import json
import shutil
import tempfile
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from loracle import hubs
from loracle.errors import UserError
from loracle.runs import folder as run_folder
from loracle.runs.model_card import model_card

Log = Callable[[str], None]


def push(run: Path, to: str, *, private: bool = False, revision: str | None = None, log: Log = print) -> str:
    """Upload the files that prediction needs, with a model card, and return the address of the page.

    Report and predictions hold texts; they, logs, scores and checkpoints are left out and named.

    Raises:
        UserError: there is no run, it is unfinished or damaged, or the hub rejects it.
    """
    info = run_folder.read_info(run)
    run_folder.verify(run)
    place = str(hubs.parse(to))
    with tempfile.TemporaryDirectory(prefix="loracle-push-") as scratch:
        staged = Path(scratch) / run.resolve().name
        left = stage(run, staged, info, place)
        if _is_local(info.base["source"]):
            log("note: the base model is a folder on this machine; to use the run elsewhere, copy it and pass --base")
        log(f"pushed: {', '.join(sorted(p.name for p in staged.iterdir()))}")
        log(f"left out (texts, paths, or not needed to predict): {', '.join(left) or 'nothing'}")
        licence = _licence(info)
        return hubs.upload(staged, place, hubs.UploadOptions(private=private, revision=revision, licence=licence))


def stage(run: Path, to: Path, info: run_folder.RunInfo, place: str) -> list[str]:
    """Copy the files to push, with paths shortened to names and a card and manifest of its own. Return the names left out."""
    to.mkdir()
    names = [p.name + "/" * p.is_dir() for p in sorted(run.iterdir()) if not p.name.startswith(".")]
    kept = [name for name in names if any(fnmatchcase(name, pattern) for pattern in hubs.RUN_FILES)]
    for name in kept:
        shutil.copyfile(run / name, to / name)
    shared = without_paths(info)
    run_folder.write_info(to, shared, out=to.name)
    source = shared.base["source"]
    if adapter := _json(to / "adapter_config.json"):
        remote = hubs.remote_source(source)
        adapter["base_model_name_or_path"] = source if remote is None else remote.id
        run_folder.write_text(to / "adapter_config.json", json.dumps(adapter, indent=2))
    if metrics := _json(to / run_folder.METRICS):
        metrics["base"] = shared.base.get("note") or source
        run_folder.write_text(to / run_folder.METRICS, json.dumps(metrics, indent=1))
        card = model_card(to.name, shared, metrics, place=place, licence=_licence(info))
        run_folder.write_text(to / run_folder.CARD, card)
    run_folder.write_manifest(to)
    return [name for name in names if name not in kept]


def without_paths(info: run_folder.RunInfo) -> run_folder.RunInfo:
    """The same with local paths shortened to names."""
    data, base = info.config.data, info.base
    data = dataclasses.replace(data, data=_name(data.data), test=_name(data.test) if data.test else None)
    model = info.config.model
    if _is_local(base["source"]):
        base = base | {"source": run_folder.LOCAL + Path(base["source"]).name}
    if _is_local(model.model):
        model = dataclasses.replace(model, model=run_folder.LOCAL + Path(model.model).name)
    config = dataclasses.replace(info.config, data=data, model=model, out=None)
    return dataclasses.replace(info, config=config, base=base)


def pull(spec: str, out: Path | None = None, *, log: Log = print) -> Path:
    """Fetch a pushed run, completely or not at all, and return its folder.

    The hub's client caches files. A cached run needs no network.

    Args:
        spec: ``hf:owner/name`` or ``modelscope:owner/name``, optionally with ``@revision``.
        out: target folder; by default ``runs/name``.

    Raises:
        UserError: nothing is there, it is not a run, or files differ from the pushed ones. ``out`` does not exist then.
    """
    place, _, revision = spec.partition("@")
    if hubs.remote_source(place) is None:
        raise UserError(f"Cannot pull {spec!r}: it is not {hubs.remote_forms()}.", "Example: hf:me/topics")
    out = run_folder.free(out or Path("runs") / place.rpartition("/")[2], "Pick another --out.")
    cached = hubs.download(place, repo_type="run", revision=revision or None)
    if not (cached / run_folder.MANIFEST).is_file() or not (cached / run_folder.RUN).is_file():
        raise UserError(
            f"{spec} is not a loracle run: it has no run.toml and manifest.json.", "Push one with loracle push."
        )
    scratch = out.with_name(f".{out.name}.pulling")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        for name in _names(cached / run_folder.MANIFEST, spec):
            if (cached / name).is_file():
                shutil.copyfile(cached / name, scratch / name)
        shutil.copyfile(cached / run_folder.MANIFEST, scratch / run_folder.MANIFEST)
        try:
            run_folder.verify(scratch)
        except UserError as error:
            message = error.message.replace(str(scratch), spec)
            raise UserError(message, "Pull again, or push it again from where it was trained.") from error
        info = run_folder.read_info(scratch)
        if out.exists():
            out.rmdir()  # it is empty: free() has checked
        scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if info.base["source"].startswith(run_folder.LOCAL):
        log(
            "note: the base model was a folder on another machine; pass its copy as --base (weights of SHA-256 "
            f"{info.base['sha256']})"
        )
    return out


def _names(manifest: Path, spec: str) -> list[str]:
    """The files that a manifest lists, if all are beside it and of the types that push uploads."""
    listed = hubs.read_json(manifest, spec)
    names = list(listed) if isinstance(listed, dict) else []
    if odd := [n for n in names if not any(fnmatchcase(n, p) for p in hubs.RUN_FILES) or Path(n).name != n]:
        raise UserError(
            f"manifest.json of {spec} lists {odd[0]!r}, which is not a file of a run.", "Do not use this run."
        )
    return names


def _licence(info: run_folder.RunInfo) -> str | None:
    return hubs.licence_of(info.base["source"], info.base.get("revision"))


def _is_local(spec: str) -> bool:
    return Path(spec).is_absolute() or glob.has_magic(spec)


def _name(spec: str) -> str:
    return Path(spec).name if _is_local(spec) else spec


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
