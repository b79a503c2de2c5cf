"""A small vocabulary whose words point where one would expect, and the parts made of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from routers import bundle
from routers.bundle import Expert, FeaturesEntry, Manifest, RouterEntry, RoutingRow, Source
from routers.features import TokenEmbeddings
from routers.linear import LinearRouter
from routers.policy import Policy
from routers.prompt import PromptRouter

WORDS = ("[UNK]", "solve", "count", "sum", "python", "code", "loop", "dragon", "castle", "the", "a")
EXPERTS = {"math": ("solve", "count", "sum"), "code": ("python", "code", "loop"), "story": ("dragon", "castle")}


@pytest.fixture
def tokenizer() -> Tokenizer:
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    return made


@pytest.fixture
def features(tokenizer: Tokenizer) -> TokenEmbeddings:
    embeddings_VD = np.random.default_rng(3).normal(0, 0.3, (len(WORDS), 16)).astype(np.float16)
    for axis, words in enumerate(EXPERTS.values()):
        embeddings_VD[[WORDS.index(word) for word in words], axis] += 2
    return TokenEmbeddings.centred_on(tokenizer, embeddings_VD, [" ".join(words) for words in EXPERTS.values()])


@pytest.fixture
def prompt_router(features: TokenEmbeddings) -> PromptRouter:
    vectors = {expert: [features.vector(word) for word in words] for expert, words in EXPERTS.items()}
    router = LinearRouter.from_vectors({expert: [expert] for expert in EXPERTS}, vectors)
    return PromptRouter(features, router, Policy("story"))


@pytest.fixture
def bundle_path(tmp_path: Path, tokenizer: Tokenizer, prompt_router: PromptRouter) -> Path:
    path = tmp_path / "bundle"
    for expert in EXPERTS:
        folder = path / bundle.EXPERTS / expert
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(expert.encode() * 100)
    tokenizer.save(str(path / bundle.TOKENIZER))
    bundle.save_router(path, prompt_router.router, prompt_router.features)
    bundle.save_routing(path, [RoutingRow(task="t", prompt="solve", scores=dict.fromkeys(EXPERTS, 1.0))])
    (path / bundle.RECORD).write_text("{}")
    bundle.write(path, manifest(path))
    return path


def manifest(path: Path) -> Manifest:
    source = Source(model="m", source="org/m", revision="abc", weights="0" * 64, coefficient=1.0)
    experts = tuple(
        Expert(
            name=name,
            method="copy",
            sources=(source,),
            context_window=64,
            files={"model.safetensors": bundle.digest(path / bundle.EXPERTS / name / "model.safetensors")},
        )
        for name in EXPERTS
    )
    files = {
        name: bundle.digest(path / name) for name in (bundle.ROUTER, bundle.TOKENIZER, bundle.ROUTING, bundle.RECORD)
    }
    return Manifest(
        zoo="z",
        inputs_sha256="0" * 64,
        seed=1,
        default="story",
        experts=experts,
        router=RouterEntry(kind="linear", k=1),
        features=FeaturesEntry(model="m", dimension=16),
        files=files,
    )
