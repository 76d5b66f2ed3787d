"""A search for settings by Optuna, on the validation examples alone: the test side is never scored.

First the learning rate on a geometric grid, all else as given, since nothing matters more; then rate, rank, targets and epochs
together by TPE (Bergstra et al. 2011). A trial that lies below the median of the others at the same look is stopped.

The study is a journal of JSON lines in the output folder, so that nothing is pickled and the same command goes on.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from loracle import pipeline
from loracle.config import RunConfig, TuneConfig
from loracle.errors import Interrupted, Log, UserError
from loracle.experiments.runner import place, root_of
from loracle.formatting import plain_table
from loracle.models.architectures import architecture_of
from loracle.runs.recipes import write_recipe
from loracle.tasks.dataset import Data, prepare_data
from loracle.training.fit import fit_model
from loracle.training.losses import choose_loss
from loracle.training.preflight import estimate_cost
from loracle.training.prepare import cached_lower_layers, make_model, open_base, settle_depth

RECIPE = "recipe.toml"
AROUND = 10.0  # times lower and higher than the given rate
RANKS = (4, 8, 16, 32, 64)
LENGTHS = (0.5, 1.0, 2.0)  # times the given epochs
SWEEP = 1 / 3  # share of the trials that vary the learning rate alone
UNDISTURBED = 3  # trials before any may be stopped


def run(config: RunConfig, settings: TuneConfig, *, log: Log = print, quiet: bool = False) -> Path:
    """Search, and write the best settings as ``recipe.toml``; returns that file.

    Raises:
        UserError: Optuna is not installed, data or model that cannot be used, no trial that ended.
        Interrupted: Ctrl-C; the same call goes on.
    """
    optuna = _optuna()
    if config.train.track:
        raise UserError(
            f"tune does not support --track {config.train.track}.", "Track the run that is trained afterwards."
        )
    config = pipeline.with_absolute_paths(config)
    data, root = prepare_data(config, log), root_of(config, "tune")
    journal = place(root, "study", config, data).with_suffix(".jsonl")
    trial_of = Trials(config, data, root / "trial", log)
    root.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
    study = optuna.create_study(
        study_name="loracle",
        storage=storage,
        load_if_exists=True,
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=UNDISTURBED),
    )
    done = _ended(study, optuna)
    if "sweep" not in study.user_attrs:  # kept, since more trials later on are to search on and not to sweep again
        study.set_user_attr("sweep", trial_of.sweep(max(1, round(settings.trials * SWEEP))))
    sweep = study.user_attrs["sweep"]
    # Optuna does not keep its generator, so each part of a search draws from its own.
    study.sampler = optuna.samplers.TPESampler(seed=config.train.seed + len(done), n_startup_trials=len(sweep))
    for rate in sweep:
        if not any(np.isclose(rate, tried) for tried in _rates(study, optuna)):
            study.enqueue_trial({"lr": rate, **trial_of.given})
    try:
        study.optimize(trial_of, n_trials=max(0, settings.trials - len(done)))
    except Interrupted as e:
        raise Interrupted(f"{str(e).partition(';')[0]} of a trial; the same command goes on with it") from None
    finally:
        shutil.rmtree(root / "trial", ignore_errors=True)
    if not any(t.state == optuna.trial.TrialState.COMPLETE for t in study.trials):
        raise UserError("No trial trained to its end.", "The notes above say why. Try another --lr.")
    best, metric = study.best_trial, data.task.evaluation.headline
    found = dataclasses.replace(trial_of.settings(best.params), out=None)
    count, sample = len(_ended(study, optuna)), len(data.validation)
    about = f"best of {count} trials: validation {metric} {best.value:.4f}, {sample:,} examples"
    write_recipe(root / RECIPE, found, (f"Found by loracle tune, {about}.", "The test side was not scored."))
    log(f"\n{_table(study, optuna, metric)}\n{about}\n\nloracle train --recipe {root / RECIPE}")
    return root / RECIPE


class Trials:
    """What Optuna calls: a trial in, the best validation metric of its training out."""

    def __init__(self, config: RunConfig, data: Data, folder: Path, log: Log):
        self.data, self.folder, self.log = data, folder, log
        self.loss = choose_loss(data, config.train)
        self.base = open_base(config, data, log)
        self.depth = settle_depth(config, data, self.loss[0], self.base, log)  # once for all trials
        first = make_model(config, data, self.base, self.depth, self.loss)
        self.tokens, self.rate = first.tokens, first.lr
        log("cost of the given settings:")
        with cached_lower_layers(config, first, log):
            plan = estimate_cost(config, first, data, log)
        self.low, self.high = (float(f"{r:.3g}") for r in (self.rate / AROUND, self.rate * AROUND))
        model = dataclasses.replace(config.model, depth=self.depth)
        train = dataclasses.replace(config.train, tokens_per_micro_batch=plan.tokens_per_micro_batch)
        self.config = dataclasses.replace(config, model=model, train=train)

        # What is searched beside the rate, the given value first.
        self.space: dict[str, tuple[Any, ...]] = {"epochs": tuple(train.epochs * x for x in LENGTHS)}
        self.given: dict[str, Any] = {"epochs": train.epochs}
        if not config.lora.full:
            architecture = architecture_of(self.base.config)
            few = architecture.few_targets if architecture.packable else config.lora.targets
            self.space |= {
                "r": tuple(sorted({*RANKS, config.lora.r})),
                "targets": tuple(dict.fromkeys((config.lora.targets, "all-linear", few))),
            }
            self.given |= {"r": config.lora.r, "targets": config.lora.targets}

    def sweep(self, count: int) -> list[float]:
        """Learning rates, evenly apart by their logarithm, the given one in the middle: at most so many, an odd number."""
        if (count := count - 1 + count % 2) == 1:
            return [self.rate]
        return [float(f"{r:.3g}") for r in np.geomspace(self.low, self.high, count)]

    def settings(self, params: dict[str, Any]) -> RunConfig:
        """The given settings with a trial's in place; alpha keeps its ratio to the rank, or the rate would change too."""
        lora, train = self.config.lora, self.config.train
        if "r" in params:
            alpha = lora.alpha / lora.r * params["r"]
            lora = dataclasses.replace(lora, r=params["r"], targets=params["targets"], alpha=alpha)
        train = dataclasses.replace(train, lr=params["lr"], epochs=params["epochs"])
        return dataclasses.replace(self.config, lora=lora, train=train)

    def __call__(self, trial: Any) -> float:
        """Train with what the trial suggests; raises Optuna's TrialPruned where that is hopeless."""
        optuna = _optuna()
        params: dict[str, Any] = {"lr": trial.suggest_float("lr", self.low, self.high, log=True)}
        params |= {name: trial.suggest_categorical(name, choices) for name, choices in self.space.items()}
        config, data = self.settings(params), self.data
        model = make_model(config, data, self.base, self.depth, self.loss, self.tokens)
        validations = 0

        def report(result: dict[str, float]) -> None:
            nonlocal validations
            validations += 1
            if np.isfinite(result["metric"]):
                # By the share of the training that is done: a longer one is not compared with the end of a shorter one.
                done = round(validations * max(LENGTHS) * self.config.train.epochs / params["epochs"])
                trial.report(result["metric"], done)
                if trial.should_prune():
                    raise optuna.TrialPruned

        values = ", ".join(f"{name} {v:.3g}" if name == "lr" else f"{name} {v}" for name, v in params.items())
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        try:
            with cached_lower_layers(config, model, lambda line: None):
                fitted = fit_model(config, model, data, self.folder, quiet=True, after_validation=report)
        except UserError as e:  # a loss that is no number, or too little memory: the fault of this trial's settings
            self.log(f"trial {trial.number + 1}: {values}: stopped ({e.message})")
            raise optuna.TrialPruned from None
        except optuna.TrialPruned:
            self.log(f"trial {trial.number + 1}: {values}: stopped at validation {validations}, below the median")
            raise
        best = fitted.progress.best_metric
        self.log(f"trial {trial.number + 1}: {values}: {best:.4f}")
        return best


