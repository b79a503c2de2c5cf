"""What a server is asked: a job as the body of OpenAI's request, with vLLM's names for what OpenAI lacks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from service.engines.base import Guide, Job, Prompt, Sampling, Tokens, UnsupportedError

Json = dict[str, Any]

COMPLETIONS: Final = "/v1/completions"
CHAT: Final = "/v1/chat/completions"

NEUTRAL: Final = Sampling()
PASSED: Final = (
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "ignore_eos",
    "min_tokens",
)
"""Fields that go by the same name, and only when they ask for something: OpenAI's own server knows few of them."""

DEFAULTED: Final = ("top_k", "min_p", "repetition_penalty")
"""Those of them that servers have defaults of their own for, or the model's generation_config has."""

EXTENDED: Final = ("vllm", "llamacpp", "modelglue")
"""Servers, as `owned_by` of their models names them, that know those: they are told the neutral values too."""

COUNTING: Final = ("vllm", "modelglue")
"""Those that count in every chunk when asked to, so that an answer that is left before its end is counted too."""

UNKNOWN_TO: Final[dict[str, dict[str, Callable[[Sampling], object]]]] = {
    "llamacpp": {
        "min_tokens": lambda sampling: sampling.min_tokens,
        "stop_token_ids": lambda sampling: sampling.stop_tokens,
        "echo": lambda sampling: sampling.prompt_logprobs is not None,
        "response_format": lambda sampling: sampling.guide and sampling.guide.kind == "regex",
    }
}
"""What a server ignores without a word, by field, and whether it is asked for."""


@dataclass(frozen=True, slots=True)
class Served:
    """What a server tells of its model; kind: who made the server, empty where nobody knows."""

    model: str
    window: int
    kind: str = ""


def check(expert: str, served: Served, prompt: Prompt, sampling: Sampling) -> None:
    """Raise UnsupportedError for what the server cannot do, or would ignore."""
    for param, asked in UNKNOWN_TO.get(served.kind, {}).items():
        if asked(sampling):
            raise UnsupportedError(f"{expert} is served by {served.kind}, which has no {param}: leave it out", param)
    if sampling.prompt_logprobs is not None and _is_chat(prompt):
        raise UnsupportedError(f"{expert}'s server scores texts and tokens only, no chats: send a prompt", "messages")
    if sampling.max_tokens is None and isinstance(prompt, str):
        raise UnsupportedError(f"only {expert}'s server can count this prompt's tokens: say max_tokens", "max_tokens")


def call(job: Job, served: Served) -> tuple[str, Json]:
    """The path and the body.

    A chat's max_tokens that is the whole window is not sent, for it stands for what the window has left. At least one
    token is asked for: servers refuse none.
    """
    sampling = job.sampling
    # Scoring a prompt, the first count tells where the answer begins.
    continuous = served.kind in COUNTING or sampling.prompt_logprobs is not None
    body: Json = {
        "model": served.model,
        "stream": True,
        "stream_options": {"include_usage": True} | ({"continuous_usage_stats": True} if continuous else {}),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        **_extensions(sampling, served),
    }
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
    if sampling.stop_tokens:
        body["stop_token_ids"] = list(sampling.stop_tokens)
    if sampling.guide is not None:
        body |= _guide(sampling.guide)
    if _is_chat(job.prompt):
        return CHAT, body | _chat(job, served.window)
    return COMPLETIONS, body | _completion(job)


def _extensions(sampling: Sampling, served: Served) -> Json:
    fields = {name: getattr(sampling, name) for name in PASSED}
    told = DEFAULTED if served.kind in EXTENDED else ()
    fields = {name: value for name, value in fields.items() if value != getattr(NEUTRAL, name) or name in told}
    if served.kind == "llamacpp":
        # Its own names: a penalty over the whole text instead of the last 64 tokens, for which it no longer takes -1;
        # counts in every chunk.
        fields |= {"repeat_penalty": fields.pop("repetition_penalty"), "repeat_last_n": served.window}
        fields["timings_per_token"] = True
    return fields


def _guide(guide: Guide) -> Json:
    if guide.kind == "regex":
        return {"structured_outputs": {"regex": guide.text}}
    schema = json.loads(guide.text)
    if not schema:
        return {"response_format": {"type": "json_object"}}
    named = {"name": "answer", "strict": True, "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def _chat(job: Job, window: int) -> Json:
    assert not isinstance(job.prompt, str | Tokens)
    sampling = job.sampling
    fields: Json = {"messages": [{"role": turn.role, "content": turn.content} for turn in job.prompt]}
    if sampling.max_tokens != window:
        fields["max_tokens"] = max(1, sampling.max_tokens or 0)
    if sampling.logprobs is not None:
        fields |= {"logprobs": True, "top_logprobs": sampling.logprobs}
    return fields


def _completion(job: Job) -> Json:
    sampling = job.sampling
    prompt = list(job.prompt.ids) if isinstance(job.prompt, Tokens) else job.prompt
    fields: Json = {"prompt": prompt, "max_tokens": max(1, sampling.max_tokens or 0)}
    wanted = [count for count in (sampling.logprobs, sampling.prompt_logprobs) if count is not None]
    if wanted:
        fields["logprobs"] = max(wanted)
    if sampling.prompt_logprobs is not None:
        fields["echo"] = True
    return fields


def _is_chat(prompt: Prompt) -> bool:
    return not isinstance(prompt, str | Tokens)
