"""SIGKILL at random moments: no row is lost or doubled, a checkpoint is whole. tests/test_recipe.py kills whole trainings."""

from __future__ import annotations

import time
from collections import Counter

import kills
import numpy as np
import pytest
import torch
from kills import KILLS
from small import write

from loracle.run.batch import Kept
from loracle.train.checkpoint import load_checkpoint

ROWS = 320


def finish(process):
    process.join(120)
    assert process.exitcode == 0


@pytest.mark.parametrize("suffix", [".csv"] if KILLS <= 5 else [".csv", ".parquet"])
def test_predict_killed_at_random_moments_ends_in_the_same_bytes(labelled_run, tmp_path, suffix, record_property):
    rows = [{"id": i, "text": f"good number {i}" if i % 7 else " "} for i in range(ROWS)]
    data, out, unbroken = write(tmp_path / "new.csv", rows), tmp_path / f"out{suffix}", tmp_path / f"unbroken{suffix}"
    finish(kills.start(kills.label, labelled_run, data, unbroken))
    if suffix == ".csv":
        ids = [line.split(",")[0] for line in unbroken.read_text().splitlines()]
        assert ids == ["id", *map(str, range(ROWS))]
    rng, scores, met, before = np.random.default_rng(KILLS), out.with_suffix(".scores"), Counter(), {}
    count = len(range(0, ROWS, kills.WINDOW))
    for _ in range(KILLS):
        done = len(list(scores.glob("*.safetensors")))
        until = int(rng.integers(done, count + 1))
        process = kills.start(kills.label, labelled_run, data, out)
        while process.is_alive() and len(list(scores.glob("*.safetensors"))) < until:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.03)  # somewhere in a window, or in the writing of what is kept or of the output
        process.kill()
        process.join()
        assert process.exitcode in (-9, 0)
        if out.exists():
            assert out.read_bytes() == unbroken.read_bytes()
            met["after the output was whole"] += 1
            out.unlink()
        elif (kept := {p.name: p.stat().st_mtime_ns for p in sorted(scores.glob("*.safetensors"))}) == {}:
            met["before the first window was kept"] += 1
        else:
            met["while the output was written" if len(kept) == count else "between the first window and the last"] += 1
            assert before.items() <= kept.items(), "what was kept was computed anew"
            held = list(Kept(scores))
            assert [len(p) for p in held] == [min(kills.WINDOW, ROWS - i * kills.WINDOW) for i in range(len(kept))]
            before = kept
            continue
        before = {}
    finish(kills.start(kills.label, labelled_run, data, out))
    assert out.read_bytes() == unbroken.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["new.csv", out.name, unbroken.name])
    assert met["between the first window and the last"] + met["while the output was written"], "every kill missed"
    record_property("kills", dict(met))


def test_a_checkpoint_whose_saving_is_killed_at_a_random_moment_is_whole(tmp_path, record_property):
    rng, folder, last, met = np.random.default_rng(KILLS), tmp_path / "checkpoints", 0, Counter()
    for _ in range(KILLS):
        ours, theirs = kills.pipe()
        process = kills.start(kills.save_without_end, folder, last + 1, theirs)
        theirs.close()
        assert ours.poll(120)
        time.sleep(rng.random() * 0.1)
        process.kill()
        process.join()
        assert process.exitcode == -9
        try:
            while True:
                last = ours.recv()
        except EOFError:
            pass
        in_the_act = any(path.name.startswith(".writing") for path in folder.iterdir())
        met["in the middle of a save" if in_the_act else "between two saves"] += 1
        found = load_checkpoint(folder)
        step = found.progress["step"]
        assert step in (last, last + 1), "a checkpoint that was saved is gone"
        for tensors in (found.weights, found.optimizer, found.best):
            assert torch.equal(tensors["w"], torch.full((128, 256), float(step)))
        last = step
    record_property("kills", dict(met))
