"""The bodies of completions and chats, and the requests that they are."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Final, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, field_validator, model_validator

from service.decisions import Request
from service.engines.base import Guide, Message, Prompt, Sampling, Tokens
from service.errors import RequestError
from service.schemas.fields import NEUTRAL, Json, Routed, Strict, Text, Values, as_list

MOST_ANSWERS: Final = 1024
"""Answers that one request may ask for, over all of its prompts."""

MOST_STOPS: Final = 64
"""Stop strings: OpenAI takes 4, and tasks of lm-evaluation-harness send more."""

MOST_LOGPROBS: Final = 20
"""Alternatives of a token that are told: OpenAI's for chats; its completions take 5, vLLM's 20."""

T = TypeVar("T")
Token = Annotated[int, Field(ge=0)]
Some = Annotated[list[T], Field(min_length=1)]

Prompts = str | Some[str] | Some[Token] | Some[Some[Token]]
Stops = Annotated[list[Text], Field(max_length=MOST_STOPS)]
TOKEN: Final = re.compile("^[0-9]{1,10}$")
BIASES: Final[Json] = {
    "propertyNames": {"pattern": TOKEN.pattern},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}


class StreamOptions(Strict):
    """What a stream carries beside the text; `continuous_usage_stats` (vLLM's) counts tokens in every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] = False


class TextPart(Strict):
    """A part of a message's content."""

    neutral: ClassVar[Values] = dict.fromkeys(("cache_control", "prompt_cache_breakpoint"), ())

    type: Literal["text"]
    text: str


def _as_parts(content: object) -> object:
    if not isinstance(content, str | list):
        raise ValueError('takes a text, or text parts: {"type": "text", "text": "..."}')
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Turn(Strict):
    """One message of a chat; its content may come in text parts."""

    neutral: ClassVar[Values] = dict.fromkeys(
        ("annotations", "audio", "function_call", "name", "reasoning", "reasoning_content", "refusal", "tool_calls"),
        ([],),
    )
    # Clients send an assistant's message back as they got it, with whatever fields its server has.
    blank: ClassVar[tuple[object, ...]] = ([],)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Some[TextPart], BeforeValidator(_as_parts, json_schema_input_type=str | Some[TextPart])]
    tool_call_id: str | None = None

    def message(self) -> Message:
        """The engine's form. `developer` is OpenAI's new word for `system`, which the experts' templates know."""
        content = "\n".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, content)


class JsonSchema(Strict):
    """The schema of an answer; `strict` changes nothing, for every answer keeps to its schema."""

    name: str
    # `schema` itself is a method of pydantic's models.
    schema_: Json = Field(default={}, alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Strict):
    """What an answer has to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('has a json_schema if its type is "json_schema", and only then')
        return self

    def guide(self) -> Guide | None:
        """The engine's form."""
        if self.type == "text":
            return None
        return Guide("json_schema", json.dumps(self.json_schema.schema_ if self.json_schema else {}))


class StructuredOutputs(Strict):
    """vLLM's way to say it."""

    # `json` itself is a method of pydantic's models.
    json_: str | Json | None = Field(default=None, alias="json")
    regex: str | None = None
    json_object: bool | None = None

    def guides(self) -> list[Guide]:
        """The engine's form of each."""
        asked = [_schema(self.json_)] if self.json_ is not None else []
        asked += [Guide("regex", self.regex)] if self.regex is not None else []
        return asked + ([_schema({})] if self.json_object else [])


