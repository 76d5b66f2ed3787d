"""The training step of a run: the loop, with tracking and validation around it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from loracle.config import RunConfig
from loracle.models.devices import pick_device
from loracle.tasks.dataset import Data
from loracle.training import tracking
from loracle.training.loop import Fit, FitJob, fit
from loracle.training.prepare import PreparedModel
from loracle.training.scoring import encode_examples, validate


def fit_model(
    config: RunConfig,
    model: PreparedModel,
    data: Data,
    folder: Path,
    *,
    quiet: bool = False,
    after_validation: Callable[[dict[str, float]], None] = lambda result: None,
) -> Fit:
    """Train the scorer in place. It ends with the weights of its best validation.

    ``after_validation`` gets each validation result; what it raises ends the training.

    Raises:
        UserError: a loss that is no number, or too little memory. Interrupted: Ctrl-C.
    """
    accelerator = None
    if service := config.train.track:
        settings = {name: dataclasses.asdict(getattr(config, name)) for name in RunConfig.SECTIONS}
        on_cpu = pick_device(config.model.device).type == "cpu"
        accelerator = tracking.start_tracking(service, folder.name, settings, cpu=on_cpu)

    def validation() -> dict[str, float]:
        result = validate(model.scorer, model.encoder, data.validation, data.task, model.loss)
        after_validation(result)
        return result

    return fit(
        FitJob(
            scorer=model.scorer,
            examples=data.train,
            encode=lambda examples: encode_examples(model.encoder, examples),
            loss=model.loss,
            validate=validation,
            settings=config.train,
            lr=model.lr,
            folder=folder,
            accelerator=accelerator,
            metric=data.task.evaluation.headline,
            quiet=quiet,
        )
    )
