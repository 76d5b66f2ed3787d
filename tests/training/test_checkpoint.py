"""Checkpoints: round trip, atomic writes, and damaged files."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch import nn

from loracle.errors import UserError
from loracle.training import checkpoint
from loracle.training.checkpoint import (
    Checkpoint,
    load_checkpoint,
    optimizer_tensors,
    save_checkpoint,
    set_optimizer_tensors,
    set_trainable_state,
    trainable_state,
)
from loracle.training.optimizer import make_optimizer


def at(step: int) -> Checkpoint:
    return Checkpoint(
        progress={"step": step, "best_loss": float("inf")},
        weights={"w": torch.full((2, 3), float(step))},
        optimizer={"0.exp_avg": torch.randn(2, 3), "0.step": torch.tensor(float(step))},
        best={"w": torch.zeros(2, 3)},
    )


def test_checkpoint_round_trip(tmp_path):
    saved = at(7)
    save_checkpoint(tmp_path, saved)
    loaded = load_checkpoint(tmp_path)
    assert loaded.progress == saved.progress
    for part in ("weights", "optimizer", "best"):
        theirs, ours = getattr(loaded, part), getattr(saved, part)
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_no_checkpoint_loads_as_none(tmp_path):
    assert load_checkpoint(tmp_path / "checkpoints") is None


def test_save_deletes_older_checkpoints_and_leftovers(tmp_path):
    (tmp_path / ".writing-step-00000001-1").mkdir()
    for step in (1, 2):
        save_checkpoint(tmp_path, at(step))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    assert load_checkpoint(tmp_path).progress["step"] == 2


def test_checkpoint_holds_no_pickle(tmp_path):
    names = {path.name for path in save_checkpoint(tmp_path, at(1)).iterdir()}
    assert names == {"weights.safetensors", "optimizer.safetensors", "best.safetensors", "state.json"}


@pytest.mark.parametrize("call", [1, 2, 3])
def test_failed_write_keeps_the_previous_checkpoint(tmp_path, monkeypatch, call):
    save_checkpoint(tmp_path, at(1))
    write, calls = checkpoint.save_file, []

    def full_disk(tensors, path):
        calls.append(path)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        write(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, at(2))
    assert load_checkpoint(tmp_path).progress["step"] == 1


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "best.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_damaged_checkpoint_is_skipped(tmp_path, name, damage):
    save_checkpoint(tmp_path, at(1))
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "elsewhere")
    newest = save_checkpoint(tmp_path, at(2))
    (tmp_path / "elsewhere").rename(tmp_path / "step-00000001")
    data = bytearray((newest / name).read_bytes())
    if damage == "gone":
        (newest / name).unlink()
    elif damage == "cut":
        (newest / name).write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 0xFF
        (newest / name).write_bytes(data)
    assert load_checkpoint(tmp_path).progress["step"] == 1
    shutil.rmtree(tmp_path / "step-00000001")
    with pytest.raises(UserError, match=r"damaged \(step-"):
        load_checkpoint(tmp_path)


def test_changed_step_counts_as_damage(tmp_path):
    state = save_checkpoint(tmp_path, at(1)) / "state.json"
    changed = json.loads(state.read_text())
    changed["progress"]["step"] = 7
    state.write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"damaged \(step-"):
        load_checkpoint(tmp_path)


def test_state_of_another_type_counts_as_damage(tmp_path):
    (save_checkpoint(tmp_path, at(1)) / "state.json").write_text(json.dumps([1, 2]))
    with pytest.raises(UserError, match=r"damaged \(step-"):
        load_checkpoint(tmp_path)


def test_restored_optimizer_takes_equal_steps():
    def steps(model, optimizer, count):
        for i in range(count):
            (model(torch.full((1, 3), float(i + 1))) ** 2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    def fresh():
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, make_optimizer(model, lr=0.1, weight_decay=0.1)

    model, optimizer = fresh()
    steps(model, optimizer, 2)
    again, other = fresh()
    set_trainable_state(again, trainable_state(model))
    set_optimizer_tensors(other, {name: t.clone() for name, t in optimizer_tensors(optimizer).items()})
    steps(model, optimizer, 2)
    steps(again, other, 2)
    assert torch.equal(model.weight, again.weight)
    assert torch.equal(model.bias, again.bias)


def test_trainable_state_is_a_copy():
    model = nn.Linear(2, 2)
    copy = trainable_state(model)
    with torch.no_grad():
        model.weight.zero_()
    assert copy["weight"].abs().sum() > 0


def test_weights_of_another_model_raise():
    with pytest.raises(ValueError, match="another model"):
        set_trainable_state(nn.Linear(2, 2), {"weight": torch.zeros(2, 2)})
