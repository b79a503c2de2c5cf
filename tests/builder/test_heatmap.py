"""The drawing of a family: every model and pair, clusters side by side, and the tree cut where the clusters are."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence

import numpy as np
import pytest

from builder.cluster import Linkage, clusters
from builder.report.heatmap import Panel, heatmap, heatmaps
from builder.similarity import Matrix

SVG = "{http://www.w3.org/2000/svg}"
NAMES = ("d", "b", "a", "c")
MATRIX = np.array([[1, 0.3, 0.97, 0.31], [0.3, 1, 0.32, 0.96], [0.97, 0.32, 1, 0.33], [0.31, 0.96, 0.33, 1]])


def drawn(names: Sequence[str], matrix: Matrix, threshold: float = 0.95, how: Linkage = "components") -> ET.Element:
    return ET.fromstring(heatmap(names, matrix, threshold, how, clusters(names, matrix, threshold, how), "family"))


def texts(root: ET.Element) -> list[str]:
    return [each.text or "" for each in root.iter(f"{SVG}text")]


def of_class(root: ET.Element, tag: str, name: str) -> list[ET.Element]:
    return [each for each in root.iter(SVG + tag) if each.get("class") == name]


def test_a_cell_says_its_pair_and_the_darkest_is_the_most_alike() -> None:
    cells = {
        (title.text or ""): float(cell.get("fill-opacity", 1))
        for cell in drawn(NAMES, MATRIX).iter(f"{SVG}rect")
        if (title := cell.find(f"{SVG}title")) is not None
    }

    assert len(cells) == 16
    assert cells["a, d: 0.97"] == cells["d, a: 0.97"] > cells["b, c: 0.96"] > cells["b, d: 0.3"] == min(cells.values())
    assert cells["a, a: 1"] == 1


@pytest.mark.parametrize("how", ["components", "complete"])
def test_clusters_lie_side_by_side_in_their_frames(how: Linkage) -> None:
    root = drawn(NAMES, MATRIX, how=how)
    rows = [text for text in texts(root) if text in NAMES]
    frames = of_class(root, "rect", "s-mark")

    assert {frozenset(rows[-4:-2]), frozenset(rows[-2:])} == {frozenset("ad"), frozenset("bc")}
    assert len(frames) == 2
    assert len({frame.get("width") for frame in frames}) == 1


def test_the_tree_is_cut_where_the_clusters_are() -> None:
    root = drawn(NAMES, MATRIX)

    assert len(of_class(root, "path", "s-heat")) == 2  # joined above the threshold
    assert len(of_class(root, "path", "s-soft")) == 1  # and below
    line = next(each for each in of_class(root, "path", "s-mark") if each.get("stroke-dasharray"))
    x = float(line.get("d", "").split()[0][1:])
    joins = [
        float(each.get("d", "").split("H")[1].split("V")[0])
        for each in root.iter(f"{SVG}path")
        if "H" in each.get("d", "")
    ]
    assert sorted(each < x for each in joins) == [False, True, True]


def test_decimals_tell_close_models_apart() -> None:
    matrix = np.array([[1, 0.999994, 0.999991], [0.999994, 1, 0.999987], [0.999991, 0.999987, 1]])
    said = texts(drawn(("a", "b", "c"), matrix))

    assert {".999994", ".999991", ".999987", "1", "0.95"} <= set(said)


@pytest.mark.parametrize(
    "matrix",
    [
        np.ones((3, 3)),
        np.eye(3),
        np.full((3, 3), -0.5) + 1.5 * np.eye(3),
        np.ones((1, 1)),
        np.ones((2, 2)),
        np.full((60, 60), 0.9) + 0.1 * np.eye(60),
    ],
)
@pytest.mark.parametrize("threshold", [1e-9, 0.95, 1.0])
def test_any_matrix_is_drawn_within_its_frame(matrix: Matrix, threshold: float) -> None:
    names = [f"m{i}" for i in range(len(matrix))]
    root = drawn(names, matrix, threshold)
    width, height = float(root.get("width", 0)), float(root.get("height", 0))

    assert "nan" not in ET.tostring(root, "unicode")
    for rect in root.iter(f"{SVG}rect"):
        x, y = (float(rect.get(key, 0)) for key in ("x", "y"))
        assert 0 <= x <= x + float(rect.get("width", 0)) <= width
        assert 0 <= y <= y + float(rect.get("height", 0)) <= height


def test_names_are_text_not_markup() -> None:
    root = drawn(("<b>&\"'", "c"), np.ones((2, 2)))

    assert "<b>&\"'" in texts(root)


def test_families_are_drawn_one_below_the_other() -> None:
    panels = [Panel(f"family {i}", NAMES, MATRIX, clusters(NAMES, MATRIX, 0.95, "components")) for i in range(2)]
    both, one = ET.fromstring(heatmaps(panels, 0.95, "components")), drawn(NAMES, MATRIX)

    assert float(both.get("height", 0)) == pytest.approx(2 * float(one.get("height", 0)))
    assert {"family 0", "family 1"} <= set(texts(both))
