"""A prompt becomes a vector: normalised text, tokens, the mean of their embeddings, centred, unit length.

V tokens in the vocabulary, T tokens in a prompt, D features.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from routers.base import Vector

MAX_TOKENS = 512
"""Tokens of a prompt that count, from its end, where a chat's question stands."""


def normalise(text: str) -> str:
    """Text as the features see it: one Unicode form, white space folded; case stays, it tells code from prose."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


class TokenEmbeddings:
    """The paper's feature: the mean of a base model's token embeddings over the prompt's own tokens.

    No padding, no special tokens, so a vector never depends on a batch. `mean_D`, the common mean that is removed,
    and the unit length are ours (PAPER.md 5).
    """

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
        return cls(tokenizer, embeddings_VD, np.stack([raw._mean(raw.tokens(text)) for text in texts]).mean(axis=0))

    @property
    def dimension(self) -> int:
        """D."""
        return int(self._embeddings_VD.shape[1])

    def tokens(self, text: str) -> list[int]:
        """Ids of the tokens that count; tokens that were added to the tokenizer and have no embedding do not."""
        ids = self._tokenizer.encode(normalise(text), add_special_tokens=False).ids
        return [i for i in ids if i < len(self._embeddings_VD)][-MAX_TOKENS:]

    def vector(self, text: str) -> Vector:
        """Unit vector [D] of a prompt; zeros for a prompt without tokens."""
        return self.of_tokens(self.tokens(text))

    def of_tokens(self, ids: Sequence[int]) -> Vector:
        """Unit vector [D] of token ids."""
        if not ids:
            return np.zeros(self.dimension, np.float32)
        return _unit(self._mean(ids) - self._mean_D)

    def leaving_out_each(self, ids: Sequence[int]) -> list[tuple[str, Vector]]:
        """Every distinct token as readable text, with the vector that the prompt would have without it."""
        sum_D = self._mean(ids) * len(ids)
        left_out = []
        for token in dict.fromkeys(ids):
            count = ids.count(token)
            rest_D = sum_D - count * self._embeddings_VD[token].astype(np.float32)
            rest = len(ids) - count
            vector_D = _unit(rest_D / rest - self._mean_D) if rest else np.zeros_like(sum_D)
            left_out.append((self._tokenizer.decode([token]).strip(), vector_D))
        return left_out

    def arrays(self) -> dict[str, NDArray[np.float16] | Vector]:
        """What a bundle stores; the tokenizer is a file of its own."""
        return {"embeddings": self._embeddings_VD, "mean": self._mean_D}

    def _mean(self, ids: Sequence[int]) -> Vector:
        mean_D: Vector = self._embeddings_VD[np.asarray(ids)].astype(np.float32).mean(axis=0)
        return mean_D


def _unit(vector_D: Vector) -> Vector:
    unit_D: Vector = vector_D / max(float(np.linalg.norm(vector_D)), 1e-12)
    return unit_D
