"""Scoring speed beside a transformers pipeline: same texts, same model, rounds in turn.

    python benchmarks/score_speed.py           # a dated table in benchmarks/results/
    python benchmarks/score_speed.py --ours    # one measurement of loracle, as a JSON line
    python benchmarks/score_speed.py --int8    # the same after `loracle export --to openvino`

All cut texts to tokens, score them with an untrained head of 24 labels and no adapter, and sort by length first.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from results import ROUNDS, SHARED, dtype_name, in_turn, last_json, medians, rate_rows, write_table

LIMIT = 1024
DATA = SHARED / "data" / "n24news" / "abstracts.json"
PEER = SHARED / "bench" / "peer_score.py"


def ours(eight: bool, limit: int) -> dict[str, float]:
    """Scores of texts, as ``predict`` computes them."""
    import torch

    from loracle.models import openvino
    from loracle.models.build import ScorerSpec, new_scorer
    from loracle.models.gguf import demo_model_folder
    from loracle.models.loading import load_sequence_classifier, load_tokenizer
    from loracle.models.scorer import Scorer
    from loracle.models.scoring import score
    from loracle.text.template import install_template
    from loracle.text.tokenize import Encoder

    with DATA.open(encoding="utf-8") as f:
        texts = [json.loads(line)["messages"][0]["content"] for line, _ in zip(f, range(limit), strict=False)]
    base, names = demo_model_folder(), tuple(str(i) for i in range(24))
    tokenizer = install_template(load_tokenizer(base), None, 512, encoder=False)
    scorer: Scorer | openvino.Int8Scorer
    if eight:
        model = load_sequence_classifier(
            base, num_labels=24, pad_token_id=0, dtype=torch.float32, problem_type=None, label_names=names
        )
        with tempfile.TemporaryDirectory() as folder:
            openvino.convert(model, Path(folder), pooling="last")
            scorer = openvino.Int8Scorer(Path(folder), pad_token_id=0)
    else:
        scorer = new_scorer(ScorerSpec(base=base, outputs=24, pad_token_id=0, dtype=getattr(torch, dtype_name())))
    encoder = Encoder(tokenizer)
    score(scorer, encoder(texts[:64]))
    started = time.perf_counter()
    score(scorer, encoder(texts))
    return {"texts_per_s": len(texts) / (time.perf_counter() - started)}


def main(limit: int) -> None:
    """All in turn, several rounds."""
    from loracle.models.gguf import demo_model_folder

    command = [
        sys.executable,
        PEER,
        "--model",
        demo_model_folder(),
        "--data",
        DATA,
        "--limit",
        limit,
        "--dtype",
        dtype_name(),
    ]
    me = [sys.executable, __file__, "--texts", limit]
    methods = {
        "transformers pipeline, best batch of 8, 32, 64": lambda: last_json(command)["texts_per_s"],
        f"loracle, {dtype_name()}": lambda: last_json([*me, "--ours"])["texts_per_s"],
        "loracle, int8": lambda: last_json([*me, "--int8"])["texts_per_s"],
    }
    rates = in_turn(methods, "texts/s")
    theirs, mine, eight = medians(rates).values()
    notes = [
        f"SmolLM2-135M-Instruct (dequantized from a 4-bit GGUF file), {limit:,} N24News abstracts, {ROUNDS} rounds in turn: "
        f"**{mine / theirs:.2f}×** in {dtype_name()}, as the peer, **{eight / theirs:.2f}×** in 8-bit integers."
    ]
    write_table("score_speed", rate_rows(rates, "texts/s", theirs), notes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--ours", action="store_true")
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--texts", type=int, default=LIMIT, help="fewer of them on a slow machine")
    given = parser.parse_args()
    if given.ours or given.int8:
        print(json.dumps(ours(given.int8, given.texts)))
    else:
        main(given.texts)
