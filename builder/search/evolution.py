"""Evolution (PAPER.md 4): CMA-ES through Optuna over coefficients, densities and whatever else a method has.

A generation is asked for at once and told in order, so the trials are those of Optuna's own loop with the same seed,
however many workers score them; and a search that was killed replays what it knows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from builder.candidate import Candidate, Kin
from builder.config import Range, Search
from builder.errors import SearchError
from builder.merge import METHODS
from builder.search.coefficient import coefficient
from builder.search.problem import Outcome, Problem, Trial

if TYPE_CHECKING:
    import optuna

SIGMA = 1 / 6
"""The first step, as a share of each range."""
REFINING_SIGMA = 0.1
REFINING_TRIALS = 100
BY_GROUP = ("weight", "t")
"""Parameters that layer groups have of their own; others are one number a model, or one."""
RANGES: Mapping[str, Range] = {"weight": (0.0, 1.0), "density": (0.1, 1.0), "t": (0.0, 1.0)}
"""What is searched unless a zoo says otherwise, where a method has it."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One number of the search: a parameter, of a member or of the merge, of one layer group."""

    parameter: str
    member: str | None
    group: int
    low: float
    high: float

    @property
    def name(self) -> str:
        """What Optuna calls it."""
        return " ".join([self.parameter, *([self.member] if self.member else []), str(self.group)])


@dataclass(frozen=True)
class Space:
    """The candidates that an evolution may ask for: N members, G layer groups, N (G + 1) weights and the rest."""

    kin: Kin
    members: tuple[str, ...]
    method: str
    groups: int
    normalise: bool
    ranges: Mapping[str, Range]
    seed: int

    @classmethod
    def of(cls, kin: Kin, members: Sequence[str], settings: Search, seed: int) -> Space:
        """Raises SearchError where the method, the members and the layers do not go together."""
        method = METHODS[settings.method]
        if settings.groups > kin.layers:
            raise SearchError(
                f"search.groups is {settings.groups} and the models have {kin.layers} layers: at most that"
            )
        if method.most == 1 and len(members) != 2:
            raise SearchError(f"{settings.method} merges two models, and this cluster has {len(members)}")
        if method.base == "required" and method.most != 1 and kin.base is None:
            raise SearchError(
                f"{settings.method} needs the base of {', '.join(members)}: name one for all of them, "
                'models = [{ ..., base = "ID" }] with [[bases]]'
            )
        if any(each.kind == "path" for each in method.parameters.values()):
            raise SearchError(f"{settings.method} needs statistics of every model: merge with a recipe instead")
        known = {key: bounds for key, bounds in RANGES.items() if key in method.parameters}
        ranges = known | settings.ranges
        if not ranges:
            raise SearchError(f"{settings.method} has no number to search: name a range, search.ranges")
        normalise = settings.constraint == "normalise"
        return cls(kin, tuple(members), settings.method, settings.groups, normalise, ranges, seed)

    @property
    def axes(self) -> list[Axis]:
        """Every number, in a fixed order."""
        return [
            Axis(key, member, group, low, high)
            for key, (low, high) in self.ranges.items()
            for member in self._owners(key)
            for group in range(self.groups + 1 if key in BY_GROUP else 1)
        ]

    def _owners(self, key: str) -> tuple[str | None, ...]:
        method = METHODS[self.method]
        if not method.parameters[key].per_model:
            return (None,)
        return self.members[1:] if method.most == 1 else self.members

    def candidate(self, values: Mapping[str, float]) -> Candidate:
        """The merge of the numbers that Optuna chose."""
        per_model: dict[str, dict[str, list[float]]] = {}
        shared: dict[str, Any] = {}
        for axis in self.axes:
            if axis.member is None:
                shared.setdefault(axis.parameter, []).append(values[axis.name])
            else:
                per_model.setdefault(axis.parameter, {}).setdefault(axis.member, []).append(values[axis.name])
        if "normalize" in METHODS[self.method].parameters:
            shared["normalize"] = self.normalise
        return self.kin.merge(self.method, self._weights(per_model, shared), per_model, shared, self.seed)

    def start(self, weights: Mapping[str, float]) -> dict[str, float]:
        """The numbers of a merge with these weights; what else is searched begins in the middle of its range."""
        return {
            axis.name: weights.get(axis.member, 0.0)
            if axis.parameter == "weight" and axis.member is not None
            else (axis.low + axis.high) / 2
            for axis in self.axes
        }

    def _weights(
        self, per_model: Mapping[str, Mapping[str, Sequence[float]]], shared: Mapping[str, Any]
    ) -> dict[str, float]:
        """How much of each member is in it: its share where weights are normalised, the mean over layer groups."""
        if "weight" in per_model:
            groups = zip(*per_model["weight"].values(), strict=True)
            scales = [1.0 / (sum(group) or 1.0) if self.normalise else 1.0 for group in groups]
            return {
                member: sum(value * scale for value, scale in zip(values, scales, strict=True)) / len(values)
                for member, values in per_model["weight"].items()
            }
        if METHODS[self.method].most == 1 and "t" in shared:
            t = sum(shared["t"]) / len(shared["t"])
            return {self.members[0]: 1 - t, self.members[1]: t}
        return dict.fromkeys(self.members, 1 / len(self.members))


