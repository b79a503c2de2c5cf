"""Families and their similarities: the toy Which16 in any order, and nothing computed twice."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mini_which16
import numpy as np
import pytest
from mini_which16 import CLUSTERS, FAMILIES, WHICH12
from numpy.typing import NDArray
from test_similarity import Counted

from builder.architecture import matrices
from builder.cluster import clusters
from builder.config import Zoo, load_zoo
from builder.errors import ZooError
from builder.families import families, measure
from builder.journal import Journal
from builder.members import Member, open_all
from builder.progress import Quiet
from builder.record import FamilyRecord
from builder.similarity import Similarity
from builder.sources import Fetched


class Counting(Journal):
    """A journal that remembers which pairs it was told of."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.kept: list[tuple[str, ...]] = []

    def keep(self, kind: str, inputs: Any, result: Any, seconds: float) -> None:
        if kind == "pair":
            self.kept.append(tuple(inputs["models"]))
        super().keep(kind, inputs, result, seconds)


@pytest.fixture
def journal(tmp_path: Path) -> Any:
    with Counting(tmp_path / "journal.sqlite") as opened:
        yield opened


@pytest.fixture
def zoo(mini_which16_zoo: Path) -> Zoo:
    return load_zoo(str(mini_which16_zoo))


def some(zoo: Zoo, names: Sequence[str]) -> Zoo:
    """The zoo with these models, in this order."""
    by_name = {model.id: model for model in zoo.models}
    return zoo.model_copy(update={"models": tuple(by_name[name] for name in names)})


def opened(zoo: Zoo, journal: Journal) -> dict[str, Member]:
    """Every model and base, counting what is read of it."""
    fetched = {entry.id: Fetched(entry.id, Path(entry.source), None) for entry in (*zoo.bases, *zoo.models)}
    members = open_all(zoo, fetched, journal)
    return {name: dataclasses.replace(each, checkpoint=Counted(each.folder)) for name, each in members.items()}


def reads(member: Member) -> Counter[str]:
    assert isinstance(member.checkpoint, Counted)
    return member.checkpoint.reads


def grouped(family: FamilyRecord, how: Any = "components") -> list[tuple[str, ...]]:
    return clusters(family.models, family.similarity["all"], 0.95, how)


@pytest.mark.parametrize("how", ["components", "complete"])
def test_which16_falls_into_its_families_and_clusters(zoo: Zoo, journal: Counting, how: str) -> None:
    found = families(zoo, opened(zoo, journal), journal, Quiet())

    assert tuple(family.models for family in found) == FAMILIES
    assert tuple(group for family in found for group in grouped(family, how)) == CLUSTERS


def test_the_order_of_the_zoo_changes_neither_clusters_nor_numbers(zoo: Zoo, journal: Counting, tmp_path: Path) -> None:
    numbers = by_pair(families(zoo, opened(zoo, journal), journal, Quiet()))
    names = [model.id for model in zoo.models]
    for seed in range(5):
        order = random.Random(seed).sample(names, len(names))
        turned = some(zoo, order)
        with Journal(tmp_path / f"{seed}.sqlite") as fresh:
            found = families(turned, opened(turned, fresh), fresh, Quiet())
        assert {frozenset(group) for family in found for group in grouped(family)} == set(map(frozenset, CLUSTERS))
        assert [name for family in found for name in family.models] == sorted(
            order, key=lambda name: [name in family.models for family in found].index(True)
        )
        assert by_pair(found) == numbers


def by_pair(found: Sequence[FamilyRecord]) -> dict[tuple[str, str], list[float]]:
    return {
        (a, b): [family.dots[i][j], *(family.similarity[part][i][j] for part in ("all", "attention", "mlp"))]
        for family in found
        for i, a in enumerate(family.models)
        for j, b in enumerate(family.models)
    }


def test_numbers_are_those_of_the_weights_as_they_are_stored(zoo: Zoo, journal: Counting) -> None:
    members = opened(zoo, journal)
    for family in families(zoo, members, journal, Quiet()):
        checkpoints = [members[name].checkpoint for name in family.models]
        names = list(matrices(checkpoints[0]))
        assert len(names) in (14, 10)
        flat = [np.concatenate([each.read(name).ravel().astype(float) for name in names]) for each in checkpoints]
        np.testing.assert_allclose(family.dots, [[a @ b for b in flat] for a in flat], rtol=1e-12)
        expected = [[np.mean([cosine(a.read(n), b.read(n)) for n in names]) for b in checkpoints] for a in checkpoints]
        np.testing.assert_allclose(family.similarity["all"], expected, rtol=0, atol=1e-13)


def cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    a, b = a.astype(float), b.astype(float)
    return float(np.mean((a * b).sum(axis=0) / np.linalg.norm(a, axis=0) / np.linalg.norm(b, axis=0)))


def test_a_second_time_nothing_is_read(zoo: Zoo, journal: Counting) -> None:
    first = families(zoo, opened(zoo, journal), journal, Quiet())
    known = len(journal.kept)
    members = opened(zoo, journal)
    turned = some(zoo, [model.id for model in reversed(zoo.models)])

    assert families(zoo, members, journal, Quiet()) == first
    assert by_pair(families(turned, members, journal, Quiet())) == by_pair(first)
    assert len(journal.kept) == known == 13 * 14 / 2 + 3 + 1
    assert not any(reads(member) for member in members.values())


def test_another_model_costs_its_own_pairs_and_one_reading(zoo: Zoo, journal: Counting) -> None:
    families(some(zoo, WHICH12[:5]), opened(zoo, journal), journal, Quiet())
    journal.kept.clear()
    members = opened(zoo, journal)
    families(some(zoo, WHICH12[:6]), members, journal, Quiet())

    new = members[WHICH12[5]].weights
    assert len(journal.kept) == 6
    assert all(new in pair for pair in journal.kept)
    assert {count for name in WHICH12[:6] for count in reads(members[name]).values()} == {1}


def test_a_model_under_two_names_is_one(zoo: Zoo, journal: Counting) -> None:
    members = opened(zoo, journal)
    kin = [members[name] for name in ("synthia", "goat", "synthia")]
    found = measure(kin, None, journal, Quiet())

    assert len(journal.kept) == 3
    assert found.parts["all"][0].tolist() == [1, found.parts["all"][0, 1], 1]
    assert np.linalg.matrix_rank(found.dots) == 2


def test_deltas_tell_what_weights_do_not(zoo: Zoo, journal: Counting) -> None:
    zoo = some(zoo, [*WHICH12, "codellama-instruct", "magicoder", "crystalchat"])
    members = opened(zoo, journal)
    found = families(zoo, members, journal, Quiet(), "deltas")

    assert tuple(family.models for family in found) == (WHICH12, *FAMILIES[1:])
    similar = np.array(found[0].similarity["all"])
    assert abs(similar[~np.eye(12, dtype=bool)]).max() < 0.5
    assert len(clusters(found[0].models, similar, 0.95, "components")) == 12
    assert set(reads(members["llama2"]).values()) == {1}
    # Both are kept, and neither is taken for the other.
    assert families(zoo, members, journal, Quiet())[0].similarity["all"][0][1] > 0.95
    assert families(zoo, members, journal, Quiet(), "deltas") == found


def changed(zoo: Zoo, name: str, base: str | None) -> Zoo:
    models = tuple(m.model_copy(update={"base": base}) if m.id == name else m for m in zoo.models)
    return zoo.model_copy(update={"models": models})


@pytest.mark.parametrize(
    ("names", "name", "base", "words"),
    [
        (WHICH12, "goat", None, "goat names none"),
        (["goat"], "goat", None, "goat names none"),
        (["crystalchat"], "crystalchat", "llama2", "crystalchat is of another architecture than its base llama2"),
    ],
)
def test_deltas_need_a_base_of_the_same_shapes(
    zoo: Zoo, journal: Counting, names: Sequence[str], name: str, base: str | None, words: str
) -> None:
    zoo = changed(some(zoo, names), name, base)
    members = opened(zoo, journal)

    with pytest.raises(ZooError, match=words):
        families(zoo, members, journal, Quiet(), "deltas")
    assert not any(reads(member) for member in members.values())


def test_models_of_one_architecture_and_two_bases_are_two_families_of_deltas(zoo: Zoo, journal: Counting) -> None:
    """Llemma has Llama-2's architecture key and CodeLlama's weights."""
    members = opened(zoo, journal)
    found = families(zoo, members, journal, Quiet(), "deltas")
    assert [set(family.models) for family in found] == [
        set(WHICH12),
        {"llemma"},
        {"codellama-instruct", "magicoder"},
        {"crystalchat"},
    ]


def test_similarity_of_which12_is_symmetric(zoo: Zoo, journal: Counting) -> None:
    members = opened(zoo, journal)
    found: Similarity = measure([members[name] for name in mini_which16.WHICH12], None, journal, Quiet())

    assert all(np.array_equal(matrix, matrix.T) for matrix in (*found.parts.values(), found.dots))
