"""A head that starts from the labels' names: knows something at once, is saved as it is, refused where it means nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from small import facts, has_facts, integers, labelled, pairs, write
from transformers import AutoModel

from loracle.cli import main
from loracle.config import ModelConfig, RunConfig
from loracle.data.demo import bbc_headlines
from loracle.errors import UserError
from loracle.examples import LabeledText
from loracle.models.scoring import score
from loracle.runs.predictor import Predictor
from loracle.tasks import Task
from loracle.tasks.dataset import Data, prepare_data
from loracle.training import prepare, scoring

CUE = "Topic of this headline: {text}\nThe topic is"


def started(config, data):
    base = prepare.open_base(config, data, lambda line: None)
    scorer, encoder = prepare.new_model(config, data.task, base, None)
    prepare.init_head(config, scorer, encoder, data)
    return scorer, encoder


@pytest.mark.slow
def test_names_separate_topics_without_training(demo_folder):
    """Accuracy of five topics, chance 20 %; a head that was drawn is at chance."""
    headlines = bbc_headlines()[::18]  # sorted by topic, so that all five are there
    topics = sorted({topic for _, topic in headlines})
    task = Task(name="single_label", label_names=tuple(topics))
    some = [LabeledText(text=text, labels=(topics.index(topic),), row=i) for i, (text, topic) in enumerate(headlines)]
    some = [*some[::2], *some[1::2]]
    data = Data(task=task, train=some[:60], validation=some[60:80], test=some[60:])
    accuracy = {}
    for how in ("random", "names"):
        config = RunConfig.from_flat({"head_init": how, "template": CUE, "device": "cpu"})
        scorer, encoder = started(config, data)
        scores = scoring.score_examples(scorer, encoder, data.test)
        accuracy[how] = np.mean([s[0].argmax() == e.labels[0] for s, e in zip(scores, data.test, strict=True)])
    assert accuracy["names"] > 0.5
    assert accuracy["random"] < 0.45
    spread = np.concatenate(scores)
    assert 0.3 < (spread - spread.mean(1, keepdims=True)).std() < 3


@pytest.mark.slow
def test_head_ignores_the_mean_text(tiny_model, tmp_path):
    data = write(tmp_path / "data.jsonl", labelled())
    folder = tiny_model("qwen2")
    config = RunConfig.from_flat({"data": str(data), "model": str(folder), "head_init": "names", "dtype": "float32"})
    sides = prepare_data(config, lambda line: None)
    scorer, encoder = started(config, sides)
    head = scorer.inner.score.modules_to_save["default"].weight.detach().double().numpy()
    seen = np.concatenate([_state(folder, encoder, e.text) for e in sides.train])
    assert np.abs(head @ seen.mean(0)).max() < 1e-4
    logits = seen @ head.T
    assert (logits - logits.mean(1, keepdims=True)).std() == pytest.approx(1, rel=1e-3)
    known = np.concatenate([_state(folder, encoder, name) for name in sides.task.label_names])
    assert (known @ head.T).argmax(1).tolist() == [0, 1, 2]


def _state(folder, encoder, text):
    """Of one text alone, by transformers' own model; LoRA starts as nothing."""
    ids = torch.tensor([encoder([text])[0].chunks[0]])
    with torch.no_grad():
        return AutoModel.from_pretrained(folder)(input_ids=ids).last_hidden_state[:, -1].double().numpy()


@pytest.mark.slow
def test_head_from_names_reloads_unchanged(tiny_model, tmp_path):
    data, run = write(tmp_path / "data.csv", labelled()), tmp_path / "run"
    flags = ["--model", tiny_model("qwen2"), "--head-init", "names", "--max-steps", "1", "--lr", "1e-9", "-o", run]
    done = CliRunner().invoke(main, ["train", str(data), *map(str, flags), "--no-baselines"])
    assert done.exit_code == 0, done.output
    config = RunConfig.from_flat({"data": str(data), "model": str(tiny_model("qwen2")), "head_init": "names"})
    sides = prepare_data(config, lambda line: None)
    scorer, encoder = started(config, sides)
    texts = [e.text for e in sides.test]
    np.testing.assert_allclose(Predictor(run).scores(texts), score(scorer, encoder(texts)), atol=1e-5)
    assert json.loads((run / "metrics.json").read_text())["train"]["steps"] == 1


@pytest.mark.parametrize(
    ("rows", "kind", "words"),
    [
        (integers, "qwen2", "--head-init"),
        (pairs, "qwen2", "--head-init"),
        (labelled, "bert", "--head-init"),
    ],
)
def test_head_init_needs_names_and_decoder(tiny_model, tmp_path, rows, kind, words):
    data = write(tmp_path / "data.jsonl", rows())
    flags = ["--model", str(tiny_model(kind)), "--head-init", "names", "-o", str(tmp_path / "run")]
    done = CliRunner().invoke(main, ["train", str(data), *flags])
    assert done.exit_code == 2
    assert has_facts(done.stderr, *words.split(" | "))
    assert len(done.stderr.strip().splitlines()) <= 2  # message and hint
    assert not (tmp_path / "run").exists()


def test_mlp_head_cannot_start_from_names():
    with pytest.raises(UserError, match=facts("--head-init")):
        ModelConfig(head="mlp", head_init="names")
