"""Small trainings, by one process or by several: ``torchrun --nproc-per-node 2 tests/training/scenarios.py FOLDER MODEL``.

Each leaves a folder: ``log.jsonl``, ``left.safetensors`` (the weights at its end), or what was raised in ``raised-<process>``.
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
from test_loop import PAIRS, SINGLE, Cut, cut_at, encode, groups, new_scorer, schedule, texts

from loracle import pipeline
from loracle.config import RunConfig
from loracle.errors import Interrupted, UserError
from loracle.training import distributed, loop

PLAIN = {"lr": 0.01, "tokens_per_micro_batch": 10}


def train(folder, examples, task=SINGLE, *, loss=None, encode=encode, look=None, scorer=None, **changes):
    """``fit`` as in test_loop.py, with a validation loss of its own: the sum of the absolute scores of six texts."""
    folder.mkdir(exist_ok=True, parents=True)
    scorer = scorer or new_scorer(labels=1 if task is PAIRS else 2)

    def seen():
        packed = scorer.pack([e for unit in encode_all(texts(6)) for e in unit])
        with torch.no_grad():
            size = scorer(packed).abs().sum().item()
        return {"metric": -size, "loss": size}

    encode_all, plan = globals()["encode"], schedule(**(PLAIN | changes))
    loop.fit(
        scorer,
        examples,
        encode,
        loss or make_loss("label" if task.label_names else "pairs"),
        look or seen,
        schedule=plan,
        folder=folder,
        quiet=True,
    )
    if PartialState().is_main_process:
        save_file(loop.trainable_state(scorer), folder / "left.safetensors")


def ragged(folder):
    """21 texts in batches of 4: the last one has less than two processes can share."""
    train(folder, texts(21), batch=4)


def sharded(folder):
    """The same, each process with a part of the frozen weights: rounds that only one of them has are met by the other."""
    scorer = new_scorer()
    distributed.shard(scorer, torch.device("cpu"))
    weight = scorer.inner.base_model.layers[0].mlp.up_proj.weight
    (folder.parent / "parts").write_text(f"{weight.to_local().numel()} of {weight.numel()}")
    train(folder, texts(21), scorer=scorer, batch=4)


def ranker(folder):
    train(folder, groups(), PAIRS, batch=5)


def resumed(folder):
    """Begun by one process (see test_distributed.py), ended by whoever runs this."""
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
    """Memory runs out in the last process alone, with its gradients half done."""
    loop.FEWEST_TOKENS = 2
    scorer, rounds = new_scorer(), []
    own = scorer.forward

    def forward(batch):
        out = own(batch)
        if torch.is_grad_enabled():
            rounds.append(batch.tokens)
            if last() and len(rounds) == 2:
                out.register_hook(lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
        return out

    scorer.forward = forward
    train(folder, texts(21), scorer=scorer, batch=12, tokens_per_micro_batch=20)
    (folder / f"rounds-{PartialState().process_index}").write_text(" ".join(map(str, rounds)))


def diverged(folder):
    """The loss of one text is no number, and only one process has it."""
    plain = make_loss("label")

    def loss(examples):
        bound, bad = plain(examples), any(e.row == 9 for e in examples)
        return lambda scores: (bound(scores)[0] * (float("nan") if bad else 1), bound(scores)[1])

    train(folder, texts(21), loss=loss, batch=8)


def interrupted(folder):
    """The last process is told to stop."""
    plain, calls = make_loss("label"), []

    def loss(examples):
        calls.append(None)
        if last() and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(examples)

    train(folder, texts(21), loss=loss, batch=4, tokens_per_micro_batch=1000, save_steps=100)


def disagreeing(folder):
    """Looks that see other things in each process: that of the main one counts."""
    metrics = iter([0.5, 0.4, 0.3, 0.9] if PartialState().is_main_process else [0.5, 0.6, 0.7, 0.8])
    train(folder, texts(21), look=lambda: {"metric": next(metrics), "loss": 1.0}, batch=7, epochs=4, patience=2)


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
    faulthandler.dump_traceback_later(240, exit=True)  # says where it hangs, and leaves no process behind
    MODEL = sys.argv[2]
    for each in ALL:
        run(each, Path(sys.argv[1]))
