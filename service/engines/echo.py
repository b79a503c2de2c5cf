"""An engine without a model: it answers with the prompt's own words. Ships, for tests and for trying the API."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Mapping, Sequence

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
    Usage,
    fit,
)


class EchoEngine:
    """Repeats the prompt, of a chat the last user turn, a word a piece; a token is a word with the space before it.

    `running` counts the open answers, `finished` those that ended, whether read to the end or closed by the reader.
    """

    def __init__(self, experts: tuple[str, ...], window: int = 64, delay: float = 0.0) -> None:
        """Wait `delay` seconds before each piece."""
        self.running = 0
        self.finished = 0
        self._experts = experts
        self._window = window
        self._delay = delay

    def status(self) -> dict[str, Status]:
        return dict.fromkeys(self._experts, Status("ready"))

    def load(self) -> dict[str, Load]:
        return dict.fromkeys(self._experts, Load(running=self.running))

    def about(self, expert: str) -> About:
        return About(self._window)

    def prepare(self, experts: Mapping[str, float], prompt: Prompt, sampling: Sampling) -> Job:
        tokens = prompt.ids if isinstance(prompt, Tokens) else tuple(map(_token, re.findall(r"\s*\S+", _text(prompt))))
        return Job(experts, tokens, fit(next(iter(experts)), len(tokens), self._window, sampling), prompt)

    def decode(self, expert: str, ids: Sequence[int]) -> str:
        return "".join(map(_word, ids))

    async def generate(self, job: Job) -> AsyncGenerator[Piece, None]:
        answer = job.tokens[: job.sampling.max_tokens]
        finish: Finish = "length" if len(answer) < len(job.tokens) else "stop"
        self.running += 1
        try:
            for token in answer[:-1]:
                await asyncio.sleep(self._delay)
                yield Piece(_word(token), 1, scored=_scored(job, token))
            await asyncio.sleep(self._delay)
            scored = tuple(each for token in answer[-1:] for each in _scored(job, token))
            text = "".join(map(_word, answer[-1:]))
            yield Piece(text, len(answer[-1:]), finish, scored, usage=Usage(len(job.tokens)))
        finally:
            self.running -= 1
            self.finished += 1

    async def start(self) -> None:
        """Nothing to load."""

    async def aclose(self) -> None:
        """Nothing to free."""


def _scored(job: Job, token: int) -> tuple[Scored, ...]:
    """An echo is certain of every word."""
    if job.sampling.logprobs is None:
        return ()
    raw = _word(token).encode()
    return (Scored(token, raw, 0.0, (Scored(token, raw, 0.0),) if job.sampling.logprobs else ()),)


def _text(prompt: str | tuple[Message, ...]) -> str:
    if isinstance(prompt, str):
        return prompt
    turns = [message.content for message in prompt if message.role == "user"]
    if not turns:
        raise PromptError("a chat needs a message of the user")
    return turns[-1]


def _token(word: str) -> int:
    return int.from_bytes(word.encode())


def _word(token: int) -> str:
    return token.to_bytes((token.bit_length() + 7) // 8).decode()
