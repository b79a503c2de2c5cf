"""What the demo bundle is worth: `python benchmarks/demo.py bundles/demo --data DIR` prints Markdown tables.

Perplexity of every expert on every domain's held-out public text (with --data), and scores on the test split, which
nothing in a build touches: best single, uniform soup, merged, and composed, with bootstrap intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from builder.candidate import Kin, whole
from builder.checkpoints import Checkpoint
from builder.config import Zoo, load_zoo
from builder.progress import Quiet
from builder.proxy import tasks
from builder.proxy.bench import Bench, Place
from builder.proxy.requests import Choices
from builder.proxy.scorer import Scorer
from builder.proxy.task import Metrics, Spec
from builder.search.average import uniform
from builder.sources import Store
from builder.zoos.demo import texts
from routers import bundle
from routers.scorecard import interval

LONGEST = 900
"""Characters of a held-out text that count."""


def main(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE")],
    data: Annotated[Path | None, typer.Option(help="Folder of the public sets, for the perplexity matrix.")] = None,
) -> None:
    """Print the tables."""
    zoo = load_zoo("demo")
    folders = {name: fetched.folder for name, fetched in Store(zoo).fetch(Quiet()).items()}
    if data is not None:
        perplexities(folders, data)
    composed(zoo, path, folders)


def perplexities(folders: dict[str, Path], data: Path) -> None:
    """Expert x domain perplexity on public text that no adapter saw."""
    held_out = {
        domain: [Choices("", (example.plain[:LONGEST],)) for example in texts.load(domain, data).held_out]
        for domain in texts.DOMAINS
    }
    row("held-out perplexity", *held_out)
    row(*["---"] * (len(held_out) + 1))
    for name, folder in folders.items():
        scorer = Scorer(folder)
        row(name, *(f"{perplexity(scorer, asked):.2f}" for asked in held_out.values()))
    print()


def perplexity(scorer: Scorer, asked: Sequence[Choices]) -> float:
    """Geometric mean over the texts."""
    likelihoods = [each for answer in scorer.answer(asked) if isinstance(answer, tuple) for each in answer]
    return math.exp(-float(np.mean([each.nats / each.tokens for each in likelihoods])))


def composed(zoo: Zoo, path: Path, folders: dict[str, Path]) -> None:
    """Test scores of every model, the uniform soup, every expert, and of the experts behind the router."""
    specs = [Spec(name, "test", None, zoo.seed) for name in zoo.proxy.tasks]
    samples = [(spec.name, sample) for spec in specs for sample in tasks.load(spec).samples]
    domains = np.array([name for name, _ in samples])
    read = bundle.read(path)
    models = [model.id for model in zoo.models]
    merged = {f"{name} (merged)": read.folder(name) for name in read.manifest.names if name not in folders}
    bench = Bench({name: Place(folder) for name, folder in {**folders, **merged}.items()})
    kin = Kin.of({name: Checkpoint(folders[name]) for name in models}, None, None)
    asked = {name: whole(name) for name in (zoo.router.features, *models)}
    asked |= {"uniform soup": kin.linear(uniform(models))} | {name: whole(name) for name in merged}
    scores: dict[str, list[Metrics]] = {}
    for name, candidate in asked.items():
        found = bench.score(candidate, specs).metrics
        scores[name] = [metrics for spec in specs for metrics in found[spec.name]]
    label = {name: name if name in scores else f"{name} (merged)" for name in read.manifest.names}
    picks = [read.router.route(sample.prompt).expert for _, sample in samples]
    scores["composed (routed)"] = [scores[label[pick]][i] for i, pick in enumerate(picks)]
    scores["composed (perfect router)"] = [
        max((scores[label[name]][i] for name in read.manifest.names), key=lambda metrics: metrics["log_likelihood"])
        for i in range(len(samples))
    ]
    table(scores, domains)
    print_picks(picks, domains, read.manifest.names)


def table(scores: dict[str, list[Metrics]], domains: np.ndarray) -> None:
    """Mean log-likelihood by domain, over all with its interval, accuracy, and the routed gain paired with each."""
    names = list(dict.fromkeys(domains))
    row("test split", *names, "mean (95 %)", "accuracy", "composed minus this (95 %)")
    row(*["---"] * (len(names) + 4))
    nats = {name: np.array([metrics["log_likelihood"] for metrics in own]) for name, own in scores.items()}
    for name, own in nats.items():
        low, high = interval(own, 0)
        gain = nats["composed (routed)"] - own
        gain_low, gain_high = interval(gain, 0)
        row(
            name,
            *(f"{own[domains == domain].mean():.3f}" for domain in names),
            f"{own.mean():.3f} ({low:.3f} to {high:.3f})",
            f"{np.mean([metrics['accuracy'] for metrics in scores[name]]):.3f}",
            f"{gain.mean():+.3f} ({gain_low:+.3f} to {gain_high:+.3f})",
        )
    print()


def print_picks(picks: list[str], domains: np.ndarray, experts: tuple[str, ...]) -> None:
    """What the router picks per domain."""
    row("prompts routed to", *experts)
    row(*["---"] * (len(experts) + 1))
    for domain in dict.fromkeys(domains):
        own = [pick for pick, other in zip(picks, domains, strict=True) if other == domain]
        row(str(domain), *(str(own.count(expert)) for expert in experts))


def row(*cells: str) -> None:
    """One row of a Markdown table."""
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
