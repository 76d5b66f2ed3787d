"""vLLM's API for classifiers and rerankers, for texts (its `entrypoints/pooling/{classify,scoring}/protocol.py`)."""

from __future__ import annotations

import time
import uuid

import numpy as np
from fastapi import APIRouter
from pydantic import BaseModel, Field

from loracle.serving.schemas import Text, with_example
from loracle.serving.service import Service

router = APIRouter()


class VllmUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class VllmClassifyRequest(BaseModel):
    model_config = with_example(model="news", input=["Markets fall as banks report losses"])
    model: str | None = Field(None, description="Name of the run. Optional if only one run is served.")
    input: Text | list[Text] = Field(min_length=1)
    user: str | None = Field(None, description="Ignored, as in vLLM.")


class VllmClassifyUsage(VllmUsage):
    completion_tokens: int = 0
    prompt_tokens_details: None = None


class VllmClassifyResult(BaseModel):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class VllmClassifyResponse(BaseModel):
    id: str
    object: str = "list"
    created: int
    model: str
    data: list[VllmClassifyResult]
    usage: VllmClassifyUsage


@router.post("/classify")
async def classify(request: VllmClassifyRequest, service: Service) -> VllmClassifyResponse:
    """Return the most likely label and the probabilities of each text, as vLLM does."""
    run = service.pick_run(request.model, "predict")
    texts = [request.input] if isinstance(request.input, str) else request.input
    encoded, proba, _ = await service.classify(run, texts)
    names, tokens = service.predictors[run].task.label_names, sum(e.tokens for e in encoded)
    return VllmClassifyResponse(
        id=f"classify-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=run,
        data=[
            VllmClassifyResult(index=i, label=names[p.argmax()], probs=p.tolist(), num_classes=len(names))
            for i, p in enumerate(proba)
        ],
        usage=VllmClassifyUsage(prompt_tokens=tokens, total_tokens=tokens),
    )


class VllmRerankRequest(BaseModel):
    model_config = with_example(model="clicks", query="An article on rivers", documents=["A river", "Rivers"], top_n=1)
    model: str | None = Field(None, description="Name of the run. Optional if only one run is served.")
    query: Text = Field(description="The context of the documents. Empty: no context.")
    documents: list[Text] = Field(min_length=1)
    top_n: int = Field(0, ge=0, strict=True, description="How many results to return. 0: all.")  # strict: not `true`
    user: str | None = Field(None, description="Ignored, as in vLLM.")


class VllmDocument(BaseModel):
    text: str
    multi_modal: None = None


class VllmRerankResult(BaseModel):
    index: int
    document: VllmDocument
    relevance_score: float


class VllmRerankResponse(BaseModel):
    id: str
    model: str
    usage: VllmUsage
    results: list[VllmRerankResult]


@router.post("/rerank")
@router.post("/v1/rerank")
@router.post("/v2/rerank")
async def rerank(request: VllmRerankRequest, service: Service) -> VllmRerankResponse:
    """Return the documents, best first, as vLLM does. The relevance score is the ranker's raw score."""
    run = service.pick_run(request.model, "rank")
    encoded, scores = await service.scores(run, request.documents, [request.query or None] * len(request.documents))
    service.metrics.count_ranking(run, scores[:, 0])
    best_first = np.argsort(-scores[:, 0], kind="stable")[: request.top_n or None]
    tokens = sum(e.tokens for e in encoded)
    return VllmRerankResponse(
        id=f"rerank-{uuid.uuid4().hex}",
        model=run,
        usage=VllmUsage(prompt_tokens=tokens, total_tokens=tokens),
        results=[
            VllmRerankResult(index=i, document=VllmDocument(text=request.documents[i]), relevance_score=scores[i, 0])
            for i in best_first.tolist()
        ],
    )
