"""What requests and answers look like, with an example each: the source of ``/openapi.json``.

Unknown fields are refused, since an option that is ignored changes an answer without a word.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from loracle.text.tokenize import clean

Text = Annotated[str, AfterValidator(clean)]  # JSON can spell a lone surrogate, and no answer could repeat it


def _example(**values: Any) -> ConfigDict:
    return ConfigDict(extra="forbid", json_schema_extra={"examples": [values]})


class Question(BaseModel):
    """What all of loracle's own requests can say."""

    run: str | None = Field(None, description="which run answers; may be left out where one is served")


class Texts(Question):
    """Texts to classify or to score."""

    model_config = _example(texts=["Markets fall as banks report losses"])
    texts: list[Text] = Field(min_length=1)
    contexts: list[Text | None] | None = Field(None, description="what stands before each text, one each")


class Titles(Question):
    """Titles that compete with each other."""

    model_config = _example(titles=["A river runs through it", "The river that you have never seen"], context=None)
    titles: list[Text] = Field(min_length=1)
    context: Text | None = Field(None, description="what they are titles for")


class Label(BaseModel):
    """Of one text: its label, or all above their thresholds where labels can stand together."""

    labels: list[str]
    probabilities: dict[str, float]
    cut: bool = Field(description="the text was longer than the model reads")


class Classified(BaseModel):
    model_config = _example(
        run="news",
        results=[{"labels": ["business"], "probabilities": {"business": 0.93, "sport": 0.07}, "cut": False}],
    )
    run: str
    results: list[Label]


class Ranked(BaseModel):
    """A title, as ``loracle rank`` shows it; what only clicks tell is null for other rankers."""

    rank: int
    index: int = Field(description="its place among the titles as they were sent, from 0")
    title: str
    score: float
    lift: float | None
    lift_low: float | None
    lift_high: float | None
    beats: list[float] | None = Field(description="chance that it is truly better than the best, the second best, …")


class Ranking(BaseModel):
    model_config = _example(
        run="clicks",
        results=[
            {"rank": 1, "index": 1, "title": "The river that you have never seen", "score": 0.41, "lift": 0.06,
             "lift_low": -0.1, "lift_high": 0.2, "beats": [0.5, 0.71]},
            {"rank": 2, "index": 0, "title": "A river runs through it", "score": 0.12, "lift": -0.06,
             "lift_low": -0.2, "lift_high": 0.1, "beats": [0.29, 0.5]},
        ],
    )  # fmt: skip
    run: str
    results: list[Ranked]


class Scores(BaseModel):
    """Scores before any softmax, one for each label of each text; a ranker has one a text."""

    model_config = _example(run="news", labels=["business", "sport"], scores=[[1.9, -0.7]])
    run: str
    labels: list[str]
    scores: list[list[float]]


class Model(BaseModel):
    id: str
    object: str = "model"
    owned_by: str = "loracle"
    task: str = Field(description="the task, such as single_label or click_ranking")
    labels: list[str]
    base: str = Field(description="the base model that it stands on")


class Models(BaseModel):
    object: str = "list"
    data: list[Model]


class Error(BaseModel):
    code: int
    message: str


class Problem(BaseModel):
    """Every answer that is none."""

    error: Error


# --- as vLLM has them (its `entrypoints/pooling/{classify,scoring}/protocol.py`) ----------------------------------------


class VllmClassify(BaseModel):
    model_config = _example(model="news", input=["Markets fall as banks report losses"])
    model: str | None = None
    input: Text | list[Text] = Field(min_length=1)
    user: str | None = Field(None, description="ignored, as vLLM does")


class VllmUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class VllmClassifyUsage(VllmUsage):
    completion_tokens: int = 0
    prompt_tokens_details: None = None


class VllmClass(BaseModel):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class VllmClassified(BaseModel):
    id: str
    object: str = "list"
    created: int
    model: str
    data: list[VllmClass]
    usage: VllmClassifyUsage


class VllmRerank(BaseModel):
    model_config = _example(model="clicks", query="An article on rivers", documents=["A river", "Rivers"], top_n=1)
    model: str | None = None
    query: Text = Field(description="the context; empty: none")
    documents: list[Text] = Field(min_length=1)
    top_n: int = Field(0, ge=0, strict=True, description="0: all")  # else `true` would be taken for 1
    user: str | None = Field(None, description="ignored, as vLLM does")


class VllmDocument(BaseModel):
    text: str
    multi_modal: None = None


class VllmReranked(BaseModel):
    index: int
    document: VllmDocument
    relevance_score: float


class VllmReranking(BaseModel):
    id: str
    model: str
    usage: VllmUsage
    results: list[VllmReranked]
