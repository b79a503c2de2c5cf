"""What all bodies have in common: strict fields, those that are not served, and the sentence for a wrong one.

A field of OpenAI's (or of vLLM's) that is not served is taken at its neutral value and refused by name at any other.
Fields that begin with `x_` are extensions of the client's own, and ignored; any other unknown one is refused.
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, ClassVar, Final, Self

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, ValidationError, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError

from routers.policy import Limits
from routers.prompt import AUTO
from service.decisions import POLICIES, Mixture, Request
from service.engines.base import Prompt
from service.errors import RequestError

Json = dict[str, Any]

EXTENSION = "x_"

UNSERVED: Final = "unserved"
"""Pydantic's name for an error of ours; its context has the field."""

PREFIX: Final = re.compile("^(Value error, |(Input|String|List) (?=should))")
"""What pydantic says before what is wrong."""

Text = Annotated[str, Field(min_length=1)]
Values = dict[str, tuple[object, ...]]

NEUTRAL: Values = {
    # OpenAI's
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": ("none",),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
    # vLLM's
    "add_generation_prompt": (True,),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "cache_salt": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "include_reasoning": (True,),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logprob_token_ids": ([],),
    "mm_processor_kwargs": ({},),
    "priority": (0,),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "repetition_detection": (),
    "return_token_ids": (False,),
    "return_token_offsets": (False,),
    "return_tokens_as_token_ids": (False,),
    "session_id": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stream_interval": (1,),
    "thinking_token_budget": (),
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}
"""Fields that are not served, each with the values (beside null) that ask for nothing."""


class Strict(BaseModel):
    """A body or a part of one: no unknown fields, no "0.5" for a number; null is as good as nothing.

    neutral: by name, values of fields that ask for nothing; those that are no fields of ours are not served. blank:
    what asks for nothing in any field that is not known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    neutral: ClassVar[Values] = {}
    blank: ClassVar[tuple[object, ...]] = ()

    @classmethod
    def of(cls, fields: Json) -> Self:
        """The body with these fields. Raises RequestError naming one that is not served, or the first that is wrong."""
        try:
            return cls.model_validate(fields)
        except ValidationError as exc:
            found = exc.errors()
            first = next((each for each in found if each["type"] == UNSERVED), found[0])
            raise refusal(first, [*cls.model_fields, *cls.neutral]) from exc

    @model_validator(mode="before")
    @classmethod
    def _served(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        asked = {name: value for name, value in fields.items() if not cls._asks_nothing(name, value)}
        for name in asked:
            if name in cls.neutral and name not in cls.model_fields:
                raise PydanticCustomError(UNSERVED, "is not served here: leave it out", {"field": name})
        return asked

    @classmethod
    def _asks_nothing(cls, name: str, value: object) -> bool:
        """Whether a field with this value is as good as left out."""
        neutral = cls.neutral.get(name, () if name in cls.model_fields else cls.blank)
        return value is None or name.startswith(EXTENSION) or _is_one_of(value, neutral)

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """With what `_served` takes beside the fields."""
        told = handler(core)
        schema = handler.resolve_ref_schema(told)
        properties = schema.get("properties", {})
        for name in properties.keys() - set(schema.get("required", ())):
            properties[name] = {"anyOf": [properties[name], {"enum": [None, *cls.neutral.get(name, ())]}]}
        for name in cls.neutral.keys() - properties.keys():
            properties[name] = {"enum": [None, *cls.neutral[name]], "description": "Not served."}
        schema["properties"] = dict(sorted(properties.items()))
        schema["additionalProperties"] = {"enum": [None, *cls.blank]}
        schema["patternProperties"] = {f"^{EXTENSION}": {"description": "The client's own; ignored."}}
        return told


class Routed(BaseModel):
    """The fields that say how to route; extensions of ours to OpenAI's bodies.

    model: `auto`, `auto:best`, `auto:cheap` (service/decisions.py says what they are) or an expert. k: so many experts
    answer as one, mixed token by token. mixture: `best` takes the best of the k alone where they cannot be mixed.
    allow, deny: experts. cost_weight: how much an expert's cost counts against its quality.
    """

    model: str = AUTO
    k: int | None = Field(default=None, ge=1)
    mixture: Mixture = "all"
    allow: list[str] | None = None
    deny: list[str] = []
    cost_weight: float | None = Field(default=None, ge=0, le=1000)

    def routed(self, prompt: Prompt, expert: str | None, session: str | None) -> Request:
        """A request as far as its route goes. expert, session: what headers say. Raises RequestError."""
        allow = None if self.allow is None else frozenset(self.allow)
        limits = Limits(self.k, allow, frozenset(self.deny), cost_weight=self.cost_weight)
        return Request(prompt, model=self._asked(expert), limits=limits, mixture=self.mixture, session=session)

    def _asked(self, pinned: str | None) -> str:
        """The model, or the expert that a header pins. Raises RequestError where they differ."""
        if pinned in (None, self.model):
            return self.model
        if self.model not in POLICIES:
            raise RequestError(f"model is {self.model!r} and the header x-expert {pinned!r}: send one of them", "model")
        return str(pinned)


def as_list(value: object) -> object:
    """OpenAI takes a text alone for a list of one."""
    return [value] if isinstance(value, str) else value


def refusal(error: ErrorDetails, known: list[str]) -> RequestError:
    """The sentence for what pydantic found, with the field in OpenAI's notation: messages[0].role."""
    where = (*error["loc"], error["ctx"]["field"]) if error["type"] == UNSERVED else error["loc"]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).removeprefix(".")
    if error["type"] == UNSERVED:
        return RequestError(f"{param} {error['msg']}", param, "unsupported_parameter")
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(param, known if len(where) == 1 else [], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return RequestError(f"there is no field {param}{hint}", param, "unknown_parameter")
    if error["type"] == "missing":
        return RequestError(f"{param} is missing", param, "missing_required_parameter")
    said = PREFIX.sub("", error["msg"])
    return RequestError(f"{param} {said}" if param else said, param or None, "invalid_value")


def _is_one_of(value: object, neutrals: tuple[object, ...]) -> bool:
    # True == 1 in Python, and not in JSON.
    return any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in neutrals)