def _ended(study: Any, optuna: Any) -> list[Any]:
    """Trials that count: those that trained to their end, and those that were stopped for being poor."""
    states = optuna.trial.TrialState
    return study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED))


def _rates(study: Any, optuna: Any) -> list[float]:
    """Learning rates that were tried to an end, or that wait; not those of trials that were broken off."""
    states = optuna.trial.TrialState
    waiting = study.get_trials(deepcopy=False, states=(states.WAITING,))
    fixed = [t.system_attrs["fixed_params"]["lr"] for t in waiting]  # where enqueue_trial puts them
    return fixed + [t.params["lr"] for t in _ended(study, optuna)]


def _table(study: Any, optuna: Any, metric: str) -> str:
    ended = sorted(_ended(study, optuna), key=lambda t: (t.state.name != "COMPLETE", -(t.value or 0.0)))
    names = list(ended[0].params)
    rows = [["trial", *names, f"validation {metric}"]]
    for t in ended:
        cells = [f"{t.params[n]:.3g}" if isinstance(t.params[n], float) else str(t.params[n]) for n in names]
        rows.append([str(t.number + 1), *cells, f"{t.value:.4f}" if t.state.name == "COMPLETE" else "stopped"])
    return plain_table(rows)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError("loracle tune needs optuna.", "Run: pip install 'loracle[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # what stops a trial is raised or said here, in one line
    return optuna
