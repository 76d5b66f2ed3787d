"""What the model has to beat, on the same split: the untuned model itself, asked or probed layer by layer, and simpler methods.

The test side is only scored; layers are chosen on validation examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loracle.baselines import budget
from loracle.baselines.budget import Plan, Work
from loracle.baselines.linear_probe import Depth, best_of, by_depth, ridge
from loracle.baselines.zero_shot import NoLikelihoodError, log_likelihood, name_pairs, name_scores, names_template
from loracle.config import RunConfig
from loracle.data.splits import Data
from loracle.errors import UserError
from loracle.evaluation import linear_models
from loracle.evaluation.calibration import Calibration, fit_calibration
from loracle.evaluation.classification import UNCALIBRATED, headline_metric, target_array
from loracle.examples import Example, Task, texts_of
from loracle.models import build
from loracle.models.loading import BaseModel, load_tokenizer, pick_device, pick_dtype, positions
from loracle.models.scorer import Scorer
from loracle.text.template import install_template
from loracle.text.tokenize import Encoder
from loracle.training.losses import Loss, numpy_objective
from loracle.training.scoring import by_example, encode_texts, measure

FROZEN_TEXTS = 2048  # training texts whose frozen features are computed for the baseline, at most
LAYERS = 12  # among which the frozen features choose
SAMPLED = 32  # test texts from which the cost of asking the untuned model for names is estimated
NAME_TOKENS = 32  # room for a label's name


def probe_depths(config: RunConfig, data: Data, loss: Loss, base: BaseModel, tokenizer: Any) -> list[Depth]:
    """Probe every layer: fitted on training texts, judged on validation texts, so the test side has no say."""
    seed, device = config.train.seed, pick_device(config.model.device)
    scorer = build.new_scorer(
        base.folder,
        data.task,
        pad_token_id=tokenizer.pad_token_id,
        dtype=pick_dtype(config.model.dtype, False, device),
        device=device,
        quantize=config.model.quantize,
    )
    encoder = Encoder(tokenizer, long=config.model.long, encoder=scorer.encoder)
    some, held = subsample(data.train, seed), subsample(data.validation, seed)
    seen, unseen = (build.layer_features(scorer, encode_texts(encoder, side)) for side in (some, held))
    return probe_layers(seen, some, unseen, held, data.task, loss, seed)


def probe_layers(
    seen: np.ndarray, some: list[Any], unseen: np.ndarray, held: list[Any], task: Task, loss: Loss, seed: int
) -> list[Depth]:
    """Probe each of the layers of ``seen [N, L, H]``, of some training texts, on ``unseen [M, L, H]``, of held-out ones."""
    if task.kind == "rank":
        objective = numpy_objective(loss)

        def fit_one(here: np.ndarray, there: np.ndarray) -> list[np.ndarray]:
            parts = by_example(here, some), some, by_example(there, held)
            return [scores[:, None] for scores in linear_models.frozen_ranker(*parts, objective, seed=seed)]

    else:
        targets = target_array(some, task)

        def fit_one(here: np.ndarray, there: np.ndarray) -> list[np.ndarray]:
            return list(ridge(here, targets, there, task)[:, None])

    return by_depth(seen, unseen, fit_one, lambda scores: measure(scores, held, task)[headline_metric(task)])


@dataclass(frozen=True, slots=True)
class Baseline:
    """Test scores of a baseline, ``[n, C]`` of each example, and what they mean, as validation texts say."""

    scores: list[np.ndarray]
    calibration: Calibration = UNCALIBRATED


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroShot:
    """How the untuned model is asked, and what it takes."""

    name: str  # of the baseline
    tokens: float
    ask: Callable[[], list[np.ndarray]]  # test scores


def ask_untuned(
    config: RunConfig, data: Data, scorer: Scorer, encoder: Encoder, base: BaseModel
) -> ZeroShot | str | None:
    """Of titles, how likely it finds each; of labels with names, which of them it would name. Where it cannot be asked, why;
    None where there is nothing to ask for.
    """
    names = label_words(data.task)
    if data.task.kind != "rank" and not names:
        return None
    if scorer.encoder or not scorer.packed:
        return f"{scorer.inner.config.model_type} has no likelihood of a next token"
    if data.task.kind == "rank":

        def ask() -> list[np.ndarray]:
            told = log_likelihood(scorer, encode_texts(encoder, data.test), base.folder, after=encoder.after)
            return [s[:, None] for s in by_example(told, data.test)]

        name, tokens = "untuned", float(sum(e.tokens for e in encode_texts(encoder, data.test)))
    else:
        name, texts = "zero-shot", ["\n".join(filter(None, (e.context, e.text))) for e in data.test]
        tokenizer, template, room = load_tokenizer(base.folder), names_template(names), positions(scorer.inner.config)
        longest = min(room, config.model.max_length + len(tokenizer(template).input_ids) + NAME_TOKENS)
        try:
            plain = Encoder(install_template(tokenizer, template, longest))
        except UserError:
            return f"its question would name {len(names)} labels, which leaves no room for a text"

        def ask() -> list[np.ndarray]:
            return list(name_scores(scorer, texts, names, base.folder, plain)[:, None])

        sample = name_pairs(plain, texts[:: -(-len(texts) // SAMPLED)], names)
        tokens = scorer.pack(sample).tokens * len(texts) * len(names) / len(sample)
    return ZeroShot(name=name, tokens=tokens, ask=ask)


def plan_baselines(data: Data, scorer: Scorer, work: Work, untuned: ZeroShot | str | None) -> Plan:
    """What the baselines learn from within their share of the training."""
    train, validation, test = (sum(len(texts_of(e)) for e in side) for side in (data.train, data.validation, data.test))
    return budget.plan(
        work,
        train=train,
        validation=validation,
        test=test,
        characters=sum(len(t) for e in data.train for t in texts_of(e)),
        labels=len(data.task.label_names) or 1,
        most=FROZEN_TEXTS,
        layers=scorer.packed and not scorer.encoder,
        asked=untuned.tokens if isinstance(untuned, ZeroShot) else None,
    )


def score_baselines(
    data: Data,
    scorer: Scorer,
    encoder: Encoder,
    loss: Loss,
    planned: Plan,
    untuned: ZeroShot | str | None,
    *,
    seed: int,
) -> tuple[dict[str, Baseline], list[str]]:
    """Simpler methods that learnt from the same split, by the same loss when ranking; and what to say of it."""
    task, notes = data.task, list(planned.said)
    if task.kind == "rank":
        lengths = linear_models.length_ranker(data.train, data.test, numpy_objective(loss), seed=seed)
        found = {"length": Baseline([s[:, None] for s in lengths])}
    else:
        shares = linear_models.majority(target_array(data.train, task), len(data.test), task)
        found = {"majority": Baseline(list(shares[:, None]))}
    found["tf-idf"] = tfidf(data, loss, seed)
    if planned.frozen:
        some = subsample(data.train, seed, planned.frozen)
        held = subsample(data.validation, seed, planned.watched) if planned.watched else []
        layer, seen, watched = best_layer(data, some, held, scorer, encoder, loss, seed)
        unseen = mean_features(scorer, encoder, data.test, layer)
        found["frozen"] = frozen(data, some, seen, held, watched, unseen, loss, seed)
        if layer is not None:
            notes.insert(0, f"frozen features are those after layer {layer + 1}, chosen on validation {task.unit}")
    if isinstance(untuned, str):
        notes.append(f"the untuned model is not asked: {untuned}")
    elif untuned and planned.asked:
        try:
            found[untuned.name] = Baseline(untuned.ask())
        except NoLikelihoodError as e:
            notes.append(f"the untuned model is not asked: {e}")
    return found, notes


def tfidf(data: Data, loss: Loss, seed: int) -> Baseline:
    """A linear model on words, by the same loss when ranking."""
    task = data.task
    if task.kind == "rank":
        ranked = linear_models.tfidf_ranker(data.train, data.test, numpy_objective(loss), seed=seed)
        return Baseline([s[:, None] for s in ranked])
    seen, unseen = map(linear_models.words_of, (data.train, [*data.validation, *data.test]))
    logits = linear_models.tfidf_classifier(seen, target_array(data.train, task), unseen, task)
    return _calibrated(logits, data.validation, task)


def _calibrated(logits: np.ndarray, held: Sequence[Any], task: Task) -> Baseline:
    """Of logits ``[H + N, C]`` those of the N test texts, at the calibration that the H held-out ones call for."""
    calibration = fit_calibration(logits[: len(held)], target_array(held, task), task) if held else UNCALIBRATED
    return Baseline(list(logits[len(held) :, None]), calibration)


def best_layer(
    data: Data, some: list[Any], held: list[Any], scorer: Scorer, encoder: Encoder, loss: Loss, seed: int
) -> tuple[int | None, list[np.ndarray], list[np.ndarray]]:
    """The layer after which a probe that learnt from ``some`` training examples does best on ``held`` validation examples, and
    the states of both there. None, the last one: of encoders, and where too few are held out to tell layers apart.

    Of deep models ``LAYERS`` are looked at, evenly spaced, the last one among them.
    """
    if scorer.encoder or not scorer.packed or not held:
        return None, mean_features(scorer, encoder, some), mean_features(scorer, encoder, held) if held else []
    count = scorer.inner.config.num_hidden_layers
    layers = np.unique(np.linspace(count - 1, 0, min(count, LAYERS)).astype(int)).tolist()
    seen, unseen = (build.layer_features(scorer, encode_texts(encoder, side), layers) for side in (some, held))
    try:
        at = best_of(probe_layers(seen, some, unseen, held, data.task, loss, seed)).layers - 1
    except UserError:
        at, chosen = -1, None
    else:
        chosen = layers[at]
    return chosen, by_example(seen[:, at], some), by_example(unseen[:, at], held)


def layer_of(data: Data, scorer: Scorer, encoder: Encoder, loss: Loss, seed: int) -> int | None:
    """``best_layer`` by as many examples as a run looks at."""
    held = subsample(data.validation, seed, budget.WATCHED)
    return best_layer(data, subsample(data.train, seed), held, scorer, encoder, loss, seed)[0]


def mean_features(
    scorer: Scorer, encoder: Encoder, examples: Sequence[Example], layer: int | None = None
) -> list[np.ndarray]:
    """Mean hidden states of each example's texts after a layer, counted from 0, by default the last: ``float32 [n, H]``."""
    texts = encode_texts(encoder, examples)
    found = build.features(scorer, texts) if layer is None else build.layer_features(scorer, texts, [layer])[:, 0]
    return by_example(found, examples)


