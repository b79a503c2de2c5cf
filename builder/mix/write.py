"""Writes a mixture: gates made, tensors streamed under their new names, config, tokenizer, card; all or nothing."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from builder import files
from builder.checkpoints import Array, Tensor
from builder.journal import Journal
from builder.merge import card, stream
from builder.merge.plan import Plan as Weights
from builder.mix import gates, train
from builder.mix.gates import Gates
from builder.mix.plan import Plan
from builder.mix.train import Text
from builder.progress import Progress

SPEC = "spec.yaml"


@dataclass(frozen=True, slots=True)
class Written:
    """A finished mixture, and what is to be said of its gates."""

    result: stream.Result
    warnings: tuple[str, ...]


def write(
    plan: Plan,
    out: Path,
    *,
    texts: Sequence[Text] = (),
    threads: int | None = None,
    shard_bytes: int | None = None,
    max_memory: int | None = None,
    overwrite: bool = False,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> Written:
    """Write the mixture's folder; it appears whole, or not at all. Raises ModelGlueError.

    texts: what MLP gates are trained on; the spec's prompts without any.
    """
    # Before hidden states are computed for minutes.
    stream.check_place(plan.weights, out, overwrite)
    made = _gates(plan, texts, journal, progress)
    result = stream.write(
        plan.weights,
        out,
        threads=threads,
        shard_bytes=shard_bytes,
        max_memory=max_memory,
        overwrite=overwrite,
        journal=journal,
        progress=progress,
        more={**made.tensors, **_zeros(plan)},
        describe=lambda weights, hashes, target: _describe(plan, made, weights, hashes, target),
    )
    return Written(result, made.warnings)


def _gates(plan: Plan, texts: Sequence[Text], journal: Journal | None, progress: Progress | None) -> Gates:
    if plan.spec.source == "random":
        return gates.random(plan)
    if plan.spec.source == "prompts":
        return gates.from_prompts(plan)
    return gates.trained(plan, texts or train.texts_of(plan), journal, progress)


def _zeros(plan: Plan) -> dict[str, tuple[Tensor, Array]]:
    return {name: (tensor, np.zeros(tensor.shape, np.float32)) for name, tensor in plan.zeros.items()}


def _describe(plan: Plan, made: Gates, weights: Weights, hashes: Mapping[Path, str], target: Path) -> None:
    """The spec, a card, and the code that loads a composed checkpoint."""
    (target / SPEC).write_text(plan.spec.text, "utf-8")
    (target / "README.md").write_text(render(plan, made.warnings, hashes), "utf-8")
    if plan.layout.name == "composed":
        import composed

        for file in composed.FILES:
            files.copy(Path(file), target / Path(file).name)


def render(plan: Plan, warnings: tuple[str, ...], hashes: Mapping[Path, str]) -> str:
    """The card's Markdown; it names models as the spec does, and no path or time of this machine."""
    spec, layers = plan.spec, int(plan.shared.config["num_hidden_layers"])
    trunk = spec.trunk(layers)
    lines = [
        "---",
        "library_name: transformers",
        "tags:",
        "- merge",
        "- moe",
        "- modelglue",
        "---",
        "",
        f"# A {spec.mixture} mixture of {', '.join(spec.names)}",
        "",
        f"{len(spec.experts)} experts, {spec.k} at a time, in {layers - trunk} of {layers} layers; {plan.layout.name} "
        f"layout, by Model-GLUE {metadata.version('modelglue')}.",
        "",
        *(_loading() if plan.layout.name == "composed" else []),
        "## Spec",
        "",
        "```yaml",
        spec.text.rstrip(),
        "```",
        "",
        f"Gates from {spec.source}, seed {spec.seed}; what the experts share is "
        + (f"{spec.base_model}'s." if spec.base_model else "their uniform linear merge, in fp32, rounded once."),
        "",
        "## Inputs",
        "",
        "| model | file | sha256 |",
        "| --- | --- | --- |",
        *(f"| {name} | {path.name} | `{hashes[path]}` |" for name, path in card.inputs(plan.weights)),
        "",
    ]
    if notes := [*plan.notes, *warnings]:
        lines += ["## Notes", "", *(f"- {note}" for note in notes), ""]
    lines += [f"Made with Python {platform.python_version()}, numpy {np.__version__}.", ""]
    return "\n".join(lines)


def _loading() -> list[str]:
    code = ["from transformers import AutoModelForCausalLM", "", "model = AutoModelForCausalLM.from_pretrained("]
    return ["```python", *code, '    "FOLDER", trust_remote_code=True, dtype="auto"', ")", "```", ""]
