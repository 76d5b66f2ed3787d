"""SIGKILL at random moments: no row is lost or doubled, checkpoints are complete. test_pipeline.py kills whole trainings."""

from __future__ import annotations

import shutil
import time
from collections import Counter

import kills
import numpy as np
import pytest
import torch
from kills import KILLS
from small import write

from loracle.runs.batch import PartialResults
from loracle.training.checkpoint import load_checkpoint

pytestmark = pytest.mark.repeated

ROWS = 3200


def finish(process):
    process.join(120)
    assert process.exitcode == 0


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".csv"] if KILLS <= 5 else [".csv", ".parquet"])
def test_killed_predict_ends_in_the_same_bytes(labelled_run, tmp_path, suffix, record_property):
    rows = [{"id": i, "text": f"good number {i}" if i % 7 else " "} for i in range(ROWS)]
    data, out, unbroken = write(tmp_path / "new.csv", rows), tmp_path / f"out{suffix}", tmp_path / f"unbroken{suffix}"
    finish(kills.start(kills.label, labelled_run, data, unbroken))
    if suffix == ".csv":
        ids = [line.split(",")[0] for line in unbroken.read_text().splitlines()]
        assert ids == ["id", *map(str, range(ROWS))]
    rng, scores, met, before = np.random.default_rng(KILLS), out.with_suffix(".scores"), Counter(), {}
    windows = [scores / f"{i:07d}.safetensors" for i in range(len(range(0, ROWS, kills.WINDOW)))]

    def reached(moment):
        """Whether this many windows are saved or, beyond the last, the output has begun."""
        if moment > len(windows):
            return any(scores.glob(".*.writing-*")) or out.exists()
        return not moment or windows[moment - 1].exists()

    for _ in range(KILLS):
        moment = int(rng.integers(len(before), len(windows) + 1)) if rng.random() < 0.7 else len(windows) + 1
        process = kills.start(kills.label, labelled_run, data, out)
        while process.is_alive() and not reached(moment):
            time.sleep(0.0002)
        time.sleep(rng.random() * 0.01)  # somewhere in scoring or writing
        process.kill()
        process.join()
        assert process.exitcode in (-9, 0)
        kept = {p.name: p.stat().st_mtime_ns for p in windows[: len(PartialResults(scores))]}
        if out.exists():
            assert out.read_bytes() == unbroken.read_bytes()
            met["after the output was whole"] += 1
            out.unlink()
            before = {}  # partial results may be half deleted
            continue
        lengths = [len(p) for p in PartialResults(scores)]
        assert lengths == [min(kills.WINDOW, ROWS - i * kills.WINDOW) for i in range(len(kept))]
        if any(scores.glob(".*.writing-*")) and len(kept) == len(windows):
            met["while the output was written"] += 1
        else:
            at = "between the first window and the last" if kept else "before the first window was kept"
            met["after the last window" if len(kept) == len(windows) else at] += 1
        assert not kept or before.items() <= kept.items(), "saved windows were computed again"
        if len(kept) == len(windows):  # nothing would be left to interrupt
            shutil.rmtree(scores)
            kept = {}
        before = kept
    finish(kills.start(kills.label, labelled_run, data, out))
    assert out.read_bytes() == unbroken.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["new.csv", out.name, unbroken.name])
    hit = [met["between the first window and the last"], met["while the output was written"]]
    assert any(hit) if KILLS <= 5 else all(hit), f"kills missed: {met}"
    record_property("kills", dict(met))


@pytest.mark.slow
def test_checkpoint_is_complete_after_a_kill_while_saving(tmp_path, record_property):
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
        checkpoint = load_checkpoint(folder)
        step = checkpoint.progress["step"]
        assert step in (last, last + 1), "a saved checkpoint is gone"
        for tensors in (checkpoint.weights, checkpoint.optimizer, checkpoint.best):
            assert torch.equal(tensors["w"], torch.full((128, 256), float(step)))
        last = step
    record_property("kills", dict(met))
