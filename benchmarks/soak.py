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
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "repeated or soak", "--timeout", "7200"]
        # The newer family of reports has no room for what a test records.
        command += ["-o", "junit_family=xunit1", "--junitxml", str(report)]
        failed = subprocess.run(command, cwd=HERE.parent).returncode
        cases = ElementTree.parse(report).getroot().iter("testcase")
        found: dict[str, list[ElementTree.Element]] = {}
        for case in cases:
            found.setdefault(f"{case.get('classname')}.{case.get('name')}".partition("[")[0], []).append(case)
    rows = [["test", "runs", "failed", "skipped", "seconds", "what was met"]]
    for name, of_test in found.items():
        bad, skipped = ([c for c in of_test if c.find(tag) is not None] for tag in ("failure", "skipped"))
        met = "; ".join(p.get("value", "") for c in of_test for p in c.iter("property"))
        seconds = sum(float(c.get("time", 0)) for c in of_test)
        rows.append([name, str(len(of_test)), str(len(bad)), str(len(skipped)), f"{seconds:.0f}", met])
    kills = os.environ.get("LORACLE_KILLS", "5")
    cases = os.environ.get("LORACLE_CASES", "10")
    notes = [
        f"SIGKILL at random moments, {kills} a test (a run each where there are {kills} runs); schemathesis, at most {cases} "
        "cases of each operation and kind."
    ]
    write_table("soak", rows, notes)
    return failed


if __name__ == "__main__":
    sys.exit(main())
