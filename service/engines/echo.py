"""An engine without a model: it answers with the prompt's own words. Ships, for tests and for trying the API."""

from __future__ import annotations

import asyncio
import re
import zlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from typing import Final

from service.engines.base import (
    About,
    Finish,
    Job,
    Load,
    Message,
    Piece,
    Prompt,
    PromptError,
    Sampling,
    Scored,
    Status,
    Tokens,
    UnsupportedError,
    Usage,
    fit,
)

OTHER: Final = Scored(ord("~"), b"~", -0.5)
"""What every word might have been instead."""


class EchoEngine:
    """Repeats the prompt, of a chat the last user turn, a word a piece; a token is a word with the space before it.

    An answer that is not greedy begins at the word of its seed's number, and goes round. A word's log-probability, 0 to
    -1, is of the word alone: `-crc32(word) / 2**32`. Several experts say what each says alone; `mixes=False` refuses
    them. `running` counts the open answers, `finished` those that ended, whether read to the end or closed.
    """

    def __init__(self, experts: tuple[str, ...], window: int = 64, delay: float = 0.0, *, mixes: bool = True) -> None:
        """Wait `delay` seconds before each piece."""
        self.running = 0
        self.finished = 0
        self._experts = experts
        self._window = window
        self._delay = delay
        self._mixes = mixes

    def status(self) -> dict[str, Status]:
        return dict.fromkeys(self._experts, Status("ready"))

    def load(self) -> dict[str, Load]:
        return dict.fromkeys(self._experts, Load(running=self.running))

    def about(self, expert: str) -> About:
        return About(self._window, {"engine": "echo"})

    def prepare(self, experts: Mapping[str, float], prompt: Prompt, sampling: Sampling) -> Job:
        self.check_mix(list(experts), sampling)
        if sampling.guide:
            raise UnsupportedError(
                "an echo takes no form but the prompt's: leave response_format out", "response_format"
            )
        tokens = self.encode(next(iter(experts)), prompt)
        return Job(experts, tokens, fit(next(iter(experts)), len(tokens), self._window, sampling), prompt)

    def check_mix(self, experts: Sequence[str], sampling: Sampling) -> None:
        if len(experts) > 1 and not self._mixes:
            raise UnsupportedError(f"{' and '.join(experts)} cannot be mixed: ask for one", "k")

    def encode(self, expert: str, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, Tokens):
            return prompt.ids
        return tuple(map(_token, re.findall(r"\s*\S+", _text(prompt))))

    def decode(self, expert: str, ids: Sequence[int]) -> str:
        return b"".join(map(_raw, ids)).decode("utf-8", "replace")

    async def generate(self, job: Job) -> AsyncGenerator[Piece, None]:
        words = _words(job)
        answer = words[: job.sampling.max_tokens]
        finish: Finish = "length" if len(answer) < len(words) else "stop"
        prompt = _scored(job.tokens, job.sampling.prompt_logprobs)
        prompt = (replace(prompt[0], logprob=None, top=()), *prompt[1:]) if prompt else ()
        usage = Usage(len(job.tokens))
        self.running += 1
        try:
            for token in answer[:-1]:
                await asyncio.sleep(self._delay)
                yield Piece(_word(token), 1, None, _scored((token,), job.sampling.logprobs), prompt, usage)
                prompt = ()
            await asyncio.sleep(self._delay)
            last = answer[-1:]
            scored = _scored(last, job.sampling.logprobs)
            yield Piece("".join(map(_word, last)), len(last), finish, scored, prompt, usage)
        finally:
            self.running -= 1
            self.finished += 1

    async def start(self) -> None:
        """Nothing to load."""

    async def aclose(self) -> None:
        """Nothing to free."""


def _words(job: Job) -> tuple[int, ...]:
    """What the answer would be without a limit."""
    words = job.tokens
    if job.sampling.seed is not None and job.sampling.temperature and words:
        first = job.sampling.seed % len(words)
        words = words[first:] + words[:first]
    ends = [i for i, word in enumerate(words) if word in job.sampling.stop_tokens]
    return words[: ends[0]] if ends else words


def _scored(tokens: Sequence[int], alternatives: int | None) -> tuple[Scored, ...]:
    if alternatives is None:
        return ()
    alone = [Scored(token, _raw(token), -zlib.crc32(_raw(token)) / 2**32) for token in tokens]
    likeliest = [sorted((each, OTHER), key=lambda scored: -(scored.logprob or 0)) for each in alone]
    return tuple(replace(each, top=tuple(top[:alternatives])) for each, top in zip(alone, likeliest, strict=True))


def _text(prompt: str | tuple[Message, ...]) -> str:
    if isinstance(prompt, str):
        return prompt
    turns = [message.content for message in prompt if message.role == "user"]
    if not turns:
        raise PromptError("a chat needs a message of the user")
    return turns[-1]


def _token(word: str) -> int:
    return int.from_bytes(word.encode())


def _raw(token: int) -> bytes:
    return token.to_bytes((token.bit_length() + 7) // 8)


def _word(token: int) -> str:
    return _raw(token).decode("utf-8", "replace")
