"""What schemathesis sends to a service that echoes (test_openapi.py), sent to models."""

from __future__ import annotations

import pytest
from fuzzing import fuzzed
from hosting import Hosted


@pytest.mark.slow
def test_nothing_that_can_be_asked_of_models_is_a_failure_of_theirs(service: Hosted) -> None:
    assert fuzzed(service.url, 200)[200] > 200
    load = service.engine.load().values()
    assert [(each.running, each.waiting, each.kv) for each in load] == [(0, 0, 0)] * 3
