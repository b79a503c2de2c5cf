"""What tests of several packages share: a trained family of tiny models, their zoo file, and its bundle."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# Before torch loads: threads that spin collapse when anything else runs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
# Before datasets loads: what tests prepare is not the user's.
os.environ.setdefault("HF_DATASETS_CACHE", str(Path(tempfile.gettempdir()) / "modelglue-tests" / "datasets"))

import pytest
from hypothesis import HealthCheck, settings

# The same examples on every machine, however slow it is.
settings.register_profile(
    "same", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("same")

ZOO = """
name = "micro"
seed = 7
experts = 3
models = [
    { id = "math", source = "./math", subject = "math" },
    { id = "code", source = "./code", subject = "code" },
    { id = "story", source = "./story", subject = "story" },
    { id = "chat", source = "./chat", subject = "chat" },
]

[subjects]
math = ["Question: Ann has 12 apples and gets 7 more. How many now?", "Question: Hugo has 30 coins and loses 4."]
code = ["def add(x, y):\\n    return x + y", "def clip(a, b):\\n    if a > b:\\n        return a"]
story = ["Once upon a time there was a shy fox who lived near the lake.", "One day the owl found a red kite."]
chat = ["User: how can I bake bread? Assistant:", "User: how can I sleep better? Assistant:"]

[cluster]
threshold = 0.5

[proxy]
tasks = ["tiny/math", "tiny/code", "tiny/story", "tiny/chat"]
metric = "log_likelihood"
limit = 8

[router]
features = "math"
"""


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


@pytest.fixture(scope="session")
def zoo_file(micro_zoo: dict[str, Path]) -> Path:
    """The zoo of the four branches."""
    file = micro_zoo["math"].parent / "micro.toml"
    file.write_text(ZOO, "utf-8")
    return file


@pytest.fixture(scope="session")
def micro_bundle(zoo_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of that zoo, a few hundred kilobytes, built once; no test changes it."""
    from builder import pipeline
    from builder.config import load_zoo
    from builder.progress import Quiet
    from builder.sources import Store

    folder, zoo = tmp_path_factory.mktemp("micro_bundle"), load_zoo(str(zoo_file))
    pipeline.build(zoo, folder / "bundle", Store(zoo, folder / "cache"), Quiet())
    return folder / "bundle"
