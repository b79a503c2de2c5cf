"""What the other endpoints take: routes, embeddings, tokens."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from routers.explain import Detail
from routers.prompt import AUTO
from service.decisions import Request
from service.engines.base import Prompt
from service.schemas.bodies import Turn
from service.schemas.fields import Routed, Strict

MOST_INPUTS: Final = 2048
"""Texts of one request for embeddings, as with OpenAI."""

Text = Annotated[str, Field(min_length=1)]
Texts = Text | Annotated[list[Text], Field(min_length=1, max_length=MOST_INPUTS)]


class DetailQuery(BaseModel):
    """`POST /route?detail=...`: not strict, for a query holds nothing but strings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    detail: Detail = "scores"


class ModelQuery(BaseModel):
    """`GET /tokenizer_info?model=...`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = AUTO


class RouteQuery(DetailQuery, Routed):
    """`GET /route?prompt=...`; `allow` and `deny` may come several times."""

    prompt: str

    def request(self, expert: str | None = None, session: str | None = None) -> Request:
        """The request whose route is asked for. expert, session: what headers say. Raises RequestError."""
        model = self.asked_model(expert)
        return Request(self.prompt, model=model, limits=self.limits(), mixture=self.mixture, session=session)


class EmbeddingsBody(Strict):
    """`POST /v1/embeddings`: the vectors that prompts are routed by, whatever the model is called."""

    neutral: ClassVar[dict[str, tuple[object, ...]]] = {"dimensions": ()}

    input: list[str] = Field(min_length=1, max_length=MOST_INPUTS)
    model: Literal["auto", "router"] = "router"
    encoding_format: Literal["float", "base64"] = "float"
    user: str = ""

    @field_validator("input", mode="before", json_schema_input_type=Texts)
    @classmethod
    def _as_list(cls, texts: Any) -> Any:
        return [texts] if isinstance(texts, str) else texts

    @field_validator("input")
    @classmethod
    def _not_empty(cls, texts: list[str]) -> list[str]:
        if "" in texts:
            raise ValueError(f"number {texts.index('')} is empty, and has no vector")
        return texts


class TokenizeBody(Strict):
    """`POST /tokenize`: a text, or a chat in the expert's template, as the expert's tokens."""

    model: str = AUTO
    prompt: str | None = None
    messages: list[Turn] | None = Field(default=None, min_length=1)
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("send prompt or messages")
        return self

    @property
    def text(self) -> Prompt:
        """The engine's form."""
        return tuple(turn.message() for turn in self.messages) if self.messages else self.prompt or ""


class DetokenizeBody(Strict):
    """`POST /detokenize`."""

    model: str = AUTO
    tokens: list[int]

    @field_validator("tokens")
    @classmethod
    def _ids(cls, tokens: list[int]) -> list[int]:
        if any(token < 0 for token in tokens):
            raise ValueError("takes token ids, which are not negative")
        return tokens
