"""``loracle doctor``: what a bug report needs, also where torch is missing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from cli_runner import loracle

import loracle as package


def test_doctor_reports_build_devices_and_extras(monkeypatch, tmp_path):
    monkeypatch.setenv("LORACLE_CACHE", str(tmp_path / "cache"))
    facts = json.loads(loracle("doctor", "--json").stdout)
    assert facts["loracle"] == package.__version__
    assert torch.__version__ in facts["torch"]
    assert facts["devices"][0] == "cpu"
    assert facts["threads"].startswith(f"{torch.get_num_threads()} of ")
    assert facts["--dtype auto"]["adapters on cpu"] in ("bfloat16", "float32")
    assert facts["packages"]["transformers"]
    assert str(tmp_path / "cache") in facts["cache"]
    assert "GiB free" in facts["cache"]
    assert "fastapi" in facts["extras"]["serve"]
    assert facts["variables"]["LORACLE_CACHE"] == str(tmp_path / "cache")
    text = loracle("doctor").stdout
    assert all(name in text for name in facts)


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["torch", "psutil", "platformdirs"])
def test_doctor_works_without_a_package(missing):
    script = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from loracle.cli import main; main(['doctor'], standalone_mode=False)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "python" in done.stdout
    if missing == "torch":
        assert "cannot be imported" in done.stdout