def evolution(problem: Problem) -> Outcome:
    """The best of CMA-ES's trials, or the best single model where no trial is accepted over it."""
    space = Space.of(problem.kin, problem.ranked, problem.settings, problem.seed)
    return _evolve(problem, "evolution", space, problem.best_single(), problem.settings.trials, SIGMA, None)


def refined(problem: Problem) -> Outcome:
    """Heuristic first, evolution among its members from its weights: the better of both."""
    found = problem.once("coefficient", coefficient)
    if len(found.candidate.members) == 1:
        return found
    space = Space.of(problem.kin, found.candidate.members, problem.settings, problem.seed)
    trials = min(problem.settings.trials, REFINING_TRIALS)
    start = space.start(found.candidate.weights)
    return _evolve(problem, "heuristic+evolution", space, found, trials, REFINING_SIGMA, start)


def _evolve(
    problem: Problem,
    strategy: str,
    space: Space,
    best: Outcome,
    trials: int,
    sigma: float,
    start: Mapping[str, float] | None,
) -> Outcome:
    study = _study(problem, strategy, space, sigma, start)
    for batch in _generations(study, space, trials):
        candidates = [space.candidate(trial.params) for trial in batch]
        ended = problem.score(strategy, [f"trial {trial.number}" for trial in batch], candidates)
        for trial, result in zip(batch, ended, strict=True):
            _tell(study, trial, result)
            scores = result.scores
            # The paper's rule takes equals; among trials the first of equals stays.
            better = scores is not None and scores.mean() > best.score and problem.accept(scores, best.scores)
            if problem.keep(result, better) and scores is not None:
                best = Outcome(result.candidate, scores)
    return best


def _study(
    problem: Problem, strategy: str, space: Space, sigma: float, start: Mapping[str, float] | None
) -> optuna.Study:
    """A fresh study, or that of all machines that share a storage."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    name, shared = f"{problem.study} {strategy}", problem.storage is not None
    try:
        study = optuna.create_study(
            sampler=sampler(len(space.axes), problem.seed, sigma, start),
            direction="maximize",
            storage=problem.storage,
            study_name=name if shared else None,
            load_if_exists=shared,
        )
    except Exception as exc:
        if not shared:
            raise
        # SQLAlchemy, its drivers and Optuna raise errors of many kinds for a storage that cannot be reached.
        reason = str(exc).splitlines()[0]
        raise SearchError(
            f"the storage {problem.storage} cannot be used ({reason}): give a URL like postgresql://..."
        ) from exc
    if start is not None and not study.trials:
        study.enqueue_trial(dict(start))
    return study


def sampler(dimensions: int, seed: int, sigma: float, start: Mapping[str, float] | None) -> optuna.samplers.BaseSampler:
    """CMA-ES with the paper's population of round(4 + 3 ln n); `start` is its first mean, the middle without."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # x0 and sigma0 are there until Optuna 6, which we do not take
        return optuna.samplers.CmaEsSampler(
            seed=seed,
            sigma0=sigma,
            x0=None if start is None else dict(start),
            popsize=population(dimensions),
            warn_independent_sampling=False,
        )


def population(dimensions: int) -> int:
    """Trials of a generation."""
    return round(4 + 3 * math.log(dimensions))


def _generations(study: optuna.Study, space: Space, trials: int) -> Iterator[list[optuna.Trial]]:
    """Trials to score together: a generation at a time, as far as Optuna's own order allows."""
    import optuna

    complete = optuna.trial.TrialState.COMPLETE
    bounds: dict[str, Any] = {
        axis.name: optuna.distributions.FloatDistribution(axis.low, axis.high) for axis in space.axes
    }
    size = population(len(bounds))
    while (left := trials - len(study.trials)) > 0:
        done = len(study.get_trials(deepcopy=False, states=(complete,)))
        # After the first, generations of `size` that ended; failed ones are asked for anew. Optuna keeps its state
        # with the trial that begins the second one, which must have ended before another is asked for.
        room = 1 if done in (0, size + 1) else size - (done - 1) % size
        yield [study.ask(bounds) for _ in range(min(room, left))]


def _tell(study: optuna.Study, trial: optuna.Trial, result: Trial) -> None:
    import optuna

    if result.score is None:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
    else:
        study.tell(trial, result.score)
