"""A prompt becomes a vector: normalised text, tokens, the mean of their embeddings, centred, unit length.

V tokens in the vocabulary, T tokens in a prompt, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from routers.base import Vector, unit
from routers.normalise import normalise

MAX_TOKENS = 512
"""Tokens of a prompt that count, from its end, where a chat's question stands."""

CHARACTERS = 16
"""Characters of a prompt that are read for each token that can count: a megabyte takes no longer than a page."""


class Features(Protocol):
    """What turns a prompt into a vector; a prompt's vector depends on nothing but the prompt."""

    kind: ClassVar[str]

    @property
    def dimension(self) -> int:
        """D."""
        ...

    def vector(self, text: str) -> Vector:
        """Unit vector [D] of a prompt; zeros for a prompt without tokens."""
        ...

    def without_each(self, text: str) -> list[tuple[str, Vector]]:
        """Every distinct word, with the vector that the prompt would have without it."""
        ...

    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """What a bundle stores in the router's file."""
        ...


class TokenEmbeddings:
    """The paper's feature: the mean of a base model's token embeddings over the prompt's own tokens.

    No padding, no special tokens, so a vector never depends on a batch. `mean_D`, the common mean that is removed,
    and the unit length are ours (PAPER.md 5).
    """

    kind: ClassVar[str] = "token-embeddings"

    def __init__(self, tokenizer: Tokenizer, embeddings_VD: NDArray[np.float16], mean_D: Vector) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._embeddings_VD = embeddings_VD
        self._mean_D = mean_D

    @classmethod
    def centred_on(cls, tokenizer: Tokenizer, embeddings_VD: NDArray[np.float16], texts: Sequence[str]) -> Self:
        """Features whose common mean is that of `texts`."""
        raw = cls(tokenizer, embeddings_VD, np.zeros(embeddings_VD.shape[1], np.float32))
        means = [raw._mean(ids) for text in texts if (ids := raw.tokens(text))]
        return cls(tokenizer, embeddings_VD, np.mean(means, axis=0, dtype=np.float32)) if means else raw

    @property
    def dimension(self) -> int:
        return int(self._embeddings_VD.shape[1])

    def tokens(self, text: str) -> list[int]:
        """Ids of the tokens that count; tokens that were added to the tokenizer and have no embedding do not."""
        ids = self._tokenizer.encode(normalise(text[-CHARACTERS * MAX_TOKENS :]), add_special_tokens=False).ids
        return [i for i in ids if i < len(self._embeddings_VD)][-MAX_TOKENS:]

    def vector(self, text: str) -> Vector:
        return self.of_tokens(self.tokens(text))

    def of_tokens(self, ids: Sequence[int]) -> Vector:
        """Unit vector [D] of token ids."""
        if not ids:
            return np.zeros(self.dimension, np.float32)
        return unit(self._mean(ids) - self._mean_D)

    def without_each(self, text: str) -> list[tuple[str, Vector]]:
        """Words are tokens here."""
        ids = self.tokens(text)
        if not ids:
            return []
        sum_D = self._mean(ids) * len(ids)
        left_out = []
        for token in dict.fromkeys(ids):
            count = ids.count(token)
            rest_D = sum_D - count * self._embeddings_VD[token].astype(np.float32)
            rest = len(ids) - count
            vector_D = unit(rest_D / rest - self._mean_D) if rest else np.zeros_like(sum_D)
            left_out.append((self._tokenizer.decode([token]).strip(), vector_D))
        return left_out

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The tokenizer is a file of its own."""
        return {"embeddings": self._embeddings_VD, "mean": self._mean_D}

    def _mean(self, ids: Sequence[int]) -> Vector:
        mean_D: Vector = self._embeddings_VD[np.asarray(ids)].astype(np.float32).mean(axis=0)
        return mean_D


def spread(embeddings_VD: Vector) -> NDArray[np.float16]:
    """Token embeddings turned to their principal axes, each divided by the square root of its deviation.

    A few directions carry most of the variance of an embedding table and little meaning (All-but-the-Top, arXiv
    1702.01417); half of a whitening balances them. It comes from the table alone, so no text has to be at hand, and as
    a mean is linear it costs a prompt nothing.
    """
    centred_VD = (embeddings_VD - embeddings_VD.mean(axis=0)).astype(np.float64)
    variances_D, axes_DD = np.linalg.eigh(centred_VD.T @ centred_VD / len(centred_VD))
    floor = max(float(variances_D[-1]) * 1e-6, 1e-30)
    # An axis points either way; the larger entry decides, on every machine.
    signs_D = np.sign(axes_DD[np.abs(axes_DD).argmax(axis=0), np.arange(len(axes_DD))])
    turned_VD = centred_VD @ (axes_DD * signs_D / np.maximum(variances_D, floor) ** 0.25)
    scaled_VD: NDArray[np.float16] = (turned_VD / max(float(turned_VD.std()), 1e-30)).astype(np.float16)
    return scaled_VD
