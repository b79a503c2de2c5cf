"""What every search strategy is worth on the demo zoo: `python benchmarks/strategies.py` prints a Markdown table.

Each strategy decides on the proxy split; what it chose is then scored on the test split, which decided nothing. All
evaluations go through the journal, so a second run, or one that was killed, computes only what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

# Before torch loads: threads that spin collapse when anything else runs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from builder import explore
from builder.candidate import Candidate, whole
from builder.config import load_zoo, with_choices
from builder.evaluate import Evaluator, Scores, places
from builder.executors.local import InProcess
from builder.files import default_cache
from builder.journal import Journal
from builder.members import open_all
from builder.progress import Terminal
from builder.search.average import uniform
from builder.sources import Store
from routers.scorecard import interval

CHOICES: dict[str, dict[str, object]] = {
    "average": {"strategy": "average"},
    "coefficient": {"strategy": "coefficient"},
    "coefficient, accepted by a paired test": {"strategy": "coefficient", "accept": "paired"},
    "similarity, most": {"strategy": "similarity", "similar": "most"},
    "similarity, least": {"strategy": "similarity", "similar": "least"},
    "evolution, linear": {"strategy": "evolution"},
    "evolution, linear, 3 layer groups": {"strategy": "evolution", "groups": 3},
    "evolution, task_arithmetic": {"strategy": "evolution", "method": "task_arithmetic", "constraint": "raw"},
    "evolution, ties": {"strategy": "evolution", "method": "ties"},
    "evolution, dare_linear": {"strategy": "evolution", "method": "dare_linear"},
    "heuristic+evolution": {"strategy": "heuristic+evolution"},
}


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    candidate: Candidate
    trials: int
    proxy: Scores
    test: Scores
    accuracy: Scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", default="demo")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--cache", type=Path, default=default_cache())
    options = parser.parse_args()
    rows: list[Row] = []
    for name, choices in CHOICES.items():
        with evaluators(options, {**choices, "trials": options.trials}) as (search, test, accuracy):
            explored = explore.explore(search.zoo, search.members, search)
            (found,) = [each for each in explored.found if len(each.models) > 1]
            best = max(found.models, key=lambda model: search.mean(whole(model)))
            if not rows:
                kin = explore.kinship(search.zoo, found.models, search.members)
                fixed = {f"best single ({best})": whole(best), "uniform soup": kin.linear(uniform(found.models))}
                rows += [row(label, each, 0, search, test, accuracy) for label, each in fixed.items()]
            rows.append(row(name, found.outcome.candidate, len(found.trials), search, test, accuracy))
    report(rows)


@contextlib.contextmanager
def evaluators(
    options: argparse.Namespace, choices: dict[str, object]
) -> Iterator[tuple[Evaluator, Evaluator, Evaluator]]:
    """One that decides, and two that prove: on the whole test split, by likelihood and by right and wrong."""
    zoo = with_choices(load_zoo(options.zoo), search=choices, proxy={})
    store, progress = Store(zoo, options.cache), Terminal()
    fetched = store.fetch(progress)
    with Journal(options.cache / "journal.sqlite") as journal:
        members = open_all(zoo, fetched, journal)
        with contextlib.closing(InProcess(places(members))) as workers:
            search = Evaluator(zoo, members, journal, progress, workers)
            test = dataclasses.replace(search, zoo=with_choices(zoo, search={}, proxy={"limit": 1000}))
            right = with_choices(zoo, search={}, proxy={"limit": 1000, "metric": "accuracy"})
            yield search, test, dataclasses.replace(search, zoo=right)


def row(name: str, candidate: Candidate, trials: int, search: Evaluator, test: Evaluator, accuracy: Evaluator) -> Row:
    return Row(
        name,
        candidate,
        trials,
        search.scores(candidate),
        test.scores(candidate, "test"),
        accuracy.scores(candidate, "test"),
    )


def report(rows: list[Row]) -> None:
    single, soup = rows[0], rows[1]
    print("\n| strategy | trials | weights | proxy | test (95 %) | minus best single | minus soup | test accuracy |")
    print("|" + " --- |" * 8)
    for each in rows:
        weights = ", ".join(f"{model} {weight:.2f}" for model, weight in each.candidate.weights.items())
        cells = [
            each.name,
            str(each.trials or "-"),
            weights,
            f"{each.proxy.mean():.4f}",
            f"{each.test.mean():.3f} ({_interval(each.test)})",
            f"{(each.test - single.test).mean():+.3f} ({_interval(each.test - single.test, '+')})",
            f"{(each.test - soup.test).mean():+.3f} ({_interval(each.test - soup.test, '+')})",
            f"{each.accuracy.mean():.3f}",
        ]
        print(f"| {' | '.join(cells)} |")
    print(f"\n{len(single.proxy)} proxy samples, {len(single.test)} test samples; nats a token, higher is better")


def _interval(values: Scores, sign: str = "") -> str:
    low, high = interval(values, 0)
    return f"{low:{sign}.3f} to {high:{sign}.3f}"


if __name__ == "__main__":
    main()
