"""The OpenAPI document as a page: every endpoint with what it takes and gives, in plain HTML without a script."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from html import escape
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from service import openapi
from service.api import PAGE_HEADERS
from service.schemas.fields import Json

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>modelglue: API</title>
<link rel="stylesheet" href="docs.css">
</head>
<body>
<header><h1>modelglue <span>API {version}</span></h1>
<p><a href="./">playground</a> <a href="openapi.json">openapi.json</a></p></header>
<p>{description}</p>
<nav><ul>{index}</ul></nav>
<main>{sections}</main>
</body>
</html>
"""


class Docs:
    """`GET /openapi.json` and `GET /docs`, of these endpoints and of themselves."""

    def __init__(self, endpoints: Sequence[APIRouter]) -> None:
        self._own = APIRouter(redirect_slashes=False)
        self._own.add_api_route("/openapi.json", self.openapi, methods=["GET"])
        self._own.add_api_route("/docs", self.docs, methods=["GET"])
        self._described = (*endpoints, self._own)

    def endpoints(self) -> APIRouter:
        """Both."""
        return self._own

    async def openapi(self) -> Json:
        """This interface as an OpenAPI document."""
        return self._document

    async def docs(self) -> Response:
        """That document as a page."""
        return Response(page(self._document), media_type="text/html", headers=PAGE_HEADERS)

    @cached_property
    def _document(self) -> Json:
        return openapi.document([route for each in self._described for route in each.routes])


def page(document: Json) -> str:
    """The whole page."""
    operations = [
        (method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    schemas = document["components"]["schemas"]
    index = [
        f'<li><a href="#{escape(each["operationId"])}">{_title(method, path)}</a> {_prose(each["summary"])}</li>'
        for method, path, each in operations
    ]
    return PAGE.format(
        version=escape(document["info"]["version"]),
        description=escape(document["info"]["description"]),
        index="\n".join(index),
        sections="\n".join([*(_operation(*each) for each in operations), *_types(schemas)]),
    )


def _operation(method: str, path: str, operation: Json) -> str:
    parts = [
        f'<section id="{escape(operation["operationId"])}"><h2>{_title(method, path)}</h2>',
        f"<p>{_prose(operation['summary'])}</p>",
    ]
    if operation["parameters"]:
        rows = [
            (each["name"], each["in"], _type(each["schema"]), _prose(each.get("description", "")))
            for each in operation["parameters"]
        ]
        parts.append(_table(("name", "where", "type", ""), rows))
    for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
        parts.append(f"<h3>Body</h3><p>{_type(content['schema'])}</p>")
        parts.append(f"<pre>{escape(_curl(method, path, media_type, content['example']))}</pre>")
    answers = [
        (status, "<br>".join(_content(response)), _prose(response["description"]))
        for status, response in operation["responses"].items()
    ]
    parts += ["<h3>Answers</h3>", _table(("status", "body", ""), answers), "</section>"]
    return "\n".join(parts)


def _content(response: Json) -> Iterable[str]:
    return (f"{escape(kind)}: {_type(content['schema'])}" for kind, content in response["content"].items())


def _types(schemas: Mapping[str, Json]) -> Iterable[str]:
    for name, schema in schemas.items():
        needed = schema.get("required", ())
        rows = [
            (field, _type(each), "" if field in needed else "optional", _prose(each.get("description", "")))
            for field, each in schema.get("properties", {}).items()
        ]
        yield f'<section id="{escape(name)}"><h2>{escape(name)}</h2><p>{_prose(schema.get("description", ""))}</p>'
        yield _table(("field", "type", "", ""), rows) + "</section>"


def _type(schema: Json) -> str:
    """A type in one line of HTML, those with a name as links."""
    if "contentSchema" in schema:
        return f"{_type(schema['contentSchema'])}. {_prose(schema['description'])}"
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[1])
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(_type, schema["anyOf"]))) + _bounds(schema)
    if "enum" in schema or "const" in schema:
        return " or ".join(
            f"<code>{escape(json.dumps(each))}</code>" for each in schema.get("enum", [schema.get("const")])
        )
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}{_bounds(schema)}"
    return escape(schema.get("type", "anything")) + _bounds(schema)


BOUNDS = {
    "minimum": "from",
    "exclusiveMinimum": "over",
    "maximum": "to",
    "exclusiveMaximum": "below",
    "minItems": "at least",
    "maxItems": "at most",
    "minLength": "characters, at least",
    "default": "without it",
}


def _bounds(schema: Json) -> str:
    told = [f"{word} {json.dumps(schema[key])}" for key, word in BOUNDS.items() if key in schema]
    return f" ({escape(', '.join(told))})" if told else ""


def _curl(method: str, path: str, media_type: str, example: Any) -> str:
    body = example if isinstance(example, str) else json.dumps(example)
    return f"curl -X {method.upper()} $SERVICE{path} -H 'content-type: {media_type}' --data-binary {shlex.quote(body)}"


def _prose(text: str) -> str:
    """Sentences whose code stands between backticks."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", escape(text))


def _title(method: str, path: str) -> str:
    return f"<code>{method.upper()} {escape(path)}</code>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML."""
    head = "".join(f"<th>{each}</th>" for each in heads)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
