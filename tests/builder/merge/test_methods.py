"""Merge methods: each equals its reference, whatever the shape, the order of inputs, the scale and the piece size."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference import REFERENCE, della_probabilities, global_trim

from builder.merge.inputs import Held, Inputs, merge_arrays, run
from builder.merge.methods import METHODS

Array = NDArray[np.float32]

W = [0.25, 0.7, 1.6]
MIXED = [0.7, -0.4, 0.9]
SPARSE = [
    {"density": [0.5, 0.3, 0.9]},
    {"density": [0.1, 1.0, 0.0], "weight": MIXED, "lambda": 0.7},
    {"density": [0.6, 0.4, 0.2], "normalize": True},
    {"density": [0.6, 0.4, 0.2], "normalize": False, "rescale": True},
    {"density": [0.6, 0.4, 0.2], "rescale": "l1", "lambda": -1.5},
    {"density": [0.6, 0.4, 0.2], "rescale": "density", "weight": MIXED},
    {"density": [0.6, 0.4, 0.2], "rescale": False},
]
DELLA = [{"density": [0.5, 0.3, 0.8], "epsilon": [0.1, 0.0, 0.15], **more} for more in SPARSE[2:]] + [
    {"density": [1.0, 0.3, 0.5]},
    {"density": [0.2, 0.0, 0.5]},
]
# Of three inputs, or of as many as the method takes.
CASES: dict[str, list[dict[str, Any]]] = {
    "linear": [{}, {"weight": MIXED}, {"normalize": False}],
    "passthrough": [{}, {"scale": [0.37]}, {"scale": [None]}],
    "slerp": [{"t": t} for t in (0.0, 0.3, 1.0, 1.4)],
    "nuslerp": [
        {"weight": weight, "nuslerp_flatten": flatten, "nuslerp_row_wise": row_wise}
        for weight in ([0.3, 0.9], [1.5, -0.3])
        for flatten, row_wise in ((True, False), (False, False), (False, True), (True, True))
    ],
    "multislerp": [{}, {"weight": MIXED}, {"normalize_weights": False}, {"eps": 0.0}],
    "karcher": [{}, {"max_iter": 1}, {"max_iter": 3, "tol": 1e-9}, {"tol": 0.05}],
    "model_stock": [{}, {"filter_wise": True}],
    "task_arithmetic": [{}, {"weight": MIXED, "lambda": 0.7}, {"normalize": True}],
    "ties": SPARSE,
    "dare_linear": SPARSE,
    "dare_ties": SPARSE,
    "della": DELLA,
    "della_linear": DELLA,
    "breadcrumbs": [*SPARSE, {"density": [0.5, 0.3, 0.9], "gamma": [0.0, 0.2, 0.5]}],
    "breadcrumbs_ties": [*SPARSE, {"density": [0.5, 0.3, 0.9], "gamma": [0.0, 0.2, 0.5]}],
    "sce": [{}, {"select_topk": 0.5}, {"select_topk": 0.03}, {"select_topk": 0.0}],
    "arcee_fusion": [{}],
    "nearswap": [{"t": t} for t in (0.0, 0.08, 10.0)],
    "ram": [{}, {"epsilon": 0.0}, {"epsilon": 0.1}],
    "ramplus_tl": [{}, {"epsilon": 0.0}, {"epsilon": 0.1, "r": 0.5, "alpha": 3.0}],
    "fisher": [{}, {"weight": W}],
    "regmean": [{}, {"weight": W}, {"reduction": 1.0}, {"reduction": 0.0}],
}
ALL_CASES = [
    pytest.param(name, case, id=f"{name}-{i}") for name, cases in CASES.items() for i, case in enumerate(cases)
]
RANDOM = ["dare_linear", "dare_ties", "della", "della_linear"]
DETERMINISTIC = [name for name in METHODS if name not in RANDOM]
WITH_BASE = [name for name, method in METHODS.items() if method.base != "none"]
SHAPES = [(48, 64), (64,), (1, 1), (1,), (1, 97), (97, 1), (3, 5, 7), (12, 1000), ()]


def inputs(shape: tuple[int, ...], count: int, seed: int = 0) -> tuple[Array, list[Array]]:
    """A base and fine-tunes of it, each with three tenths of the elements unchanged and the others changed visibly."""
    rng = np.random.default_rng(seed)

    def exact(values: Any) -> Array:
        # On a grid where every difference is a float32: no rounding changes which of two updates is the larger.
        return np.asarray(np.round(values * 2.0**20) / 2.0**20, np.float32)

    base = exact(rng.standard_normal(shape))
    changes = [
        rng.uniform(0.05, 0.2, shape) * rng.choice([-1, 1], shape) * (rng.random(shape) < 0.7) for _ in range(count)
    ]
    return base, [exact(base + change) for change in changes]


def coarse(shape: tuple[int, ...], count: int, seed: int = 0) -> tuple[Array, list[Array]]:
    """The same with so few different changes that most magnitudes are met often, and all sums are exact."""
    rng = np.random.default_rng(seed)
    base = (rng.integers(-64, 65, shape) / 16).astype(np.float32)
    return base, [base + (rng.integers(-4, 5, shape) / 16).astype(np.float32) for _ in range(count)]


def statistics(method: str, tensors: Sequence[Array], seed: int = 0) -> list[Array]:
    """What the method is told about each input, nothing where it is told nothing."""
    rng = np.random.default_rng(seed)
    shape = tensors[0].shape
    if method == "fisher":
        unknown = rng.random(shape) < 0.2
        return [np.asarray(np.where(unknown, 0, rng.random(shape) ** 4), np.float32) for _ in tensors]
    if method == "regmean" and len(shape) == 2 and shape[1] <= 128:
        features = [rng.standard_normal((4 * shape[1], shape[1])) for _ in tensors]
        return [(x.T @ x / len(x)).astype(np.float32) for x in features]
    return []


def complete(method: str, case: dict[str, Any]) -> dict[str, Any]:
    """The case with weights, where the method asks for them and the case has none."""
    return {"weight": W, **case} if "weight" in METHODS[method].parameters else case


def inputs_of(method: str, shape: tuple[int, ...], seed: int = 0) -> tuple[Array, list[Array]]:
    return inputs(shape, min(3, METHODS[method].most or 3), seed)


def drawn(method: str, tensors: Sequence[Array], base: Array, case: dict[str, Any], **more: Any) -> list[Any]:
    """The elements that chance keeps of each input, seen by merging each alone."""
    plain = {**case, "normalize": False, "rescale": False, "lambda": 1.0}
    weights = np.eye(len(tensors)).tolist()
    return [merge_arrays(method, tensors, base, **{**plain, "weight": weight, **more}) != base for weight in weights]


def assert_rounding(got: Array, want: NDArray[Any], *others: Array) -> None:
    """Equal but for the rounding of a few operations in fp32 on values of the others' magnitude."""
    assert got.dtype == np.float32
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    scale = np.abs(want) + np.max([np.abs(x) for x in others], axis=0)
    wrong = ~(np.abs(got - want) <= 1e-6 * scale)
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} elements, up to {np.abs(got - want).max()}"


