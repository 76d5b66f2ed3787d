"""Four small runs of one base, and a client for all of them."""

from __future__ import annotations

import pytest
from serving_client import RUNS, client_for
from small import QUICK, clicked, labelled, pairs, several, write

from loracle import pipeline
from loracle.config import RunConfig
from loracle.serving.server import load


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """Four float32 runs of one base: one label, several labels with an instruction, a ranker, a ranker from clicks."""
    root = tmp_path_factory.mktemp("runs")

    def train(name, rows, **more):
        data = write(root / f"{name}.jsonl", rows)
        config = QUICK | {"data": str(data), "model": str(tiny_model("qwen2")), "dtype": "float32", "max_length": 48}
        config |= {"out": str(root / name), **more}
        pipeline.train(RunConfig.from_flat(config), log=lambda line: None, quiet=True)

    train("moods", labelled())
    train("several", several(), template="Instruction: sort what follows by topic.\nTitle: {text}\nTopic:")
    train("pairs", pairs())
    train("clicks", clicked(), group="site,day", text="headline", clicks="clicks", impressions="impressions")
    return root


@pytest.fixture(scope="module")
def predictors(folder):
    return load([folder / name for name in RUNS], log=lambda line: None)


@pytest.fixture(scope="module")
def client(predictors):
    with client_for(predictors) as client:
        yield client


@pytest.fixture
def one(predictors):
    return {"moods": predictors["moods"]}
