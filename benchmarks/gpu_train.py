"""LoRA training speed of a 7B model on one GPU, with the share of what the card's matrix products reach.

    python benchmarks/gpu_train.py                    # Qwen2.5-7B's true shape, random weights: no hub needed
    python benchmarks/gpu_train.py --size 0.5b --rounds 5

Texts have the lengths of N24News abstracts (28 tokens on average); LoRA r 16 on every linear layer, bfloat16, no dropout. The
limit counts 4 N operations a token (N: weights that a token passes through), against the rate that this card reaches for the
model's own largest product. Not run yet: no GPU has been lent to this project (dev/LOG.md).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from results import ROUNDS, write_table

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 1000},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151_936},
    "7b": {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152_064},
}  # fmt: skip
LABELS, BATCH, STEPS, WARM = 24, 256, 12, 3


def scorer_of(size: str, device: Any) -> Any:
    """A scorer of that shape with random weights, made on the device itself."""
    import torch
    import transformers

    from loracle.model.adapters import add_lora
    from loracle.model.scorer import Scorer

    config = transformers.Qwen2Config(**SIZES[size], num_labels=LABELS, pad_token_id=0)
    with torch.device(device):
        model = transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)
    model.score.float()
    return Scorer(add_lora(model, r=16, alpha=32, dropout=0.0).to(device))


def texts(count: int, vocabulary: int, seed: int) -> list[Any]:
    """Random token ids of lengths like those of N24News abstracts: log-normal, mean 28, 95th percentile 42."""
    from loracle.text.encode import Encoded

    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(27.2), 0.26, count).round(), 5, 120).astype(int)
    return [Encoded(chunks=(tuple(rng.integers(1, vocabulary, n).tolist()),), starts=(0,)) for n in lengths]


def measure(size: str, scorer: Any, seed: int, folder: Path, micro_tokens: int) -> dict[str, float]:
    """Useful tokens a second over some steps of the loop itself, the first ones left out."""
    from loracle.data.examples import LabeledText, Task
    from loracle.train.loop import Schedule, fit
    from loracle.train.losses import make_loss

    encoded = texts(BATCH * STEPS, SIZES[size]["vocab_size"], seed)
    examples = [LabeledText(text=str(i), labels=(i % LABELS,), row=i + 1) for i in range(len(encoded))]

    def encode(some: Any) -> list[list[Any]]:
        return [[encoded[int(e.text)]] for e in some]

    task = Task(kind="single", label_names=tuple(map(str, range(LABELS))))
    schedule = Schedule(epochs=1, batch=BATCH, lr=1e-4, save_steps=10**9, micro_tokens=micro_tokens, seed=seed)
    folder.mkdir()
    look = {"metric": 0.0, "loss": 0.0}
    fit(scorer, examples, encode, make_loss(task), lambda: look, schedule=schedule, folder=folder, quiet=True)
    # The log has means since the beginning. In each step the processor waits once for the GPU, so its clock serves for both.
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [r for r in logged if "loss" in r]
    seconds = [BATCH * r["step"] / r["examples_per_s"] for r in steps]
    tokens = [r["tokens_per_s"] * s for r, s in zip(steps, seconds, strict=True)]
    return {"tokens_per_s": (tokens[-1] - tokens[WARM - 1]) / (seconds[-1] - seconds[WARM - 1])}


def main(size: str, rounds: int, micro_tokens: int) -> None:
    """Several rounds, then the table."""
    import torch

    from loracle.model.backbone import pick_device
    from loracle.model.memory import matrix_rate, training_need

    device = pick_device("auto")
    scorer = scorer_of(size, device)
    rate = matrix_rate(scorer, seconds=1.0)
    with tempfile.TemporaryDirectory() as folder:
        found = [
            measure(size, scorer, seed, Path(folder) / str(seed), micro_tokens)["tokens_per_s"]
            for seed in range(rounds)
        ]
    speed = statistics.median(found)
    done = speed * training_need(scorer).flops_per_token
    peak = f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB" if device.type == "cuda" else "not measured"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    rows = [
        ["useful tokens/s, median", "all rounds", "TFLOP/s", "share of the card's own matrix rate", "peak memory"],
        [f"{speed:,.0f}", ", ".join(f"{v:,.0f}" for v in found), f"{done / 1e12:.1f}", f"{done / rate:.0%}", peak],
    ]
    notes = [
        f"Qwen2.5 of {size}, random weights, on {name}; LoRA r 16 on every linear layer, bfloat16, {BATCH} texts a step, "
        f"rounds of {micro_tokens:,} tokens; its largest product runs at {rate / 1e12:.1f} TFLOP/s."
    ]
    write_table(f"gpu_train_{size}", rows, notes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--micro-tokens", type=int, default=8192)
    given = parser.parse_args()
    main(given.size, given.rounds, given.micro_tokens)
