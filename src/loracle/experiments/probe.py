"""How much of a base model does a data set need? A linear probe on every layer; nothing is trained."""

from __future__ import annotations

from loracle import pipeline
from loracle.config import RunConfig
from loracle.errors import Log
from loracle.tasks.dataset import prepare_data
from loracle.training.losses import choose_loss
from loracle.training.prepare import open_base, probe_base
from loracle.training.probe import Depth


def probe_data(config: RunConfig, *, log: Log = print) -> tuple[list[Depth], str]:
    """What a linear probe reaches on each layer, on validation examples, and the name of the metric.

    Raises:
        UserError: as ``train``.
    """
    config = pipeline.with_absolute_paths(config)
    data = prepare_data(config, log)
    loss, _ = choose_loss(data, config.train)
    return probe_base(config, data, loss, open_base(config, data, log)), data.task.evaluation.headline
