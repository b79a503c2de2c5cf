"""The service as an OpenAPI document, made of the types that read its bodies and of those that tell its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final

from fastapi.routing import APIRoute
from pydantic import BaseModel, TypeAdapter
from starlette.routing import BaseRoute

from routers.prompt import AUTO
from service.schemas import shapes
from service.schemas.bodies import ChatBody, CompletionBody
from service.schemas.feedback import FeedbackBody
from service.schemas.fields import Json, Strict
from service.schemas.queries import DetailQuery, DetokenizeBody, EmbeddingsBody, ModelQuery, RouteQuery, TokenizeBody

JSON: Final = "application/json"
LINES: Final = "application/jsonl"
EVENTS: Final = "text/event-stream"
REF: Final = "#/components/schemas/{model}"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What one takes and gives, beside what all do.

    answers: types by media type; of LINES, of each line, and of EVENTS, of each event. bodies: any of these, `takes`
    being their media type. failures: statuses. asks, tells: headers.
    """

    answers: Mapping[str, Any]
    bodies: tuple[type[Strict], ...] = ()
    takes: str = JSON
    query: type[BaseModel] | None = None
    example: Any = None
    failures: tuple[int, ...] = ()
    asks: tuple[str, ...] = ()
    tells: tuple[str, ...] = ()


CHAT: Final[Json] = {"model": AUTO, "messages": [{"role": "user", "content": "What is 3 + 4?"}], "max_tokens": 32}
PROMPT: Final[Json] = {"model": AUTO, "prompt": "Once upon a time", "max_tokens": 32, "temperature": 0}
LINE: Final = '{"prompt": "Once upon a time"}\n{"messages": [{"role": "user", "content": "What is 3 + 4?"}]}\n'
HINTS: Final = ("x-expert", "x-session-id")
ROUTED: Final = ("x-route-expert", "x-route-reason", "x-route-ms")

_COMPLETE = Endpoint(
    {JSON: shapes.Completion, EVENTS: shapes.CompletionChunk},
    (CompletionBody,),
    example=PROMPT,
    failures=(404, 504),
    asks=(*HINTS, "x-route-debug"),
    tells=ROUTED,
)
_CHAT = Endpoint(
    {JSON: shapes.Chat, EVENTS: shapes.ChatChunk},
    (ChatBody,),
    example=CHAT,
    failures=(404, 504),
    asks=(*HINTS, "x-route-debug"),
    tells=ROUTED,
)
_EITHER = (CompletionBody, ChatBody)
_ROUTE = Endpoint({JSON: shapes.Route | list[shapes.Route]}, _EITHER, JSON, DetailQuery, CHAT, (404,), HINTS)

ENDPOINTS: Final[Mapping[str, Endpoint]] = {
    "complete": _COMPLETE,
    "chat": _CHAT,
    "embed": Endpoint(
        {JSON: shapes.Embeddings}, (EmbeddingsBody,), example={"input": ["a text", "another"]}, failures=(404,)
    ),
    "route_of_query": Endpoint({JSON: shapes.Route}, query=RouteQuery, failures=(400, 404), asks=HINTS),
    "route_of_body": _ROUTE,
    "routes_of_lines": Endpoint({LINES: shapes.Route}, _EITHER, LINES, DetailQuery, LINE, asks=HINTS),
    "tokenize": Endpoint({JSON: shapes.Tokens}, (TokenizeBody,), example={"prompt": "a text"}, failures=(404,)),
    "detokenize": Endpoint({JSON: shapes.Text}, (DetokenizeBody,), example={"tokens": [1, 2]}, failures=(404,)),
    "tokenizer_info": Endpoint({JSON: shapes.Tokenizer}, query=ModelQuery, failures=(400, 404)),
    "models": Endpoint({JSON: shapes.Models}),
    "model": Endpoint({JSON: shapes.Model}, failures=(404,)),
    "version": Endpoint({JSON: shapes.Version}),
    "healthz": Endpoint({JSON: shapes.Health}),
    "readyz": Endpoint({JSON: shapes.Readiness}),
    "metrics": Endpoint({"text/plain": str}),
    "feedback": Endpoint(
        {JSON: shapes.Feedback},
        (FeedbackBody,),
        example={"request_id": "an answer's x-request-id", "thumbs": "up"},
        failures=(404,),
    ),
    "reload": Endpoint({JSON: shapes.Reloaded}, failures=(403, 409)),
    "openapi": Endpoint({JSON: Json}),
    "docs": Endpoint({"text/html": str}),
}
"""By the names of their handlers, whose docstrings are the summaries."""

FAILURES: Final[Mapping[int, str]] = {
    400: "Something in it cannot be honoured; `param` names the field.",
    401: "No API key, or one that is not known, where the service asks for keys.",
    403: "It may be asked from the service's own machine, or with the key `admin`.",
    404: "There is no such model, or no such request.",
    408: "Its body did not come in time.",
    409: "The new router cannot take the old one's place.",
    413: "Its body is too large.",
    429: "A queue is full, or a key's limit is reached; `retry-after` says when there may be room.",
    500: "A bug; the service's log says why.",
    503: "The expert is loading or has failed, or the service stops.",
    504: "It took longer than a request may.",
}
ANY: Final = (401, 429, 500, 503)
WITH_A_BODY: Final = (400, 408, 413)

