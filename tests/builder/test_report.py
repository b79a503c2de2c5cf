from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builder.candidate import Kin
from builder.config import Search
from builder.record import (
    ClusterRecord,
    Estimate,
    FamilyRecord,
    ModelRecord,
    ScoredRecord,
    SearchRecord,
    TrialRecord,
)
from builder.report import charts, render
from builder.report.coefficients import columns, numbers, rows, shares
from builder.report.importance import importance
from builder.report.trials import best_so_far, by_strategy, share, steps
from builder.search.evolution import Space
from routers import bundle
from routers.errors import BundleError

VOID = {"meta", "br"}
Scores = Mapping[str, float]


def around(mean: float, half: float = 0.05) -> Estimate:
    return Estimate(mean=mean, low=mean - half, high=mean + half)


def kin_of(names: Sequence[str], base: str | None = None) -> Kin:
    return Kin(tuple(names), base, "model.layers", 4, False)


def trial(
    strategy: str, tried: str, weights: Scores, said: Mapping[str, Any], score: float | None, **more: Any
) -> TrialRecord:
    given: dict[str, Any] = {
        "strategy": strategy,
        "tried": tried,
        "weights": dict(weights),
        "said": dict(said),
        "score": None if score is None else around(score),
        "gain": None if score is None else around(score - 0.5),
        "tasks": {} if score is None else {"a": score, "b": score},
        "failure": "the merge holds a number that is not finite" if score is None else None,
        "accepted": False,
    }
    return TrialRecord(**given | more)


def averaged(names: Sequence[str], scores: Sequence[float | None]) -> list[TrialRecord]:
    """Each name of names[1:] is tried on the first."""
    found = []
    for name, score in zip(names[1:], scores, strict=True):
        candidate = kin_of(names).linear({names[0]: 0.5, name: 0.5})
        found.append(trial("average", name, candidate.weights, candidate.said, score))
    return found


def grown(names: Sequence[str], scores: Sequence[float | None], strategy: str = "coefficient") -> list[TrialRecord]:
    """The second name at nine coefficients of the first."""
    found = []
    for i, score in enumerate(scores):
        candidate = kin_of(names).linear({names[0]: (i + 1) / 10, names[1]: 1 - (i + 1) / 10})
        found.append(trial(strategy, names[1], candidate.weights, candidate.said, score))
    return found


def evolved(
    names: Sequence[str], count: int, groups: int = 0, strategy: str = "evolution", **settings: Any
) -> list[TrialRecord]:
    """Scores that hang on the first member's first weight alone."""
    space = Space.of(kin_of(names, "base"), names, Search(groups=groups, **settings), 0)
    rng, found = np.random.default_rng(3), []
    for i in range(count):
        values = {axis.name: float(rng.uniform(axis.low, axis.high)) for axis in space.axes}
        candidate = space.candidate(values)
        score = 0.5 + 0.3 * values[f"weight {names[0]} 0"]
        found.append(trial(strategy, f"trial {i}", candidate.weights, candidate.said, score))
    return found


def scored(name: str, mean: float, tasks: Sequence[str]) -> ScoredRecord:
    return ScoredRecord(name=name, score=around(mean), tasks={task: around(mean + 0.01) for task in tasks})


def cluster(
    names: Sequence[str],
    trials: Sequence[TrialRecord],
    keep: TrialRecord | None = None,
    tasks: Sequence[str] = ("a", "b"),
) -> ClusterRecord:
    standings = [scored(names[0], 0.5, tasks)]
    if len(names) > 1:
        standings.append(scored("uniform soup", 0.55, tasks))
    if keep is not None and keep.score is not None:
        standings.append(scored("the kept one (linear)", keep.score.mean, tasks))
    return ClusterRecord(
        models=tuple(names),
        method="linear" if keep else "copy",
        weights=keep.weights if keep else {names[0]: 1.0},
        said=keep.said if keep else {},
        score=0.6,
        trials=tuple(trials),
        standings=tuple(standings),
    )


