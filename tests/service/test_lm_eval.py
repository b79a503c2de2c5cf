"""lm-evaluation-harness, unmodified, against a real server: what it sends, and what it reads out of the answers."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
from serving import serve
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from routers.bundle import Bundle
from service.app import create_app
from service.engines.echo import EchoEngine

PAIRS = [
    ("python loop", " class import"),
    ("the owl of", " the forest"),
    ("add", " sum"),
    ("the princess of the castle", " night"),
    ("list", " function add divide multiply"),
]


@pytest.fixture(scope="module")
def url(bundle: Bundle) -> Iterator[str]:
    with serve(create_app(bundle, EchoEngine(bundle.router.experts))) as (url, _):
        yield url


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of the harness's own, whose ids an echo takes for letters."""
    path = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="?").save_pretrained(path)
    return path


def client(url: str, folder: Path, **options: Any) -> LocalCompletionsAPI:
    return LocalCompletionsAPI(
        base_url=f"{url}/v1/completions", model="auto", tokenizer=str(folder), max_length=64, max_retries=1, **options
    )


def asked(kind: str, arguments: tuple[Any, ...]) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def logprob(token: int) -> float:
    """An echo's, for a token of one letter; for the first there is no letter at all."""
    return -zlib.crc32(bytes([token]) if token else b"") / 2**32


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 4}, {"batch_size": 2, "num_concurrent": 3}])
def test_log_likelihoods_are_those_of_the_continuations_tokens(
    url: str, folder: Path, tokenizer: Tokenizer, options: dict[str, int]
) -> None:
    lm = client(url, folder, tokenizer_backend="huggingface", **options)
    got = lm.loglikelihood([asked("loglikelihood", pair) for pair in PAIRS])
    for (_, continuation), (value, greedy) in zip(PAIRS, got, strict=True):
        scores = [logprob(token) for token in tokenizer.encode(continuation).ids]
        assert value == pytest.approx(sum(scores), abs=1e-9)
        assert greedy == all(score > -0.5 for score in scores)


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 3}, {"batch_size": 2, "num_concurrent": 3}])
def test_texts_are_generated_up_to_a_stop_string_in_order(url: str, folder: Path, options: dict[str, int]) -> None:
    lm = client(url, folder, tokenizer_backend="huggingface", tokenized_requests=False, **options)
    prompts = [f"{i} one two stop three" for i in range(5)]
    until = {"until": ["stop"], "max_gen_toks": 4}
    got = lm.generate_until([asked("generate_until", (prompt, until)) for prompt in prompts])
    assert got == [f"{i} one two " for i in range(5)]


def test_chats_are_answered(url: str) -> None:
    lm = LocalChatCompletion(base_url=f"{url}/v1/chat/completions", model="auto", max_retries=1, eos_string="<end>")
    chat = lm.apply_chat_template([{"role": "user", "content": "one two stop three"}])
    got = lm.generate_until([asked("generate_until", (chat, {"until": ["stop"], "max_gen_toks": 4}))])
    assert got == ["one two "]
