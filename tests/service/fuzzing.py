"""Everything that a service's OpenAPI document allows, and much that it forbids, sent to the service."""

from __future__ import annotations

from collections import Counter
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks

from service.openapi import LINES

CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]
SETTINGS: dict[str, Any] = {
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.explicit, Phase.generate],
}


def fuzzed(url: str, examples: int) -> Counter[int]:
    """Statuses of what was sent; so many of what is allowed, and of what is not, for each endpoint."""
    statuses = Counter[int]()
    for found in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():
        operation = found.ok()
        if any(body.media_type == LINES for body in operation.body):
            continue  # a whole of many bodies, which schemathesis has no words for
        statuses += _sent(operation, GenerationMode.POSITIVE, examples)
        if operation.body or operation.query:
            statuses += _sent(operation, GenerationMode.NEGATIVE, examples)
    return statuses


def _sent(operation: Any, mode: GenerationMode, examples: int) -> Counter[int]:
    statuses = Counter[int]()

    @settings(max_examples=examples, **SETTINGS)
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = None  # else nearly all of them name one that there is not
        statuses[case.call_and_validate(checks=CHECKS).status_code] += 1

    ask()
    return statuses
