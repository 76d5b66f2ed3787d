"""Checkpoints: complete or absent, exact to resume, without pickle.

A checkpoint is a folder of safetensors files and one JSON file. It is written under a temporary name, flushed to disk and
renamed. So a kill at any moment leaves the previous one. Random state is not saved: the loop seeds every step.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loracle.errors import UserError
from loracle.hubs import checksum

STATE = "state.json"


@dataclass(slots=True, kw_only=True)
class Checkpoint:
    """The state to resume from: ``progress`` is plain JSON, ``best`` the weights of the best validation so far."""

    progress: dict[str, Any]
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    best: dict[str, Tensor]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write ``folder/step-N`` atomically and delete older checkpoints."""
    final = folder / f"step-{checkpoint.progress['step']:08d}"
    temporary = folder / f".writing-{final.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    files = {"weights": checkpoint.weights, "optimizer": checkpoint.optimizer, "best": checkpoint.best}
    for name, tensors in files.items():
        save_file(tensors, temporary / f"{name}.safetensors")
    sums = {f"{name}.safetensors": checksum(temporary / f"{name}.safetensors") for name in files}
    state = {"progress": checkpoint.progress, "progress_sha256": _digest(checkpoint.progress), "sha256": sums}
    (temporary / STATE).write_text(json.dumps(state, indent=1))
    for path in temporary.iterdir():
        _flush(path)
    _flush(temporary)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    _flush(folder)
    for old in [*folder.glob("step-*"), *folder.glob(".writing-*")]:
        if old != final:
            shutil.rmtree(old, ignore_errors=True)
    return final


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest intact checkpoint under ``folder``, or None where there is none yet; skips damaged ones.

    Raises:
        UserError: all checkpoints are damaged.
    """
    checkpoints = sorted(folder.glob("step-*"), reverse=True)
    for path in checkpoints:
        try:
            state = json.loads((path / STATE).read_text())
            if _digest(state["progress"]) != state["progress_sha256"]:
                continue
            if any(checksum(path / name) != digest for name, digest in state["sha256"].items()):
                continue
            tensors = {name: load_file(path / f"{name}.safetensors") for name in ("weights", "optimizer", "best")}
            return Checkpoint(progress=state["progress"], **tensors)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            continue
    if checkpoints:
        raise UserError(f"All checkpoints in {folder} are damaged ({checkpoints[0].name}).", "Start a new run.")
    return None


def _digest(progress: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(progress, sort_keys=True).encode()).hexdigest()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors named ``<parameter index>.<name>``."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": t.detach().cpu().contiguous() for i, s in state.items() for name, t in s.items()}


def set_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore what ``optimizer_tensors`` returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def trainable_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of all trainable weights by name, on the CPU."""
    return {n: p.detach().to("cpu", copy=True).contiguous() for n, p in model.named_parameters() if p.requires_grad}


def set_trainable_state(model: torch.nn.Module, state: dict[str, Tensor]) -> None:
    """Restore what ``trainable_state`` returned.

    Raises:
        ValueError: the weights belong to another model.
    """
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if trainable.keys() != state.keys():
        raise ValueError(f"weights of another model: {sorted(trainable.keys() ^ state.keys())[:3]}")
    with torch.no_grad():
        for name, p in trainable.items():
            p.copy_(state[name])


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
