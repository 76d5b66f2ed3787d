"""A run as a folder that others load: plain transformers (and so pipelines and vLLM), or OpenVINO in 8-bit integers.

No export leaves this module untried: it is opened as its users open it, scores texts of the run's own test side, and is removed
again where it does not give what the run gives.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loracle.errors import UserError
from loracle.evaluation.calibration import Calibration, temperature_of
from loracle.models import openvino
from loracle.models.build import ScorerSpec, load_merged
from loracle.models.loading import head_names, load_tokenizer
from loracle.runs import folder as run_folder
from loracle.runs.predictor import Predictor, find_base
from loracle.text.template import needs_context

TRIED = 64  # texts that a float32 export must score as the run does
COMPARED = 1000  # texts that an int8 export is compared on
TOLERANCE = 1e-4
ROUNDINGS, AT_MOST = (
    4,
    1e-3,
)  # times what a text's own scores move in float32 when it is scored alone, but no more than that
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "chat_template*")
Log = Callable[[str], None]


def export(run: Path, out: Path, to: str, *, base: str | None = None, log: Log = print) -> Path:
    """Write the run as ``to`` into ``out``, try it, and say what the format cannot carry.

    Raises:
        UserError: the folder is in use, or the format cannot hold this run; nothing is left then.
    """
    info = run_folder.read_info(run)
    run_folder.verify(run)
    if (run / openvino.MODEL).exists():
        raise UserError("a run that was trained", f"{run}, which is an export", "give the run that it was made from")
    run_folder.free(out, "pick another one")
    kept = info.config.model
    if to == "transformers" and (kept.head, kept.pooling) != ("linear", "last"):
        what = "an MLP head" if kept.head != "linear" else "mean pooling"
        raise UserError(
            "a linear head on the last token, which is all that transformers' classes know",
            what,
            "export --to openvino, or train with --head linear --pooling last",
        )
    spec = ScorerSpec(
        base=find_base(info, run, base).folder,
        task=info.task,
        pad_token_id=load_tokenizer(run).pad_token_id,
        head=kept.head,
        depth=kept.layers,
        quantize=kept.quantize,
    )
    model = load_merged(spec, run)
    out.mkdir(parents=True, exist_ok=True)
    try:
        for pattern in TOKENIZER:
            for path in run.glob(pattern):
                shutil.copy2(path, out)
        if to == "transformers":
            _fold(model, run_folder.read_calibration(run, info.task))
            model.save_pretrained(out)
            del model
            apart = _try_transformers(run, out, base)
            same = (
                "the same scores as the run" if apart <= TOLERANCE else f"the run's scores to {apart:.1g}, by rounding"
            )
            said = f"{same}, float32, through transformers alone"
        else:
            openvino.convert(model, out, pooling=kept.pooling)
            del model
            for name in (run_folder.RUN, run_folder.CALIBRATION, run_folder.REFERENCE):
                if (run / name).exists():
                    shutil.copy2(run / name, out)
            run_folder.write_manifest(out)
            said = _compare_int8(run, out, base)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    log(said)
    for line in _lost(info, to):
        log(f"note: {line}")
    return out


def _fold(model: Any, meaning: Any) -> None:
    """Put a classifier's calibration where transformers keeps it: the temperature into the head's last layer, so that a softmax
    or sigmoid of its logits gives calibrated probabilities; thresholds into the config, where whoever reads these finds them.
    """
    if not isinstance(meaning, Calibration):
        return
    if meaning.thresholds:
        model.config.thresholds = dict(zip(model.config.id2label.values(), meaning.thresholds, strict=True))
    *_, last = (m for name in head_names(model) for m in model.get_submodule(name).modules() if _gives_scores(m, model))
    for weight in last.parameters():
        weight.data /= meaning.temperature


def _gives_scores(module: Any, model: Any) -> bool:
    return isinstance(module, torch.nn.Linear) and module.out_features == model.config.num_labels


def _try_transformers(run: Path, out: Path, base: str | None) -> float:
    """Open the export as anybody would and compare; over-long texts too, since those are what formats differ in. How far
    scores are apart at most.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    info = run_folder.read_info(run)
    predictor = Predictor(run, base=base, device="cpu", dtype="float32")
    predictor.encoder.long = "cut"  # as the format does, which is said
    texts, contexts, _ = _asked(run, predictor, TRIED)
    words = " ".join(texts)
    texts.append(words * (1 + info.config.model.max_length // max(1, len(words.split()))))
    contexts.append(contexts[0])
    ours = predictor.scores(texts, contexts) / temperature_of(predictor.calibration)
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForSequenceClassification.from_pretrained(out)
    asked = list(zip(texts, contexts, strict=True))
    as_it_is = load_tokenizer(out)
    if any(_ids(tokenizer, *pair) != _ids(as_it_is, *pair) for pair in asked):
        raise UserError(
            "a base whose tokenizer transformers reads as tokenizer.json has it",
            f"{type(tokenizer).__name__}, which it takes for every {model.config.model_type}, cutting texts another way",
            "serve the run itself, or export --to openvino",
        )
    theirs = np.empty_like(ours)
    alone, behind = ([i for i, c in enumerate(contexts) if (c is None) == none] for none in (True, False))
    batches = [part[i : i + 8] for part in (alone, behind) for i in range(0, len(part), 8)]
    with torch.inference_mode():
        for batch in batches:
            first = [c for i in batch if (c := contexts[i]) is not None]
            given = tokenizer(*([first] if first else []), [texts[i] for i in batch], truncation=True, padding=True)
            theirs[batch] = model.eval()(**given.convert_to_tensors("pt")).logits.float().numpy()
    worst = _apart(ours, theirs)
    if not worst <= TOLERANCE:  # by which large models round
        each = np.concatenate([predictor.scores([text], [c]) for text, c in asked])
        rounding = _apart(ours, each / temperature_of(predictor.calibration))
        if not worst <= min(ROUNDINGS * rounding, AT_MOST):
            raise RuntimeError(f"{out} does not score as {run}: {worst:.2g} apart; this is a bug in loracle")
    return worst


def _apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference of scores, relative where they are above 1."""
    return float(np.max(np.abs(ours - theirs) / np.maximum(1, np.abs(ours))))


def _ids(tokenizer: Any, text: str, context: str | None) -> list[int]:
    return tokenizer(*([] if context is None else [context]), text, truncation=True).input_ids


def _compare_int8(run: Path, out: Path, base: str | None) -> str:
    """How often 8-bit scores say the same as the run's, and what that costs where labels are known."""
    exact, rounded = Predictor(run, base=base, device="cpu"), Predictor(out)
    texts, contexts, rows = _asked(run, exact, COMPARED)
    a, b = (p.scores(texts, contexts) for p in (exact, rounded))
    if not rows:
        moved = np.abs(a - b).mean() / max(float(np.abs(a).mean()), 1e-12)
        return f"int8 moves scores by {moved:.1%} on made-up texts, as the run keeps none: let evaluate say what that costs"
    return exact.task.output.agreement(a, b, rows, exact.task, exact.calibration)


def _asked(run: Path, predictor: Predictor, most: int) -> tuple[list[str], list[str | None], list[dict[str, str]]]:
    """Texts to try an export on, what stands before each, and the rows of the test side that they are; none if made up."""
    rows, needed = _test_rows(run, most), needs_context(predictor.info.config.model.template)
    if needed and rows and "context" not in rows[0]:  # of a run of an earlier version, which did not keep them
        rows = []
    texts = [row["text"] for row in rows] or _made_up(predictor, TRIED)
    if needed and not rows:
        return texts, [*texts[1:], texts[0]], rows
    known = [row.get("context", "") for row in rows] or [""] * len(texts)
    return texts, [context if context or needed else None for context in known], rows


def _test_rows(run: Path, most: int) -> list[dict[str, str]]:
    """Rows of the run's test side; none of a run that keeps no texts (``--no-texts``), or that was pulled from a hub."""
    if not run_folder.read_info(run).config.train.texts or not (run / run_folder.PREDICTIONS).exists():
        return []
    with (run / run_folder.PREDICTIONS).open(encoding="utf-8", newline="") as f:
        return [row for row, _ in zip(csv.DictReader(f), range(most), strict=False)]


def _made_up(predictor: Predictor, count: int) -> list[str]:
    """Texts to try an export on where the run keeps none: tokens of the model drawn at random, from none to dozens a text."""
    rng, tokenizer = np.random.default_rng(0), predictor.encoder.tokenizer
    drawn = (rng.integers(len(tokenizer), size=rng.integers(0, 48)) for _ in range(count))
    return [str(tokenizer.decode(ids.tolist(), skip_special_tokens=True)) for ids in drawn]


def _lost(info: Any, to: str) -> list[str]:
    """What the format cannot carry."""
    lost = []
    if to == "transformers" and info.config.model.long == "chunk":
        lost.append("texts over --max-length are cut there, not scored in chunks")
    if to == "transformers":
        lost += info.task.output.lost_in_transformers()
    if to == "openvino":
        lost.append(
            "texts are padded there and an instruction is computed for each: bf16 may be faster behind a long one"
        )
    return lost
