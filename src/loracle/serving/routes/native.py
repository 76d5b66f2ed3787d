"""loracle's own API: classify, rank, score and list the served runs."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel, Field

from loracle.serving.schemas import Text, with_example
from loracle.serving.service import Service

router = APIRouter(prefix="/v1")


class RunRequest(BaseModel):
    run: str | None = Field(None, description="Name of the run. Optional if only one run is served.")


class TextsRequest(RunRequest):
    """Texts to classify or to score."""

    model_config = with_example(texts=["Markets fall as banks report losses"])
    texts: list[Text] = Field(min_length=1)
    contexts: list[Text | None] | None = Field(None, description="The context of each text, for the template.")


class LabelResult(BaseModel):
    labels: list[str] = Field(
        description="The label of the text. With several labels a text: all above their thresholds."
    )
    probabilities: dict[str, float]
    truncated: bool = Field(description="Whether the text was longer than the model reads.")


class ClassifyResponse(BaseModel):
    model_config = with_example(
        run="news",
        results=[{"labels": ["business"], "probabilities": {"business": 0.93, "sport": 0.07}, "truncated": False}],
    )
    run: str
    results: list[LabelResult]


@router.post("/classify")
async def classify(request: TextsRequest, service: Service) -> ClassifyResponse:
    """Return the labels and probabilities of each text, as `loracle predict` does."""
    run = service.pick_run(request.run, "predict")
    encoded, proba, labels = await service.classify(run, request.texts, request.contexts)
    label_names = service.predictors[run].task.label_names
    results = [
        LabelResult(labels=names, probabilities=dict(zip(label_names, p.tolist(), strict=True)), truncated=e.cut)
        for e, p, names in zip(encoded, proba, labels, strict=True)
    ]
    return ClassifyResponse(run=run, results=results)


class RankRequest(RunRequest):
    """Titles to compare with each other."""

    model_config = with_example(titles=["A river runs through it", "The river that you have never seen"], context=None)
    titles: list[Text] = Field(min_length=1)
    context: Text | None = Field(None, description="What the titles are for, for the template.")


class TitleResult(BaseModel):
    """A title as ``loracle rank`` shows it. Lifts and ``beats`` are null unless the run learned from clicks."""

    rank: int
    index: int = Field(description="Position of the title in the request, from 0.")
    title: str
    score: float
    lift: float | None
    lift_low: float | None
    lift_high: float | None
    beats: list[float] | None = Field(
        description="Probability that the title is truly better than the best, the second best, and so on."
    )


class RankResponse(BaseModel):
    model_config = with_example(
        run="clicks",
        results=[
            {"rank": 1, "index": 1, "title": "The river that you have never seen", "score": 0.41, "lift": 0.06,
             "lift_low": -0.1, "lift_high": 0.2, "beats": [0.5, 0.71]},
            {"rank": 2, "index": 0, "title": "A river runs through it", "score": 0.12, "lift": -0.06,
             "lift_low": -0.2, "lift_high": 0.1, "beats": [0.29, 0.5]},
        ],
    )  # fmt: skip
    run: str
    results: list[TitleResult]


@router.post("/rank")
async def rank(request: RankRequest, service: Service) -> RankResponse:
    """Return the titles, best first, with scores and lifts, as `loracle rank` does."""
    run = service.pick_run(request.run, "rank")
    results = [
        TitleResult(
            rank=place,
            index=r.index,
            title=r.text,
            score=r.score,
            lift=r.lift,
            lift_low=r.lift_low,
            lift_high=r.lift_high,
            beats=None if r.beats is None else list(r.beats),
        )
        for place, r in enumerate(await service.rank(run, request.titles, request.context), 1)
    ]
    return RankResponse(run=run, results=results)


class ScoreResponse(BaseModel):
    """Scores before softmax: one for each label of each text. A ranker has one score a text and no labels."""

    model_config = with_example(run="news", labels=["business", "sport"], scores=[[1.9, -0.7]])
    run: str
    labels: list[str]
    scores: list[list[float]]


@router.post("/score")
async def score(request: TextsRequest, service: Service) -> ScoreResponse:
    """Return the scores before softmax of a classifier or a ranker."""
    run = service.pick_run(request.run)
    _, scores = await service.scores(run, request.texts, request.contexts)
    return ScoreResponse(run=run, labels=list(service.predictors[run].task.label_names), scores=scores.tolist())


class ModelInfo(BaseModel):
    id: str
    object: str = "model"
    owned_by: str = "loracle"
    task: str = Field(description="Name of the task, such as single_label or ranking.")
    command: str = Field(description="predict or rank: what the run answers.")
    labels: list[str]
    base: str = Field(description="Source of the base model.")


class ModelsResponse(BaseModel):
    object: str = "list"
    data: list[ModelInfo]


@router.get("/models")
async def models(service: Service) -> ModelsResponse:
    """List the served runs."""
    return ModelsResponse(
        data=[
            ModelInfo(
                id=name,
                task=p.task.name,
                command=p.task.output.command,
                labels=list(p.task.label_names),
                base=p.info.base["source"],
            )
            for name, p in service.predictors.items()
        ]
    )
