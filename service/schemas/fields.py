"""What all bodies have in common: strict fields, those that are not served, and the sentence for a wrong one.

A field of OpenAI's (or of vLLM's) that is not served is taken at its neutral value and refused by name at any other.
Fields that begin with `x_` are extensions of the client's own, and ignored; any other unknown one is refused.
"""

from __future__ import annotations

import difflib
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from routers.policy import Limits
from routers.prompt import AUTO
from service.decisions import Mixture
from service.errors import RequestError

Json = dict[str, Any]

EXTENSION = "x_"

NEUTRAL: dict[str, tuple[object, ...]] = {
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
    """A body or a part of one: no unknown fields, no "0.5" for a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    neutral: ClassVar[dict[str, tuple[object, ...]]] = {}

    @classmethod
    def of(cls, fields: Json) -> Self:
        """The body with these fields. Raises RequestError naming the first that is unknown, wrong or not served."""
        served = {
            name: value
            for name, value in fields.items()
            if value is not None
            and not name.startswith(EXTENSION)
            and not _is_neutral(value, cls.neutral.get(name, ()))
        }
        if unserved := next((name for name in served if name in cls.neutral and name not in cls.model_fields), None):
            raise RequestError(f"{unserved} is not served here: leave it out", unserved, "unsupported_parameter")
        try:
            return cls.model_validate(served)
        except ValidationError as exc:
            raise refusal(exc.errors()[0], [*cls.model_fields, *cls.neutral]) from exc


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

    def limits(self) -> Limits:
        """What is asked of the route."""
        allow = None if self.allow is None else frozenset(self.allow)
        return Limits(self.k, allow, frozenset(self.deny), cost_weight=self.cost_weight)

    def asked_model(self, pinned: str | None) -> str:
        """The model, or the expert that a header pins. Raises RequestError where they differ."""
        if pinned in (None, self.model):
            return self.model
        if not self.model.startswith(AUTO):
            raise RequestError(f"model is {self.model!r} and the header x-expert {pinned!r}: send one of them", "model")
        return str(pinned)


def refusal(error: ErrorDetails, known: list[str]) -> RequestError:
    """The sentence for what pydantic found, with the field in OpenAI's notation: messages[0].role."""
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).removeprefix(".")
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(param, known if len(error["loc"]) == 1 else [], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return RequestError(f"there is no field {param}{hint}", param, "unknown_parameter")
    if error["type"] == "missing":
        return RequestError(f"{param} is missing", param, "missing_required_parameter")
    said = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return RequestError(f"{param} {said}" if param else said, param or None, "invalid_value")


def _is_neutral(value: object, neutrals: tuple[object, ...]) -> bool:
    # True == 1 in Python, and not in JSON.
    return any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in neutrals)
