"""What requests and answers of all routes share. Each route's own models are beside it in ``routes/``."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict

from loracle.text.tokenize import clean

Text = Annotated[str, AfterValidator(clean)]  # JSON can hold a lone surrogate, which no answer could repeat


def with_example(**values: Any) -> ConfigDict:
    """Model settings: an example for ``/openapi.json``, and unknown fields are errors, not ignored."""
    return ConfigDict(extra="forbid", json_schema_extra={"examples": [values]})


class Error(BaseModel):
    code: int
    message: str


class ErrorResponse(BaseModel):
    """The body of every error."""

    error: Error