HEADERS: Final[Mapping[str, str]] = {
    "x-request-id": "The request's name; the answer and the log bear it.",
    "x-expert": "The expert that is to answer, as `model` says it.",
    "x-session-id": "The conversation that this belongs to; it stays with its expert unless another is clearly better.",
    "x-route-debug": "1: the answer's last part has the decision as `route`.",
    "x-route-expert": "Who answers; of several prompts, all who do.",
    "x-route-reason": "Why.",
    "x-route-ms": "Milliseconds that the decision took.",
    "retry-after": "Seconds.",
}


def document(routes: Sequence[BaseRoute]) -> Json:
    """The document of those routes whose handlers are in ENDPOINTS."""
    schemas = Schemas()
    paths: dict[str, Json] = {}
    for route in routes:
        if isinstance(route, APIRoute) and route.name in ENDPOINTS:
            for method in sorted(route.methods or ()):
                paths.setdefault(route.path_format, {})[method.lower()] = _operation(route, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "modelglue",
            "version": version("modelglue"),
            "description": "Several experts behind OpenAI's API: the router picks who answers a prompt.",
        },
        "security": [{}, {"key": []}],
        "paths": paths,
        "components": {
            "schemas": schemas.named,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


class Schemas:
    """JSON schemas of all types that ENDPOINTS name."""

    def __init__(self) -> None:
        bodies = {body for endpoint in ENDPOINTS.values() for body in endpoint.bodies}
        types = [*bodies, *(kind for endpoint in ENDPOINTS.values() for kind in endpoint.answers.values())]
        found, whole = TypeAdapter.json_schemas(
            [(repr(kind), "validation", TypeAdapter(kind)) for kind in (*types, shapes.Failure)], ref_template=REF
        )
        self._found = {name: schema for (name, _), schema in found.items()}
        self.named: dict[str, Json] = dict(sorted(whole["$defs"].items()))
        for name, schema in self.named.items():
            if "properties" in schema:
                schema.setdefault("additionalProperties", False)
            self.named[name] = _untitled(schema)

    def of(self, kind: Any) -> Json:
        """One type's."""
        found: Json = _untitled(self._found[repr(kind)])
        return found


def _operation(route: APIRoute, schemas: Schemas) -> Json:
    endpoint = ENDPOINTS[route.name]
    words = [word.strip("{}") for word in route.path_format.split("/") if word]
    operation: Json = {
        "operationId": "_".join([route.name, *words]),
        "summary": (route.endpoint.__doc__ or "").strip(),
        "parameters": _parameters(route, endpoint),
        "responses": _responses(endpoint, schemas),
    }
    if endpoint.bodies:
        kinds = [schemas.of(body) for body in endpoint.bodies]
        either = kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
        content = {"schema": _text(endpoint.takes, either), "example": endpoint.example}
        operation["requestBody"] = {"required": True, "content": {endpoint.takes: content}}
    return operation


def _parameters(route: APIRoute, endpoint: Endpoint) -> list[Json]:
    path = [
        {"name": each.name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for each in route.dependant.path_params
    ]
    headers = [
        {"name": name, "in": "header", "description": HEADERS[name], "schema": {"type": "string"}}
        for name in ("x-request-id", *endpoint.asks)
    ]
    return [*path, *_query(endpoint.query), *headers]


def _query(model: type[BaseModel] | None) -> list[Json]:
    if model is None:
        return []
    schema = _untitled(model.model_json_schema())
    needed = schema.get("required", ())
    return [
        # A query has no null: what is left out is that.
        {"name": name, "in": "query", "required": name in needed, "schema": found.get("anyOf", [found])[0]}
        for name, found in schema["properties"].items()
    ]


def _responses(endpoint: Endpoint, schemas: Schemas) -> Json:
    named = {"x-request-id": _header("x-request-id")}
    told = {name: _header(name) for name in endpoint.tells}
    content = {kind: {"schema": _text(kind, schemas.of(answer))} for kind, answer in endpoint.answers.items()}
    responses: Json = {"200": {"description": "As asked.", "headers": named | told, "content": content}}
    statuses = {*ANY, *endpoint.failures, *(WITH_A_BODY if endpoint.bodies else ())}
    for status in sorted(statuses):
        later = {"retry-after": _header("retry-after", required=status == 429)} if status in (429, 503) else {}
        failure = {JSON: {"schema": schemas.of(shapes.Failure)}}
        responses[str(status)] = {"description": FAILURES[status], "headers": named | later, "content": failure}
    if endpoint is ENDPOINTS["readyz"]:
        responses["503"]["content"][JSON]["schema"] = {
            "anyOf": [schemas.of(shapes.Readiness), schemas.of(shapes.Failure)]
        }
    return responses


def _header(name: str, *, required: bool = True) -> Json:
    return {"description": HEADERS[name], "required": required, "schema": {"type": "string"}}


def _text(media_type: str, schema: Json) -> Json:
    """The schema of a whole body of which this is the schema of a part."""
    told = {
        LINES: "Lines of JSON; an answer has those of what was asked, in order.",
        EVENTS: "Events, as the body has `stream`: `data: ` and JSON, comments while they are awaited, `data: [DONE]`.",
    }
    if media_type not in told:
        return schema
    return {"type": "string", "description": told[media_type], "contentMediaType": JSON, "contentSchema": schema}


def _untitled(schema: Any) -> Any:
    """Without the titles that pydantic gives to every field, which say its name once more."""
    if isinstance(schema, list):
        return [_untitled(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _untitled(value) for key, value in schema.items() if key != "title" or isinstance(value, dict)}
