"""A bundle's routing small enough to read, and an app over it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from tokenizers import Tokenizer, models, pre_tokenizers

from routers import bundle as bundles
from routers.bundle import ROUTER, Bundle, Digest, Expert, FeaturesEntry, Manifest, RouterEntry, Source, digest
from routers.features import TokenEmbeddings
from routers.linear import LinearRouter
from routers.policy import Policy
from routers.prompt import PromptRouter
from service.app import create_app
from service.engines.echo import EchoEngine

WORDS = {
    "math": ["add", "subtract", "multiply", "divide", "sum", "fraction"],
    "code": ["python", "function", "loop", "list", "class", "import"],
    "story": ["owl", "princess", "forest", "dragon", "castle", "night"],
}


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    vocabulary = ["?", "the", "a", "of", *(word for words in WORDS.values() for word in words)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.fixture(scope="session")
def router(tokenizer: Tokenizer) -> PromptRouter:
    """Three experts that know six words each; `story` is the default."""
    embeddings_VD = np.random.default_rng(0).standard_normal((tokenizer.get_vocab_size(), 16)).astype(np.float16)
    prompts = {expert: [" ".join(words[:3]), " ".join(words[3:])] for expert, words in WORDS.items()}
    features = TokenEmbeddings.centred_on(
        tokenizer, embeddings_VD, [text for texts in prompts.values() for text in texts]
    )
    vectors = {expert: [features.vector(text) for text in texts] for expert, texts in prompts.items()}
    linear = LinearRouter.from_vectors({expert: [expert] for expert in vectors}, vectors)
    return PromptRouter(features, linear, Policy(default="story"))


@pytest.fixture(scope="session")
def bundle(router: PromptRouter) -> Bundle:
    """What would be read from a folder; none is there."""
    nothing = Digest(bytes=0, sha256="0" * 64)
    experts = [
        Expert(
            name=name,
            method="copy",
            sources=(_source(name),),
            subjects=(name,),
            scores={},
            context_window=64,
            files={},
        )
        for name in router.experts
    ]
    manifest = Manifest(
        zoo="three",
        inputs_sha256="0" * 64,
        seed=0,
        default=router.policy.default,
        experts=tuple(experts),
        router=RouterEntry(kind="linear", k=1),
        features=FeaturesEntry(model="none", dimension=16),
        files={ROUTER: nothing},
    )
    return Bundle(Path("three"), manifest, router)


@pytest.fixture
def folder(tmp_path: Path, router: PromptRouter, tokenizer: Tokenizer) -> Path:
    """A bundle whose experts have no files."""
    tokenizer.save(str(tmp_path / bundles.TOKENIZER))
    bundles.save_router(tmp_path, router.router, router.features)
    source = Source(model="toy", source="toy", revision=None, weights="0" * 64, coefficient=1.0)
    experts = [
        Expert(name=name, method="copy", sources=(source,), context_window=64, files={}) for name in router.experts
    ]
    manifest = Manifest(
        zoo="toy",
        inputs_sha256="0" * 64,
        seed=0,
        default="story",
        experts=tuple(experts),
        router=RouterEntry(kind="linear", k=1),
        features=FeaturesEntry(model="toy", dimension=16),
        files={name: digest(tmp_path / name) for name in (bundles.ROUTER, bundles.TOKENIZER)},
    )
    bundles.write(tmp_path, manifest)
    return tmp_path


@pytest.fixture
def engine(router: PromptRouter) -> EchoEngine:
    return EchoEngine(router.experts)


@pytest.fixture
def client(bundle: Bundle, engine: EchoEngine) -> Iterator[TestClient]:
    with TestClient(create_app(bundle, engine), raise_server_exceptions=False) as client:
        yield client


def _source(name: str) -> Source:
    return Source(model=name, source="nowhere", revision=None, weights="0" * 64, coefficient=1.0)
