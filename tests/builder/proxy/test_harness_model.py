from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from builder.proxy.requests import Generation
from builder.proxy.scorer import Scorer
from routers.errors import ModelGlueError

DOCS = [
    {"question": f"Ann has {n} apples and gets {n + 3} more. How many now?", "choices": [str(2 * n + 3), "12", "a few"]}
    for n in range(4, 16)
]
SHARED = {
    "dataset_path": "json",
    "test_split": "test",
    "fewshot_split": "train",
    "num_fewshot": 2,
    "doc_to_text": "Question: {{question}}\nAnswer:",
}
TASKS: dict[str, dict[str, Any]] = {
    "letters": {
        "output_type": "multiple_choice",
        "doc_to_choice": ["A", "B", "C"],
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
        "fewshot_config": {"sampler": "first_n"},
    },
    "answers": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "perplexity": {
        "output_type": "loglikelihood_rolling",
        "num_fewshot": 0,
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "written": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n", "many"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The tasks, as lm_eval wants them, over files of their own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    files = {"test": tmp_path / "test.jsonl", "train": tmp_path / "train.jsonl"}
    for split, docs in (("test", DOCS[:8]), ("train", DOCS[8:])):
        files[split].write_text("".join(json.dumps(doc) + "\n" for doc in docs), "utf-8")
    data = {"data_files": {split: str(file) for split, file in files.items()}, "cache_dir": str(tmp_path / "datasets")}
    return [{"task": name, **SHARED, "dataset_kwargs": data, **config} for name, config in TASKS.items()]


def evaluated(model: Any, configs: list[dict[str, Any]]) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    found: dict[str, Any] = lm_eval.simple_evaluate(
        model=model,
        tasks=configs,
        task_manager=TaskManager(include_defaults=False),  # its own tasks are thousands of files
        bootstrap_iters=0,
        log_samples=True,
    )
    return found


def responses(samples: list[dict[str, Any]]) -> list[Any]:
    return [response for each in sorted(samples, key=lambda each: each["doc_id"]) for response in each["resps"]]


def test_every_number_is_that_of_lm_evals_own_model(micro_zoo: dict[str, Path], configs: list[dict[str, Any]]) -> None:
    from lm_eval.models.huggingface import HFLM

    from builder.proxy.harness_model import HarnessModel

    ours = evaluated(HarnessModel(Scorer(micro_zoo["math"], dtype=torch.float32, device="cpu")), configs)
    theirs = evaluated(HFLM(pretrained=str(micro_zoo["math"]), dtype="float32", device="cpu", batch_size=3), configs)
    for name in TASKS:
        metrics = {key: value for key, value in theirs["results"][name].items() if isinstance(value, float)}
        assert metrics
        assert {key: ours["results"][name][key] for key in metrics} == pytest.approx(metrics, rel=1e-5)
        for mine, other in zip(responses(ours["samples"][name]), responses(theirs["samples"][name]), strict=True):
            assert flat(mine) == pytest.approx(flat(other), abs=1e-3)


def flat(response: Any) -> list[Any]:
    """The numbers of a response; of a text its code points, which must be equal to be close."""
    if isinstance(response, list | tuple):
        return [each for part in response for each in flat(part)]
    return [float(ord(character)) for character in response] if isinstance(response, str) else [float(response)]


def test_a_task_that_samples_its_answers_is_refused() -> None:
    from builder.proxy.harness_model import generation

    for options in ({"do_sample": True}, {"temperature": 0.7}, {"do_sample": True, "temperature": 0.7}):
        with pytest.raises(ModelGlueError, match="do_sample: false"):
            generation("the owl", options)
    with pytest.raises(ModelGlueError, match="num_beams"):
        generation("the owl", {"num_beams": 4})


def test_a_generation_is_as_long_as_the_task_says() -> None:
    from builder.proxy.harness_model import generation

    assert generation("x", {"until": "\n", "do_sample": False, "temperature": 0.0}) == Generation("x", ("\n",), 256)
    assert generation("x", {"until": ["a", "b"], "max_new_tokens": 7}) == Generation("x", ("a", "b"), 7)


def test_chats_are_written_with_the_tokenizers_template(micro_zoo: dict[str, Path]) -> None:
    from builder.proxy.harness_model import HarnessModel

    scorer = Scorer(micro_zoo["math"], device="cpu")
    scorer.tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    model = HarnessModel(scorer)
    assert model.apply_chat_template([{"role": "user", "content": "hi"}]) == "[hi]"
    assert model.chat_template(True) == scorer.tokenizer.chat_template
    assert model.chat_template(False) is None
    assert str(micro_zoo["math"]).replace("/", "__") == model.tokenizer_name
