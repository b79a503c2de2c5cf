"""A mixture of models that are at hand, such as a build's experts, without a file of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from builder.journal import Journal
from builder.merge.models import folder_of
from builder.mix import spec as specs
from builder.mix.plan import Plan, plan
from builder.mix.train import Text
from builder.mix.write import Written, write
from builder.progress import Progress


def spec_of(prompts: Mapping[str, Sequence[str]], **choices: Any) -> specs.Spec:
    """The spec of experts by name, each with its prompts; `choices` are a spec's other keys. Raises MixError."""
    experts = [{"source_model": name, "positive_prompts": list(texts)} for name, texts in prompts.items()]
    text = yaml.safe_dump({**choices, "experts": experts}, sort_keys=False, allow_unicode=True)
    return specs.parse(text, "the mixture", Path())


def planned(spec: specs.Spec, folders: Mapping[str, Path]) -> Plan:
    """Its plan, from headers alone; folders by the names in the spec. Raises ModelGlueError for what does not mix."""
    return plan(spec, lambda name: folder_of(folders[name]))


def write_mixture(
    folders: Mapping[str, Path],
    prompts: Mapping[str, Sequence[str]],
    out: Path,
    *,
    texts: Sequence[Text] = (),
    journal: Journal | None = None,
    progress: Progress | None = None,
    **choices: Any,
) -> Written:
    """Write a mixture of `folders`, by name, whose gates are made from prompts, or trained on `texts`.

    choices: keys of a spec: mixture, hybrid_layers, gate, experts_per_token, seed ... The card names models by their
    names here, and no folder. Raises ModelGlueError.
    """
    todo = planned(spec_of(prompts, **choices), folders)
    return write(todo, out, texts=texts, journal=journal, progress=progress)
