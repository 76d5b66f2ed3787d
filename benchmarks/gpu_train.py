"""LoRA training speed of a 7B model on one GPU beside transformers' Trainer with PEFT, and its share of the card's speed.

    python benchmarks/gpu_train.py                    # Qwen2.5-7B's shape, random weights: no hub needed
    python benchmarks/gpu_train.py --size 0.5b --rounds 5
    python benchmarks/gpu_train.py --profile          # where the time goes, by kernel

Texts have the lengths of N24News abstracts (28 tokens on average); LoRA r 16 on every linear layer, bfloat16, no dropout. The
limit counts 4 N operations per token (N: weights that a token passes through), against this card's rate for the model's
largest product. The Trainer gets the same token ids, sorted by length, at its best batch size.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from results import ROUNDS, write_table

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 1000},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151_936},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151_936},
    "7b": {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152_064},
}  # fmt: skip
LABELS, STEPS, WARM = 24, 12, 3
PEER_BATCHES = (32, 64, 128)


def model_of(size: str, device: Any) -> Any:
    """A model of that shape with random weights, created on the device."""
    import torch
    import transformers

    config = transformers.Qwen2Config(**SIZES[size], num_labels=LABELS, pad_token_id=0, use_cache=False)
    with torch.device(device):
        model = transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)
    return model


def scorer_of(size: str, device: Any) -> Any:
    """The model with adapters."""
    from loracle.models.lora import add_lora
    from loracle.models.scorer import Scorer

    model = model_of(size, device)
    model.score.float()
    return Scorer(add_lora(model, r=16, alpha=32, dropout=0.0).to(device))


def texts(count: int, vocabulary: int, seed: int) -> list[Any]:
    """Random token ids of lengths like those of N24News abstracts: log-normal, mean 28, 95th percentile 42."""
    from loracle.text.tokenize import Encoded

    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(27.2), 0.26, count).round(), 5, 120).astype(int)
    return [Encoded(chunks=(tuple(rng.integers(1, vocabulary, n).tolist()),), starts=(0,)) for n in lengths]


def measure(size: str, scorer: Any, seed: int, batch: int, tokens_per_micro_batch: int) -> float:
    """Tokens per second, padding left out, over the steps after the first ones."""
    from loracle.config import TrainConfig
    from loracle.examples import LabeledText
    from loracle.training.loop import FitJob, fit
    from loracle.training.losses import LOSSES, LossSettings

    encoded = texts(batch * STEPS, SIZES[size]["vocab_size"], seed)
    examples = [LabeledText(text=str(i), labels=(i % LABELS,), row=i + 1) for i in range(len(encoded))]

    def encode(examples: Any) -> list[list[Any]]:
        return [[encoded[int(e.text)]] for e in examples]

    settings = TrainConfig(
        epochs=1, batch=batch, save_steps=10**9, seed=seed, tokens_per_micro_batch=tokens_per_micro_batch
    )
    with tempfile.TemporaryDirectory() as folder:
        fit(
            FitJob(
                scorer=scorer,
                examples=examples,
                encode=encode,
                loss=LOSSES["cross-entropy"].make(LossSettings()),
                validate=lambda: {"metric": 0.0, "loss": 0.0},
                settings=settings,
                lr=1e-4,
                folder=Path(folder),
                quiet=True,
            )
        )
        lines = (Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    # The log has means since the start. The CPU waits for the GPU once a step, so its clock is valid for both.
    steps = [r for line in lines if "loss" in (r := json.loads(line))]
    seconds = [batch * r["step"] / r["examples_per_s"] for r in steps]
    tokens = [r["tokens_per_s"] * s for r, s in zip(steps, seconds, strict=True)]
    return (tokens[-1] - tokens[WARM - 1]) / (seconds[-1] - seconds[WARM - 1])


def measure_peer(size: str, model: Any, seed: int, batch: int) -> float:
    """The same for transformers' Trainer, with the settings of ``../shared/bench/peer_classify.py``."""
    import torch
    import transformers

    encoded = texts(batch * STEPS, SIZES[size]["vocab_size"], seed)
    rows = [{"input_ids": list(e.chunks[0]), "labels": i % LABELS} for i, e in enumerate(encoded)]
    marks: list[float] = []
    tokens: list[int] = []

    def collate(batch_rows: list[dict[str, Any]]) -> dict[str, Any]:
        ids = [torch.tensor(row["input_ids"]) for row in batch_rows]
        tokens.append(sum(map(len, ids)))
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)  # 0 is the pad token, and in no text
        return {
            "input_ids": padded,
            "attention_mask": (padded != 0).long(),
            "labels": torch.tensor([row["labels"] for row in batch_rows]),
        }

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, num_train_epochs=1, per_device_train_batch_size=batch, learning_rate=1e-4, seed=seed,
            lr_scheduler_type="cosine", weight_decay=0.0, logging_steps=1000, save_strategy="no", report_to=[],
            use_cpu=not torch.cuda.is_available(), train_sampling_strategy="group_by_length", disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[Clock()]
        )
        trainer.train()
    return sum(tokens[WARM : len(marks)]) / (marks[-1] - marks[WARM - 1])


