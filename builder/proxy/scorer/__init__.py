"""The model side: requests become rows of tokens, rows a trie, and each of its nodes is computed once."""

from __future__ import annotations

from builder.proxy.scorer.scorer import Scorer, fast_dtype

__all__ = ["Scorer", "fast_dtype"]
