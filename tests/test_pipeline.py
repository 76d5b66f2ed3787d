"""A killed or stopped run goes on as if nothing had happened, and a run that does not reproduce itself fails aloud."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from kills import KILLS
from safetensors.torch import load_file, save_file
from small import QUICK, facts, labelled, pairs, write

from loracle import pipeline
from loracle.baselines import base, linear_probe, zero_shot
from loracle.config import RunConfig, TrainConfig
from loracle.errors import UserError
from loracle.examples import RankGroup
from loracle.experiments.probe import probe_data
from loracle.models.scorer import Scorer
from loracle.runs import save, sharing
from loracle.runs.folder import read_info
from loracle.runs.predictor import Predictor
from loracle.tasks import Task
from loracle.tasks.dataset import Data, prepare_data
from loracle.training import preflight, prepare
from loracle.training.losses import choose_loss
from loracle.training.prepare import make_model, open_base, probe_base

STEPS = 24


def config_of(folder, model, **more):
    data = folder / "data.jsonl"
    if not data.exists():
        write(data, labelled(80))
    flat = QUICK | {"data": str(data), "model": str(model), "out": str(folder / "run"), "epochs": 10, "save_steps": 3}
    return RunConfig.from_flat(flat | {"max_steps": STEPS, "patience": 0} | more)


def train(config):
    return pipeline.train(config, log=lambda line: None, quiet=True)


@pytest.mark.slow
def test_rounds_that_would_not_fit_are_made_smaller_and_the_run_remembers(tiny_model, tmp_path, monkeypatch):
    need = preflight.training_need
    said = []

    def free(device):
        return int((needs[-1].bytes(70) if needs else 1e9) / preflight.USABLE) + 1

    needs = []
    monkeypatch.setattr(preflight, "free_memory", free)
    monkeypatch.setattr(preflight, "training_need", lambda *given: needs.append(need(*given)) or needs[-1])
    config = config_of(tmp_path, tiny_model("qwen2"), max_steps=2, batch=40)
    run = pipeline.train(config, log=said.append, quiet=True)
    assert any("micro-batches of 70 tokens instead" in line for line in said)
    assert any(line.startswith("an epoch: ") and "padding" in line for line in said)
    assert any(line.startswith("about ") and "for 2 steps" in line for line in said)
    assert read_info(run).config.train.tokens_per_micro_batch == 70


@pytest.mark.slow
def test_a_forward_for_which_memory_is_too_little_ends_no_run(tiny_model, tmp_path, monkeypatch):
    """It only asks how long the training will take; that goes on in smaller rounds."""
    said, whole, seen = [], Scorer.forward, []

    def forward(self, batch):
        seen.append(batch.tokens)
        if batch.tokens > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, batch)

    monkeypatch.setattr(Scorer, "forward", forward)
    pipeline.train(config_of(tmp_path, tiny_model("qwen2"), max_steps=2, batch=40), log=said.append, quiet=True)
    assert seen[0] > 100
    assert any("time of 2 steps is unknown" in line for line in said)


@pytest.mark.slow
def test_too_little_for_anything_is_said_beforehand(tiny_model, tmp_path, monkeypatch):
    """It is an estimate, so the run is tried; but nothing is promised."""
    said, need = [], preflight.training_need
    needs = []
    monkeypatch.setattr(preflight, "free_memory", lambda device: int(needs[-1].fixed if needs else 1e9))
    monkeypatch.setattr(preflight, "training_need", lambda *given: needs.append(need(*given)) or needs[-1])
    pipeline.train(config_of(tmp_path, tiny_model("qwen2"), max_steps=1), log=said.append, quiet=True)
    assert any("too small even for micro-batches of 64 tokens" in line for line in said)
    assert not any("results stay the same" in line for line in said)


@pytest.mark.parametrize("begin", [pipeline.train, probe_data])
def test_weights_that_do_not_fit_are_not_read(tiny_model, tmp_path, monkeypatch, begin):
    monkeypatch.setattr(prepare, "free_memory", lambda device: 1000)
    with pytest.raises(UserError, match=facts("0.0")):
        begin(config_of(tmp_path, tiny_model("qwen2")), log=lambda line: None)
    assert not (tmp_path / "run").exists()


def command(config):
    flags = [f"--{n.replace('_', '-')}={v}" for n, v in (
        ("model", config.model.model), ("out", config.out), ("epochs", 10), ("save-steps", 3), ("max-steps", STEPS),
        ("patience", 0), ("batch", 8), ("lr", 0.01), ("test-share", 0.2), ("validation-share", 0.2),
    )]  # fmt: skip
    return [sys.executable, "-m", "loracle", "train", config.data.data, *flags, "--no-baselines"]


def result(run):
    return (run / "adapter_model.safetensors").read_bytes(), json.loads((run / "metrics.json").read_text())["test"]


@pytest.fixture(scope="module")
def unbroken(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    config = config_of(folder, tiny_model("qwen2"))
    done = subprocess.run(command(config), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def wait_for_step(run, step, process):
    log = run / "log.jsonl"
    while process.poll() is None:
        if log.exists() and len(log.read_text().splitlines()) >= step:
            return
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.repeated
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(2, KILLS))])
def test_sigkill_at_a_random_moment_then_resume_is_bit_for_bit(tiny_model, tmp_path, unbroken, seed):
    rng = np.random.default_rng(seed)
    config = config_of(tmp_path, tiny_model("qwen2"))
    process = subprocess.Popen(command(config), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_step(tmp_path / "run", int(rng.integers(1, STEPS)), process)
    time.sleep(rng.random() * 0.05)  # somewhere in a step, or in the writing of a checkpoint
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not (tmp_path / "run" / "manifest.json").exists():
        resumed = [sys.executable, "-m", "loracle", "train", "--resume", str(tmp_path / "run")]
        done = subprocess.run(resumed, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert result(tmp_path / "run") == result(unbroken)


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on_and_going_on_is_exact(tiny_model, tmp_path, unbroken):
    config = config_of(tmp_path, tiny_model("qwen2"))
    process = subprocess.Popen(command(config), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for_step(tmp_path / "run", 7, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"loracle train --resume {config.out}" in said
    pipeline.resume(tmp_path / "run", log=lambda line: None, quiet=True)
    assert result(tmp_path / "run")[0] == result(unbroken)[0]


@pytest.mark.slow
def test_resume_refuses_what_is_not_the_same_run(tiny_model, tmp_path):
    config = config_of(tmp_path, tiny_model("qwen2"), max_steps=2)
    run = train(config)
    with pytest.raises(UserError, match="is finished"):
        pipeline.resume(run)
    (run / "manifest.json").unlink()
    write(tmp_path / "data.jsonl", labelled(81))
    with pytest.raises(UserError, match="have changed"):
        pipeline.resume(run, log=lambda line: None)


@pytest.mark.slow
def test_a_run_that_does_not_reproduce_itself_fails_aloud(tiny_model, tmp_path, monkeypatch):
    """The head is spoilt between training and the check, as several tools have done to their users."""
    honest = save.save_adapter

    def spoilt(model, folder, **how):
        honest(model, folder, **how)
        path = folder / "adapter_model.safetensors"
        save_file({k: v * 0.5 if "score" in k else v for k, v in load_file(path).items()}, path)

    monkeypatch.setattr(save, "save_adapter", spoilt)
    with pytest.raises(RuntimeError, match="does not reproduce"):
        train(config_of(tmp_path, tiny_model("qwen2"), max_steps=2))
    assert not (tmp_path / "run" / "manifest.json").exists()


@pytest.mark.slow
def test_the_lines_of_the_model_card_give_the_same_scores(tiny_model, tmp_path, monkeypatch):
    """Plain PEFT opens the folder as its README says, several texts at once, in float32."""
    run = train(config_of(tmp_path, tiny_model("qwen2"), dtype="float32"))
    card = (run / "README.md").read_text()
    assert "| loracle |" in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    monkeypatch.chdir(run)
    said = {}
    exec(code, said)
    wanted = Predictor(run).scores(["a text", "another"])
    np.testing.assert_allclose(said["scores"].detach().numpy(), wanted, rtol=0, atol=1e-5 * max(1, abs(wanted).max()))


@pytest.mark.slow
def test_over_long_texts_are_counted_cut_or_chunked(tiny_model, tmp_path):
    write(
        tmp_path / "data.jsonl",
        [{**r, "text": r["text"] + " and more" * (30 * (i < 5))} for i, r in enumerate(labelled(80))],
    )
    for how in ("cut", "chunk"):
        said = []
        config = config_of(tmp_path, tiny_model("qwen2"), max_steps=1, max_length=40, long=how, out=str(tmp_path / how))
        run = pipeline.train(config, log=said.append, quiet=True)
        assert json.loads((run / "metrics.json").read_text())["texts"]["over_length"] == 5
        assert any(f"5 texts over 40 ({how}" in line for line in said)


@pytest.mark.slow
def test_a_second_run_of_the_same_file_gets_its_own_folder(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_of(tmp_path, tiny_model("qwen2"), max_steps=1, out=None)
    assert [train(config).name for _ in range(2)] == ["data", "data-2"]
    shutil.rmtree("runs")


def test_the_three_sides_share_no_text(tmp_path):
    write(tmp_path / "data.jsonl", [*labelled(60), *labelled(20)])
    sides = prepare_data(config_of(tmp_path, "unused"), lambda line: None)
    texts = [{e.text for e in side} for side in (sides.train, sides.validation, sides.test)]
    assert all(texts)
    assert len(set().union(*texts)) == sum(map(len, texts))


def test_what_a_test_file_holds_is_taken_out_of_training_and_counted(tmp_path):
    write(tmp_path / "test.jsonl", labelled(12))
    said = []
    data = prepare_data(config_of(tmp_path, "unused", test=str(tmp_path / "test.jsonl")), said.append)
    assert len(data.test) == 12
    assert not {e.text for e in data.test} & {e.text for e in [*data.train, *data.validation]}
    assert any("test" in line and line.startswith("note:") for line in said)


def test_what_the_audit_sees_is_said_while_training(tmp_path):
    rows = [*labelled(60), {"text": labelled(1)[0]["text"], "label": "neg"}]
    write(tmp_path / "data.jsonl", rows)
    said = []
    prepare_data(config_of(tmp_path, "unused"), said.append)
    assert any("repeat an earlier text" in line for line in said)
    assert any("label" in line and "61" in line for line in said)


def test_pairs_of_one_title_stay_on_one_side(tmp_path):
    rows = [*pairs(20), *({"chosen": f"good title {i}", "rejected": f"worse title {i}"} for i in range(20))]
    write(tmp_path / "data.jsonl", rows)
    sides = prepare_data(config_of(tmp_path, "unused"), lambda line: None)
    titles = [{t for g in side for t in g.texts} for side in (sides.train, sides.test)]
    assert not titles[0] & titles[1]


def test_the_test_side_is_on_no_other_side_whoever_made_the_splits(tmp_path):
    """A data set whose own validation repeats its test: early stopping would look at the test."""
    folder = tmp_path / "set"
    folder.mkdir()
    rows = labelled(90)
    for name, some in (("train", rows[:60]), ("validation", rows[60:80]), ("test", rows[70:90])):
        write(folder / f"{name}.jsonl", some)
    said = []
    sides = prepare_data(config_of(tmp_path, "unused", data=str(folder)), said.append)
    assert not {e.text for e in sides.validation} & {e.text for e in sides.test}
    assert (len(sides.train), len(sides.validation), len(sides.test)) == (60, 10, 20)
    assert any("left out: 10" in line for line in said)


def test_a_test_file_that_takes_a_whole_class_away_is_said(tmp_path):
    rows = [{"text": f"text {i}", "label": "x" if i < 30 else "y"} for i in range(36)]
    write(tmp_path / "data.jsonl", rows)
    write(tmp_path / "test.jsonl", rows[30:])
    with pytest.raises(UserError, match="same label"):
        prepare_data(config_of(tmp_path, "unused", test=str(tmp_path / "test.jsonl")), lambda line: None)


def test_a_test_split_without_labels_is_said_and_another_one_made(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", labelled(60))
    write(folder / "test.jsonl", [{"text": r["text"] + "!", "label": None} for r in labelled(20)])
    said = []
    sides = prepare_data(config_of(tmp_path, "unused", data=str(folder)), said.append)
    assert sides.test
    assert any("(test) is not used" in line for line in said)


def test_equal_texts_of_other_contexts_are_other_texts(tmp_path):
    rows = [{"text": "yes", "context": f"question {i}", "label": "xy"[i % 2]} for i in range(60)]
    write(tmp_path / "data.jsonl", rows)
    sides = prepare_data(config_of(tmp_path, "unused", context="context"), lambda line: None)
    assert len(sides.train) + len(sides.validation) + len(sides.test) == 60


@pytest.mark.slow
def test_a_template_with_a_context_wants_one_for_every_text(tiny_model, tmp_path):
    config = config_of(tmp_path, tiny_model("qwen2"), template="About {context}: {text}", max_steps=1)
    with pytest.raises(UserError, match="have no context"):
        train(config)
    write(tmp_path / "data.jsonl", [{**r, "context": "sport"} for r in labelled(80)])
    run = train(
        config_of(tmp_path, tiny_model("qwen2"), template="About {context}: {text}", max_steps=1, context="context")
    )
    assert Predictor(run).scores(["a"], ["sport"]).shape == (1, 3)
    with pytest.raises(UserError, match="have no context"):
        Predictor(run).scores(["a"])


@pytest.mark.slow
def test_a_model_of_few_positions_cuts_sooner_and_says_so(tiny_model, tmp_path):
    """BERT has 512 positions; asked for more, it would fail in the middle of a run."""
    write(
        tmp_path / "data.jsonl",
        [{**r, "text": r["text"] + " and more" * (600 * (i == 3))} for i, r in enumerate(labelled(80))],
    )
    for kind, room in (("bert", 512), ("roberta", 510)):
        said = []
        config = config_of(tmp_path, tiny_model(kind), max_length=1024, max_steps=1, out=str(tmp_path / kind))
        run = pipeline.train(config, log=said.append, quiet=True)
        assert any(f"--max-length 1024 becomes {room}" in line for line in said)
        assert json.loads((run / "metrics.json").read_text())["texts"]["max"] == room


def test_scores_that_are_no_numbers_stop_a_look_with_step_and_rows(tiny_model, tmp_path):
    with pytest.raises(UserError, match=facts("1")):
        train(config_of(tmp_path, tiny_model("qwen2"), lr=1e30, max_steps=1, save_steps=1))
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_a_torn_log_does_not_stop_a_resume(tiny_model, tmp_path, unbroken):
    config = config_of(tmp_path, tiny_model("qwen2"))
    process = subprocess.Popen(command(config), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_step(tmp_path / "run", 7, process)
    process.kill()
    process.wait()
    with (tmp_path / "run" / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "lo')
    pipeline.resume(tmp_path / "run", log=lambda line: None, quiet=True)
    assert result(tmp_path / "run")[0] == result(unbroken)[0]


@pytest.mark.slow
def test_a_kill_while_saving_leaves_the_checkpoint(tiny_model, tmp_path, monkeypatch):
    """The manifest says that a run is whole; until then the checkpoint is all there is."""
    monkeypatch.setattr(save.run_folder, "write_manifest", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(config_of(tmp_path, tiny_model("qwen2"), max_steps=2))
    monkeypatch.undo()
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    run = pipeline.resume(tmp_path / "run", log=lambda line: None, quiet=True)
    assert not (run / "checkpoints").exists()


def test_a_pattern_is_found_again_from_anywhere(tmp_path, monkeypatch):
    """And of where it pointed a pushed run tells the last part alone."""
    write(tmp_path / "a.csv", labelled(6))
    monkeypatch.chdir(tmp_path)
    found = pipeline.with_absolute_paths(RunConfig.from_flat({"data": "*.csv"})).data.data
    assert found == str(tmp_path / "*.csv")
    assert [sharing._name(spec) for spec in (found, "clients/acme/*.csv", "hf:me/data")] == [
        "*.csv",
        "*.csv",
        "hf:me/data",
    ]


def test_data_of_a_folder_that_changed_are_seen(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", labelled(60))
    first = prepare_data(config_of(tmp_path, "unused", data=str(folder)), lambda line: None).checksums
    write(folder / "train.jsonl", labelled(63))
    assert prepare_data(config_of(tmp_path, "unused", data=str(folder)), lambda line: None).checksums != first


def test_the_saturation_of_frequent_clicks_is_that_of_log_odds():
    """A log of 50 % click rates whose titles differ by 0.3: n / (tau^2 (1 - p)) clicks, not what rare ones would say."""
    rng, groups = np.random.default_rng(0), []
    for i in range(300):
        rates = 1 / (1 + np.exp(-0.3 * rng.normal(size=4)))
        clicks = rng.binomial(2000, rates)
        groups.append(
            RankGroup(group=str(i), texts=tuple(f"title {i} {j}" for j in range(4)), rows=(i,) * 4,
                      clicks=tuple(clicks.tolist()), impressions=(2000,) * 4)
        )  # fmt: skip
    task = Task(name="click_ranking")
    data = Data(task=task, train=groups[:200], validation=groups[200:], test=groups[200:])
    _, chosen = choose_loss(data, TrainConfig())
    assert chosen["name"] == "binomial"
    assert chosen["saturation"] == pytest.approx(4 / (0.09 * 0.5), rel=0.2)


def test_linear_probe_reads_the_best_layer(tiny_model, tmp_path):
    """The choice equals the probe's own; the states equal those of a pass for that layer alone."""
    config = config_of(tmp_path, tiny_model("qwen2"))
    data = prepare_data(config, lambda line: None)
    loss = choose_loss(data, config.train)
    opened = open_base(config, data, lambda line: None)
    model = make_model(config, data, opened, None, loss)
    inputs = base.BaselineInputs(data=data, model=model, seed=0)
    chosen = linear_probe.choose_layer(model, data, data.train, data.validation, inputs)
    depths = probe_base(config, data, loss[0], opened)
    assert depths[chosen.layer].value == max(d.value for d in depths)
    for states, examples in ((chosen.train, data.train), (chosen.validation, data.validation)):
        for one, again in zip(states, linear_probe.mean_states(model, examples, chosen.layer), strict=True):
            np.testing.assert_allclose(one, again, atol=2e-2)  # bfloat16, in other micro-batches


@pytest.mark.slow
def test_baselines_above_their_caps_are_noted(tiny_model, tmp_path, monkeypatch):
    """TF-IDF stays, and the page says what is missing."""
    monkeypatch.setattr(linear_probe, "TEST_TEXTS", 1)
    monkeypatch.setattr(zero_shot, "QUESTIONS_ASKED", 1)
    said = []
    run = pipeline.train(
        config_of(tmp_path, tiny_model("qwen2"), max_steps=2, baselines=True), log=said.append, quiet=True
    )
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics["baselines"]) == {"majority", "tfidf"}
    assert [line for line in said if "no linear probe" in line] == [f"note: {metrics['notes'][0]}"]
    assert "No zero-shot: " in (run / "report.html").read_text()
    assert set(json.loads((run / "report.json").read_text())["label_errors"]) == {"train", "test"}
