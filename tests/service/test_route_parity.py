"""One prompt, one route: alone, among others, and over HTTP."""

from __future__ import annotations

import numpy as np
from fastapi.testclient import TestClient

from routers.prompt import PromptRouter

COUNT = 1000


def prompts() -> list[str]:
    """Of words that the experts know, and others."""
    rng = np.random.default_rng(0)
    words = [
        "add",
        "sum",
        "fraction",
        "divide",
        "python",
        "loop",
        "class",
        "import",
        "owl",
        "forest",
        "dragon",
        "night",
        "the",
        "a",
        "of",
        "unknown",
    ]
    return [" ".join(rng.choice(words, int(rng.integers(0, 12)))) for _ in range(COUNT)]


def test_a_thousand_prompts_are_routed_over_http_as_alone_in_whatever_order(
    client: TestClient, router: PromptRouter
) -> None:
    texts = prompts()
    alone = [router.route(text) for text in texts]
    assert [router.route(text) for text in reversed(texts)] == alone[::-1]
    for text, route in zip(texts, alone, strict=True):
        told = client.post("/route", json={"model": "auto", "prompt": text}).json()
        assert (told["expert"], told["reason"]) == (route.expert, route.reason)
        assert [each["score"] for each in told["experts"]] == [each.score for each in route.ranking]
