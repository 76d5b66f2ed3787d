"""Training speed beside transformers' Trainer + PEFT: same model, same token ids, rounds in turn.

    python benchmarks/train_speed.py                 # a dated table in benchmarks/results/
    python benchmarks/train_speed.py --prefix 200    # the same with an instruction of 200 words before every text
    python benchmarks/train_speed.py --ours 32       # one measurement of loracle at batch 32, as a JSON line

loracle runs the loop of ``loracle train`` with the peer's settings: LoRA r 16 on every linear layer, no dropout, the dtype
that ``--dtype auto`` picks on this machine. One peer is ``bench/peer_classify.py`` (transformers Trainer + PEFT) at several
batch sizes. The other is the reference script, which pads every text to 512 tokens, runs the LM head and adapts q and v only.
It is measured with its dropout of 0.05 and without any, each beside loracle with the same. The peers need `datasets`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path

from results import ROUNDS, SHARED, dtype_name, in_turn, last_json, medians, rate_rows, write_table

LIMIT, PREFIXED_LIMIT, REFERENCE_LIMIT, BATCHES = 320, 96, 24, (16, 32, 64)
OURS = (32,)
DROPOUT = 0.05  # the reference script's
REFERENCE = "the reference script"
DATA = SHARED / "data" / "n24news" / "abstracts.json"
PEER = SHARED / "bench" / "peer_classify.py"


def texts_and_labels(limit: int) -> tuple[list[str], list[int]]:
    """The peer's training examples, in its order."""
    rows: dict[str, int] = {}
    for line in DATA.open(encoding="utf-8"):
        row = json.loads(line)
        rows.setdefault(row["messages"][0]["content"].strip(), row["label"])
    chosen = sorted(rows, key=lambda t: hashlib.sha256(t.encode()).hexdigest())[:limit]
    return chosen, [rows[t] for t in chosen]


def instruction(words: int) -> str:
    """The peer's instruction, word for word."""
    text = "Read the abstract of a newspaper article and decide which desk of the paper it was written for ."
    known = text.split()
    return " ".join(known[i % len(known)] for i in range(words)) + "\n" if words else ""


def ours(batch: int, dropout: float, prefix: int, limit: int) -> dict[str, float]:
    """One epoch of loracle over the peer's token ids."""
    import torch
    from transformers import AutoTokenizer

    from loracle.config import TrainConfig
    from loracle.examples import LabeledText
    from loracle.models.build import ScorerSpec, new_scorer
    from loracle.models.gguf import demo_model_folder
    from loracle.text.tokenize import Encoded
    from loracle.training.loop import FitJob, fit
    from loracle.training.losses import LOSSES, LossSettings

    texts, labels = texts_and_labels(limit)
    tokenizer = AutoTokenizer.from_pretrained(demo_model_folder())
    before = instruction(prefix)
    ids = {t: tuple(i) for t, i in zip(texts, tokenizer([before + t for t in texts]).input_ids, strict=True)}
    start = len(tokenizer(before).input_ids) if before else 0
    examples = [LabeledText(text=t, labels=(y,), row=i) for i, (t, y) in enumerate(zip(texts, labels, strict=True), 1)]
    spec = ScorerSpec(base=demo_model_folder(), outputs=24, pad_token_id=0, dtype=getattr(torch, dtype_name()))
    scorer = new_scorer(spec, lora={"r": 16, "alpha": 32, "dropout": dropout})
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        outcome = fit(
            FitJob(
                scorer=scorer,
                examples=examples,
                encode=lambda batch: [[Encoded(chunks=(ids[e.text],), starts=(start,))] for e in batch],
                loss=LOSSES["cross-entropy"].make(LossSettings()),
                validate=lambda: {"metric": 0.0, "loss": 0.0},
                settings=TrainConfig(epochs=1, batch=batch, save_steps=10**9),
                lr=5e-4,
                folder=Path(folder),
                quiet=True,
            )
        )
        wall = time.perf_counter() - started
    return {
        "examples_per_s": limit / wall,
        "tokens_per_s": outcome.tokens / wall,
        "in_steps": outcome.examples / outcome.seconds,
    }


