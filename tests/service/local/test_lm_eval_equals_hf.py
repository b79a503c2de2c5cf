"""lm-evaluation-harness against a service of ours, and on the same folder by transformers: one and the same result."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hosting import hosted
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
from lm_eval.tasks import TaskManager
from tiny import WINDOW

ROOT = Path(__file__).parents[3]
DEMO = ROOT / "bundles" / "demo" / "experts" / "chat"

SENTENCES = [
    "the owl was afraid of the dark and the fox was not",
    "def largest(numbers): return max(numbers)",
    "Tom buys 3 boxes of 12 pencils and gives away 7.",
    "日本語 and 👍 are no English words, but they are text.",
]
QUESTIONS = [
    {"text": "the owl was afraid of", "choices": [" the dark", " the fox", " max", " 日本"], "answer": 0},
    {"text": "def largest(numbers): return", "choices": [" max(numbers)", " the owl", " 1"], "answer": 0},
    {"text": "Tom has 3 boxes. He gives away 1, so he has", "choices": [" 2 left.", " no idea.", " 🙂"], "answer": 0},
]
CHOICE = {
    "task": "choice",
    "output_type": "multiple_choice",
    "doc_to_text": "{{text}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
}
ROLLING = {
    "task": "rolling",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "word_perplexity"}],
}
WRITING = {
    "task": "writing",
    "output_type": "generate_until",
    "doc_to_text": "{{text}}",
    "doc_to_target": "nothing",
    "generation_kwargs": {
        "until": ["\n\n", "def ", "class ", "<end>", "fox", "0"],
        "max_gen_toks": 24,
        "do_sample": False,
    },
    "metric_list": [{"metric": "exact_match"}],
}


@dataclass(frozen=True)
class Pair:
    """A service with one expert, the expert's folder, and how many tokens the harness may use."""

    url: str
    folder: Path
    window: int


@pytest.fixture(scope="module", params=["tiny", pytest.param("demo", marks=pytest.mark.slow)])
def pair(request: pytest.FixtureRequest, llamas: dict[str, Path]) -> Iterator[Pair]:
    folder, window, options = (
        (llamas["math"], WINDOW, {}) if request.param == "tiny" else (demo(), 384, {"kv_bytes": 1 << 30})
    )
    with hosted({"math": folder}, **options) as found:
        yield Pair(found.url, folder, window)


def demo() -> Path:
    if not DEMO.is_dir():
        pytest.skip("no bundles/demo: `make demo` builds it")
    return DEMO


def documents(texts: list[Any]) -> Any:
    """A data set that the harness need not fetch."""
    import datasets

    rows = [{"text": text} if isinstance(text, str) else text for text in texts]
    return lambda **_: {"test": datasets.Dataset.from_list(rows)}


def task(config: dict[str, Any], texts: list[Any]) -> dict[str, Any]:
    return config | {"custom_dataset": documents(texts), "test_split": "test"}


def evaluated(model: Any, tasks: list[dict[str, Any]], *, chat: bool = False) -> dict[str, list[Any]]:
    """What the model answered to each request of each task."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found = simple_evaluate(
        model,
        tasks=tasks,
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        apply_chat_template=chat,
    )
    assert found is not None
    return {name: [sample["filtered_resps"] for sample in samples] for name, samples in found["samples"].items()}


def completions(pair: Pair, *, backend: str = "huggingface", **options: Any) -> LocalCompletionsAPI:
    return LocalCompletionsAPI(
        base_url=f"{pair.url}/v1/completions",
        model="math",
        tokenizer=str(pair.folder),
        tokenizer_backend=backend,
        max_length=pair.window,
        max_retries=1,
        **options,
    )


def transformers(pair: Pair, window: int) -> HFLM:
    torch.set_num_threads(1)
    return HFLM(pretrained=str(pair.folder), dtype="float32", device="cpu", batch_size=1, max_length=window)


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 3, "num_concurrent": 4}])
def test_log_likelihoods_and_texts_are_those_of_transformers(pair: Pair, options: dict[str, int]) -> None:
    long = [" ".join(SENTENCES * 12), *SENTENCES]
    tasks = [task(CHOICE, QUESTIONS), task(ROLLING, long), task(WRITING, SENTENCES)]
    ours = evaluated(completions(pair, **options), tasks)
    # The client keeps two tokens of the window for itself when it cuts a long text.
    theirs = evaluated(transformers(pair, pair.window - 2), tasks)
    assert ours["writing"] == theirs["writing"]
    for mine, other in zip(ours["choice"], theirs["choice"], strict=True):
        assert [greedy for _, greedy in mine] == [greedy for _, greedy in other]
        assert [value for value, _ in mine] == pytest.approx([value for value, _ in other], abs=1e-3)
    for mine, other in zip(ours["rolling"], theirs["rolling"], strict=True):
        assert mine == pytest.approx(other, abs=1e-3)
    assert any(text for (text,) in ours["writing"])


def test_the_harness_may_leave_its_tokens_to_the_service(pair: Pair) -> None:
    remote, own = completions(pair, backend="remote"), completions(pair)
    for text in SENTENCES:
        ids = remote.tokenizer.encode(text)
        assert ids == own.tokenizer.encode(text, add_special_tokens=False)
        assert remote.tokenizer.decode(ids) == text
    for name in ("bos_token", "eos_token", "pad_token", "eos_token_id"):
        assert getattr(remote.tokenizer, name) == getattr(own.tokenizer, name)
    tasks = [task(CHOICE, QUESTIONS), task(WRITING, SENTENCES)]
    assert evaluated(remote, tasks) == evaluated(own, tasks)


def test_chats_are_answered_as_by_transformers_in_the_same_template(pair: Pair) -> None:
    client = LocalChatCompletion(
        base_url=f"{pair.url}/v1/chat/completions", model="math", max_retries=1, num_concurrent=3
    )
    tasks = [task(WRITING | {"generation_kwargs": WRITING["generation_kwargs"] | {"until": ["fox", "0"]}}, SENTENCES)]
    assert evaluated(client, tasks, chat=True) == evaluated(transformers(pair, pair.window), tasks, chat=True)
