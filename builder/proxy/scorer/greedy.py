"""Writes answers greedily, many at a time in one packed row; who is done leaves, and who waits takes the place.

Array names as in packed.py; A answers being written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from builder.proxy.scorer.encoding import Prompt
from builder.proxy.scorer.packed import Held, chunk_of, read_nodes
from builder.proxy.scorer.stops import Stops
from builder.proxy.scorer.trie import plant

ANSWERS = {"cpu": 16, "cuda": 64}
"""How many answers are written at a time."""
KEYS = {"cpu": 3000, "cuda": 30000}
"""How many keys each new token may be compared with though few are its own."""
ROWS = {"cpu": 8, "cuda": 32}
"""How many answers are written at a time in padded rows."""
UNUSED = 0.2
"""What part of the keys and values may be of nobody's use before they are dropped: to drop some copies the others."""


@dataclass(slots=True, eq=False)
class _Answer:
    """The answer to a prompt, whose last token is `node` of the trie."""

    index: int
    prompt: Prompt
    node: int
    tokens: list[int] = field(default_factory=list)


def answers(model: Any, stops: Stops, prompts: Sequence[Prompt]) -> Iterator[tuple[int, list[int]]]:
    """The tokens of each answer, by its prompt's index, as soon as it has come to its end."""
    writer = _Writer(model, prompts)
    places = ANSWERS.get(model.device.type, ANSWERS["cuda"])
    while writer.waiting or writer.writing:
        # Some at a time: to read one prompt takes hardly less than to read four.
        if writer.waiting and len(writer.writing) <= places * 3 // 4:
            writer.admit(places - len(writer.writing))
        else:
            writer.step()
        for answer in [each for each in writer.writing if stops.met(each.prompt, each.tokens)]:
            writer.dismiss(answer)
            yield answer.index, answer.tokens


def worthwhile(model: Any, prompts: Sequence[Prompt]) -> bool:
    """Whether packed rows beat padded ones: every token is compared with all keys, so prompts must share or be few."""
    places, device = ANSWERS.get(model.device.type, ANSWERS["cuda"]), model.device.type
    nodes = len(plant([prompt.tokens for prompt in prompts], [0] * len(prompts)))
    keys = nodes * min(1.0, places / len(prompts))
    longest = max(len(prompt.tokens) for prompt in prompts)
    return keys <= max(KEYS.get(device, KEYS["cuda"]), 4 * longest)


def rows(model: Any) -> int:
    """How many padded rows a model may write at a time; one where padding would count as what was said before."""
    penalty = model.generation_config.repetition_penalty or 1.0
    return ROWS.get(model.device.type, ROWS["cuda"]) if penalty == 1.0 else 1


class _Writer:
    """The answers being written, those that wait in the order of the trie, and what the model has read for both."""

    def __init__(self, model: Any, prompts: Sequence[Prompt]) -> None:
        self._trie = plant([prompt.tokens for prompt in prompts], [len(prompt.tokens) - 1 for prompt in prompts])
        self.waiting = [_Answer(i, prompts[i], int(self._trie.paths[i][0])) for i in reversed(self._trie.order)]
        self.writing: list[_Answer] = []
        self._held, self._chunk, self._read = Held(model), chunk_of(model), 0
        self._penalty = model.generation_config.repetition_penalty or 1.0
        self._first: dict[int, int] = {}  # the first token after each prompt, by its node: prompts can be equal

    def admit(self, count: int) -> None:
        """Let so many of those who wait begin; each has its first token then."""
        self._drop()
        for _ in range(min(count, len(self.waiting))):
            self.writing.append(self.waiting.pop())
        new = [answer for answer in self.writing if not answer.tokens]
        while self._read <= new[-1].node:
            last = min(self._read + self._chunk, new[-1].node + 1)
            ended = list({answer.node: answer for answer in new if self._read <= answer.node < last}.values())
            wanted_W = np.array([answer.node for answer in ended], np.int64)
            picked = self._pick(read_nodes(self._held, self._trie, self._read, last, wanted_W), ended)
            self._first |= zip(wanted_W.tolist(), picked, strict=True)
            self._read = last
        for answer in new:
            answer.tokens.append(self._first[answer.node])

    def step(self) -> None:
        """Write a token of every answer."""
        nodes_A = np.array([answer.node for answer in self.writing])
        logits_AV = self._held.read(
            tokens_Q=np.array([answer.tokens[-1] for answer in self.writing]),
            depths_Q=np.array([len(answer.prompt.tokens) + len(answer.tokens) - 1 for answer in self.writing]),
            nodes_Q=nodes_A,
            ends_Q=np.zeros_like(nodes_A),  # below no node: its owner alone sees it
            owners_Q=np.array([answer.index for answer in self.writing]),
            wanted_W=np.arange(len(nodes_A)),
        )
        for answer, token in zip(self.writing, self._pick(logits_AV, self.writing), strict=True):
            answer.tokens.append(token)

    def dismiss(self, answer: _Answer) -> None:
        """Write no more of this answer."""
        self.writing.remove(answer)

    def _drop(self) -> None:
        """Forget what neither those who write nor the next who waits will see again."""
        held = self._held
        nodes = np.array([answer.node for answer in [*self.writing, *self.waiting[-1:]]])[:, None]
        used_K = ((held.nodes_K <= nodes) & (nodes < held.ends_K)).any(0)
        used_K |= np.isin(held.owners_K, [answer.index for answer in self.writing])
        if used_K.sum() < (1 - UNUSED) * len(used_K):
            held.keep(used_K)

    @torch.inference_mode()
    def _pick(self, logits_AV: Tensor, answers: Sequence[_Answer]) -> list[int]:
        """The likeliest token of each; one that was there already counts less where the model's own settings say so."""
        logits_AV = logits_AV.float()
        if self._penalty != 1.0:
            for answer, logits_V in zip(answers, logits_AV, strict=True):
                seen = torch.from_numpy(np.union1d(answer.prompt.tokens, answer.tokens).astype(np.int64))
                seen = seen.to(logits_V.device)
                logits = logits_V[seen]
                logits_V[seen] = torch.where(logits < 0, logits * self._penalty, logits / self._penalty)
        picked: list[int] = logits_AV.argmax(1).tolist()
        return picked
