"""An engine without a model: it answers with the prompt's own words. Ships, for tests and for trying the API."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator

from service.engines.base import Finish, Job, Piece, Prompt, PromptError, Sampling, Status


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

    def window(self, expert: str) -> int:
        return self._window

    def prepare(self, expert: str, prompt: Prompt, sampling: Sampling) -> Job:
        words = re.findall(r"\s*\S+", _text(prompt))
        if len(words) + sampling.max_tokens > self._window:
            raise PromptError(
                f"{len(words)} tokens of prompt and {sampling.max_tokens} of answer "
                f"are over {expert}'s window of {self._window}"
            )
        return Job(expert, tuple(map(_token, words)), sampling)

    async def generate(self, job: Job) -> AsyncGenerator[Piece, None]:
        answer = job.tokens[: max(0, job.sampling.max_tokens)]
        finish: Finish = "length" if len(answer) < len(job.tokens) else "stop"
        self.running += 1
        try:
            for token in answer[:-1]:
                await asyncio.sleep(self._delay)
                yield Piece(_word(token), 1)
            await asyncio.sleep(self._delay)
            yield Piece("".join(map(_word, answer[-1:])), len(answer[-1:]), finish)
        finally:
            self.running -= 1
            self.finished += 1

    async def start(self) -> None:
        """Nothing to load."""

    async def aclose(self) -> None:
        """Nothing to free."""


def _text(prompt: Prompt) -> str:
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
