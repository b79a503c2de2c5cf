"""The decoder's arithmetic: C and torch give what transformers' modules give, and a row knows nothing of the others."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from service.engines.local import ops
from service.engines.local.ops import PAGE, Shape

DTYPES = [torch.bfloat16, torch.float32]
SHAPES = [Shape(2, 9, 3, 64), Shape(2, 14, 2, 64), Shape(1, 4, 4, 80), Shape(2, 8, 1, 128), Shape(1, 4, 2, 256)]
NARROW = Shape(2, 4, 2, 8)
"""Too narrow for the attention of the C kernels."""


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


def random(*sizes: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*sizes).to(dtype)


def close(found: Tensor, expected: Tensor) -> None:
    """Equal but for a rounding that falls the other way, in few places."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    if expected.dtype == torch.bfloat16:
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-5)
        assert (found != expected).float().mean() < 0.01
    else:
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)


class Context:
    """Rows with contexts of their own, in pages scattered over a memory, and the same keys and values in order."""

    def __init__(self, shape: Shape, lengths: list[int], dtype: torch.dtype) -> None:
        self.shape, self.lengths = shape, lengths
        counts = [-(-length // PAGE) for length in lengths]
        order = (torch.randperm(sum(counts)) * shape.page + 7).split(counts)
        self.memory = torch.full((sum(counts) * shape.page + 7,), torch.nan, dtype=dtype)
        self.tables_BP = torch.nn.utils.rnn.pad_sequence(list(order), batch_first=True, padding_value=7)
        self.lengths_B = torch.tensor(lengths)
        self.keys, self.values = [], []
        for length, pages in zip(lengths, order, strict=True):
            kv = random(shape.layers, 2, shape.kv_heads, length, shape.width, dtype=dtype)
            for place in range(length):
                start = int(pages[place // PAGE])
                page = self.memory[start : start + shape.page].view(*kv.shape[:3], PAGE, shape.width)
                page[:, :, :, place % PAGE] = kv[:, :, :, place]
            self.keys.append(kv[:, 0])
            self.values.append(kv[:, 1])
        self.qkv_BX = random(len(lengths), (shape.heads + 2 * shape.kv_heads) * shape.width, dtype=dtype)

    def attend(self, rows: slice = slice(None), window: int | None = None) -> Tensor:
        scale = self.shape.width**-0.5
        tables_BP, lengths_B, layer = self.tables_BP[rows], self.lengths_B[rows], self.shape.layers - 1
        return ops.attend(self.qkv_BX[rows], self.memory, tables_BP, lengths_B, layer, self.shape, scale, window)

    def expected(self, window: int | None = None) -> Tensor:
        """In fp64, head by head."""
        shape, rows = self.shape, []
        for row, length in enumerate(self.lengths):
            first = max(0, length - window) if window else 0
            for head in range(shape.heads):
                q_D = self.qkv_BX[row, head * shape.width : (head + 1) * shape.width].double()
                shared = head // (shape.heads // shape.kv_heads)
                k_SD = self.keys[row][-1, shared, first:].double()
                v_SD = self.values[row][-1, shared, first:].double()
                rows.append((k_SD @ q_D * shape.width**-0.5).softmax(0) @ v_SD)
        return torch.stack(rows).view(len(self.lengths), -1)


def test_the_c_kernels_are_there_where_a_compiler_is(engine: str) -> None:
    assert engine == "torch" or not shutil.which("gcc") or ops.library() is not None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 100, 576, 4096])
def test_norm_is_llamas(width: int, dtype: torch.dtype) -> None:
    hidden, weight = random(37, width, dtype=dtype), random(width, dtype=dtype)
    module = LlamaRMSNorm(width, eps=1e-5).to(dtype)
    module.weight.data = weight
    close(ops.norm(hidden, weight, 1e-5), module(hidden).detach())


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_first_adds_the_delta_to_hidden(dtype: torch.dtype) -> None:
    hidden, delta, weight = random(5, 96, dtype=dtype), random(5, 96, dtype=dtype), random(96, dtype=dtype)
    total = hidden + delta
    found = ops.norm(hidden, weight, 1e-5, delta)
    assert torch.equal(hidden, total)
    assert torch.equal(found, ops.norm(total, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, NARROW])
def test_place_turns_as_llama_and_qwen3_do(shape: Shape, normed: bool, dtype: torch.dtype) -> None:
    tokens, width = 5, shape.width
    qkv_TX = random(tokens, (shape.heads + 2 * shape.kv_heads) * width, dtype=dtype)
    angles = torch.outer(torch.arange(3.0, 3 + tokens), 10000 ** -(torch.arange(0, width, 2) / width)).repeat(1, 2)
    cos_TD, sin_TD = angles.cos().to(dtype), angles.sin().to(dtype)
    norms = [Qwen3RMSNorm(width, eps=1e-6).to(dtype) for _ in "qk"]
    for each in norms:
        each.weight.data = random(width, dtype=dtype)
    weights = [each.weight.data if normed else None for each in norms]
    q, k, v = qkv_TX.clone().view(tokens, -1, width).split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
    if normed:
        q, k = norms[0](q).detach(), norms[1](k).detach()
    q, k = apply_rotary_pos_emb(q, k, cos_TD, sin_TD)

    page = torch.zeros(shape.page, dtype=dtype)
    memory = torch.cat((torch.ones(3, dtype=dtype), page, torch.ones(3, dtype=dtype)))
    layer = shape.layers - 1
    slots_T = 3 + torch.tensor([4, 0, 15, 7, 1]) * width
    ops.place(qkv_TX, cos_TD, sin_TD, memory, slots_T, layer, shape, *weights, 1e-6)

    expected = torch.cat((q, k, v), dim=1).view(tokens, -1)
    if normed:
        torch.testing.assert_close(qkv_TX, expected, rtol=2**-6 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    else:
        assert torch.equal(qkv_TX, expected)
    held = memory[3:-3].view(shape.layers, 2, shape.kv_heads, PAGE, width)
    placed = qkv_TX.view(tokens, -1, width)[:, shape.heads :].view(tokens, 2, shape.kv_heads, width)
    assert torch.equal(held[layer][:, :, [4, 0, 15, 7, 1]], placed.permute(1, 2, 0, 3))
    assert held.count_nonzero() == placed.count_nonzero()
    assert memory[:3].eq(1).all()
    assert memory[-3:].eq(1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, NARROW])
def test_attention_is_softmax_over_each_rows_own_tokens(shape: Shape, dtype: torch.dtype) -> None:
    context = Context(shape, [1, 16, 17, 130, 300], dtype)
    rounding = {"rtol": 2**-7, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(context.attend(), context.expected().to(dtype), **rounding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 16, 100, 129, 1000])
def test_attention_sees_no_further_back_than_the_window(window: int, dtype: torch.dtype) -> None:
    context = Context(SHAPES[0], [1, 17, 130, 300], dtype)
    rounding = {"rtol": 2**-7, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(context.attend(window=window), context.expected(window).to(dtype), **rounding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 75])
@pytest.mark.parametrize("shape", [*SHAPES, Shape(1, 10, 2, 96), Shape(1, 1, 1, 256)])
def test_tokens_of_several_sequences_go_side_by_side(
    engine: str, shape: Shape, window: int | None, dtype: torch.dtype
) -> None:
    """As in a step that reads several prompts and writes for others: rows of one table, of which each sees one more."""
    context = Context(shape, [9, 150, 40, 200], dtype)
    rows = [0, *[1] * 33, 2, 2, *[3] * 70]
    last = [context.lengths[row] - rows[i + 1 :].count(row) for i, row in enumerate(rows)]
    context.tables_BP, context.lengths_B = context.tables_BP[rows], torch.tensor(last)
    context.qkv_BX = random(len(rows), context.qkv_BX.shape[1], dtype=dtype)
    whole = context.attend(window=window)
    context.keys, context.values = (
        [each[row][:, :, :length] for row, length in zip(rows, last, strict=True)]
        for each in (context.keys, context.values)
    )
    context.lengths = last
    rounding = {"rtol": 2**-7, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(whole, context.expected(window).to(dtype), **rounding)
    if engine == "c":
        for row in range(len(rows)):
            assert torch.equal(context.attend(slice(row, row + 1), window)[0], whole[row])


def test_attention_needs_no_keys_beside_the_queries() -> None:
    context = Context(SHAPES[1], [17, 130], torch.bfloat16)
    whole = context.attend()
    context.qkv_BX = context.qkv_BX[:, : whole.shape[1]].contiguous()
    assert torch.equal(context.attend(), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequences_tokens_may_share_its_table(engine: str, dtype: torch.dtype) -> None:
    context = Context(SHAPES[0], [900], dtype)
    context.qkv_BX = random(900, context.qkv_BX.shape[1], dtype=dtype)[-600:]
    context.tables_BP, context.lengths_B = context.tables_BP.expand(600, -1), torch.arange(301, 901)
    whole = context.attend()
    for row in (0, 17, 599):
        alone = context.attend(slice(row, row + 1))[0]
        assert torch.equal(alone, whole[row]) if engine == "c" else torch.allclose(alone, whole[row], atol=0.02)
        q_GD = context.qkv_BX[row, : 9 * 64].view(3, 3, 64).double()
        k_HSD, v_HSD = (each[0][-1, :, : 301 + row].double() for each in (context.keys, context.values))
        expected = (q_GD @ k_HSD.mT / 8).softmax(-1) @ v_HSD
        torch.testing.assert_close(whole[row].double(), expected.flatten(), rtol=2**-7, atol=2e-3)


def test_attention_of_huge_scores_is_finite() -> None:
    context = Context(SHAPES[0], [40], torch.float32)
    context.qkv_BX *= 1000
    torch.testing.assert_close(context.attend(), context.expected().float(), rtol=1e-3, atol=1e-3)


def test_what_is_not_a_number_stays_so_in_its_own_row_alone() -> None:
    context = Context(SHAPES[0], [40, 40], torch.bfloat16)
    clean = context.attend()[1]
    context.qkv_BX[0] = torch.nan
    found = context.attend()
    assert found[0].isnan().all()
    assert torch.equal(found[1], clean)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_puts_a_context_in_order(dtype: torch.dtype) -> None:
    context = Context(SHAPES[0], [37, 16, 900], dtype)
    for row, length in enumerate(context.lengths):
        k, v = ops.gather(context.memory, context.tables_BP[row], length, 1, context.shape)
        assert torch.equal(k, context.keys[row][1])
        assert torch.equal(v, context.values[row][1])
        assert k.is_contiguous()
        assert v.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_is_llamas(dtype: torch.dtype) -> None:
    gate_up = random(70, 2 * 520, dtype=dtype) * 4
    gate_up[0, :6] = torch.tensor([0.0, -0.0, 90.0, -87.0, torch.inf, torch.nan])
    gate, up = gate_up.chunk(2, dim=-1)
    close(torch.nan_to_num(ops.silu_mul(gate_up)), torch.nan_to_num(torch.nn.functional.silu(gate) * up))
    assert ops.silu_mul(gate_up)[0, 5].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_attention_has_the_same_bits_alone_in_a_batch_and_with_any_threads(
    engine: str, dtype: torch.dtype
) -> None:
    if engine == "torch":
        pytest.skip("what torch computes may depend on the batch")
    context = Context(SHAPES[0], [700, 3, 256, 1100, 129], dtype)
    whole = context.attend()
    for threads in (1, 2, 3, 8):
        ops.set_threads(threads)
        for _ in range(20):
            assert torch.equal(context.attend(), whole)
        for row in range(len(whole)):
            assert torch.equal(context.attend(slice(row, row + 1))[0], whole[row])


def test_threads_leave_the_elementwise_steps_as_they_are(engine: str) -> None:
    hidden, weight, gate_up = (random(*sizes, dtype=torch.bfloat16) for sizes in ((300, 576), (576,), (300, 3072)))
    alone = [ops.norm(hidden, weight, 1e-5), ops.silu_mul(gate_up)]
    ops.set_threads(3)
    assert all(map(torch.equal, [ops.norm(hidden, weight, 1e-5), ops.silu_mul(gate_up)], alone))


@pytest.mark.parametrize("dtype", DTYPES)
def test_callers_at_the_same_time_get_what_each_gets_alone(engine: str, dtype: torch.dtype) -> None:
    hidden, weight, gate_up = (random(*sizes, dtype=dtype) for sizes in ((300, 576), (576,), (300, 1152)))
    shape = SHAPES[0]
    qkv, turns = random(300, 15 * 64, dtype=dtype), random(300, 64, dtype=dtype)
    slots = torch.arange(300) // PAGE * shape.page + torch.arange(300) % PAGE * 64
    context = Context(shape, [700, 3, 256, 1100, 129], dtype)

    def placed() -> Tensor:
        turned, memory = qkv.clone(), torch.zeros(19 * shape.page, dtype=dtype)
        ops.place(turned, turns, turns, memory, slots, 0, shape)
        return torch.cat((turned.flatten(), memory))

    callers = [context.attend, lambda: ops.norm(hidden, weight, 1e-5), lambda: ops.silu_mul(gate_up), placed]
    alone = [call() for call in callers]
    ops.set_threads(3)

    def repeat(call: Callable[[], Tensor], expected: Tensor) -> bool:
        return all(torch.equal(call(), expected) for _ in range(100))

    with ThreadPoolExecutor(len(callers)) as threads:
        assert all(threads.map(repeat, callers, alone))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own(engine: str) -> None:
    if engine == "torch":
        pytest.skip("torch's threads do not outlive a fork")
    ops.set_threads(2)
    context = Context(SHAPES[0], [700, 3, 256, 1100, 129], torch.float32)
    expected = context.attend()
    child = os.fork()
    if not child:
        os._exit(0 if torch.equal(context.attend(), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
