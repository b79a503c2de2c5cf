"""The whole service over the local engine, on a real port."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from serving import serve
from tiny import KV_BYTES
from tokenizers import Tokenizer, models, pre_tokenizers
from waiting import wait_until

from routers.bundle import ROUTER, Bundle, Digest, Expert, FeaturesEntry, Manifest, RouterEntry, Source
from routers.features import TokenEmbeddings
from routers.linear import LinearRouter
from routers.policy import Policy
from routers.prompt import PromptRouter
from service.app import create_app
from service.engines.local import LocalEngine, Options

NOTHING = Digest(bytes=0, sha256="0" * 64)


@dataclass(frozen=True)
class Hosted:
    """A service under test."""

    url: str
    engine: LocalEngine
    server: uvicorn.Server


@contextmanager
def hosted(folders: Mapping[str, Path], **options: Any) -> Iterator[Hosted]:
    """The service of these experts, each routed to by its own name, the first being the default."""
    options = {"dtype": torch.float32, "kv_bytes": KV_BYTES, "threads": 1} | options
    engine = LocalEngine(folders, Options(**options))
    with serve(create_app(bundle_of(tuple(folders)), engine)) as (url, server):
        wait_until(lambda: all(status.state != "loading" for status in engine.status().values()))
        yield Hosted(url, engine, server)


def bundle_of(experts: tuple[str, ...]) -> Bundle:
    """A bundle's routing; no folder is there."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(("?", *experts))}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    embeddings_VD = np.random.default_rng(0).standard_normal((len(experts) + 1, 16)).astype(np.float16)
    features = TokenEmbeddings.centred_on(tokenizer, embeddings_VD, list(experts))
    router = LinearRouter.from_vectors(
        {expert: [expert] for expert in experts}, {expert: [features.vector(expert)] for expert in experts}
    )
    source = Source(model="tiny", source="nowhere", revision=None, weights="0" * 64, coefficient=1.0)
    manifest = Manifest(
        zoo="tiny",
        inputs_sha256="0" * 64,
        seed=0,
        default=experts[0],
        experts=tuple(
            Expert(name=name, method="copy", sources=(source,), context_window=512, files={}) for name in experts
        ),
        router=RouterEntry(kind="linear", k=1),
        features=FeaturesEntry(model="none", dimension=16),
        files={ROUTER: NOTHING},
    )
    return Bundle(Path("tiny"), manifest, PromptRouter(features, router, Policy(default=experts[0])))
