"""Reports, metrics and predictions from recorded scores stay as they are; ``make golden`` renews them on purpose."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "golden"))

from compare import differences
from compute import CASES, FILES, compute


@pytest.mark.parametrize("name", ["single_label", "multi_label", "pairs", "grades", "clicks"])
def test_golden_files_are_reproduced(tmp_path, name):
    compute(CASES / name, tmp_path)
    changed = {file: list(differences(CASES / name / file, tmp_path / file)) for file in FILES}
    assert not any(changed.values()), changed