def profile(size: str, scorer: Any, batch: int, tokens_per_micro_batch: int) -> None:
    """Print the kernels of a few steps, longest first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as result:
        measure(size, scorer, 0, batch, tokens_per_micro_batch)
    kernels = sorted(result.key_averages(), key=lambda e: -e.self_device_time_total)
    print(f"{sum(e.self_device_time_total for e in kernels) / 1e6:.2f} s on the card, of {STEPS} steps:")
    for e in kernels[:40]:
        print(f"{e.self_device_time_total / 1e3:9.1f} ms {e.count:7,d}  {e.key[:110]}")


def main(size: str, rounds: int, batch: int, tokens_per_micro_batch: int, peers: bool, profiled: bool) -> None:
    """Several rounds in turn, then the table."""
    import torch
    from peft import LoraConfig, get_peft_model

    from loracle.models.devices import pick_device
    from loracle.models.memory import matrix_rate, training_need

    device = pick_device("auto")
    scorer = scorer_of(size, device)
    measure(size, scorer, 99, batch, tokens_per_micro_batch)  # compiles what is compiled once
    methods = {"loracle": lambda seed: measure(size, scorer, seed, batch, tokens_per_micro_batch)}
    if peers:
        lora = LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, target_modules="all-linear")
        model = get_peft_model(model_of(size, device), lora)
        for n in PEER_BATCHES:
            methods[f"Trainer + PEFT, batch {n}"] = lambda seed, n=n: measure_peer(size, model, seed, n)
    rate = matrix_rate(scorer, seconds=1.0, rows=tokens_per_micro_batch)
    cuda = device.type == "cuda"
    found: dict[str, list[float]] = {name: [] for name in methods}
    peak: dict[str, float] = {}
    for seed in range(rounds):
        for name, method in methods.items():
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            found[name].append(method(seed))
            peak[name] = torch.cuda.max_memory_allocated() / 1e9 if cuda else float("nan")
            print(f"{name}: {found[name][-1]:,.0f} tokens/s, {peak[name]:.1f} GB", flush=True)
    best = max((statistics.median(v) for name, v in found.items() if name != "loracle"), default=float("nan"))
    operations = training_need(scorer).flops_per_token
    rows = [
        [
            "method",
            "tokens/s without padding, median",
            "all rounds",
            "ratio to the best peer",
            "TFLOP/s",
            "share of the rate",
        ]
    ]
    for name, values in found.items():
        speed = statistics.median(values)
        done = speed * operations
        rows.append([
            name, f"{speed:,.0f}", ", ".join(f"{v:,.0f}" for v in values), f"{speed / best:.2f}×", f"{done / 1e12:.0f}",
            f"{done / rate:.0%}",
        ])  # fmt: skip
    card = torch.cuda.get_device_name(device) if cuda else "the CPU"
    notes = [
        f"Qwen2.5 of {size}, random weights, on {card}. LoRA r 16 on every linear layer, bfloat16. loracle takes steps "
        f"of {batch} texts in micro-batches of {tokens_per_micro_batch:,} tokens. "
        f"Operations: 4 N per token plus the adapters'. "
        f"The model's largest product runs at {rate / 1e12:.0f} TFLOP/s here. Peak memory: "
        + "; ".join(f"{name}: {gb:.0f} GB" for name, gb in peak.items())
        + " (both models are in memory).",
    ]
    write_table(f"gpu_train_{size}", rows, notes)
    if profiled:
        profile(size, scorer, batch, tokens_per_micro_batch)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--tokens-per-micro-batch", type=int, default=8192)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    main(given.size, given.rounds, given.batch, given.tokens_per_micro_batch, not given.no_peers, given.profile)
