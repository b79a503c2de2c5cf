"""What every merge method makes of real fine-tunes: `python benchmarks/methods.py --data DIR` prints a Markdown table.

The demo zoo's fine-tunes of SmolLM2-135M-Instruct are merged by a recipe a method; each result is loaded by
transformers, asked for a few words, and scored by its perplexity on held-out public text, which no adapter saw.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import geometric_mean
from typing import Annotated, Any

import typer
import yaml
from demo import LONGEST, perplexity, row
from transformers import AutoModelForCausalLM, AutoTokenizer

from builder.config import load_zoo
from builder.merge import METHODS, stream
from builder.merge.models import Found
from builder.merge.plan import plan
from builder.merge.recipe import parse
from builder.merge.statistics import Kind, measure
from builder.progress import Quiet
from builder.proxy.requests import Choices
from builder.proxy.scorer import Scorer
from builder.sources import Store
from builder.zoos.demo import texts

BASE, TUNED = "smollm2", ("math", "code", "story", "chat")
PARAMETERS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"weight": 0.4},
    "ties": {"weight": 1.0, "density": 0.3},
    "dare_linear": {"weight": 0.4, "density": 0.5},
    "dare_ties": {"weight": 0.4, "density": 0.5},
    "della": {"weight": 1.0, "density": 0.5},
    "della_linear": {"weight": 0.4, "density": 0.5},
    "breadcrumbs": {"weight": 0.4, "density": 0.9},
    "breadcrumbs_ties": {"weight": 0.4, "density": 0.9},
    "slerp": {"t": 0.5},
    "nearswap": {"t": 0.0005},
    "sce": {"select_topk": 0.5},
}
"""Where the defaults do not say enough; every other weight is 1."""


def main(
    data: Annotated[Path, typer.Option(help="Folder of the public sets.")],
    work: Annotated[Path, typer.Option(help="Folder for the merges.")] = Path("build/methods"),
    methods: Annotated[str, typer.Option(help="With commas between.")] = ",".join(METHODS),
    count: Annotated[int, typer.Option("--texts", min=1, help="Held-out texts of each domain, at most.")] = 40,
) -> None:
    """Print the table."""
    folders = {name: fetched.folder for name, fetched in Store(load_zoo("demo")).fetch(Quiet()).items()}
    held_out = {
        domain: [Choices("", (example.plain[:LONGEST],)) for example in texts.load(domain, data).held_out[:count]]
        for domain in texts.DOMAINS
    }
    row("held-out perplexity", *held_out, "mean", "says")
    row(*["---"] * (len(held_out) + 3))
    for name in (BASE, *TUNED):
        print_scores(name, folders[name], held_out)
    for name, recipe in recipes(methods.split(","), folders, data, work):
        out = work / "out"
        stream.write(plan(parse(yaml.safe_dump(recipe), name, work), lambda model: Found(folders[model])), out)
        print_scores(name, out, held_out)
        shutil.rmtree(out)


def recipes(
    methods: list[str], folders: Mapping[str, Path], data: Path, work: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A recipe a method, with what makes sense for it; `ties` with the paper's trim too."""
    for name in methods:
        method = METHODS[name]
        own = PARAMETERS.get(name, {"weight": 1.0} if "weight" in method.parameters else {})
        tuned = TUNED[: method.most]
        models: list[dict[str, Any]] = [{"model": model} for model in tuned]
        if "statistics" in method.parameters:
            for model in models:
                path = statistics(name, model["model"], folders, data, work)
                model["parameters"] = {"statistics": str(path.resolve())}
        recipe: dict[str, Any] = {"merge_method": name, "models": models, "parameters": own}
        if name == "slerp":
            yield name, {**recipe, "base_model": TUNED[0], "models": [{"model": TUNED[0]}, {"model": TUNED[1]}]}
            continue
        if method.base == "required":
            recipe["base_model"] = BASE
        yield name, recipe
        if name == "ties":
            yield "ties, trim: global", {**recipe, "parameters": {**own, "trim": "global"}}
        if name == "model_stock":
            yield "model_stock, filter_wise", {**recipe, "parameters": {"filter_wise": True}}


def statistics(kind: Kind, model: str, folders: Mapping[str, Path], data: Path, work: Path) -> Path:
    """Of a fine-tune on its own domain's training text, measured once."""
    out = work / f"{model}.{kind}.safetensors"
    if not out.exists():
        work.mkdir(parents=True, exist_ok=True)
        own = [example.plain[:LONGEST] for example in texts.load(model, data).public[:16]]
        measure(folders[model], own, out, kind=kind, max_tokens=256)
    return out


def print_scores(name: str, folder: Path, held_out: Mapping[str, list[Choices]]) -> None:
    """One row: perplexities, their geometric mean, and what it says first."""
    scorer = Scorer(folder)
    values = [perplexity(scorer, asked) for asked in held_out.values()]
    row(name, *(f"{value:.2f}" for value in values), f"{geometric_mean(values):.2f}", said(folder))


def said(folder: Path) -> str:
    """The first words of an answer, greedy."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**asked, max_new_tokens=12, do_sample=False)[0, asked["input_ids"].shape[1] :]
    return " ".join(tokenizer.decode(answer, skip_special_tokens=True).split())


if __name__ == "__main__":
    typer.run(main)
