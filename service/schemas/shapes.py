"""What is answered, as types: for the OpenAPI document. answers.py writes it, and tests hold the two together."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

# pydantic needs this one before Python 3.12.
from typing_extensions import TypedDict

from service.engines.base import Finish, State


class Error(TypedDict):
    """What went wrong. param: the field that is at fault. code: what kind of fault it is."""

    message: str
    type: Literal["invalid_request_error", "requests", "server_error"]
    param: str | None
    code: str | None


class Failure(TypedDict):
    """OpenAI's error body; in a stream that has begun, its last event before [DONE]."""

    error: Error


class PromptDetails(TypedDict):
    """Tokens of the prompt that were not computed anew."""

    cached_tokens: int


class Usage(TypedDict):
    """Token counts; of several prompts, their sums."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class CompletionLogprobs(TypedDict):
    """Of every token, an echoed prompt's too: itself, its log-probability, the likeliest in its place, its offset."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """One answer, or the next bit of one. expert: who gave it, where there are several prompts."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None
    expert: NotRequired[str]


class Candidate(TypedDict):
    """A token that might have been."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(Candidate):
    """A token that is."""

    top_logprobs: list[Candidate]


class ChatLogprobs(TypedDict):
    """Of every token."""

    content: list[ChatToken]
    refusal: None


class AssistantMessage(TypedDict):
    """A whole answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class Delta(TypedDict):
    """The next bit of an answer; the role comes with the first."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]


class ChatChoice(TypedDict):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish
    expert: NotRequired[str]


class ChatChunkChoice(TypedDict):
    """The next bit of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None
    expert: NotRequired[str]


class RankedExpert(TypedDict):
    """What was expected of an expert. excluded: why it may not answer."""

    expert: str
    rank: int
    score: float
    expected_quality: float | None
    std: float | None
    cost: float | None
    selected: bool
    weight: float
    excluded: str | None


class Word(TypedDict):
    """A word of the prompt that spoke for the chosen expert."""

    word: str
    score: float


class Route(TypedDict):
    """Who answers, and why; what follows `words` is there by `detail`. steps_ms: those of `ms` in the router."""

    object: Literal["route"]
    text: str
    ms: float
    steps_ms: dict[str, float]
    expert: str
    reason: str
    router: str
    margin: float
    entropy: float
    confidence: float | None
    k: int
    words: NotRequired[list[Word]]
    experts: NotRequired[list[RankedExpert]]
    evidence: NotRequired[dict[str, Any]]
    counterfactuals: NotRequired[list[dict[str, Any]]]
    scorecard: NotRequired[dict[str, Any] | None]
    router_sha256: NotRequired[str]


class _Answer(TypedDict):
    id: str
    created: int
    system_fingerprint: str
    service_tier: NotRequired[Literal["default"]]
    model: str
    route: NotRequired[Route | list[Route]]


class Completion(_Answer):
    """A text, continued. model: the expert, or `auto` where several prompts went to several."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(_Answer):
    """An event of a stream."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class Chat(_Answer):
    """A chat, answered."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(_Answer):
    """An event of a stream."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]


class Embedding(TypedDict):
    """A vector; or its little-endian float32 in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(TypedDict):
    """About how many tokens were read."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(TypedDict):
    """A vector for every text."""

    object: Literal["list"]
    data: list[Embedding]
    model: Literal["router"]
    usage: EmbeddingUsage


class Model(TypedDict):
    """An expert, or a policy that picks one. window, facts: an expert's alone."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["modelglue"]
    state: State
    window: NotRequired[int | None]
    facts: NotRequired[dict[str, Any]]


class Models(TypedDict):
    """All of them."""

    object: Literal["list"]
    data: list[Model]


class Tokens(TypedDict):
    """A text as tokens of `model`, an expert; max_model_len: its window."""

    model: str
    tokens: list[int]
    count: int
    max_model_len: int


class Tokenizer(TypedDict):
    """What clients that count tokens themselves ask for: the special tokens of `model`, an expert, and its template."""

    model: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None


class Text(TypedDict):
    """Tokens as text."""

    prompt: str


class Version(TypedDict):
    """The release, and the bundle that it serves."""

    version: str
    bundle: str
    inputs_sha256: str
    router_sha256: str


class Feedback(TypedDict):
    """What was kept of it; score is 1 or 0 for thumbs."""

    object: Literal["feedback"]
    request_id: str
    index: int
    score: float


class Reloaded(TypedDict):
    """What was taken."""

    object: Literal["reload"]
    detail: str


class Health(TypedDict):
    """The process answers."""

    status: Literal["ok"]


class ExpertState(TypedDict):
    """How far an expert is. detail: why it failed, or how far it has come."""

    state: State
    detail: NotRequired[str]


class Readiness(TypedDict):
    """Whether requests should be sent here."""

    ready: bool
    stopping: bool
    experts: dict[str, ExpertState]
