"""Changes of a prompt that mean nothing, to see whether its route stays."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable

TYPOS = 0.08
"""The share of words with two letters swapped; one at least."""


def typos(prompt: str) -> str:
    """Two neighbouring letters swapped in some words; the same ones every time."""
    chance = random.Random(zlib.crc32(prompt.encode()))
    words = prompt.split(" ")
    long = [place for place, word in enumerate(words) if len(word) > 3 and word.isalpha()]
    for place in chance.sample(long, min(len(long), max(1, round(TYPOS * len(words))))):
        word, at = words[place], chance.randrange(1, len(words[place]) - 1)
        words[place] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


def upper(prompt: str) -> str:
    """All in capitals."""
    return prompt.upper()


def spaces(prompt: str) -> str:
    """Spaces doubled, tabs and empty lines around."""
    return "\n\n " + prompt.replace(" ", "  ").replace("\n", " \n\t") + " \n"


def template(prompt: str) -> str:
    """What is left of a chat template around it."""
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def headers(prompt: str) -> str:
    """Alpaca's headers around it."""
    return f"### Instruction:\n{prompt}\n\n### Response:"


def unicode_forms(prompt: str) -> str:
    """Typographic quotes and no-break spaces."""
    return prompt.replace("'", "’").replace(" ", "\u00a0", 3)


PERTURBATIONS: dict[str, Callable[[str], str]] = {
    "typos": typos,
    "case": upper,
    "spaces": spaces,
    "template": template,
    "headers": headers,
    "unicode": unicode_forms,
}
