"""Export to a folder that plain transformers loads, and with it pipelines and vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loracle.errors import UserError
from loracle.evaluation.calibration import Calibration, temperature_of

if TYPE_CHECKING:
    from loracle.runs.export.samples import Samples
    from loracle.runs.folder import RunInfo
    from loracle.runs.predictor import Predictor

SAMPLES = 64  # texts on which the scores must be equal
TOLERANCE = 1e-4
# Large models round more. Scores may then differ by ROUNDINGS times the change from scoring a text alone instead of in a
# batch, but at most by MAX_DIFFERENCE.
ROUNDINGS, MAX_DIFFERENCE = 4, 1e-3


class TransformersExporter:
    """See ``Exporter``. The export gives the scores of the run in float32."""

    help = "a folder that transformers loads without loracle"

    def check(self, info: RunInfo) -> None:
        settings = info.config.model
        if (settings.head, settings.pooling) != ("linear", "last"):
            feature = "an MLP head" if settings.head != "linear" else "mean pooling"
            raise UserError(
                f"The run has {feature}; transformers' classes know only a linear head on the last token.",
                "Export --to openvino, or train with --head linear --pooling last.",
            )

    def write(self, model: Any, run: Path, out: Path) -> None:
        from loracle.models.quiet import quiet_transformers
        from loracle.runs import folder as run_folder

        _fold_calibration(model, run_folder.read_calibration(run, run_folder.read_info(run).task))
        with quiet_transformers():
            model.save_pretrained(out)

    def compare(self, run: Path, out: Path, base: str | None) -> str:
        """Compare scores with the run's, over-long texts included, as formats differ most in those."""
        from loracle.runs.export.samples import draw_samples
        from loracle.runs.predictor import Predictor

        predictor = Predictor(run, base=base, device="cpu", dtype="float32")
        predictor.encoder.long = "cut"  # as transformers does; see ``notes``
        samples = draw_samples(run, predictor, SAMPLES)
        words = " ".join(samples.texts)
        long_text = words * (1 + predictor.info.config.model.max_length // max(1, len(words.split())))
        samples.texts.append(long_text)
        samples.contexts.append(samples.contexts[0])
        temperature = temperature_of(predictor.calibration)
        expected = predictor.scores(samples.texts, samples.contexts) / temperature
        difference = _max_difference(expected, _scores_of(out, samples))
        if difference <= TOLERANCE:
            return "the same scores as the run, float32, through transformers alone"
        if not difference <= min(ROUNDINGS * _rounding(predictor, samples, expected), MAX_DIFFERENCE):
            raise RuntimeError(f"{out} does not score as {run}: {difference:.2g} apart. This is a bug in loracle.")
        return f"the run's scores to {difference:.1g}, by rounding, float32, through transformers alone"

    def notes(self, info: RunInfo) -> list[str]:
        long = ["texts over --max-length are cut, not scored in chunks"] if info.config.model.long == "chunk" else []
        return [*long, *info.task.output.lost_in_transformers()]


def _fold_calibration(model: Any, calibration: Any) -> None:
    """Divide the last layer of the head by the temperature, and write thresholds to the config.

    A softmax or sigmoid of the logits then gives calibrated probabilities.
    """
    from torch import nn

    from loracle.models.loading import head_names

    if not isinstance(calibration, Calibration):
        return
    if calibration.thresholds:
        model.config.thresholds = dict(zip(model.config.id2label.values(), calibration.thresholds, strict=True))
    modules = (m for name in head_names(model) for m in model.get_submodule(name).modules())
    *_, last = (m for m in modules if isinstance(m, nn.Linear) and m.out_features == model.config.num_labels)
    for weight in last.parameters():
        weight.data /= calibration.temperature


def _scores_of(out: Path, samples: Samples) -> np.ndarray:
    """Scores by transformers alone, ``float32 [N, C]``.

    Raises:
        UserError: transformers builds another tokenizer than ``tokenizer.json`` describes.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from loracle.models.loading import load_tokenizer
    from loracle.models.quiet import quiet_transformers

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(out)
        model = AutoModelForSequenceClassification.from_pretrained(out)
    texts, contexts, expected = samples.texts, samples.contexts, load_tokenizer(out)
    pairs = list(zip(texts, contexts, strict=True))
    if any(_token_ids(tokenizer, *pair) != _token_ids(expected, *pair) for pair in pairs):
        raise UserError(
            f"transformers reads the tokenizer as {type(tokenizer).__name__}, as it does for every "
            f"{model.config.model_type}, and not as tokenizer.json describes it. It splits texts into other tokens.",
            "Serve the run itself, or export --to openvino.",
        )
    scores = np.empty((len(texts), model.config.num_labels), np.float32)
    without, with_context = ([i for i, c in enumerate(contexts) if (c is None) == none] for none in (True, False))
    batches = [part[i : i + 8] for part in (without, with_context) for i in range(0, len(part), 8)]
    with torch.inference_mode():
        for batch in batches:
            first = [c for i in batch if (c := contexts[i]) is not None]
            inputs = tokenizer(*([first] if first else []), [texts[i] for i in batch], truncation=True, padding=True)
            scores[batch] = model.eval()(**inputs.convert_to_tensors("pt")).logits.float().numpy()
    return scores


def _rounding(predictor: Predictor, samples: Samples, expected: np.ndarray) -> float:
    """The largest change of the run's own scores when each text is scored alone."""
    alone = np.concatenate([predictor.scores([t], [c]) for t, c in zip(samples.texts, samples.contexts, strict=True)])
    return _max_difference(expected, alone / temperature_of(predictor.calibration))


def _max_difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of scores, relative where scores are above 1."""
    return float(np.max(np.abs(a - b) / np.maximum(1, np.abs(a))))


def _token_ids(tokenizer: Any, text: str, context: str | None) -> list[int]:
    return tokenizer(*([] if context is None else [context]), text, truncation=True).input_ids