def record(*clusters: ClusterRecord, tasks: Sequence[str] = ("a", "b"), **search: Any) -> SearchRecord:
    names = [name for each in clusters for name in each.models]
    matrix = 0.9 + 0.1 * np.eye(len(names))
    rows_of = tuple(map(tuple, matrix.tolist()))
    return SearchRecord(
        zoo="toy",
        seed=7,
        metric="accuracy",
        threshold=0.95,
        linkage="components",
        search=Search(**search).model_dump(mode="json"),
        tasks=tuple(tasks),
        samples=40,
        models=tuple(
            ModelRecord(
                id=name,
                subject="s",
                family="f",
                bytes=10**9,
                scores=dict.fromkeys(tasks, 0.5),
                score=Estimate(mean=0.5, low=0.4, high=0.6),
            )
            for name in names
        ),
        families=(
            FamilyRecord(key="f", models=tuple(names), similarity=dict.fromkeys(("all", "mlp"), rows_of), dots=rows_of),
        ),
        clusters=clusters,
    )


@pytest.fixture
def page(tmp_path: Path) -> Any:
    """Writes a record and gives its page, which must be whole."""

    def written(found: SearchRecord) -> str:
        (tmp_path / "search.json").write_text(found.model_dump_json(), "utf-8")
        page = render(tmp_path)
        check(page)
        return page

    return written


class Tags(HTMLParser):
    """Every tag that opens closes, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.getpos()


def check(page: str) -> None:
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    assert "script" not in tags.seen
    assert "link" not in tags.seen
    for word in ("src=", "href=", "url(", "@import", "http:", "https:", "None", "nan", "inf "):
        assert word not in page, word
    for drawn in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        for value in re.findall(r' (?:x|y|x1|x2|y1|y2|cx|cy|r|width|height|d|points|viewBox)="([^"]*)"', drawn):
            assert re.fullmatch(r"[-+0-9.eMmLlHhVvzZ, %]*", value), value


def words(page: str) -> str:
    """What a reader reads."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))


def test_a_search_shows_every_part(page: Any) -> None:
    names = ["m1", "m2", "m3"]
    keep = trial("average", "m2", {"m1": 0.5, "m2": 0.5}, averaged(names[:2], [0.6])[0].said, 0.6, accepted=True)
    trials = [
        keep,
        averaged(names, [0.6, 0.4])[1],
        *grown(names, [0.4, 0.5, 0.6, 0.7, 0.8, 0.7, 0.6, 0.5, None]),
        *grown(names, [0.4] * 9, "similarity"),
        *evolved(names, 20),
        *evolved(names, 12, strategy="heuristic+evolution"),
    ]
    said = words(page(record(cluster(names, trials, keep))))
    for part in (
        "what the search found",
        "Which models are alike",
        "By the mlp weights alone",
        "Kept: a merge of 2 models by linear , found by average",
        "Average: who was taken in, who was refused",
        "Coefficient: who was taken in, who was refused",
        "Similarity: who was taken in, who was refused",
        "Evolution: which numbers matter",
        "Heuristic+evolution: which numbers matter",
        "merge_method: linear",
        "failed: the merge holds a number that is not finite",
        "All 52 trials as a table",
    ):
        assert part in said, part


def test_numbers_and_intervals_are_those_of_the_record(page: Any) -> None:
    keep = averaged(["m1", "m2"], [0.612])[0].model_copy(
        update={
            "score": Estimate(mean=0.612, low=0.551, high=0.674),
            "gain": Estimate(mean=-0.012, low=-0.046, high=0.032),
            "accepted": True,
        }
    )
    said = words(page(record(cluster(["m1", "m2"], [keep], keep))))
    assert "0.612 (0.551 to 0.674)" in said
    assert "−0.012 (−0.046 to +0.032)" in said
    assert "luck may explain that" in said


