"""Small trainings, by one process or by several: ``torchrun --nproc-per-node 2 tests/training/scenarios.py FOLDER MODEL``.

Each writes a folder: ``log.jsonl``, ``left.safetensors`` (the final weights), or the error message in ``raised-<process>``.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from small import QUICK, labelled, make_loss, write
from test_loop import PAIRS, SINGLE, Cut, cut_at, encode, groups, new_scorer, settings, texts

from loracle import pipeline
from loracle.config import RunConfig
from loracle.errors import Interrupted, UserError
from loracle.training import batches, distributed, loop


def train(folder, examples, task=SINGLE, *, loss=None, encode=encode, validate=None, scorer=None, **changes):
    """``fit`` as in test_loop.py; the validation loss is the sum of the absolute scores of six texts."""
    folder.mkdir(exist_ok=True, parents=True)
    scorer = scorer or new_scorer(labels=1 if task is PAIRS else 2)
    encode_all = globals()["encode"]

    def absolute_scores():
        packed = scorer.pack([e for unit in encode_all(texts(6)) for e in unit])
        with torch.no_grad():
            size = scorer(packed).abs().sum().item()
        return {"metric": -size, "loss": size}

    loop.fit(
        loop.FitJob(
            scorer=scorer,
            examples=examples,
            encode=encode,
            loss=loss or make_loss("label" if task.label_names else "pairs"),
            validate=validate or absolute_scores,
            settings=settings(**({"tokens_per_micro_batch": 10} | changes)),
            lr=0.01,
            folder=folder,
            quiet=True,
        )
    )
    if PartialState().is_main_process:
        save_file(loop.trainable_state(scorer), folder / "left.safetensors")


def ragged(folder):
    """21 texts in batches of 4: the last batch has one text for two processes."""
    train(folder, texts(21), batch=4)


def sharded(folder):
    """The same with a sharded base: a process without a micro-batch computes an empty one."""
    scorer = new_scorer()
    distributed.shard(scorer, torch.device("cpu"))
    weight = scorer.inner.base_model.layers[0].mlp.up_proj.weight
    (folder.parent / "parts").write_text(f"{weight.to_local().numel()} of {weight.numel()}")
    train(folder, texts(21), scorer=scorer, batch=4)


def ranker(folder):
    train(folder, groups(), PAIRS, batch=5)


def resumed(folder):
    """Continue a run that one process began (see test_distributed.py)."""
    train(folder, texts(21), batch=4)


def begin(folder):
    try:
        train(folder, texts(21), batch=4, encode=cut_at(5))
    except Cut:
        return
    raise AssertionError("not cut")


def last() -> bool:
    state = PartialState()
    return state.process_index == state.num_processes - 1


def short_of_memory(folder):
    """The last process alone runs out of memory, after its first micro-batch."""
    batches.MIN_TOKENS_PER_MICRO_BATCH = 2
    scorer, tokens = new_scorer(), []
    forward_of_model = scorer.forward

    def forward(batch):
        out = forward_of_model(batch)
        if torch.is_grad_enabled():
            tokens.append(batch.tokens)
            if last() and len(tokens) == 2:
                out.register_hook(lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
        return out

    scorer.forward = forward
    train(folder, texts(21), scorer=scorer, batch=12, tokens_per_micro_batch=20)
    (folder / f"tokens-{PartialState().process_index}").write_text(" ".join(map(str, tokens)))


def diverged(folder):
    """The loss of one text is NaN, in one process only."""
    plain = make_loss("label")

    def loss(examples):
        bound, bad = plain(examples), any(e.row == 9 for e in examples)
        return lambda scores: (bound(scores)[0] * (float("nan") if bad else 1), bound(scores)[1])

    train(folder, texts(21), loss=loss, batch=8)


def interrupted(folder):
    """The last process receives Ctrl-C."""
    plain, calls = make_loss("label"), []

    def loss(examples):
        calls.append(None)
        if last() and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(examples)

    train(folder, texts(21), loss=loss, batch=4, tokens_per_micro_batch=1000, save_steps=100)


def disagreeing(folder):
    """Validation differs between processes; that of the main one counts."""
    metrics = iter([0.5, 0.4, 0.3, 0.9] if PartialState().is_main_process else [0.5, 0.6, 0.7, 0.8])
    train(folder, texts(21), validate=lambda: {"metric": next(metrics), "loss": 1.0}, batch=7, epochs=4, patience=2)


def whole_run(folder, **more):
    folder.mkdir(exist_ok=True, parents=True)
    data = folder / "data.csv"
    distributed.start(torch.device("cpu"))
    distributed.on_main(lambda: write(data, labelled()).name)
    settings = QUICK | {
        "data": str(data),
        "model": MODEL,
        "batch": 7,
        "epochs": 2.0,
    }
    settings |= {"dropout": 0.0, "dtype": "float32", "out": str(folder / "run"), "baselines": True, **more}
    pipeline.train(RunConfig.from_flat(settings), log=lambda line: None, quiet=True)


def sharded_run(folder):
    whole_run(folder, shard=True)


MODEL = ""  # of the whole run
ALL = (
    ragged, sharded, ranker, resumed, short_of_memory, diverged, interrupted, disagreeing, whole_run, sharded_run,
)  # fmt: skip


def run(scenario, root):
    state = distributed.start(torch.device("cpu"))
    folder = root / scenario.__name__
    try:
        scenario(folder)
    except (UserError, Interrupted) as e:
        (folder / f"raised-{state.process_index}").write_text(str(e))


if __name__ == "__main__":
    faulthandler.dump_traceback_later(240, exit=True)  # shows where it hangs, and leaves no process behind
    MODEL = sys.argv[2]
    for each in ALL:
        run(each, Path(sys.argv[1]))
