"""What the other endpoints take: routes, embeddings, tokens."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from routers.errors import RoutingError
from routers.explain import Detail
from routers.prompt import AUTO
from service.decisions import Request
from service.engines.base import Prompt
from service.schemas.bodies import Token, Turn
from service.schemas.fields import Routed, Strict, Text, Values, as_list

MOST_INPUTS: Final = 2048
"""Texts of one request for embeddings, as with OpenAI."""

EMBEDDERS: Final = ("router", AUTO)
"""Names of the one model that embeds."""

Texts = Annotated[list[Text], Field(min_length=1, max_length=MOST_INPUTS)]


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
        return self.routed(self.prompt, expert, session)


class EmbeddingsBody(Strict):
    """`POST /v1/embeddings`: the vectors that prompts are routed by."""

    neutral: ClassVar[Values] = {"dimensions": ()}

    input: Annotated[Texts, BeforeValidator(as_list, json_schema_input_type=Text | Texts)]
    model: str = EMBEDDERS[0]
    encoding_format: Literal["float", "base64"] = "float"
    user: str = ""

    @model_validator(mode="after")
    def _of_a_model_that_embeds(self) -> Self:
        if self.model not in EMBEDDERS:
            raise RoutingError(f"no model {self.model!r} embeds; there are: {', '.join(EMBEDDERS)}")
        return self


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
    tokens: list[Token]