def test_a_gain_above_zero_is_called_more_than_luck(page: Any) -> None:
    keep = averaged(["m1", "m2"], [0.9])[0]
    found = page(record(cluster(["m1", "m2"], [keep], keep)))
    assert "more than luck explains" in words(found)
    assert "1 of 1" in words(found)


@pytest.mark.parametrize(
    "found",
    [
        record(cluster(["alone"], [])),
        record(cluster(["m1", "m2"], averaged(["m1", "m2"], [None]))),
        record(cluster(["m1", "m2"], [*averaged(["m1", "m2"], [None]), *grown(["m1", "m2"], [None] * 9)])),
        record(cluster(["m1", "m2"], averaged(["m1", "m2"], [0.5]))),
        record(cluster(["m1", "m2"], evolved(["m1", "m2"], 3))),
        record(cluster(["m1", "m2"], evolved(["m1", "m2"], 230))),
        record(cluster([f"m{i}" for i in range(16)], evolved([f"m{i}" for i in range(16)], 40))),
        record(cluster(["m1" * 60, "m2"], averaged(["m1" * 60, "m2"], [0.6]))),
        record(cluster(["m1", "m2"], averaged(["m1", "m2"], [0.6]), tasks=["a"]), tasks=["a"]),
        record(cluster(["m1", "m2"], averaged(["m1", "m2"], [0.6])), cluster(["m3"], [])),
    ],
    ids=["one", "failed", "all-failed", "no-gain", "few", "many", "sixteen", "long", "a-task", "two-clusters"],
)
def test_whatever_a_search_found_is_a_whole_page(page: Any, found: SearchRecord) -> None:
    assert "accuracies" in words(page(found))


def test_scores_below_zero_are_drawn_too(page: Any) -> None:
    names = ["m1", "m2"]
    trials = [
        one.model_copy(update={"score": around(-3.0 - i / 10), "gain": around(-i / 10)})
        for i, one in enumerate(grown(names, [0.5] * 9))
    ]
    below = cluster(names, trials)
    best = below.standings[0].model_copy(update={"score": around(-3.2), "tasks": dict.fromkeys("ab", around(-3.2))})
    found = record(below.model_copy(update={"standings": (best,)})).model_copy(update={"metric": "log_likelihood"})
    said = words(page(found))
    assert "nats a token" in said
    assert "−3.800" in said


def test_names_and_reasons_are_text_and_never_markup(page: Any) -> None:
    evil = '<b>"m1"</b>&'
    failed = averaged([evil, "m2"], [None])[0].model_copy(update={"failure": "<script>x</script>"})
    trials = [failed, *grown([evil, "m2"], [0.4, None, *[0.6] * 7]), *evolved([evil, "m2"], 12, groups=2)]
    found = page(record(cluster([evil, "m2"], trials, trials[-1]), groups=2))
    assert "<b>&#34;" not in found
    assert '<b>"' not in found
    assert "&lt;script&gt;x&lt;/script&gt;" in found
    assert "&lt;b&gt;" in found


def test_the_best_so_far_never_falls_and_passes_over_failures() -> None:
    scores = [None, 0.4, 0.3, None, 0.6, 0.5]
    trials = [trial("evolution", f"trial {i}", {"m": 1.0}, {}, score) for i, score in enumerate(scores)]
    assert best_so_far(trials) == [None, 0.4, 0.4, 0.4, 0.6, 0.6]


def test_the_line_of_the_history_goes_through_the_best_so_far() -> None:
    scores = [0.2, None, 0.8, 0.5]
    trials = [trial("evolution", f"trial {i}", {"m": 1.0}, {}, score) for i, score in enumerate(scores)]
    drawn = charts.history(trials, around(0.5), "m", 3)
    (line,) = re.findall(r'class="best-so-far" d="([^"]*)"', drawn)
    dots = [float(y) for y in re.findall(r'<circle class="left"[^>]*cy="([^"]*)"', drawn)]
    heights = [float(y) for y in re.findall(r"(?:M[\d.]+ |V)([\d.]+)", line)]
    assert heights == [dots[0], dots[0], dots[1], dots[1]]
    wide = (charts.WIDE - charts.RIGHT - charts.LEFT) / 4
    assert re.findall(r"[MH]([\d.]+)", line) == [f"{charts.LEFT + wide * place:.1f}" for place in range(5)]
    assert drawn.count('class="cross"') == 1


