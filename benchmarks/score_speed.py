"""Scoring speed beside what a user runs today: a transformers pipeline, same texts, same model, alternating rounds.

    python benchmarks/score_speed.py           # a dated table in benchmarks/results/
    python benchmarks/score_speed.py --ours    # one measurement of ours, as a JSON line

Both cut texts to tokens, score them with an untrained head of 24 labels and no adapter, and sort by length first.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from results import ROUNDS, SHARED, in_turn, last_json, medians, rate_rows, write_table

LIMIT = 1024
DATA = SHARED / "data" / "n24news" / "abstracts.json"
PEER = SHARED / "bench" / "peer_score.py"


def ours() -> dict[str, float]:
    """Texts to scores, as ``predict`` does it."""
    import torch

    from loracle.data.examples import Task
    from loracle.model.assemble import new_scorer, score
    from loracle.model.backbone import demo_model_folder, load_tokenizer
    from loracle.text.encode import Encoder
    from loracle.text.template import bake

    with DATA.open(encoding="utf-8") as f:
        texts = [json.loads(line)["messages"][0]["content"] for line, _ in zip(f, range(LIMIT), strict=False)]
    tokenizer = bake(load_tokenizer(demo_model_folder()), None, 512, encoder=False)
    task = Task(kind="single", label_names=tuple(str(i) for i in range(24)))
    scorer = new_scorer(
        demo_model_folder(), task, pad_token_id=0, dtype=torch.bfloat16, device=torch.device("cpu"), lora=None
    )
    encoder = Encoder(tokenizer)
    score(scorer, encoder(texts[:64]))
    started = time.perf_counter()
    score(scorer, encoder(texts))
    return {"texts_per_s": len(texts) / (time.perf_counter() - started)}


def main() -> None:
    """Both in turn, several rounds."""
    from loracle.model.backbone import demo_model_folder

    command = [sys.executable, PEER, "--model", demo_model_folder(), "--data", DATA, "--limit", LIMIT]
    ways = {
        "transformers pipeline, best batch of 8, 32, 64": lambda: last_json(command)["texts_per_s"],
        "loracle": lambda: last_json([sys.executable, __file__, "--ours"])["texts_per_s"],
    }
    rates = in_turn(ways, "texts/s")
    theirs, mine = medians(rates).values()
    notes = [
        f"SmolLM2-135M-Instruct (dequantised from a 4-bit GGUF file), bfloat16, {LIMIT:,} N24News abstracts, {ROUNDS} rounds "
        f"in turn: **{mine / theirs:.2f}×**."
    ]
    write_table("score_speed", rate_rows(rates, "texts/s", theirs), notes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--ours", action="store_true")
    if parser.parse_args().ours:
        print(json.dumps(ours()))
    else:
        main()
