"""The chat template of a merged model: its models' most common one, a built-in one, or the recipe's own."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from builder.errors import MergeError

NAMES = ("alpaca", "chatml", "exaone", "llama3", "mistral")
"""The built-in templates, each a file of templates/."""


def template(choice: str, folders: Sequence[Path]) -> str | None:
    """The template that a recipe's `chat_template` means for a merge of these model folders.

    choice: "auto", the template that most of them have (of equally many, the first), or None where none has one; a
        built-in's name; or a template, which has a brace.

    Raises MergeError.
    """
    if choice == "auto":
        found = [text for folder in folders if (text := _of(folder))]
        counts = Counter(text.strip() for text in found)
        return max(found, key=lambda text: counts[text.strip()], default=None)
    if choice in NAMES:
        return (resources.files("builder.merge") / "templates" / f"{choice}.jinja").read_text("utf-8")
    if "{" in choice:
        return choice
    raise MergeError(
        f"chat_template: {choice!r} is none of auto, {', '.join(NAMES)}, and no template, which would have a brace"
    )


def _of(folder: Path) -> str | None:
    """A folder's own template: chat_template.jinja, else the default one of tokenizer_config.json."""
    try:
        if (folder / "chat_template.jinja").exists():
            return (folder / "chat_template.jinja").read_text("utf-8")
        if not (folder / "tokenizer_config.json").exists():
            return None
        said: Any = json.loads((folder / "tokenizer_config.json").read_bytes()).get("chat_template")
        if isinstance(said, list):
            said = {entry["name"]: entry["template"] for entry in said}
        if isinstance(said, dict):
            said = said.get("default")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise MergeError(f"the chat template of {folder} cannot be read ({exc!r}): fetch the model again") from exc
    return said if isinstance(said, str) else None
