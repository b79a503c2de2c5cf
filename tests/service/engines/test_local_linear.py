"""Linear layers: every kind is W x + b to its precision, and a row knows nothing of the others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from service.engines.base import EngineError
from service.engines.local import ops
from service.engines.local.linear import Kind, Linear, Panels, Plain, Quantised

SIZES = [(960, 576), (33, 64), (1, 2), (100, 1536), (64, 30)]
DTYPES = [torch.bfloat16, torch.float32]
KINDS: list[Kind] = ["int8", "int4"]
EVERY: list[tuple[torch.dtype, Kind | None]] = [(dtype, kind) for dtype in DTYPES for kind in (None, *KINDS)]


@pytest.fixture(params=["c", "torch"], autouse=True)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each test runs with the C kernels and without."""
    monkeypatch.setenv("MODELGLUE_KERNELS", "" if request.param == "c" else "torch")
    ops.library.cache_clear()
    if request.param == "c" and ops.library() is None:
        pytest.skip("no compiler at install")
    torch.manual_seed(0)
    yield request.param
    ops.set_threads(1)
    ops.library.cache_clear()


def layer(outputs: int, inputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (torch.randn(outputs, inputs) / inputs**0.5).to(dtype), torch.randn(outputs).to(dtype)


def near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    rounding = {"rtol": 2**-8, "atol": 1e-4} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found.double(), expected, **rounding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [*SIZES, (5, 7)])
def test_a_layer_is_the_product_and_the_bias(outputs: int, inputs: int, biased: bool, dtype: torch.dtype) -> None:
    weight, bias = layer(outputs, inputs, dtype)
    linear = Linear.of(weight, bias if biased else None)
    for count in (1, 2, 3, 5, 12, 13, 40, 250):
        x = torch.randn(count, inputs).to(dtype)
        near(linear(x), x.double() @ weight.double().T + (bias.double() if biased else 0), dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("outputs", "inputs"), [(960, 576), (33, 64), (100, 1536)])
def test_a_quantised_layer_is_the_product_with_its_own_rows(outputs: int, inputs: int, kind: Kind) -> None:
    weight, bias = layer(outputs, inputs, torch.bfloat16)
    linear = Linear.of(weight, bias, kind)
    restored = linear.rows(torch.arange(outputs)).double()
    for count in (1, 3, 40):
        x = torch.randn(count, inputs).bfloat16()
        expected = x.double() @ restored.T + bias.double()
        torch.testing.assert_close(linear(x).double(), expected, rtol=2**-7, atol=1e-2)


def test_a_quantised_layer_may_have_an_odd_number_of_inputs() -> None:
    weight, bias = layer(33, 7, torch.bfloat16)
    linear = Linear.of(weight, bias, "int8")
    restored = linear.rows(torch.arange(33)).double()
    x = torch.randn(3, 7).bfloat16()
    torch.testing.assert_close(linear(x).double(), x.double() @ restored.T + bias.double(), rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize(("kind", "loss"), [("int8", 0.01), ("int4", 0.09)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_quantised_weight_is_near_what_it_was(dtype: torch.dtype, kind: Kind, loss: float) -> None:
    weight, _ = layer(70, 576, dtype)
    weight[3] = 0
    restored = Linear.of(weight, kind=kind).rows(torch.arange(70))
    assert (restored - weight.float()).norm() / weight.float().norm() < loss
    assert restored[3].abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_c_and_torch_quantise_alike(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _ = layer(100, 64, torch.bfloat16)
    found = Linear.of(weight, kind=kind).rows(torch.arange(100))
    monkeypatch.setenv("MODELGLUE_KERNELS", "torch")
    ops.library.cache_clear()
    assert torch.equal(found, Linear.of(weight, kind=kind).rows(torch.arange(100)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_the_weights(dtype: torch.dtype) -> None:
    weight, _ = layer(100, 64, dtype)
    ids = torch.tensor([99, 0, 31, 32, 5, 99])
    assert torch.equal(Linear.of(weight).rows(ids), weight[ids])


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_layer_answers_in_the_dtype_it_is_asked_in(kind: Kind) -> None:
    weight, _ = layer(64, 64, torch.float32)
    linear = Linear.of(weight, kind=kind)
    x = torch.randn(3, 64)
    assert linear(x).dtype == torch.float32
    torch.testing.assert_close(linear(x), linear(x.bfloat16()).float(), rtol=0.02, atol=0.02)


def test_int4_refuses_inputs_that_do_not_make_whole_groups() -> None:
    with pytest.raises(EngineError, match="48 inputs"):
        Linear.of(torch.ones(32, 48), kind="int4")


@pytest.mark.parametrize(("dtype", "kind"), EVERY)
def test_a_row_has_the_same_bits_alone_in_any_batch_and_with_any_threads(
    engine: str, dtype: torch.dtype, kind: Kind | None
) -> None:
    if engine == "torch":
        pytest.skip("what torch computes may depend on the batch")
    weight, bias = layer(1000, 576, dtype)
    linear = Linear.of(weight, bias, kind)
    x = torch.randn(300, 576).to(dtype)
    whole = linear(x)
    for threads in (1, 2, 5):
        ops.set_threads(threads)
        for count in (1, 2, 3, 4, 7, 12, 13, 16, 64, 128, 239, 300):
            assert torch.equal(linear(x[-count:]), whole[-count:])


def test_what_is_not_a_number_stays_in_its_own_row() -> None:
    weight, _ = layer(64, 64, torch.bfloat16)
    x = torch.randn(3, 64).bfloat16()
    x[1, 5] = torch.nan
    found = Linear.of(weight)(x)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


def test_the_environment_decides_who_computes(engine: str) -> None:
    weight, _ = layer(64, 64, torch.bfloat16)
    assert isinstance(Linear.of(weight), Panels if engine == "c" else Plain)
    assert isinstance(Linear.of(weight, kind="int4"), Panels if engine == "c" else Quantised)
    assert isinstance(Linear.of(weight.half()), Plain)
