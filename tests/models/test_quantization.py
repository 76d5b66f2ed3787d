"""A base in 4 bits: it learns, reloads exactly, keeps its head whole, and leaves as what it was trained as."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small import QUICK, facts, labelled, new_scorer, write

from loracle import pipeline
from loracle.config import RunConfig
from loracle.errors import UserError
from loracle.experiments.probe import probe_data
from loracle.models import memory, scoring
from loracle.runs.export import export
from loracle.runs.predictor import Predictor
from loracle.tasks import Task

pytest.importorskip("bitsandbytes", reason="the extra nf4 is not installed")
TASK = Task(name="single_label", label_names=("a", "b", "c"))
LORA = {"r": 4, "alpha": 8, "dropout": 0.0}


def scorer(folder, quantize, **more):
    settings = {"pad_token_id": 0, "dtype": torch.bfloat16, "device": torch.device("cpu"), "lora": LORA}
    return new_scorer(folder, TASK, quantize=quantize, **settings | more)


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nf4")
    config = QUICK | {"data": str(write(folder / "a.jsonl", labelled())), "model": str(tiny_model("qwen2"))}
    config |= {"out": str(folder / "run"), "quantize": "nf4", "epochs": 6.0, "dtype": "float32"}
    return pipeline.train(RunConfig.from_flat(config), log=lambda line: None, quiet=True)


@pytest.mark.slow
def test_four_bit_run_learns_and_reloads(run):
    predictor = Predictor(run)
    assert predictor.predict(["good number 3", "bad number 4", "so number 5"]) == ["pos", "neg", "mid"]
    kinds = {type(m).__name__ for m in predictor.scorer.inner.base_model.modules()}
    assert "Linear4bit" in kinds  # nothing was silently left in 16 bits


@pytest.mark.slow
def test_merge_of_four_bits_raises(run):
    with pytest.raises(UserError, match=facts("4", "--merge")):
        Predictor(run, merged=True)


def test_only_layers_of_the_backbone_are_quantised(tiny_model):
    small = scorer(tiny_model("llama"), "nf4")
    dtypes = {name: p.dtype for name, p in small.named_parameters()}
    four = {name for name, dtype in dtypes.items() if dtype == torch.uint8}
    assert four
    assert all(".layers." in name and "lora" not in name and "norm" not in name for name in four)
    trained = {name for name, p in small.named_parameters() if p.requires_grad}
    assert any("score" in name for name in trained)
    assert {dtypes[name] for name in trained} == {torch.float32}


def test_training_need_counts_whole_weights(tiny_model):
    whole, small = (memory.training_need(scorer(tiny_model("qwen2"), q)) for q in (None, "nf4"))
    assert small.flops_per_token == whole.flops_per_token
    assert small.per_token == whole.per_token
    folder = tiny_model("qwen2")
    assert memory.weight_bytes(folder, torch.bfloat16, four_bit=True) < memory.weight_bytes(folder, torch.bfloat16)


def test_export_has_dequantised_weights(run, tmp_path):
    """``export`` compares with the 4-bit run to 1e-4 itself; the unquantised base would be far off."""
    from transformers import AutoModelForSequenceClassification

    out = export(run, tmp_path / "plain", "transformers", log=lambda line: None)
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert not [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    assert np.isfinite(model.score.weight.detach().numpy()).all()


def test_invalid_quantisation_raises(tiny_model, tmp_path):
    with pytest.raises(UserError, match="--quantize needs a decoder"):
        scorer(tiny_model("bert"), "nf4", lora=None)
    with pytest.raises(UserError, match="4-bit weights do not train"):
        RunConfig.from_flat({"quantize": "nf4", "full": True})


def test_missing_bitsandbytes_names_the_extra(tiny_model, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(UserError, match=r"pip install 'loracle\[nf4\]'"):
        scorer(tiny_model("qwen2"), "nf4")


def test_probe_reads_quantised_states(tiny_model, tmp_path, monkeypatch):
    read: dict[str | None, list[np.ndarray]] = {None: [], "nf4": []}
    plain = scoring.layer_features
    for quantize, kept in read.items():
        flat = QUICK | {"data": str(write(tmp_path / "a.jsonl", labelled())), "model": str(tiny_model("qwen2"))}
        monkeypatch.setattr(scoring, "layer_features", lambda *given, kept=kept: kept.append(plain(*given)) or kept[-1])
        probe_data(RunConfig.from_flat(flat | {"quantize": quantize}), log=lambda line: None)
    assert read[None][0].shape == read["nf4"][0].shape
    assert not np.allclose(read[None][0], read["nf4"][0])
