"""``loracle doctor``: versions, devices and settings of this machine, for bug reports. Works when torch is missing."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from pathlib import Path
from typing import Any

import click

import loracle
from loracle.cli import terminal
from loracle.cli.options import JSON, command

PACKAGES = ("transformers", "peft", "accelerate", "tokenizers", "huggingface-hub", "numpy", "polars", "scikit-learn")
VARIABLES = (
    "LORACLE_CACHE", "HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "WORLD_SIZE",
)  # fmt: skip


@command(can_be_quiet=False)
@JSON
def doctor(as_json: bool) -> None:
    """Print versions, devices and settings for a bug report."""
    terminal.silence_libraries()
    facts = collect_facts()
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        lines = [f"{k}: {v}" for k, v in value.items()] if isinstance(value, dict) else value
        for number, line in enumerate(lines if isinstance(lines, list) else [lines]):
            click.echo(f"{'' if number else name:<{width}}  {line}")


def collect_facts() -> dict[str, Any]:
    """Facts of this installation and machine as plain JSON. No name, host or token is among them."""
    return {
        "loracle": loracle.__version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "memory": _memory(),
        **_torch_facts(),
        "packages": {name: _version(name) or "not installed" for name in PACKAGES},
        "extras": _extras(),
        **_disk_facts(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ} or "none set",
    }


def _torch_facts() -> dict[str, Any]:
    """Build, devices, dtypes and threads; or the error of the import."""
    try:
        import torch

        from loracle.models.devices import pick_device, pick_dtype
    except Exception as error:  # a broken installation is what this command must report
        return {"torch": f"cannot be imported: {type(error).__name__}: {error}", "processors": str(os.cpu_count())}
    build = (
        f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {hip}" if (hip := torch.version.hip) else "CPU"
    )
    devices = ["cpu"]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        capability = f"compute capability {properties.major}.{properties.minor}"
        devices.append(f"cuda:{i}, {properties.name}, {properties.total_memory / 2**30:.0f} GiB, {capability}")
    if torch.backends.mps.is_available():
        devices.append("mps")
    device = pick_device("auto")
    dtype = {f"adapters on {place}": str(pick_dtype("auto", False, torch.device(place))).removeprefix("torch.")
             for place in dict.fromkeys(("cpu", device.type))}  # fmt: skip
    return {
        "torch": f"{torch.__version__}, {build} build",
        "devices": devices,
        "--device auto": str(device),
        "--dtype auto": dtype,
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
    }


def _memory() -> str:
    try:
        import psutil
    except ImportError:
        return "unknown (psutil is not installed)"
    memory = psutil.virtual_memory()
    return f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB free"


def _disk_facts() -> dict[str, str]:
    try:
        from loracle.hubs import cache_dir

        cache = cache_dir()
    except ImportError as error:
        return {"cache": f"unknown ({error})"}
    places = {"cache": cache, "models": _hugging_face_cache(), "here": Path.cwd()}
    home = str(Path.home())
    return {name: f"{str(path).replace(home, '~', 1)}, {_free(path)}" for name, path in places.items()}


def _hugging_face_cache() -> Path:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface").expanduser()
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()


def _free(path: Path) -> str:
    existing = next(place for place in (path, *path.parents) if place.exists())
    return f"{shutil.disk_usage(existing).free / 2**30:.0f} GiB free{'' if path.exists() else ', not created yet'}"


def _version(name: str) -> str | None:
    import importlib.metadata  # 30 ms, which every start would take

    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extras() -> dict[str, str] | str:
    """The optional packages of each extra, from loracle's own metadata."""
    import importlib.metadata

    try:
        requirements = importlib.metadata.requires("loracle") or []
    except importlib.metadata.PackageNotFoundError:
        return "unknown (loracle is not installed as a package)"
    extras: dict[str, list[str]] = {}
    for requirement in requirements:
        name, _, condition = requirement.partition(";")
        if (extra := re.search(r"extra == ['\"](\w+)['\"]", condition)) and extra[1] not in ("dev", "docs", "bench"):
            package = re.split(r"[<>=!~\[ ]", name.strip())[0]
            extras.setdefault(extra[1], []).append(f"{package} {_version(package) or 'not installed'}")
    return {extra: ", ".join(packages) for extra, packages in extras.items()}
