"""The training log: ``log.jsonl``, TensorBoard, and Weights & Biases, MLflow or SwanLab through Accelerate's trackers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from loracle.errors import UserError
from loracle.training.progress import ProgressDisplay

PROJECT = "loracle"
RUN_NAME = {"wandb": "name", "mlflow": "run_name", "swanlab": "experiment_name"}  # the argument that names a run


def check_installed(service: str | None) -> None:
    """Check that the package of the service is installed, where there is a service.

    Raises:
        UserError: it is not.
    """
    if service and service not in map(str, get_available_trackers()):
        raise UserError(f"--track {service} needs the package {service}.", f"Run: pip install {service}")


def start_tracking(service: str, name: str, settings: dict[str, dict[str, Any]], *, cpu: bool) -> Accelerator:
    """Start a run called ``name`` at the service and return the Accelerator that logs to it.

    Settings come by section and are named ``section.setting`` there.

    Raises:
        UserError: the package is not installed, or the service reports an error.
    """
    check_installed(service)
    accelerator = Accelerator(cpu=cpu, log_with=service)
    flat = {f"{section}.{key}": value for section, values in settings.items() for key, value in values.items()}
    try:
        accelerator.init_trackers(PROJECT, config=flat, init_kwargs={service: {RUN_NAME[service]: name}})
    except Exception as e:  # each service has exceptions of its own
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(
            f"{service} could not start a run: {reason.rstrip('.')}.", "Log in there, or leave out --track."
        ) from e
    return accelerator


class TrainingLog:
    """Records of a training: progress for people; ``log.jsonl``, TensorBoard and trackers for tools.

    Only the main process writes.

    Args:
        folder: the run folder.
        total: steps of the whole training.
        step: steps taken before, by a run that continues; later records in ``log.jsonl`` are dropped.
        metric: name of the validation metric.
        quiet: show no progress.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, *, total: int, step: int, metric: str, quiet: bool):
        self.path, self.accelerator, self.metric = folder / "log.jsonl", accelerator, metric
        self.display = ProgressDisplay(total, step, quiet=quiet or not accelerator.is_main_process)
        if accelerator.is_main_process:
            from torch.utils.tensorboard import SummaryWriter

            _drop_records_after(self.path, step)
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, *_) -> None:
        self.display.__exit__()
        if self.accelerator.is_main_process:
            self.board.close()
        for tracker in getattr(self.accelerator, "trackers", ()):
            tracker.finish()

    def step(self, step: int, record: dict[str, float]) -> None:
        """Log a step's loss, learning rate and speed."""
        self.display.update(
            details=f"loss {record['loss']:.3f}, {record['examples_per_s']:.1f} examples/s, "
            f"{record['tokens_per_s']:,.0f} tokens/s"
        )
        self._write({"step": step, **record})

    def validation(self, step: int, values: dict[str, float], *, best: bool) -> None:
        """Log the validation metric and loss after a step."""
        shown = f"validation {self.metric} {values['metric']:.3f}, loss {values['loss']:.3f}"
        self.display.line(f"step {step}: {shown}{' (best so far)' if best else ''}")
        self._write({"step": step, **{f"validation_{name}": value for name, value in values.items()}})

    def note(self, line: str) -> None:
        """Show a note; it is not logged."""
        self.display.line(f"note: {line}")

    def _write(self, record: dict[str, Any]) -> None:
        if not self.accelerator.is_main_process:
            return
        with self.path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")
        values = {name: value for name, value in record.items() if name != "step"}
        for name, value in values.items():
            self.board.add_scalar(name, value, record["step"])
        if getattr(self.accelerator, "trackers", ()):  # only with --track, and only once they are started
            self.accelerator.log(values, step=record["step"])


def _drop_records_after(path: Path, step: int) -> None:
    """Drop log lines of steps that a resumed run takes again."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:  # a line that a crash cut short
            continue
    path.write_text("".join(kept), encoding="utf-8")
