"""What the builder's tests share: tiny models written in a moment, and a trained family of them."""

from __future__ import annotations

import os

# Before torch loads: threads that spin collapse when anything else runs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def micro_zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A trained base and its four branches, each a model folder, by name; a few seconds, once a run."""
    from builder.zoos.tiny.corpus import DOMAINS
    from builder.zoos.tiny.train import MICRO, train

    folder = tmp_path_factory.mktemp("micro_zoo")
    train("base", folder / "base", base=None, size=MICRO, seed=7, done=lambda: None)
    for domain in DOMAINS:
        train(domain, folder / domain, base=folder / "base", size=MICRO, seed=7, done=lambda: None)
    return {name: folder / name for name in ("base", *DOMAINS)}
