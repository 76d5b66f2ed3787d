"""Ranking speed beside TRL's RewardTrainer + PEFT: same pairs of the same A/B tests, rounds in turn.

    python benchmarks/rank_speed.py                 # a dated table in benchmarks/results/
    python benchmarks/rank_speed.py --ours          # one measurement of loracle, as a JSON line

Both train one epoch (``bench/peer_rank.py``) with LoRA r 16 on every linear layer, in the dtype that ``--dtype auto`` picks
on this machine. The peer runs two forward passes a pair. loracle scores each title of a group once and forms the pairs from
the scores. Dropout (0), Bradley-Terry loss and the end-of-text token are the same on both sides.
"""

from __future__ import annotations

import argparse
import collections
import csv
import gzip
import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path

from results import ROUNDS, SHARED, dtype_name, in_turn, last_json, medians, rate_rows, write_table

TESTS, BATCHES, GROUPS = 40, (16, 32), 8
DATA = SHARED / "data" / "upworthy" / "packages.csv.gz"
PEER = SHARED / "bench" / "peer_rank.py"


def arms(tests: int) -> list[dict[str, tuple[int, int]]]:
    """``{headline: (clicks, impressions)}`` of each test and image, in the peer's order."""
    groups: dict[tuple[str, str], dict[str, tuple[int, int]]] = collections.defaultdict(dict)
    with gzip.open(DATA, "rt", encoding="utf-8") as f:
        for row in csv.DictReader(f):
            if (shown := int(row["impressions"])) >= 100:
                of_group, title = groups[row["clickability_test_id"], row["eyecatcher_id"]], row["headline"].strip()
                clicks, before = of_group.get(title, (0, 0))
                of_group[title] = clicks + int(row["clicks"]), before + shown
    by_test = collections.defaultdict(list)
    for (test, _), of_group in groups.items():
        if len(of_group) > 1:
            by_test[test].append(of_group)
    order = sorted(by_test, key=lambda test: hashlib.sha256(test.encode()).hexdigest())
    return [of_group for test in order[:tests] for of_group in by_test[test]]


def ours() -> dict[str, float]:
    """One epoch of loracle over the peer's pairs."""
    import torch
    from transformers import AutoTokenizer

    from loracle.config import TrainConfig
    from loracle.evaluation.pairs import group_pairs
    from loracle.examples import RankGroup
    from loracle.models.build import ScorerSpec, new_scorer
    from loracle.models.gguf import demo_model_folder
    from loracle.text.tokenize import Encoded
    from loracle.training.loop import FitJob, fit
    from loracle.training.losses import LOSSES, LossSettings

    groups = [
        RankGroup(
            group=str(i), texts=tuple(of_group), rows=(i,) * len(of_group),
            clicks=tuple(c for c, _ in of_group.values()), impressions=tuple(n for _, n in of_group.values()),
        )
        for i, of_group in enumerate(arms(TESTS), 1)
    ]  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(demo_model_folder())
    titles = sorted({t for g in groups for t in g.texts})
    ids = {t: (*i, tokenizer.eos_token_id) for t, i in zip(titles, tokenizer(titles).input_ids, strict=True)}
    spec = ScorerSpec(base=demo_model_folder(), outputs=1, pad_token_id=0, dtype=getattr(torch, dtype_name()))
    scorer = new_scorer(spec, lora={"r": 16, "alpha": 32, "dropout": 0.0})
    pairs = sum(len(group_pairs(g)) for g in groups)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        fit(
            FitJob(
                scorer=scorer,
                examples=groups,
                encode=lambda batch: [[Encoded(chunks=(ids[t],), starts=(0,)) for t in g.texts] for g in batch],
                loss=LOSSES["bradley-terry"].make(LossSettings()),
                validate=lambda: {"metric": 0.0, "loss": 0.0},
                settings=TrainConfig(epochs=1, batch=GROUPS, save_steps=10**9),
                lr=2e-4,
                folder=Path(folder),
                quiet=True,
            )
        )
        wall = time.perf_counter() - started
    return {"pairs": pairs, "pairs_per_s": pairs / wall, "titles_per_s": len(titles) / wall}


def peer(batch: int) -> dict[str, float]:
    """One epoch of RewardTrainer + PEFT."""
    from loracle.models.gguf import demo_model_folder

    command = [sys.executable, PEER, "--model", demo_model_folder(), "--data", DATA, "--tests", TESTS, "--batch", batch]
    return last_json([*command, "--dtype", dtype_name()])


def main() -> None:
    """All methods in turn, several rounds; medians and the ratio."""
    counts: set[int] = set()

    def rate(found: dict[str, float]) -> float:
        counts.add(int(found["pairs"]))
        return found["pairs_per_s"]

    methods = {f"TRL RewardTrainer + PEFT, {b} pairs a step": lambda b=b: rate(peer(b)) for b in BATCHES}
    mine = f"loracle, {GROUPS} groups a step"
    methods[mine] = lambda: rate(last_json([sys.executable, __file__, "--ours"]))
    rates = in_turn(methods, "pairs/s")
    if len(counts) != 1:
        raise SystemExit(f"the methods saw different pairs: {counts}")
    median = medians(rates)
    best = max(value for name, value in median.items() if name != mine)
    notes = [
        f"SmolLM2-135M-Instruct (dequantized from a 4-bit GGUF file) in {dtype_name()}, {TESTS} Upworthy tests, "
        f"{counts.pop():,} pairs, one epoch, {ROUNDS} rounds in turn, without loading the model. There is no context: "
        "the gain comes from scoring each title once and from no padding.",
        f"loracle / best peer: **{median[mine] / best:.2f}×**.",
    ]
    write_table("rank_speed", rate_rows(rates, "pairs/s", best), notes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--ours", action="store_true")
    if parser.parse_args().ours:
        print(json.dumps(ours()))
    else:
        main()