def frozen(
    data: Data,
    some: Sequence[Any],
    seen: list[np.ndarray],
    held: Sequence[Any],
    watched: list[np.ndarray],
    unseen: list[np.ndarray],
    loss: Loss,
    seed: int,
) -> Baseline:
    """A linear model on features: ``seen`` of some training examples, ``watched`` of held-out ones, ``unseen`` of the test
    side.
    """
    task = data.task
    if task.kind == "rank":
        ranked = linear_models.frozen_ranker(seen, some, unseen, numpy_objective(loss), seed=seed)
        return Baseline([s[:, None] for s in ranked])
    features, targets = np.concatenate([*watched, *unseen]), target_array(some, task)
    logits = linear_models.frozen_classifier(np.concatenate(seen), targets, features, task, seed=seed)
    return _calibrated(logits, held, task)


def label_words(task: Task) -> list[str]:
    """The labels' names in words; none where they are numbers, or there are no labels."""
    names = task.label_names
    if all(name.strip().lstrip("-").replace(".", "", 1).isdecimal() for name in names):
        return []
    return [name.replace("_", " ").replace("-", " ") for name in names]


def subsample(examples: list[Any], seed: int, most: int | None = None) -> list[Any]:
    """A seeded part of the examples that holds about ``most`` texts, by default ``FROZEN_TEXTS``."""
    order = np.random.default_rng(seed).permutation(len(examples))
    sizes = np.cumsum([len(texts_of(examples[i])) for i in order])
    return [examples[i] for i in order[: max(1, int(np.searchsorted(sizes, most or FROZEN_TEXTS, "right")))]]
