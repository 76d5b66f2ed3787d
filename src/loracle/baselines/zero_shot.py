"""The base model itself, asked without training."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from loracle.baselines.base import Baseline, BaselineInputs, NotApplicableError
from loracle.errors import UserError
from loracle.models.architectures import positions
from loracle.models.likelihood import NoLikelihoodError, log_likelihood, name_scores, names_template
from loracle.models.loading import load_tokenizer
from loracle.tasks.base import by_example
from loracle.text.template import install_template
from loracle.text.tokenize import Encoder
from loracle.training.scoring import encode_texts

NAME_TOKENS = 32  # room for a label name
QUESTIONS_ASKED = 20_000  # pairs of text and label name, at most


def fit_zero_shot(inputs: BaselineInputs) -> Baseline:
    """Ask the base model the question that fits the task."""
    scorer = inputs.model.scorer
    if scorer.encoder or not scorer.packed:
        raise NotApplicableError(f"no zero-shot: {scorer.inner.config.model_type} does not predict the next token")
    try:
        return Baseline(QUESTIONS[inputs.data.task.learning.zero_shot](inputs))
    except NoLikelihoodError as e:
        raise NotApplicableError(f"no zero-shot: {e}") from None


def ask_likelihood(inputs: BaselineInputs) -> list[np.ndarray]:
    """The mean log-likelihood of each text."""
    data, model = inputs.data, inputs.model
    texts = encode_texts(model.encoder, data.test)
    values = log_likelihood(model.scorer, texts, model.base.source.folder, after=model.encoder.after)
    return [s[:, None] for s in by_example(values, data.test)]


def ask_label_names(inputs: BaselineInputs) -> list[np.ndarray]:
    """How likely each label name is behind a text."""
    data, model = inputs.data, inputs.model
    names, folder = data.task.learning.label_words(data.task), model.base.source.folder
    if not names:
        raise NotApplicableError("no zero-shot: the labels are numbers, not names")
    if len(names) * len(data.test) > QUESTIONS_ASKED:
        raise NotApplicableError(f"no zero-shot: {len(data.test):,} texts times {len(names)} labels take too long")
    texts = ["\n".join(filter(None, (e.context, e.text))) for e in data.test]
    tokenizer, template = load_tokenizer(folder), names_template(names)
    question = len(tokenizer(template).input_ids)
    tokens = min(positions(model.scorer.inner.config), model.base.max_tokens + question + NAME_TOKENS)
    try:
        encoder = Encoder(install_template(tokenizer, template, tokens))
    except UserError:
        raise NotApplicableError(f"no zero-shot: a question with {len(names)} label names leaves no room") from None
    return list(name_scores(model.scorer, texts, names, folder, encoder)[:, None])


QUESTIONS: dict[str, Callable[[BaselineInputs], list[np.ndarray]]] = {
    "likelihood": ask_likelihood,
    "label names": ask_label_names,
}
