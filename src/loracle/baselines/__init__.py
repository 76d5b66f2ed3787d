"""Simpler methods that a model has to beat, on the same split. To add one, write a file beside these and register it here.

The test examples are only scored. Layers and calibrations are chosen on validation examples.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from loracle.baselines.base import Baseline, BaselineInputs, BaselineType, NotApplicableError
from loracle.baselines.length import fit_length
from loracle.baselines.linear_probe import fit_linear_probe
from loracle.baselines.majority import fit_majority
from loracle.baselines.tfidf import fit_tfidf
from loracle.baselines.zero_shot import fit_zero_shot
from loracle.config import RunConfig
from loracle.errors import Log
from loracle.tasks.dataset import Data
from loracle.training import distributed
from loracle.training.prepare import PreparedModel

# In the order of the report.
BASELINES: dict[str, BaselineType] = {
    "majority": BaselineType(fit_majority, needs=frozenset({"label", "labels"})),
    "length": BaselineType(fit_length, needs=frozenset({"pairs"})),
    "tfidf": BaselineType(fit_tfidf),
    "linear-probe": BaselineType(fit_linear_probe),
    "zero-shot": BaselineType(fit_zero_shot),
}


@dataclass(frozen=True, slots=True)
class BaselineResults:
    """Baselines by name, and notes on what they were computed from."""

    by_name: dict[str, Baseline] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def fit_baselines(config: RunConfig, model: PreparedModel, data: Data, log: Log) -> BaselineResults:
    """Fit every baseline that the evidence allows, unless ``--no-baselines``. The main process does the work."""
    if not config.baselines:
        return BaselineResults()
    log("baselines …")
    inputs = BaselineInputs(data=data, model=model, seed=config.train.seed)
    results = distributed.on_main(lambda: _fit_all(inputs), along=model.scorer)
    for note in results.notes:
        log(f"note: {note}")
    return results


def _fit_all(inputs: BaselineInputs) -> BaselineResults:
    evidence = inputs.data.task.learning.evidence(inputs.data.train)
    by_name: dict[str, Baseline] = {}
    notes: list[str] = []
    for name, baseline in BASELINES.items():
        if baseline.needs and not baseline.needs & evidence:
            continue
        try:
            by_name[name] = baseline.fit(inputs)
            notes += by_name[name].notes
        except NotApplicableError as e:
            notes.append(str(e))
    return BaselineResults(by_name, tuple(notes))
