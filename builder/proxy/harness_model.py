"""The scorer as a model of lm_eval's, for `lm_eval.simple_evaluate(model=HarnessModel(scorer), ...)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from builder.proxy.harness import generation
from builder.proxy.requests import Choices, Likelihood, Rolling
from builder.proxy.scorer import Scorer


class HarnessModel(LM):  # type: ignore[misc] # lm_eval is untyped to us
    """Answers lm_eval's requests with a scorer; `done` hears how many more are finished."""

    def __init__(self, scorer: Scorer, done: Callable[[int], None] = lambda _: None) -> None:
        super().__init__()
        self._scorer, self._done = scorer, done
        self._device = scorer.model.device

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        answers = self._scorer.answer([Choices(prompt, (text,)) for prompt, text in _arguments(requests)], self._done)
        parts = [_only(answer) for answer in answers]
        return self._told("loglikelihood", requests, [(part.nats, part.greedy) for part in parts])

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        answers = self._scorer.answer([Rolling(text) for (text,) in _arguments(requests)], self._done)
        return self._told("loglikelihood_rolling", requests, [_only(answer).nats for answer in answers])

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        asked = [generation(prompt, options) for prompt, options in _arguments(requests)]
        return self._told(
            "generate_until", requests, [str(answer) for answer in self._scorer.answer(asked, self._done)]
        )

    @property
    def tokenizer_name(self) -> str:
        name: str = self._scorer.tokenizer.name_or_path
        return name.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text: str = self._scorer.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        if chat_template is False or chat_template is None:
            return None
        name = chat_template if isinstance(chat_template, str) else None
        template: str = self._scorer.tokenizer.get_chat_template(name)
        return template

    def _told(self, kind: str, requests: Sequence[Instance], answers: list[Any]) -> list[Any]:
        """The answers, of which lm_eval's cache has heard."""
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)
        return answers


def _arguments(requests: Sequence[Instance]) -> list[tuple[Any, ...]]:
    return [request.args for request in requests]


def _only(answer: Any) -> Likelihood:
    """The likelihood of an answer that has one."""
    likelihood: Likelihood = answer[0] if isinstance(answer, tuple) else answer
    return likelihood