def test_a_whisker_of_the_history_is_the_paired_gain_from_the_best_single_models_line() -> None:
    one = trial("evolution", "trial 0", {"m": 1.0}, {}, 0.6).model_copy(
        update={"score": around(0.6, 0.4), "gain": Estimate(mean=0.1, low=0.0, high=0.3)}
    )
    drawn = charts.history([one], around(0.5, 0.4), "m", 3)
    (single,) = re.findall(r'class="single-line"[^>]*y1="([^"]*)"', drawn)
    ((low, high),) = re.findall(r'class="reach"[^>]*y1="([^"]*)"[^>]*y2="([^"]*)"', drawn)
    (mean,) = re.findall(r'<circle[^>]*cy="([^"]*)"', drawn)
    assert low == single
    assert (float(mean) - float(low)) / (float(high) - float(low)) == pytest.approx(1 / 3, abs=0.01)


def test_a_trial_that_is_far_worse_is_marked_at_the_edge_and_flattens_nothing() -> None:
    good = [trial("evolution", f"trial {i}", {"m": 1.0}, {}, 0.5 + i / 100) for i in range(9)]
    drawn = charts.history([*good, trial("evolution", "trial 9", {"m": 1.0}, {}, -40.0)], around(0.5), "m", 3)
    assert drawn.count('class="below"') == 1
    assert "−40.000" in drawn
    dots = [float(y) for y in re.findall(r'<circle class="left"[^>]*cy="([^"]*)"', drawn)]
    assert max(dots) - min(dots) > 50


def test_the_score_to_beat_rises_with_each_member_that_is_taken() -> None:
    first = [one.model_copy(update={"tried": "m2"}) for one in grown(["m1", "m2"], [0.4] * 4 + [0.7] + [0.4] * 4)]
    first[4] = first[4].model_copy(update={"accepted": True})
    second = grown(["m1", "m3"], [0.6] * 9)
    found = steps([*first, *second], 0.5)
    assert [(step.member, step.beat, step.taken) for step in found] == [("m2", 0.5, True), ("m3", 0.7, False)]
    assert found[0].share == pytest.approx(0.5)
    assert share(second[0]) == pytest.approx(0.1)


def test_strategies_come_in_the_order_of_the_search() -> None:
    trials = [*averaged(["m1", "m2"], [0.5]), *evolved(["m1", "m2"], 2)]
    assert {name: len(group) for name, group in by_strategy(trials).items()} == {"average": 1, "evolution": 2}


