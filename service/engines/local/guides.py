"""What answers have to look like, as masks over an expert's vocabulary: JSON by a schema, or a regular expression."""

from __future__ import annotations

import json
import threading
from collections.abc import Collection
from functools import lru_cache
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from numpy.typing import NDArray

from service.engines.base import EngineError, Guide, UnsupportedError

# Between JSON's tokens: compact, spaced, or pretty-printed. Without a bound some models never stop at it.
SPACE = r" |\n[ \t]{0,40}"
KEPT = 64


class Matcher:
    """Where one answer stands in its guide. For one thread at a time. W: words of 32 tokens, the lowest bit first."""

    def __init__(self, inner: LLMatcher) -> None:
        self._inner = inner

    def allow(self, masks_RW: NDArray[np.int32], row: int) -> None:
        """Write which tokens may come next into a row of masks. Raises EngineError for a guide beyond its limits."""
        fill_next_token_bitmask(self._inner, masks_RW, row)
        self._check()

    def accept(self, token: int) -> None:
        """Go on by a token. Raises EngineError for one that the guide rules out."""
        self._inner.consume_token(token)
        self._check()

    @property
    def finished(self) -> bool:
        """Whether the text is whole and nothing but an end-of-sequence token can follow, or one has."""
        return self._inner.is_stopped()

    def _check(self) -> None:
        if self._inner.is_error():
            raise EngineError(f"the answer cannot follow its guide: {_gist(self._inner.get_error())}")


class Guides:
    """The guides of one expert, each compiled once. For any thread.

    tokenizer: a fast one of transformers. vocabulary: how many logits the expert has. eos: what ends an answer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, eos: Collection[int]) -> None:
        self._source = tokenizer
        self._vocabulary = vocabulary
        self._eos = sorted(eos) or None
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._compiled = lru_cache(KEPT)(self._compile)

    def matcher(self, guide: Guide) -> Matcher:
        """A matcher at the start of an answer; compiling a new guide takes milliseconds, the first one a second.

        Raises UnsupportedError for a guide that is wrong or too much, or a tokenizer that cannot be guided.
        """
        return Matcher(self._compiled(guide).deep_copy())

    def _compile(self, guide: Guide) -> LLMatcher:
        matcher = LLMatcher(self._readied(), _grammar(guide), log_level=0)
        # The first mask builds what every answer's start needs, and meets the limits, here rather than in a step.
        fill_next_token_bitmask(matcher, allocate_token_bitmask(1, self._vocabulary))
        if matcher.is_error():
            raise _unsupported(guide, matcher.get_error())
        return matcher

    def _readied(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                try:
                    source = self._source.backend_tokenizer.to_str()
                    self._tokenizer = LLTokenizer(source, n_vocab=self._vocabulary, eos_token=self._eos)
                except (AttributeError, ValueError) as exc:
                    raise UnsupportedError(
                        f"this expert's tokenizer cannot be guided: {_gist(str(exc))}", "response_format"
                    ) from exc
            return self._tokenizer


def _grammar(guide: Guide) -> str:
    if guide.kind == "regex":
        return LLMatcher.grammar_from_regex(guide.text)
    try:
        schema = json.loads(guide.text)
    except (ValueError, RecursionError) as exc:
        raise _unsupported(guide, f"it is no JSON: {exc}") from exc
    if not isinstance(schema, dict):
        raise _unsupported(guide, "it is no JSON object")
    # By the standard {} allows any value; of an answer in JSON an object is expected.
    return LLMatcher.grammar_from_json_schema(schema or {"type": "object"}, defaults={"whitespace_pattern": SPACE})


def _unsupported(guide: Guide, reason: str) -> UnsupportedError:
    what = "regular expression" if guide.kind == "regex" else "JSON schema"
    return UnsupportedError(f"the {what} cannot guide an answer: {_gist(reason)}", "response_format")


def _gist(error: str) -> str:
    """The line that says it, of an error that quotes the grammar around it."""
    lines = error.splitlines() or [""]
    said = next((line for line in lines if line.startswith("error: ")), lines[0])
    if said == "NoExtensionBias":
        return "nothing matches it"
    return said.removeprefix("error: ").rpartition("(in regex): ")[2]
