"""The files of a model folder around its weights: config, tokenizer, chat template, code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builder import files
from builder.merge.plan import Plan

CONFIG = ("config.json", "generation_config.json")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def companions(folder: Path) -> list[Path]:
    """The files of a model folder that go with its weights, in a fixed order: a custom architecture's code too."""
    names = (*CONFIG, *TOKENIZER, *PROCESSOR)
    return [folder / name for name in names if (folder / name).exists()] + sorted(folder.glob("*.py"))


def copy(source: Path, target: Path) -> None:
    """All of that, as it is."""
    for path in companions(source):
        files.copy(path, target / path.name)


def write(plan: Plan, target: Path) -> None:
    """What goes with the merged weights: the donor's files, with the plan's config, vocabulary and chat template."""
    donor = plan.donor.checkpoint.folder
    tokens = plan.vocabulary.folder if plan.vocabulary else donor
    for path in companions(donor):
        if path.name not in TOKENIZER and path.name != "config.json":
            files.copy(path, target / path.name)
    for name in TOKENIZER:
        if (tokens / name).exists():
            files.copy(tokens / name, target / name)
    if tokens != donor and (tokens / "generation_config.json").exists():
        # Its token ids are those of the tokenizer.
        files.copy(tokens / "generation_config.json", target / "generation_config.json")
    for name, data in (plan.vocabulary.files if plan.vocabulary else {}).items():
        (target / name).write_bytes(data)
    _write_json(target / "config.json", plan.config)
    if plan.chat_template is not None:
        _set_template(target, plan.chat_template)


def _set_template(target: Path, template: str) -> None:
    """The one place where readers look first; a template elsewhere would contradict it."""
    (target / "chat_template.jinja").write_text(template, "utf-8")
    config = target / "tokenizer_config.json"
    if config.exists():
        facts = json.loads(config.read_text("utf-8"))
        if facts.pop("chat_template", None) is not None:
            _write_json(config, facts)


def _write_json(path: Path, facts: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", "utf-8")
