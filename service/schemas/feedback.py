"""What is said of an answer."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from service.schemas.fields import Strict


class FeedbackBody(Strict):
    """`POST /v1/feedback`: how good an answer was. request_id: its x-request-id. index: of several prompts, which."""

    request_id: str = Field(min_length=1, max_length=200)
    score: float | None = Field(default=None, ge=0, le=1)
    thumbs: Literal["up", "down"] | None = None
    comment: str = Field(default="", max_length=4000)
    index: int = Field(default=0, ge=0, le=1023)

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.score is None) == (self.thumbs is None):
            raise ValueError('send score, from 0 to 1, or thumbs, "up" or "down"')
        return self

    @property
    def value(self) -> float:
        """From 0 to 1."""
        return self.score if self.score is not None else float(self.thumbs == "up")
