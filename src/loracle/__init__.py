"""loracle: labelled text, preference pairs or click logs into an LLM classifier or ranker."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Predictor", "TextClassifier", "TextRanker", "UserError", "__version__"]

if TYPE_CHECKING:
    from loracle.api import TextClassifier, TextRanker
    from loracle.errors import UserError
    from loracle.runs.predictor import Predictor

_HOMES = {
    "TextClassifier": "loracle.api",
    "TextRanker": "loracle.api",
    "Predictor": "loracle.runs.predictor",
    "UserError": "loracle.errors",
}


def __getattr__(name: str) -> Any:
    """Public names are looked up on first use, so that ``import loracle`` does not wait for torch (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'loracle' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
