"""The scorer as a model of lm_eval's, for `lm_eval.simple_evaluate(model=HarnessModel(scorer), ...)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from builder.proxy.requests import Choices, Generation, Likelihood, Rolling
from builder.proxy.scorer import Scorer
from routers.errors import ModelGlueError

MAX_TOKENS = 256
"""How long an answer may be where the task does not say."""
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the longest answer; the first counts."""
KNOWN = {"until", "do_sample", "temperature", *LIMITS}
NEUTRAL = {"top_p", "top_k", "min_p", "typical_p"}
"""Settings of sampling, of no effect on a greedy answer."""


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


def generation(prompt: str, options: dict[str, Any]) -> Generation:
    """The request of a task's generation_kwargs. Raises ModelGlueError for what is not greedy decoding."""
    sampled = options.get("do_sample")
    if sampled is not False and float(options.get("temperature", 1.0 if sampled else 0.0)) > 0:
        raise ModelGlueError("a task wants sampled answers, and ours are greedy: set do_sample: false in its YAML file")
    unknown = sorted(set(options) - KNOWN - NEUTRAL)
    if unknown:
        raise ModelGlueError(f"a task sets generation_kwargs.{unknown[0]}, which our scorer does not know")
    until = options.get("until") or ()
    limit = next((options[name] for name in LIMITS if options.get(name) is not None), MAX_TOKENS)
    return Generation(prompt, (until,) if isinstance(until, str) else tuple(until), int(limit))


def _arguments(requests: Sequence[Instance]) -> list[tuple[Any, ...]]:
    return [request.args for request in requests]


def _only(answer: Any) -> Likelihood:
    """The likelihood of an answer that has one."""
    likelihood: Likelihood = answer[0] if isinstance(answer, tuple) else answer
    return likelihood