@pytest.mark.parametrize("groups", [0, 1, 3])
@pytest.mark.parametrize("method", ["linear", "ties", "slerp", "dare_ties"])
def test_the_numbers_in_a_recipe_are_those_that_evolution_chose(method: str, groups: int) -> None:
    space = Space.of(
        kin_of(["m1", "m2"], "base"), ["m1", "m2"], Search(method=method, groups=groups, strategy="auto"), 0
    )
    # Equal ones in adjacent groups must not become one group.
    values = {axis.name: round(axis.low + (i // 2) / 100, 6) for i, axis in enumerate(space.axes)}
    said = space.candidate(values).said
    assert numbers(said, groups) == values
    spans = columns(said, groups)
    assert spans == {0: [], 1: ["layers 0–3", "outside"], 3: ["layers 0–1", "layer 2", "layer 3", "outside"]}[groups]


def test_weights_that_a_merge_divides_by_their_sum_are_shown_as_shares() -> None:
    said = kin_of(["m1", "m2"]).linear({"m1": 0.2, "m2": 0.6}).said
    assert [row.values[0] for row in shares(said, rows(said, 0))] == pytest.approx([0.25, 0.75])
    raw = {**said, "parameters": {"normalize": False}}
    assert [row.values[0] for row in shares(raw, rows(said, 0))] == pytest.approx([0.2, 0.6])


def test_importance_finds_the_number_that_matters_and_says_how_sure_it_is() -> None:
    trials = evolved(["m1", "m2"], 40, groups=2)
    found = importance(trials, Search(groups=2).model_dump(mode="json"), 5)
    assert len(found) == 6
    assert found[0].label == "weight of m1, layers 0–1"
    assert found[0].low > 0.5
    assert all(each.low <= each.mean <= each.high for each in found)
    assert found == importance(trials, Search(groups=2).model_dump(mode="json"), 5)


def test_importance_says_nothing_from_few_trials_or_equal_scores() -> None:
    settings = Search().model_dump(mode="json")
    assert importance(evolved(["m1", "m2"], 9), settings, 5) == []
    equal = [one.model_copy(update={"score": around(0.5)}) for one in evolved(["m1", "m2"], 20)]
    assert importance(equal, settings, 5) == []


def test_a_merge_with_layer_groups_shows_members_by_groups(page: Any) -> None:
    trials = evolved(["m1", "m2"], 12, groups=2)
    found = page(record(cluster(["m1", "m2"], trials, trials[3]), groups=2))
    for word in ("layers 0–1", "layers 2–3", "outside"):
        assert f">{word}</text>" in found
    shown = shares(trials[3].said, rows(trials[3].said, 2))
    (drawn,) = re.findall(r'<svg class="chart layers".*?</svg>', found)
    cells = re.findall(r">(\d\.\d\d)</text>", drawn)
    assert cells == [f"{value:.2f}" for row in shown for value in row.values]


def test_a_whisker_lies_where_its_interval_is() -> None:
    mark = charts.Mark("m1", Estimate(mean=0.612, low=0.551, high=0.674), "merge")
    drawn = charts.whiskers([mark], charts.Scale(0, 1, 0, 100), 3)
    assert '<line class="reach" x1="55.1"' in drawn
    assert 'x2="67.4"' in drawn
    assert "M61.2 " in drawn
    assert "<title>m1: 0.612 (0.551 to 0.674)</title>" in drawn


@pytest.mark.parametrize("value", [0.0, -0.0001])
def test_zero_has_no_minus(value: float) -> None:
    assert charts.number(value, 3) == "0.000"
    assert charts.number(value, 3, sign=True) == "+0.000"


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.71, -3.70), (1e-5, 3e-5), (-200.0, 1000.0)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    ticks = charts.Scale(low, high, 0, 100).ticks(5)
    assert 3 <= len(ticks) <= 6
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)


def test_a_folder_that_is_neither_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no manifest.json in .*, nor search.json"):
        render(tmp_path)


def test_a_record_of_another_release_says_to_search_again(tmp_path: Path) -> None:
    old = json.loads(record(cluster(["m1"], [])).model_dump_json())
    del old["linkage"]
    (tmp_path / "search.json").write_text(json.dumps(old), "utf-8")
    with pytest.raises(BundleError, match="search again"):
        render(tmp_path)


def test_a_bundle_shows_its_search_its_experts_and_its_router(micro_bundle: Path) -> None:
    page = render(micro_bundle)
    check(page)
    said = words(page)
    for part in ("how this bundle came about", "The experts", "The router's choices", "Every merge that was tried"):
        assert part in said, part
    manifest = bundle.read_manifest(micro_bundle)
    for kind, card in manifest.scorecards.items():
        assert f"{kind} {card.routed:.4f}".replace("-", "−") in said, kind
    for name in manifest.names:
        assert f"always {name}" in said


def test_a_bundle_whose_record_is_of_another_release_says_to_build_it_again(micro_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes((micro_bundle / "manifest.json").read_bytes())
    (tmp_path / "build.json").write_text('{"zoo": "micro"}', "utf-8")
    with pytest.raises(BundleError, match="build the bundle again"):
        render(tmp_path)
