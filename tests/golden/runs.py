"""Five small whole runs, to be compared byte for byte before and after a refactoring, on one machine.

    python tests/golden/runs.py OUT                    train, predict and rank into OUT
    python tests/golden/runs.py OUT --against OTHER    compare two such folders; exits with 1 where they differ

Never part of the tests: processors round differently. Everything runs in float32 on one thread.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from compare import differences
from compute import CASES

SETTINGS = ["--dtype", "float32", "--device", "cpu", "--epochs", "1", "--max-steps", "6", "--lr", "0.01"]
COLUMNS = {
    "single_label": ["--context", "context"],
    "multi_label": ["--label-delimiter", "|"],
    "grades": ["--grade", "grade", "--group", "query", "--text", "title"],
}
BYTES = ("adapter_model.safetensors", "tokenizer.json", "predictions.csv")
VALUES = ("metrics.json", "report.json", "calibration.json", "reference.json")
BY_MACHINE = ("seconds", "_per_s", "versions", "/settings", "/facts", "/run/name", "/base", "/notes")


def main() -> int:
    """Run or compare, as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path)
    options = parser.parse_args()
    if options.against:
        return compare(options.out, options.against)
    run(options.out)
    return 0


def run(out: Path) -> None:
    """Train every case, then predict with the classifier and rank with the click ranker."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    model = tiny_model(out / "model")

    def loracle(*arguments: object) -> None:
        subprocess.run([sys.executable, "-m", "loracle", *map(str, arguments)], check=True, env=environment)

    for case in sorted(CASES.iterdir()):
        train, test = (next(case.glob(f"{name}.*")) for name in ("train", "test"))
        flags = [*COLUMNS.get(case.name, []), *SETTINGS, "--model", model, "-o", out / case.name]
        loracle("train", train, "--test", test, *flags)
    loracle("predict", out / "single_label", CASES / "single_label" / "test.csv", "-o", out / "predicted.csv")
    loracle("rank", out / "clicks", CASES / "clicks" / "test.csv", "-o", out / "ranked.csv")


def tiny_model(folder: Path) -> Path:
    """A random Llama of three layers with a tokenizer, the same for every seed and machine."""
    import torch
    import transformers

    sys.path.insert(0, str(Path(__file__).parents[1]))
    import conftest

    config_class, settings, family = conftest.MODELS["llama"]
    tokenizer = conftest._TOKENIZERS[family]()
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(vocab_size=len(tokenizer), **ids, **settings)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def compare(old: Path, new: Path) -> int:
    """Print what differs between two outputs; 1 if anything does."""
    lines = [f"{name} differs" for name in ("predicted.csv", "ranked.csv") if _bytes(old / name) != _bytes(new / name)]
    for case in sorted(p.name for p in CASES.iterdir()):
        lines += [f"{case}/{n} differs" for n in BYTES if _bytes(old / case / n) != _bytes(new / case / n)]
        for name in VALUES:
            if (old / case / name).exists():
                changed = differences(old / case / name, new / case / name)
                lines += [f"{case}/{name}{line}" for line in changed if not any(key in line for key in BY_MACHINE)]
    print("\n".join(lines) or "equal")
    return int(bool(lines))


def _bytes(path: Path) -> bytes:
    return path.read_bytes()


if __name__ == "__main__":
    sys.exit(main())
