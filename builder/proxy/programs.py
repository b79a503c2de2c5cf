"""Scores of programs that a model wrote: run in the sandbox, never in this process."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from builder.proxy.sandbox import Language, Sandbox

_ASSERT_THROWS = (
    "console.assert = (ok, ...said) => { if (!ok) throw new Error(said.join(' ') || 'assertion failed') }\n"
)
"""node's console.assert prints and goes on, which would pass every test."""


@cache
def sandbox(unsafe: bool = False) -> Sandbox:
    """This process's sandbox, chosen once. Raises SandboxError where none is safe, unless `unsafe`."""
    return Sandbox(unsafe=unsafe, warn=lambda line: print(f"warning: {line}", file=sys.stderr))


_unsafe = False


def allow_unsafe() -> None:
    """Let programs run where the sandbox is weak: the user said --unsafe-code."""
    global _unsafe
    _unsafe = True


def ready() -> None:
    """Raises SandboxError where programs must not run."""
    sandbox(_unsafe)


def passes(program: str, language: Language = "python") -> bool:
    """Whether a program ends well, within the sandbox's limits."""
    return sandbox(_unsafe).run(program, language).passed


def mbpp(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """pass_at_1 of an MBPP answer: the code and the problem's tests."""
    parts = [doc.get("test_setup_code") or "", results[0], *doc["test_list"]]
    return {"pass_at_1": float(passes("\n".join(parts)))}


def humanevalpack_js(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """pass_at_1 of a JavaScript answer: the function's head, the rest that was written, and the problem's tests."""
    program = f"{_ASSERT_THROWS}{doc['prompt']}{results[0]}\n{doc['test']}"
    return {"pass_at_1": float(passes(program, "javascript"))}


class CodeEval:
    """What `evaluate.load("code_eval")` gives, with the sandbox below it: one score a problem, the share that passes.

    pass@k is the unbiased estimate of Chen et al. 2021, arXiv 2107.03374, equation 1.
    """

    def compute(
        self,
        *,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: Sequence[int] = (1, 10, 100),
        **_: Any,
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """pass@k for every k up to the number of candidates, and what became of each candidate."""
        details: dict[int, list[tuple[int, dict[str, Any]]]] = {}
        for task, (reference, candidates) in enumerate(zip(references, predictions, strict=True)):
            outcomes = sandbox(_unsafe).run_all([f"{candidate}\n{reference}" for candidate in candidates])
            details[task] = [
                (i, {"task_id": task, "passed": each.passed, "result": each.reason, "completion_id": i})
                for i, each in enumerate(outcomes)
            ]
        counts = [(len(each), sum(facts["passed"] for _, facts in each)) for each in details.values()]
        smallest = min(n for n, _ in counts)
        scores = {f"pass@{m}": sum(_pass_at(n, c, m) for n, c in counts) / len(counts) for m in k if m <= smallest}
        return scores, details


def _pass_at(n: int, c: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k)."""
    missed = 1.0
    for i in range(n - c + 1, n + 1):
        missed *= max(1.0 - k / i, 0.0)
    return 1.0 - missed