def bfloat16(values: Array) -> Array:
    """Rounded to the nearest bfloat16, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def test_every_method_has_cases_and_a_reference() -> None:
    assert set(CASES) == set(REFERENCE) == set(METHODS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("method", "case"), ALL_CASES)
def test_a_merge_equals_its_reference(method: str, case: dict[str, Any], shape: tuple[int, ...]) -> None:
    base, tensors = inputs_of(method, shape)
    case, known = complete(method, case), statistics(method, tensors)
    bases = {"required": [base], "optional": [base, None], "none": [None]}[METHODS[method].base]
    for origin in bases:
        extra: dict[str, Any] = {"statistics": known} if known else {}
        if method in RANDOM:
            extra["kept"] = drawn(method, tensors, base, case)

        got = merge_arrays(method, tensors, origin, piece=4096, statistics=known, **case)

        assert_rounding(got, REFERENCE[method](tensors, origin, **case, **extra), base, *tensors)


@pytest.mark.parametrize("t", [0.3, 0.8])
@pytest.mark.parametrize("sign", [-1, 1])
def test_slerp_of_distant_models_follows_the_arc(t: float, sign: int) -> None:
    base, other = inputs((30, 40), 1)[0], sign * inputs((30, 40), 1, seed=1)[0]

    assert_rounding(merge_arrays("slerp", [other], base, t=t), REFERENCE["slerp"]([other], base, t=t), base, other)


@pytest.mark.parametrize("max_iter", [1, 2, 10])
def test_karcher_finds_the_mean_of_distant_models(max_iter: int) -> None:
    tensors = [inputs((30, 40), 0, seed)[0] for seed in range(4)]

    got = merge_arrays("karcher", tensors, max_iter=max_iter)

    assert_rounding(got, REFERENCE["karcher"](tensors, max_iter=max_iter), *tensors)


def test_a_zero_tensor_has_no_direction_for_karcher() -> None:
    _, tensors = inputs((30, 40), 2)
    tensors.append(np.zeros_like(tensors[0]))

    assert_rounding(merge_arrays("karcher", tensors), REFERENCE["karcher"](tensors), *tensors)


@pytest.mark.parametrize("signs", [(1, 1), (1, -1)])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (33, 1)])
def test_single_elements_lie_on_one_line_for_nuslerp(shape: tuple[int, ...], signs: tuple[int, int]) -> None:
    values = np.abs(inputs(shape, 0)[0])
    tensors = [signs[0] * values, signs[1] * np.float32(0.3) * values]

    got = merge_arrays("nuslerp", tensors, weight=[0.7, 0.3], nuslerp_flatten=False)

    assert_rounding(got, 0.7 * tensors[0] + 0.3 * tensors[1], *tensors)


@pytest.mark.parametrize("method", ["slerp", "nuslerp", "multislerp"])
def test_opposite_updates_are_mixed_on_a_line(method: str) -> None:
    x = inputs((50, 60), 0)[0]
    parameters = {"t": 0.3} if method == "slerp" else {"weight": [0.7, 0.3]}
    tensors, base = ([-x], x) if method == "slerp" else ([x, -x], None)

    got = merge_arrays(method, tensors, base, **parameters)

    assert_rounding(got, REFERENCE[method](tensors, base, **parameters), x)


# Equal magnitudes


@pytest.mark.parametrize("rescale", [False, "density"])
@pytest.mark.parametrize("density", [0.125, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties"])
def test_of_equal_magnitudes_the_first_are_the_larger(method: str, density: float, rescale: bool | str) -> None:
    base, tensors = coarse((24, 700), 2)
    case = {"weight": [1.0, 1.0], "density": [density] * 2, "rescale": rescale}
    case |= {} if method == "ties" else {"gamma": [0.05, 0.3]}

    got = merge_arrays(method, tensors, base, piece=4096, **case)

    assert np.array_equal(got, REFERENCE[method](tensors, base, **case))


@pytest.mark.parametrize("select_topk", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_of_equal_variances_sce_takes_the_first(count: int, select_topk: float) -> None:
    base, tensors = coarse((24, 700), count)

    got = merge_arrays("sce", tensors, base, piece=4096, select_topk=select_topk)

    assert_rounding(got, REFERENCE["sce"](tensors, base, select_topk=select_topk), base, *tensors)


@pytest.mark.parametrize("weight", [[1.0, 1.0], [1.0, -1.0]])
def test_votes_that_cancel_out_elect_plus(weight: list[float]) -> None:
    base = np.zeros(2, np.float32)
    tensors = [np.array([1, -1], np.float32), np.array([-1, 1], np.float32) * np.float32(weight[1])]

    got = merge_arrays("ties", tensors, base, weight=weight, normalize=False)

    assert got.tolist() == [1.0, 1.0]


def test_agreeing_weights_that_cancel_out_divide_nothing() -> None:
    weight = [0.7, -0.4, -0.3]  # their sum in fp32 is -3e-8
    base, tensors = np.zeros(3, np.float32), [np.full(3, x, np.float32) for x in (1, -1, -1)]

    got = merge_arrays("ties", tensors, base, weight=weight)

    assert_rounding(got, REFERENCE["ties"](tensors, base, weight=weight), *tensors)


@pytest.mark.parametrize("density", [[0.3, 0.05], [0.5, 1.0], [0.0, 0.02]])
def test_global_trim_cuts_the_model_as_one_vector(density: list[float]) -> None:
    # The last tensors change the most: cuts of their own would keep as much of the others.
    models = [coarse(shape, 2, seed) for seed, shape in enumerate([(24, 700), (5,), (1,), (40, 50)])]
    models = [(base, [base + 2**i * (x - base) for x in tensors]) for i, (base, tensors) in enumerate(models)]
    case = {"weight": [1.0, 1.0], "density": density, "normalize": True, "rescale": False, "lambda": 1.0}
    case["trim"] = "global"
    held = [
        Inputs(f"t{i}", [Held(x) for x in tensors], Held(base), piece=4096) for i, (base, tensors) in enumerate(models)
    ]

    found = METHODS["ties"].survey([(each, case) for each in held], map)

    deltas = [[np.float64(tensors[i]) - base for base, tensors in models] for i in range(2)]
    masks = [global_trim(model, share) for model, share in zip(deltas, density, strict=True)]
    for tensor, (base, tensors) in enumerate(models):
        got = np.concatenate(list(run(METHODS["ties"], held[tensor], {**case, **found[tensor]})))
        kept = [mask[tensor] for mask in masks]
        want = REFERENCE["ties"](tensors, base, weight=[1.0, 1.0], density=density, kept=kept)
        assert np.array_equal(got.reshape(base.shape), want), tensor


# Properties of all methods


@pytest.mark.parametrize("method", METHODS)
def test_merging_a_model_with_itself_gives_that_model(method: str) -> None:
    base, tensors = inputs_of(method, (40, 50))
    base, model = bfloat16(base), bfloat16(tensors[0])
    same = [model] * len(tensors)
    case: dict[str, Any] = {"t": 0.3} if "t" in METHODS[method].parameters else {}
    case |= {"weight": [0.25, 0.5, 0.25][: len(same)]} if "weight" in METHODS[method].parameters else {}
    # Methods that take from the base what they do not take from one model.
    mixing = ("slerp", "nearswap", "arcee_fusion")
    bases = [None] if METHODS[method].base == "none" else [model] if method in mixing else [model, base]
    for origin in bases:
        got = merge_arrays(method, same, origin, statistics=statistics(method, same), **case)

        assert np.array_equal(bfloat16(got), model)


@pytest.mark.parametrize("method", [method for method in WITH_BASE if method != "slerp"])
def test_a_tensor_that_nobody_changed_stays_as_it_is(method: str) -> None:
    base, tensors = inputs_of(method, (40, 50))
    for case in CASES[method]:
        got = merge_arrays(method, [base] * len(tensors), base, **complete(method, case))

        assert np.array_equal(got, base), case


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)], ids=str)
def test_an_empty_tensor_stays_empty(method: str, shape: tuple[int, ...]) -> None:
    base, tensors = inputs_of(method, shape)
    base = None if METHODS[method].base == "none" else base
    for case in CASES[method]:
        assert merge_arrays(method, tensors, base, **complete(method, case)).shape == shape


@pytest.mark.parametrize("method", [method for method in DETERMINISTIC if METHODS[method].most != 1])
@settings(max_examples=8)
@given(seed=st.integers(0, 2**32 - 1), data=st.data())
def test_the_order_of_inputs_changes_only_rounding(method: str, seed: int, data: st.DataObject) -> None:
    base, tensors = inputs_of(method, (9, 11), seed)
    base = None if METHODS[method].base == "none" else base
    case = complete(method, data.draw(st.sampled_from(CASES[method])))
    order = data.draw(st.permutations(range(len(tensors))))
    known = statistics(method, tensors, seed)
    moved = {name: [v[i] for i in order] if isinstance(v, list) else v for name, v in case.items()}
    moved_known = [known[i] for i in order] if known else []

    got = merge_arrays(method, [tensors[i] for i in order], base, statistics=moved_known, **moved)

    assert_rounding(got, merge_arrays(method, tensors, base, statistics=known, **case), *tensors)


@pytest.mark.parametrize("shape", [(7, 3000), (21000,), (1400, 3)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_the_piece_size_changes_no_bit(method: str, shape: tuple[int, ...]) -> None:
    base, tensors = inputs_of(method, shape)
    base = None if METHODS[method].base == "none" else base
    known = statistics(method, tensors)
    for case in (CASES[method][0], CASES[method][-1]):
        case = complete(method, case)
        whole = merge_arrays(method, tensors, base, statistics=known, **case)
        for piece in (4096, 3 * 4096):
            got = merge_arrays(method, tensors, base, statistics=known, piece=piece, **case)

            assert np.array_equal(got, whole), (piece, case)


@pytest.mark.parametrize("exponent", [-30, 12])
@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("arcee_fusion", *RANDOM)])
def test_the_scale_of_the_weights_changes_nothing_else(method: str, exponent: int) -> None:
    scale = np.float32(2.0**exponent)
    base, tensors = inputs_of(method, (20, 30))
    known = statistics(method, tensors)
    for case in CASES[method]:
        case = complete(method, case)
        lengths = {"nearswap": "t", "ram": "epsilon", "ramplus_tl": "epsilon", "multislerp": "eps"}
        case = {"epsilon": 1e-5, **case} if lengths.get(method) == "epsilon" else case
        case = {**case, "eps": 0.0} if method == "multislerp" else case
        scaled = {name: v * float(scale) if name == lengths.get(method) else v for name, v in case.items()}
        origin = None if METHODS[method].base == "none" else base
        far = None if origin is None else origin * scale

        got = merge_arrays(method, [x * scale for x in tensors], far, statistics=known, **scaled)

        want = merge_arrays(method, tensors, origin, statistics=known, **case)
        assert_rounding(got / scale, want, base, *tensors)


@pytest.mark.parametrize(
    ("method", "case"),
    [
        ("model_stock", {"filter_wise": True}),
        ("nuslerp", {"nuslerp_flatten": False}),
        ("della", {"density": [0.5] * 2}),
    ],
)
def test_narrow_rows_take_no_memory_beyond_their_elements(method: str, case: dict[str, Any]) -> None:
    base, tensors = inputs((4000, 3), 2)
    case = case if method == "model_stock" else {"weight": [1.0, 1.0], **case}

    tracemalloc.start()
    merge_arrays(method, tensors, base, **case)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 100 * base.nbytes


def test_weights_that_sum_to_zero_are_refused_where_they_are_divided_by_their_sum() -> None:
    per_model = {"weight": [1.0, -1.0], "density": [0.5, 0.5], "epsilon": [0.1, 0.1], "gamma": [0.0, 0.0]}
    by_sum = ("linear", "task_arithmetic", "dare_linear", "della_linear", "breadcrumbs")
    by_those_that_agree = ("ties", "dare_ties", "della", "breadcrumbs_ties")

    def refusal(method: str, normalize: bool) -> str | None:
        return METHODS[method].check({**per_model, "normalize": normalize})

    assert [method for method in by_sum if refusal(method, True) is None] == []
    assert [method for method in by_sum if refusal(method, False) is not None] == []
    assert [method for method in by_those_that_agree if refusal(method, True) or refusal(method, False)] == []
    for method in ("nuslerp", "multislerp", "fisher", "regmean"):
        assert METHODS[method].check(per_model) is not None, method


@pytest.mark.parametrize("method", ["della", "della_linear"])
@pytest.mark.parametrize(
    ("density", "epsilon", "fine"), [(0.5, 0.49, True), (0.5, 0.5, False), (0.1, 0.15, False), (1.0, 0.15, True)]
)
def test_della_refuses_what_is_no_probability(method: str, density: float, epsilon: float, fine: bool) -> None:
    case = {"weight": [1.0], "density": [density], "epsilon": [epsilon], "normalize": True}

    assert (METHODS[method].check(case) is None) == fine


# Chance


@pytest.mark.parametrize("method", RANDOM)
def test_a_seed_gives_the_same_bits_and_another_seed_another_mask(method: str) -> None:
    base, tensors = inputs((40, 50), 3)
    case = {"weight": W, "density": [0.5, 0.5, 0.5]}

    first = merge_arrays(method, tensors, base, seed=3, **case)

    assert np.array_equal(first, merge_arrays(method, tensors, base, seed=3, **case))
    assert not np.array_equal(first, merge_arrays(method, tensors, base, seed=4, **case))


@pytest.mark.parametrize("method", RANDOM)
def test_every_input_and_every_tensor_has_a_mask_of_its_own(method: str) -> None:
    # In a row the probabilities of DELLA differ: as large as it gets, the masks have more in common than by chance.
    base, change = np.zeros((200, 200), np.float32), np.full((200, 200), 0.1, np.float32)
    case = {"density": [0.3, 0.3], **({"epsilon": [0.0, 0.0]} if method.startswith("della") else {})}

    masks = drawn(method, [change, change], base, case, name="a") + drawn(
        method, [change, change], base, case, name="b"
    )

    sigma = np.sqrt(0.09 * 0.91 / change.size)
    for i in range(4):
        for j in range(i):
            assert abs(np.mean(masks[i] & masks[j]) - 0.09) < 5 * sigma


@pytest.mark.parametrize("density", [0.0, 0.01, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_keeps_its_density(method: str, density: float) -> None:
    base, change = np.zeros((200, 200), np.float32), np.full((200, 200), 0.1, np.float32)

    (kept,) = drawn(method, [change], base, {"density": [density]})

    assert abs(kept.mean() - density) <= 5 * np.sqrt(density * (1 - density) / kept.size)


@pytest.mark.parametrize("row", [[3, -1, 1, 1, 0.5, -2, 2, 3], [1, 1, 1, 1], [-7], [2, 1]], ids=str)
@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_della_keeps_by_the_rank_in_the_row(method: str, row: list[float]) -> None:
    change = np.tile(np.array(row, np.float32), (20000, 1))
    base = np.zeros_like(change)
    case = {"density": [0.4], "epsilon": [0.3]}

    observed = np.mean([drawn(method, [change], base, case, seed=seed)[0].mean(axis=0) for seed in range(3)], axis=0)

    p = della_probabilities(np.array(row, np.float64), 0.4, 0.3)
    assert (np.abs(observed - p) <= 5 * np.sqrt(p * (1 - p) / (3 * len(change)))).all()


@pytest.mark.parametrize("method", RANDOM)
def test_divided_by_its_probability_the_kept_update_is_the_whole_on_average(method: str) -> None:
    base, change = np.zeros((20000, 6), np.float32), np.tile(np.arange(1, 7, dtype=np.float32), (20000, 1))

    got = merge_arrays(method, [change], base, weight=[1.0], density=[0.5], rescale="density")

    # Kept with a probability of at least 0.35 and divided by it, an element deviates by at most 1.4 times itself.
    assert (np.abs(got.mean(axis=0) / change[0] - 1) < 5 * 1.4 / np.sqrt(len(change))).all()


# Rescaling


@pytest.mark.parametrize("rescale", [True, "l1"])
@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties", *RANDOM])
def test_l1_rescaling_restores_the_norm_of_the_update(method: str, rescale: bool | str) -> None:
    change = np.random.default_rng(0).standard_normal((100, 130)).astype(np.float32)

    got = merge_arrays(method, [change], np.zeros_like(change), weight=[1.0], density=[0.3], rescale=rescale)

    assert np.count_nonzero(got) < 0.4 * got.size
    assert np.abs(got).sum(dtype=np.float64) == pytest.approx(np.abs(change).sum(dtype=np.float64), rel=1e-6)


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties"])
def test_density_rescaling_divides_by_the_density(method: str) -> None:
    change = np.random.default_rng(0).standard_normal((100, 130)).astype(np.float32)

    got = merge_arrays(method, [change], np.zeros_like(change), weight=[1.0], density=[0.25], rescale="density")

    kept = got != 0
    assert np.array_equal(got[kept], 4 * change[kept])


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties"])
@pytest.mark.parametrize("rescale", [True, "l1", "density"])
def test_nothing_kept_is_nothing_added(method: str, rescale: bool | str) -> None:
    base, tensors = inputs((30, 40), 2)

    got = merge_arrays(method, tensors, base, weight=[1.0, 1.0], density=[0.0, 0.0], rescale=rescale)

    assert np.array_equal(got, base)


def test_ties_keeps_one_element_of_any_tensor() -> None:
    change = np.array([1, -3, 2], np.float32)

    got = merge_arrays("ties", [change], np.zeros_like(change), weight=[1.0], density=[0.001])

    assert got.tolist() == [0.0, -3.0, 0.0]


# What other tools lose


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_keeps_small_updates_that_agree(filter_wise: bool) -> None:
    update = (1e-5 * np.random.default_rng(0).standard_normal((64, 64))).astype(np.float32)
    base = np.zeros_like(update)

    got = merge_arrays("model_stock", [update, update], base, filter_wise=filter_wise)

    assert_rounding(got, update.astype(np.float64), update)


def test_arcee_fusion_looks_at_every_element() -> None:
    base, tensors = inputs((1001, 1000), 1)

    first = merge_arrays("arcee_fusion", tensors, base)

    assert np.array_equal(first, REFERENCE["arcee_fusion"](tensors, base))


@pytest.mark.parametrize("known", [True, False])
def test_regmean_answers_as_the_models_do_on_what_they_have_seen(known: bool) -> None:
    rng = np.random.default_rng(0)
    tensors = [rng.standard_normal((5, 8)).astype(np.float32) for _ in range(2)]
    features = [np.zeros((20, 8)), np.zeros((20, 8))]
    features[0][:, :4], features[1][:, 4:] = rng.standard_normal((2, 20, 4))
    grams = [(x.T @ x).astype(np.float32) for x in features] if known else []

    got = merge_arrays("regmean", tensors, statistics=grams, reduction=1.0)

    # Each model saw half of the features: the merged one has each model's weights on its half.
    want = np.concatenate([tensors[0][:, :4], tensors[1][:, 4:]], axis=1) if known else sum(tensors) / 2
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_feature_that_no_model_saw_takes_the_mean() -> None:
    _, tensors = inputs((5, 8), 2)
    grams = statistics("regmean", tensors)
    for gram in grams:
        gram[3] = gram[:, 3] = 0

    got = merge_arrays("regmean", tensors, statistics=grams)

    assert_rounding(got, REFERENCE["regmean"](tensors, None, statistics=grams), *tensors)
