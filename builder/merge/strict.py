"""YAML read strictly: repeated and unknown keys are mistakes, told all at once, each with its place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from builder.merge.settings import Mistake, Mistakes, Place, unknown
from routers.errors import ModelGlueError

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def document(
    text: str, name: str, what: str, form: str, error: type[ModelGlueError]
) -> tuple[dict[str, Any], list[Mistake]]:
    """The one mapping in a YAML text, and the keys that it gives twice.

    what, form: what the text should be, and a sentence on how that looks. Raises `error` for anything else.
    """
    try:
        nodes = list(yaml.compose_all(text, LOADER))
        twice = [*_twice(nodes[0], (), set())] if nodes else []
        data = yaml.load(text, LOADER) if len(nodes) == 1 else None
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        found = " ".join(str(exc).split()).replace(' in "<unicode string>",', " at")
        raise error(f"{name} is not YAML: {found}") from exc
    if len(nodes) > 1:
        raise error(f"{name} holds {len(nodes)} YAML documents: give each {what} its own file")
    if not isinstance(data, dict):
        raise error(f"{name} is no {what}: {form}")
    return data, twice


def _twice(node: yaml.Node, place: Place, seen: set[int]) -> Iterator[Mistake]:
    """Keys that a mapping gives twice; YAML's readers silently take the last."""
    if id(node) in seen:
        return
    seen.add(id(node))
    below: Iterable[tuple[str | int, yaml.Node]] = ()
    if isinstance(node, yaml.SequenceNode):
        below = enumerate(node.value)
    if isinstance(node, yaml.MappingNode):
        below = [(str(key.value), said) for key, said in node.value]
        keys = Counter(key for key, _ in below)
        yield from (((*place, key), f"given {count} times") for key, count in keys.items() if count > 1)
    for key, one in below:
        yield from _twice(one, (*place, key), seen)


def found(exc: ValidationError, root: type[BaseModel]) -> Iterator[Mistake]:
    """pydantic's findings as sentences with their places."""
    for error in exc.errors():
        place, inner = error["loc"], error.get("ctx", {}).get("error")
        if isinstance(inner, Mistakes):
            yield from (((*place, *below), said) for below, said in inner.found)
        elif error["type"] == "extra_forbidden":
            yield place, unknown(str(place[-1]), _keys(root, place[:-1]))
        elif error["type"] == "model_type":
            yield place, f"give a mapping with the keys {', '.join(_keys(root, place))}"
        else:
            ours = {"missing": "is missing", "tuple_type": "give a list", "dict_type": "give a mapping"}
            yield place, ours.get(error["type"], error["msg"].removeprefix("Value error, "))


def _keys(root: type[BaseModel], place: Place) -> list[str]:
    """The keys that are known at a place."""
    for key in place:
        if key in root.model_fields:
            root = _model_in(root.model_fields[str(key)].annotation) or root
    return list(root.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)


def told(name: str, mistakes: Iterable[Mistake]) -> str:
    """Mistakes of the file `name` as text, a line each."""
    lines = [f"{'.'.join(map(str, place))}: {said}" if place else said for place, said in mistakes]
    return "\n".join(f"{name}: {line}" for line in lines)