def reference(dropout: float) -> dict[str, float]:
    """The steps of github.com/xiaohaochen0308/LLM_seq_cls (lora_cls.py, data.py).

    Batches of 8 padded to 512, LM head, hidden states of all layers, mean over the padding too, q and v adapted.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from loracle.models.gguf import demo_model_folder

    texts, labels = texts_and_labels(REFERENCE_LIMIT)
    tokenizer = AutoTokenizer.from_pretrained(demo_model_folder())
    model = AutoModelForCausalLM.from_pretrained(demo_model_folder(), dtype=getattr(torch, dtype_name()))
    model = get_peft_model(
        model, LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout, target_modules=["q_proj", "v_proj"])
    )
    model.train()
    hidden = model.config.hidden_size
    head = torch.nn.Sequential(
        torch.nn.Linear(hidden, 1024), torch.nn.ReLU(), torch.nn.Dropout(2 * dropout),
        torch.nn.Linear(1024, 512), torch.nn.ReLU(), torch.nn.Dropout(2 * dropout), torch.nn.Linear(512, 24),
    ).to(getattr(torch, dtype_name()))  # fmt: skip
    trained = [p for p in [*model.parameters(), *head.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-5)
    started = 0.0
    for i in range(0, len(texts), 8):
        started = time.perf_counter() if i == 8 else started  # the first step warms up
        batch = tokenizer(texts[i : i + 8], padding="max_length", truncation=True, max_length=512, return_tensors="pt")
        states = model(**batch, output_hidden_states=True).hidden_states[-1]
        loss = torch.nn.functional.cross_entropy(head(states.mean(1)).float(), torch.tensor(labels[i : i + 8]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"in_steps": (len(texts) - 8) / (time.perf_counter() - started)}


def peer(batch: int, prefix: int, limit: int) -> dict[str, float]:
    """One epoch of Trainer + PEFT."""
    from loracle.models.gguf import demo_model_folder

    command = [sys.executable, PEER, "--model", demo_model_folder(), "--data", DATA, "--limit", limit, "--batch", batch]
    return last_json([*command, "--prefix-tokens", prefix, "--dtype", dtype_name()])


def main(prefix: int, limit: int) -> None:
    """All methods in turn, several rounds; medians and ratios."""
    me = [sys.executable, __file__, "--prefix", prefix, "--examples", limit]
    batches = BATCHES[:1] if prefix else BATCHES  # behind a long prefix the smallest was the best by a third
    methods = {f"Trainer + PEFT, batch {b}": lambda b=b: peer(b, prefix, limit)["examples_per_s"] for b in batches}
    methods |= {f"loracle, batch {b}": lambda b=b: last_json([*me, "--ours", b])["examples_per_s"] for b in OURS}
    if not prefix:
        for p in (0.0, DROPOUT):
            command = [*me, "--dropout", p]
            methods[f"loracle, dropout {p:g}, steps only"] = lambda w=command: last_json([*w, "--ours", OURS[0]])[
                "in_steps"
            ]
            methods[f"{REFERENCE}, dropout {p:g}, steps only"] = lambda w=command: last_json([*w, "--reference"])[
                "in_steps"
            ]
    rates = in_turn(methods, "examples/s")
    median = medians(rates)
    best_peer = max(value for name, value in median.items() if name.startswith("Trainer"))
    mine = max(median[f"loracle, batch {b}"] for b in OURS)
    notes = [
        f"SmolLM2-135M-Instruct (dequantized from a 4-bit GGUF file) in {dtype_name()}, N24News abstracts, "
        f"{limit} examples, one epoch, {ROUNDS} rounds in turn, without loading the model.",
        f"loracle / best Trainer, whole training loops: **{mine / best_peer:.2f}×**.",
    ]
    if prefix:
        notes.append(
            f"An instruction of {prefix} words precedes every text. loracle computes it once a step, the peer once a text."
        )
    else:
        ratios = [
            f"**{median[f'loracle, dropout {p:g}, steps only'] / median[f'{REFERENCE}, dropout {p:g}, steps only']:.1f}×** "
            f"with dropout {p:g}"
            for p in (0.0, DROPOUT)
        ]
        notes.append(
            f"loracle / the reference script, steps only ({REFERENCE_LIMIT} of its examples, the first 8 not timed): "
            f"{', '.join(ratios)}, the same for both."
        )
    write_table("train_speed_prefix" if prefix else "train_speed", rate_rows(rates, "examples/s", best_peer), notes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--ours", type=int, metavar="BATCH")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--prefix", type=int, default=0, metavar="WORDS")
    parser.add_argument("--reference", action="store_true")
    parser.add_argument("--examples", type=int, help="fewer of them on a slow machine")
    given = parser.parse_args()
    limit = given.examples or (PREFIXED_LIMIT if given.prefix else LIMIT)
    if given.ours:
        print(json.dumps(ours(given.ours, given.dropout, given.prefix, limit)))
    elif given.reference:
        print(json.dumps(reference(given.dropout)))
    else:
        main(given.prefix, limit)
