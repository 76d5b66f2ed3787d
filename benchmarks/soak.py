"""Run the tests marked ``repeated`` and ``soak`` and write a dated table of what happened.

``LORACLE_KILLS`` sets the kills a test, ``LORACLE_CASES`` the random requests of each operation and kind.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from results import HERE, write_table


def main() -> int:
    """Run the tests and write the table; returns pytest's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "repeated or soak", "--timeout", "7200"]
        # Newer report families drop the properties that tests record.
        command += ["-o", "junit_family=xunit1", "--junitxml", str(report)]
        failed = subprocess.run(command, cwd=HERE.parent).returncode
        cases = ElementTree.parse(report).getroot().iter("testcase")
        found: dict[str, list[ElementTree.Element]] = {}
        for case in cases:
            found.setdefault(f"{case.get('classname')}.{case.get('name')}".partition("[")[0], []).append(case)
    rows = [["test", "runs", "failed", "skipped", "seconds"]]
    notes = []
    for name, of_test in found.items():
        bad, skipped = ([c for c in of_test if c.find(tag) is not None] for tag in ("failure", "skipped"))
        met = "; then ".join(p.get("value", "") for c in of_test for p in c.iter("property"))
        seconds = sum(float(c.get("time", 0)) for c in of_test)
        rows.append([name, str(len(of_test)), str(len(bad)), str(len(skipped)), f"{seconds:.0f}"])
        if met:
            notes.append(f"Met in {name.rpartition('.')[2]}: {met}.")
    kills = os.environ.get("LORACLE_KILLS", "5")
    requests = os.environ.get("LORACLE_CASES", "10")
    about = (
        f"SIGKILL at random moments, {kills} a test (one per run where there are {kills} runs). "
        f"Schemathesis: at most {requests} cases of each operation."
    )
    write_table("soak", rows, [about, *notes])
    return failed


if __name__ == "__main__":
    sys.exit(main())
