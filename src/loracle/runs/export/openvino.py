"""Export to OpenVINO in 8-bit integers, for CPUs. The folder is a run folder that ``predict`` takes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loracle.runs.folder import RunInfo

SAMPLES = 1000  # texts on which the export is compared


class OpenVinoExporter:
    """See ``Exporter``. Int8 moves scores, so the comparison reports agreement and does not fail."""

    help = "8-bit integers for CPUs, by OpenVINO"

    def check(self, info: RunInfo) -> None:
        """Every run can be converted."""

    def write(self, model: Any, run: Path, out: Path) -> None:
        from loracle.models import openvino
        from loracle.runs import folder as run_folder

        openvino.convert(model, out, pooling=run_folder.read_info(run).config.model.pooling)
        for name in (run_folder.RUN, run_folder.CALIBRATION, run_folder.REFERENCE):
            if (run / name).exists():
                shutil.copy2(run / name, out)
        run_folder.write_manifest(out)

    def compare(self, run: Path, out: Path, base: str | None) -> str:
        """How often labels or orders agree, with the accuracy of both where labels are known."""
        from loracle.runs.export.samples import draw_samples
        from loracle.runs.predictor import Predictor

        exact, int8 = Predictor(run, base=base, device="cpu"), Predictor(out)
        samples = draw_samples(run, exact, SAMPLES)
        a, b = (predictor.scores(samples.texts, samples.contexts) for predictor in (exact, int8))
        if not samples.rows:
            moved = abs(a - b).mean() / max(float(abs(a).mean()), 1e-12)
            return f"int8 moves scores by {moved:.1%} on random texts, as the run keeps none; measure it with evaluate"
        return exact.task.output.agreement(a, b, samples.rows, exact.task, exact.calibration)

    def notes(self, info: RunInfo) -> list[str]:
        return ["texts are padded, and an instruction is computed for each text; behind a long one bf16 may be faster"]
