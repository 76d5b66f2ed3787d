"""Renew the golden files, and list every key that changed: ``python tests/golden/make.py``."""

from __future__ import annotations

import tempfile
from pathlib import Path

from compare import differences
from compute import CASES, FILES, compute

LISTED = 50


def main() -> None:
    """Compute every case anew, print the differences, and overwrite the files."""
    for case in sorted(CASES.iterdir()):
        with tempfile.TemporaryDirectory() as folder:
            compute(case, Path(folder))
            for name in FILES:
                new = (Path(folder) / name).read_text(encoding="utf-8")
                changed = (
                    list(differences(case / name, Path(folder) / name)) if (case / name).exists() else ["new file"]
                )
                print(f"{case.name}/{name}: {len(changed)} changed", *changed[:LISTED], sep="\n  ")
                (case / name).write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
