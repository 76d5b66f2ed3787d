"""Weights & Biases, MLflow and SwanLab, through Accelerate's trackers; nothing of them is imported unless asked for."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from loracle.errors import UserError

PROJECT = "loracle"
RUN_NAME = {"wandb": "name", "mlflow": "run_name", "swanlab": "experiment_name"}  # what each calls the name of a run


def tracked(service: str, *, cpu: bool) -> Accelerator:
    """An Accelerator that will log to ``service``; nothing is begun there yet.

    Raises:
        UserError: its package is not installed.
    """
    if service not in map(str, get_available_trackers()):
        raise UserError(f"{service} for --track {service}", "none installed", f"run: pip install {service}")
    return Accelerator(cpu=cpu, log_with=service)


def begin(accelerator: Accelerator, service: str, name: str, settings: dict[str, dict[str, Any]]) -> None:
    """Begin a run called ``name`` with its settings, ``section.dial`` each.

    Raises:
        UserError: the service refuses.
    """
    flat = {f"{section}.{name}": value for section, values in settings.items() for name, value in values.items()}
    try:
        accelerator.init_trackers(PROJECT, config=flat, init_kwargs={service: {RUN_NAME[service]: name}})
    except Exception as e:  # each has errors of its own, and none of them is loracle's
        found = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(f"{service} to begin a run", found, "log in there, or leave out --track") from e
