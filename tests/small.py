"""Small data files of every task, learnable by a tiny random model, and the quickest settings to train on them."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

WORDS = {"pos": "good", "neg": "bad", "mid": "so"}
QUICK = {"epochs": 1.0, "batch": 8, "lr": 1e-2, "baselines": False, "test_share": 0.2, "validation_share": 0.2}

ENGLISH = (
    "Markets fall as banks report losses", "Striker signs for rivals after record bid", "Star wins film award in Berlin",
    "Minister quits over tax plan", "Chip maker unveils faster phone processor", "Heavy rain closes the coast road",
)  # fmt: skip
CHINESE = (
    "受银行亏损影响,股市全线下跌", "前锋以创纪录转会费加盟死敌", "影星在柏林电影节获奖",
    "部长因税收方案辞职", "芯片制造商发布更快的手机处理器", "暴雨导致沿海公路封闭",
)  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as the file's suffix says: .csv, .tsv, .jsonl or .json."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as f:
            out = csv.DictWriter(f, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            out.writeheader()
            out.writerows(rows)
    return path


def labelled(n: int = 60) -> list[dict[str, Any]]:
    """One of three labels each; one word of the text says which."""
    return [{"text": f"{list(WORDS.values())[i % 3]} number {i}", "label": list(WORDS)[i % 3]} for i in range(n)]


def integers(n: int = 60) -> list[dict[str, Any]]:
    return [{"text": row["text"], "label": list(WORDS).index(row["label"]) * 10} for row in labelled(n)]


def messages(n: int = 60) -> list[dict[str, Any]]:
    return [{"messages": [{"role": "user", "content": row["text"]}], "label": row["label"]} for row in labelled(n)]


def several(n: int = 60) -> list[dict[str, Any]]:
    """Any number of two labels each."""
    return [
        {"text": f"{'good' if i % 2 else 'bad'} and {'dear' if i % 3 else 'cheap'} {i}",
         "labels": [name for name, has in (("quality", i % 2), ("price", i % 3 == 0)) if has]}
        for i in range(n)
    ]  # fmt: skip


def pairs(n: int = 40) -> list[dict[str, Any]]:
    return [{"chosen": f"good title {i}", "rejected": f"bad title {i}"} for i in range(n)]


def prompted(n: int = 40) -> list[dict[str, Any]]:
    return [{"prompt": f"article {i // 2}", **row} for i, row in enumerate(pairs(n))]


def graded(n: int = 20) -> list[dict[str, Any]]:
    return [
        {"query": f"article {i}", "title": f"{word} title {i}", "grade": grade}
        for i in range(n)
        for grade, word in enumerate(("bad", "so", "good"))
    ]


def clicked(n: int = 20) -> list[dict[str, Any]]:
    """A click log whose groups are told apart by two columns together."""
    return [
        {"site": f"site {i % 2}", "day": f"day {i // 2}", "headline": f"{word} headline {i}", "clicks": 10 * c,
         "impressions": 1000}
        for i in range(n)
        for c, word in enumerate(("bad", "so", "good"))
    ]  # fmt: skip


LOSS_OF = {"label": "cross-entropy", "labels": "binary", "pairs": "bradley-terry", "grades": "list", "clicks": "list"}


def make_loss(evidence: str, name: str = "auto", *, weights=None, margin: float = 1.0, saturation: float = 200.0):
    """A loss by name; ``auto`` is what such evidence gets by default."""
    from loracle.training.losses import LOSSES, LossSettings

    settings = LossSettings(class_weights=weights, margin=margin, saturation=saturation)
    return LOSSES[LOSS_OF[evidence] if name == "auto" else name].make(settings)


def facts(*words: str) -> str:
    """A pattern for ``pytest.raises(match=…)``: the message has all of these words, in any order and case."""
    return "(?si)" + "".join(f"(?=.*{re.escape(word)})" for word in words)


def has_facts(message: str, *words: str) -> bool:
    """Whether a message has all of these words; what is missing is printed."""
    missing = [word for word in words if word.lower() not in message.lower()]
    print(f"missing {missing} in: {message}" if missing else "")
    return not missing


def new_scorer(base: Path, task: Any, *, lora: dict[str, Any] | None = None, seed: int = 0, **spec: Any) -> Any:
    """``build.new_scorer`` of a spec with these fields."""
    from loracle.models import build

    outputs, names = task.learning.outputs(task), task.label_names
    spec |= {"base": base, "outputs": outputs, "label_names": names, "problem_type": task.learning.problem_type}
    return build.new_scorer(build.ScorerSpec(**spec), lora=lora, seed=seed)


def load_scorer(base: Path, run: Path, task: Any, **spec: Any) -> Any:
    """``build.load_scorer`` of a spec with these fields."""
    from loracle.models import build

    outputs, names = task.learning.outputs(task), task.label_names
    spec |= {"base": base, "outputs": outputs, "label_names": names, "problem_type": task.learning.problem_type}
    return build.load_scorer(build.ScorerSpec(**spec), run)