class Body(Strict, Routed):
    """What completions and chats have in common.

    A route is made for every prompt by itself. Where several prompts of a request go to several experts, `model` of the
    answer is `auto`, and in any answer to several prompts each choice names its own in the field `expert`.
    """

    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]
    prefix: ClassVar[str]
    neutral = NEUTRAL

    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: dict[str, float] = Field(default={}, json_schema_extra=BIASES)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[Stops, BeforeValidator(as_list, json_schema_input_type=Text | Stops)] = Field(default=[])
    n: int = Field(default=1, ge=1, le=128)
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    # vLLM's
    top_k: int = Field(default=0, ge=-1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, ge=0.001, le=1000)
    min_tokens: int = Field(default=0, ge=0)
    stop_token_ids: list[Token] = Field(default=[])
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    guided_json: str | Json | None = None
    guided_regex: str | None = None
    structured_outputs: StructuredOutputs | None = None
    # Taken, and of no effect here: names and hints.
    user: str = ""
    metadata: dict[str, str] = Field(default={})
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    safety_identifier: str = ""
    prompt_cache_key: str = ""
    prompt_cache_options: Json = Field(default={})
    prompt_cache_retention: str = ""
    request_id: str = ""

    @field_validator("logit_bias")
    @classmethod
    def _of_tokens(cls, biases: dict[str, float]) -> dict[str, float]:
        if not all(TOKEN.fullmatch(token) and -100 <= bias <= 100 for token, bias in biases.items()):
            raise ValueError("takes token ids, each with a bias between -100 and 100")
        return biases

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options and not self.stream:
            raise RequestError("stream_options need stream: true", "stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk of token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk has them."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    def requests(self, expert: str | None = None, session: str | None = None) -> tuple[Request, ...]:
        """A request for every prompt. expert, session: what headers say. Raises RequestError."""
        prompts, best_of = self.prompts(), max(self.n, self._best_of())
        if len(prompts) * best_of > MOST_ANSWERS:
            raise RequestError(f"{len(prompts) * best_of} answers are asked for, {MOST_ANSWERS} are the most", "n")
        sampling = self.sampling()
        return tuple(
            replace(
                self.routed(prompt, expert, session),
                sampling=sampling,
                stop=tuple(self.stop),
                keep_stop=self.include_stop_str_in_output,
                n=self.n,
                best_of=best_of,
                echo=self.echoes(),
            )
            for prompt in prompts
        )

    def sampling(self) -> Sampling:
        """How tokens are picked. Raises RequestError."""
        max_tokens = self.limit()
        if max_tokens is not None and self.min_tokens > max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}, over the answer's limit of {max_tokens}", "min_tokens"
            )
        logprobs = self.alternatives()
        return Sampling(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple((int(token), bias) for token, bias in self.logit_bias.items()),
            seed=self.seed,
            stop_tokens=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            logprobs=0 if logprobs is None and self._best_of() > self.n else logprobs,
            prompt_logprobs=logprobs if self.echoes() else None,
            guide=self._guide(),
        )

    def prompts(self) -> tuple[Prompt, ...]:
        """What is to be answered."""
        raise NotImplementedError

    def limit(self) -> int | None:
        """Tokens of an answer; None for what the window has left."""
        raise NotImplementedError

    def alternatives(self) -> int | None:
        """Log-probabilities wanted in every place, beside the token's own; None for none at all."""
        raise NotImplementedError

    def echoes(self) -> bool:
        """Whether the prompt goes before the answer."""
        return False

    def _best_of(self) -> int:
        return 1

    def _guide(self) -> Guide | None:
        asked = [_schema(self.guided_json)] if self.guided_json is not None else []
        asked += [Guide("regex", self.guided_regex)] if self.guided_regex is not None else []
        asked += self.structured_outputs.guides() if self.structured_outputs else []
        asked += [guide] if self.response_format and (guide := self.response_format.guide()) else []
        if len(asked) > 1:
            raise RequestError("an answer can have one form only: send one schema or one expression", "response_format")
        return asked[0] if asked else None


class CompletionBody(Body):
    """`POST /v1/completions`."""

    whole_object = chunk_object = "text_completion"
    prefix = "cmpl"
    neutral = NEUTRAL | {"add_special_tokens": (True,)}

    prompt: Prompts
    max_tokens: int = Field(default=16, ge=0)
    best_of: int = Field(default=1, ge=1, le=128)
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)

    @field_validator("prompt", mode="before")
    @classmethod
    def _of_one_kind(cls, prompt: Any) -> Any:
        """Checked here, for of a union pydantic would name every member that it is not."""
        kinds = (
            _is_string,
            _is_token,
            lambda each: isinstance(each, list) and bool(each) and all(map(_is_token, each)),
        )
        if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and any(all(map(k, prompt)) for k in kinds)):
            return prompt
        raise ValueError("must be a string, token ids, or a list of strings or of token ids, none of them empty")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens must be at least 1 unless the prompt is echoed", "max_tokens")
        if "best_of" in self.model_fields_set and self.best_of < self.n:
            raise RequestError(f"best_of is {self.best_of}, less than the {self.n} answers of n", "best_of")
        if self.stream and self.best_of > self.n:
            raise RequestError("best_of picks among whole answers: leave out stream, or best_of", "best_of")
        return self

    def prompts(self) -> tuple[Prompt, ...]:
        if isinstance(self.prompt, str):
            return (self.prompt,)
        if _is_token(self.prompt[0]):
            return (_tokens(self.prompt),)
        return tuple(each if isinstance(each, str) else _tokens(each) for each in self.prompt)

    def limit(self) -> int | None:
        return self.max_tokens

    def alternatives(self) -> int | None:
        return self.logprobs

    def echoes(self) -> bool:
        return self.echo

    def _best_of(self) -> int:
        return self.best_of


class ChatBody(Body):
    """`POST /v1/chat/completions`; as with OpenAI, an answer without a limit may fill the window."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    prefix = "chatcmpl"
    neutral = NEUTRAL | {"add_special_tokens": (False,)}

    messages: list[Turn] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MOST_LOGPROBS)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.max_tokens and self.max_completion_tokens not in (None, self.max_tokens):
            raise RequestError("max_tokens is the old name of max_completion_tokens: send one of them", "max_tokens")
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs need logprobs: true", "top_logprobs")
        return self

    def prompts(self) -> tuple[Prompt, ...]:
        return (tuple(turn.message() for turn in self.messages),)

    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def alternatives(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


def _is_string(value: object) -> bool:
    return isinstance(value, str)


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _tokens(ids: Any) -> Tokens:
    return Tokens(tuple(ids))


def _schema(schema: str | Json) -> Guide:
    """The form of a schema. Raises RequestError for text that is none."""
    try:
        return Guide("json_schema", json.dumps(json.loads(schema) if isinstance(schema, str) else schema))
    except ValueError as exc:
        raise RequestError(f"the schema is not JSON: {exc}", "response_format") from exc
