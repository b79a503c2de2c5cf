"""What a decoder's step costs: `OMP_WAIT_POLICY=PASSIVE python benchmarks/decoder_ops.py` prints Markdown tables.

Seeded weights of SmolLM2-135M's sizes: every linear layer of a step, ours beside torch's and oneDNN's packed one, and
the attention of all layers over scattered pages, C beside torch. Variants take turns; a figure is the median of rounds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from service.engines.local import ops
from service.engines.local.linear import Linear

SHAPE = ops.Shape(layers=30, heads=9, kv_heads=3, width=64)
SIZES = ((960, 576), (576, 576), (3072, 576), (576, 1536))
"""Outputs and inputs of a layer's q, k and v; o; gate and up; down."""
HEAD = (49152, 576)
ROWS = (1, 4, 16, 128)
BATCHES = ((1, 192), (1, 1024), (16, 192), (16, 1024))
"""Rows and the length of their contexts."""
Call = Callable[[Tensor], object]
Run = Callable[[], object]


@contextmanager
def torch_only() -> Iterator[None]:
    os.environ["MODELGLUE_KERNELS"] = "torch"
    ops.library.cache_clear()
    yield
    del os.environ["MODELGLUE_KERNELS"]
    ops.library.cache_clear()


def packed(weight_NK: Tensor) -> Call:
    laid = torch.ops.mkldnn._reorder_linear_weight(weight_NK, 1)
    return lambda x_TK: torch.ops.mkldnn._linear_pointwise(x_TK, laid, None, "none", [], "")


KINDS: dict[str, tuple[torch.dtype, Callable[[Tensor], Call]]] = {
    "torch bf16": (torch.bfloat16, lambda weight_NK: lambda x_TK: F.linear(x_TK, weight_NK)),
    "oneDNN packed bf16": (torch.bfloat16, packed),
    "ours bf16": (torch.bfloat16, Linear.of),
    "ours int8": (torch.bfloat16, lambda weight_NK: Linear.of(weight_NK, kind="int8")),
    "ours int4": (torch.bfloat16, lambda weight_NK: Linear.of(weight_NK, kind="int4")),
    "torch fp32": (torch.float32, lambda weight_NK: lambda x_TK: F.linear(x_TK, weight_NK)),
    "ours fp32": (torch.float32, lambda weight_NK: Linear.of(weight_NK.float())),
}


def medians(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Milliseconds of each, which take turns; the first turn is not counted."""
    seen: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seen[name].append((time.perf_counter() - start) * 1e3)
    return {name: median(times[1:]) for name, times in seen.items()}


def linears(threads: int, rounds: int, models: dict[str, list[tuple[int, Call]]]) -> None:
    table = {name: [] for name in models}
    for rows in ROWS:
        inputs = {
            dtype: {width: torch.randn(rows, width).to(dtype) for width in (576, 1536)}
            for dtype in (torch.bfloat16, torch.float32)
        }

        def step(name: str, given: dict[torch.dtype, dict[int, Tensor]] = inputs) -> None:
            for width, call in models[name]:
                call(given[KINDS[name][0]][width])

        for name, time_ms in medians({name: lambda name=name: step(name) for name in models}, rounds).items():
            table[name].append(time_ms)
    print(f"\nAll linear layers of a step, ms; threads: {threads}\n")
    print(f"| | {' | '.join(f'T = {rows}' for rows in ROWS)} |\n|---|{'--:|' * len(ROWS)}")
    for name, times in table.items():
        print(f"| {name} | {' | '.join(f'{time_ms:.2f}' for time_ms in times)} |")


def attention(threads: int, rounds: int) -> None:
    print(f"\nAttention of all layers, ms; threads: {threads}\n")
    print("| rows | context | C | torch |\n|--:|--:|--:|--:|")
    for rows, length in BATCHES:
        pages = -(-length // ops.PAGE)
        memory = torch.randn(SHAPE.page).bfloat16().repeat(rows * pages)
        tables_BP = (torch.randperm(rows * pages) * SHAPE.page).view(rows, pages)
        lengths_B = torch.full((rows,), length)
        qkv_BX = torch.randn(rows, SIZES[0][0]).bfloat16()

        def step(given: tuple[Tensor, ...] = (qkv_BX, memory, tables_BP, lengths_B)) -> None:
            for layer in range(SHAPE.layers):
                ops.attend(*given, layer, SHAPE, SHAPE.width**-0.5)

        def in_torch(run: Run = step) -> None:
            with torch_only():
                run()

        times = medians({"C": step, "torch": in_torch}, rounds)
        print(f"| {rows} | {length} | {times['C']:.2f} | {times['torch']:.2f} |")


def main(
    rounds: Annotated[int, typer.Option(help="Turns that count.")] = 15,
    threads: Annotated[list[int], typer.Option(help="Numbers of threads.")] = [1, 2],  # noqa: B006 - typer's default
) -> None:
    torch.manual_seed(0)
    sizes = [*(size for _ in range(SHAPE.layers) for size in SIZES), HEAD]
    models = {}
    for name, (dtype, make) in KINDS.items():
        weights = ((torch.randn(*size) / size[1] ** 0.5).to(dtype) for size in sizes)
        models[name] = [(weight_NK.shape[1], make(weight_NK)) for weight_NK in weights]
    for count in threads:
        torch.set_num_threads(count)
        ops.set_threads(count)
        linears(count, rounds, models)
        attention(count, rounds)


if __name__ == "__main__":
    typer.run(main)
