"""Export a run to a folder that other programs load.

Each exporter opens its export the way users do, and scores test texts of the run. An export that differs is deleted.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from loracle.errors import Log, UserError
from loracle.runs.export.openvino import OpenVinoExporter
from loracle.runs.export.transformers import TransformersExporter

if TYPE_CHECKING:
    from loracle.runs.folder import RunInfo

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template*")


class Exporter(Protocol):
    """A format to export to. Its module imports torch only inside methods, since ``--help`` lists the formats."""

    help: str  # shown beside the name in ``loracle export --help``

    def check(self, info: RunInfo) -> None:
        """Check that the format can hold this run.

        Raises:
            UserError: it cannot.
        """

    def write(self, model: Any, run: Path, out: Path) -> None:
        """Write the merged ``model`` of ``run`` into ``out``, which already holds the tokenizer."""

    def compare(self, run: Path, out: Path, base: str | None) -> str:
        """Compare the scores of the export with those of the run, and return a line for the user.

        Raises:
            RuntimeError: the scores differ more than the format allows.
        """

    def notes(self, info: RunInfo) -> list[str]:
        """Features of the run that the format does not keep, a line each."""


EXPORTERS: dict[str, Exporter] = {
    "transformers": TransformersExporter(),
    "openvino": OpenVinoExporter(),
}


def export(run: Path, out: Path, to: str, *, base: str | None = None, log: Log = print) -> Path:
    """Export ``run`` to the folder ``out`` in the format ``to``, a name in ``EXPORTERS``.

    Raises:
        UserError: the folder is in use, or the format cannot hold this run. ``out`` does not exist then.
        RuntimeError: the export scores differently from the run. ``out`` does not exist then.
    """
    from loracle.models import openvino
    from loracle.runs import folder as run_folder

    exporter, info = EXPORTERS[to], run_folder.read_info(run)
    run_folder.verify(run)
    if (run / openvino.MODEL).exists():
        raise UserError(f"{run} is an export itself.", "Export the run that it was made from.")
    run_folder.free(out, "Pick another --out.")
    exporter.check(info)
    model = _merged_model(run, info, base)
    out.mkdir(parents=True, exist_ok=True)
    try:
        for pattern in TOKENIZER_FILES:
            for path in run.glob(pattern):
                shutil.copy2(path, out)
        exporter.write(model, run, out)
        del model  # comparing loads the run and the export
        result = exporter.compare(run, out, base)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    log(result)
    for line in exporter.notes(info):
        log(f"note: {line}")
    return out


def _merged_model(run: Path, info: RunInfo, base: str | None) -> Any:
    """The run's model in transformers' class, adapters merged."""
    from loracle.models.build import ScorerSpec, load_merged
    from loracle.models.loading import load_tokenizer
    from loracle.runs.predictor import find_base

    settings, task = info.config.model, info.task
    spec = ScorerSpec(
        base=find_base(info, run, base).folder,
        outputs=task.learning.outputs(task),
        label_names=task.label_names,
        problem_type=task.learning.problem_type,
        pad_token_id=load_tokenizer(run).pad_token_id,
        head=settings.head,
        depth=settings.layers,
        quantize=settings.quantize,
    )
    return load_merged(spec, run)
