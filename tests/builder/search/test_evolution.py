from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import numpy as np
import optuna
import pytest
from landscape import Landscape, kin, problem

from builder.config import Search
from builder.errors import SearchError
from builder.merge.recipe import parse
from builder.search.auto import auto
from builder.search.coefficient import coefficient
from builder.search.evolution import Space, evolution, population, refined
from builder.search.strategies import STRATEGIES

NAMES = ("a", "b", "c")
TARGET = dict(zip(NAMES, (0.2, 0.7, 0.4), strict=True))
SINGLES = {name: -1.0 - i for i, name in enumerate(NAMES)}


def quadratic(weights: Mapping[str, float]) -> float:
    return -sum((weights.get(name, 0.0) - each) ** 2 for name, each in TARGET.items())


def optunas_own(trials: int, seed: int = 42, lowest: float = 0.0) -> list[float | None]:
    """What Optuna's own loop finds; a trial fails where a's weight is below `lowest`."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        sampler = optuna.samplers.CmaEsSampler(
            seed=seed, sigma0=1 / 6, popsize=round(4 + 3 * math.log(3)), warn_independent_sampling=False
        )
    study = optuna.create_study(sampler=sampler, direction="maximize")

    def objective(trial: optuna.Trial) -> float:
        weights = {name: trial.suggest_float(f"weight {name} 0", 0, 1) for name in NAMES}
        if weights["a"] < lowest:
            raise ValueError
        return quadratic(weights)

    study.optimize(objective, n_trials=trials, catch=(ValueError,))
    return [trial.value for trial in study.trials]


def test_a_quadratic_is_searched_as_optuna_itself_would_with_that_seed() -> None:
    landscape = Landscape(quadratic)
    search = problem(SINGLES, landscape, strategy="evolution", trials=60)
    outcome = evolution(search)
    expected = optunas_own(60)
    assert [trial.score for trial in search.trials] == pytest.approx(expected)
    assert outcome.score == pytest.approx(max(each for each in expected if each is not None))


def test_generations_are_asked_for_at_once_so_that_workers_have_work() -> None:
    landscape = Landscape(quadratic)
    evolution(problem(SINGLES, landscape, strategy="evolution", trials=30))
    size = population(3)
    assert [len(batch) for batch in landscape.asked] == [1, size, 1, size - 1, size, size, 1]
    assert sum(map(len, landscape.asked)) == 30


def test_another_seed_searches_elsewhere() -> None:
    first, second = problem(SINGLES, Landscape(quadratic), trials=5), problem(SINGLES, Landscape(quadratic), trials=5)
    second.seed = 43
    evolution(first)
    evolution(second)
    assert [trial.score for trial in first.trials] != [trial.score for trial in second.trials]


def test_failed_trials_are_no_zeros_and_the_rest_goes_on() -> None:
    landscape = Landscape(lambda weights: "out of memory" if weights["a"] < 0.1 else quadratic(weights))
    search = problem(SINGLES, landscape, strategy="evolution", trials=60)
    outcome = evolution(search)
    failed = [trial for trial in search.trials if trial.failure]
    assert 0 < len(failed) < 30
    assert all(trial.score is None for trial in failed)
    assert outcome.score > -0.05
    assert [trial.score for trial in search.trials] == pytest.approx(optunas_own(60, lowest=0.1))


def test_too_many_failures_in_a_row_end_the_search_with_the_last_ones_words() -> None:
    search = problem(SINGLES, Landscape(lambda _: "the GPU is gone"), strategy="evolution", failures=3)
    with pytest.raises(SearchError, match=r"3 trials in a row failed, the last with: the GPU is gone\. Mend that"):
        evolution(search)
    assert len(search.trials) == 2  # the third ended the search


def test_an_evolution_that_finds_nothing_better_leaves_the_best_single() -> None:
    outcome = evolution(problem({"a": 2.0, "b": 0.0}, Landscape(lambda _: 1.0), trials=10))
    assert (outcome.candidate.weights, outcome.score) == ({"a": 1.0}, 2.0)


def test_refining_begins_at_the_heuristics_merge_and_is_never_worse() -> None:
    landscape = Landscape(quadratic)
    search = problem(SINGLES, landscape, strategy="heuristic+evolution", trials=200)
    outcome = refined(search)
    heuristic = coefficient(problem(SINGLES, Landscape(quadratic)))
    first = next(trial for trial in search.trials if trial.strategy == "heuristic+evolution")
    assert first.candidate.weights == pytest.approx(heuristic.candidate.weights)
    assert first.score == pytest.approx(heuristic.score)
    assert outcome.score >= heuristic.score
    assert sum(trial.strategy == "heuristic+evolution" for trial in search.trials) == 100


def test_auto_is_the_best_of_all_and_searches_nothing_twice() -> None:
    search = problem(SINGLES, Landscape(quadratic), strategy="auto", trials=40)
    search.dots = np.eye(3)
    outcome = auto(search)
    assert outcome.score == max(trial.score for trial in search.trials if trial.score is not None)
    counts = {name: sum(trial.strategy == name for trial in search.trials) for name in STRATEGIES}
    assert counts == {
        "average": 2,
        "coefficient": 18,
        "similarity": 18,
        "evolution": 40,
        "heuristic+evolution": 40,
        "auto": 0,
    }


def space(
    method: str, base: str | None = None, members: tuple[str, ...] = NAMES, layers: int = 4, **said: object
) -> Space:
    settings = Search.model_validate({"strategy": "evolution", "method": method, **said})
    return Space.of(kin(*members, layers=layers, base=base), members, settings, 42)


@pytest.mark.parametrize("layers", [1, 5, 12])
def test_every_tensor_has_exactly_one_coefficient_set_for_any_number_of_groups(layers: int) -> None:
    for groups in range(layers + 1):
        made = space("linear", layers=layers, groups=groups)
        axes = made.axes
        assert len(axes) == 3 * (groups + 1)  # N (G + 1)
        values = {axis.name: (i + 1) / 100 for i, axis in enumerate(axes)}
        said = made.candidate(values).said
        owners: dict[float, list[int]] = {}
        for layer in range(layers):
            tensor = f"model.layers.{layer}.self_attn.q_proj.weight"
            owners.setdefault(first_match(said["models"][1]["parameters"]["weight"], tensor), []).append(layer)
        outside = {
            first_match(said["models"][1]["parameters"]["weight"], name)
            for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
        }
        assert len(outside) == 1
        assert len(owners) == max(groups, 1)
        assert all(each == list(range(each[0], each[-1] + 1)) for each in owners.values())  # adjacent
        sizes = [len(each) for each in owners.values()]
        assert max(sizes) - min(sizes) <= 1
        if groups:
            assert outside.isdisjoint(owners)


def first_match(value: object, tensor: str) -> float:
    """What a recipe says of a tensor: the first condition that it meets."""
    if not isinstance(value, list):
        assert isinstance(value, float)
        return value
    return next(each["value"] for each in value if each.get("filter", "") in tensor)


@pytest.mark.parametrize(
    ("method", "base", "members", "count"),
    [
        ("linear", None, NAMES, 3),
        ("task_arithmetic", "base", NAMES, 3),
        ("ties", "base", NAMES, 6),  # a density a model
        ("dare_ties", "base", NAMES, 6),
        ("dare_linear", "base", NAMES, 6),
        ("slerp", None, ("a", "b"), 1),
    ],
)
def test_a_methods_own_numbers_are_searched_and_its_recipes_are_sound(
    method: str, base: str | None, members: tuple[str, ...], count: int, tmp_path: object
) -> None:
    import yaml

    made = space(method, base, members)
    assert len(made.axes) == count
    candidate = made.candidate({axis.name: 0.5 for axis in made.axes})
    parse(yaml.safe_dump(dict(candidate.said)), "found", tmp_path)  # type: ignore[arg-type]
    assert ("seed" in candidate.said) == (method.startswith("dare"))
    assert set(candidate.references) == {*members, *([base] if base else [])}


def test_weights_that_are_normalised_are_told_as_shares() -> None:
    made = space("linear", groups=1)
    values = {
        "weight a 0": 0.2,
        "weight b 0": 0.2,
        "weight c 0": 0.4,
        "weight a 1": 1,
        "weight b 1": 0,
        "weight c 1": 1,
    }
    assert made.candidate(values).weights == pytest.approx({"a": 0.375, "b": 0.125, "c": 0.5})
    raw = space("linear", groups=1, constraint="raw")
    assert raw.candidate(values).weights == pytest.approx({"a": 0.6, "b": 0.1, "c": 0.7})


def test_ranges_add_numbers_and_set_bounds() -> None:
    made = space("ties", "base", ranges={"lambda": (0.5, 1.5), "density": (0.2, 0.4)})
    assert {(axis.parameter, axis.low, axis.high) for axis in made.axes} == {
        ("weight", 0.0, 1.0),
        ("density", 0.2, 0.4),
        ("lambda", 0.5, 1.5),
    }


@pytest.mark.parametrize(("constraint", "normalize"), [("normalise", True), ("raw", False)])
def test_the_constraint_says_whether_weights_are_divided_by_their_sum(constraint: str, normalize: bool) -> None:
    made = space("linear", constraint=constraint)
    said = made.candidate({axis.name: 0.5 for axis in made.axes}).said
    assert said["parameters"]["normalize"] is normalize


@pytest.mark.parametrize(
    ("method", "said", "sentence"),
    [
        ("ties", {}, "ties needs the base of a, b, c: name one for all of them"),
        ("slerp", {}, "slerp merges two models, and this cluster has 3"),
        ("linear", {"groups": 9}, r"search\.groups is 9 and the models have 4 layers"),
        ("fisher", {}, "fisher needs statistics"),
        ("model_stock", {}, "needs the base"),
    ],
)
def test_what_does_not_go_together_is_said_before_any_trial(
    method: str, said: dict[str, object], sentence: str
) -> None:
    with pytest.raises(SearchError, match=sentence):
        space(method, **said)  # type: ignore[arg-type]


def test_a_storage_that_cannot_be_reached_is_one_sentence() -> None:
    search = problem(SINGLES, Landscape(quadratic), trials=3)
    search.storage = "sqlite:////nowhere/at/all.db"
    with pytest.raises(SearchError, match=r"the storage sqlite:////nowhere/at/all\.db cannot be used"):
        evolution(search)


def test_a_shared_storage_holds_the_trials_and_a_second_machine_goes_on(tmp_path: object) -> None:
    url = f"sqlite:///{tmp_path}/trials.db"
    counts = []
    for trials in (4, 7):
        landscape = Landscape(quadratic)
        search = problem(SINGLES, landscape, trials=trials)
        search.storage = url
        evolution(search)
        counts.append(len(landscape.candidates))
    assert counts == [4, 3]


def test_an_evolution_that_was_killed_asks_for_nothing_twice_and_ends_the_same() -> None:
    whole = problem(SINGLES, Landscape(quadratic), trials=40)
    expected = evolution(whole)
    for survived in (1, 5, 11, 23):
        memory = Memory(survived)
        with pytest.raises(KeyboardInterrupt):
            evolution(problem(SINGLES, Landscape(memory), trials=40))
        memory.limit = 1000
        again = problem(SINGLES, Landscape(memory), trials=40)
        assert evolution(again).candidate == expected.candidate
        assert [trial.score for trial in again.trials] == [trial.score for trial in whole.trials]
        assert memory.asked == 40 + 1  # the one that was cut short


class Memory:
    """A score that is computed once, and breaks off after so many."""

    def __init__(self, limit: int) -> None:
        self.limit, self.asked, self.known = limit, 0, dict[str, float]()

    def __call__(self, weights: Mapping[str, float]) -> float:
        key = str(weights)
        if key not in self.known:
            self.asked += 1
            if self.asked > self.limit:
                raise KeyboardInterrupt
            self.known[key] = quadratic(weights)
        return self.known[key]
