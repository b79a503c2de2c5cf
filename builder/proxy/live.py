"""One model in memory that becomes one merge after another: its weights are rewritten in place, what changed alone.

The weights are those that `stream.write` would write, bit for bit, so a merge scores the same before and after it is
on disk, and whatever was scored before it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from builder import kernels
from builder.errors import MergeError
from builder.merge import stream
from builder.merge.methods import METHODS
from builder.merge.plan import Output, Plan
from builder.proxy.scorer import Scorer

_STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class Live:
    """A loaded model of the plan's architecture. Raises CheckpointError where it cannot be loaded."""

    def __init__(
        self, plan: Plan, tokenizer: Path, *, device: str | None = None, trust_remote_code: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.folder = plan.donor.checkpoint.folder
        self.scorer = Scorer(self.folder, tokenizer=tokenizer, device=device, trust_remote_code=trust_remote_code)
        self._state: dict[str, torch.Tensor] = self.scorer.model.state_dict()
        self._holds: dict[str, str] = {}

    def fits(self, plan: Plan, tokenizer: Path) -> bool:
        """Whether the plan's tensors are this model's: every weight is rewritten, and none is left over."""
        if (self.folder, self.tokenizer) != (plan.donor.checkpoint.folder, tokenizer):
            return False
        if any(name not in self._state or self._state[name].shape != each.shape for name, each in plan.layout.items()):
            return False
        written = {self._state[name].data_ptr() for name in plan.layout}
        return len(written) == len(plan.layout) and all(each.data_ptr() in written for each in self._state.values())

    def become(self, plan: Plan) -> int:
        """Make the model the plan's merge; how many tensors changed. Raises MergeError for NaN or inf."""
        device = next(iter(self._state.values())).device
        threads = len(os.sched_getaffinity(0)) if device.type == "cpu" else 2
        changed = [output for output in plan.outputs if self._holds.get(output.name) != _said(output, plan)]
        if not changed:
            return 0
        if any(METHODS[output.method].survey for output in changed):
            changed = list(plan.outputs)  # what one tensor becomes depends on all
        for output in changed:
            self._holds.pop(output.name, None)
        executor = stream.Executor(plan, stream.arrays_of(str(device)), threads)
        executor.run(lambda output: self._put(output, executor), changed, lambda _: None)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._holds |= {output.name: _said(output, plan) for output in changed}
        return len(changed)

    def _put(self, output: Output, executor: stream.Executor) -> None:
        place, at = self._state[output.name].view(-1), 0
        for values in executor.pieces(output):
            stored, finite = _rounded(values, output.tensor.dtype)
            if not finite:
                raise MergeError(f"{output.name} would hold NaN or inf in {output.tensor.dtype}: look at its sources")
            _copy(stored, place[at : at + stored.numel()])
            at += stored.numel()


def _said(output: Output, plan: Plan) -> str:
    """What decides a tensor."""
    return repr((output.method, output.inputs, output.base, output.parameters, output.tensor, plan.recipe.seed))


def _rounded(values: Any, dtype: str) -> tuple[torch.Tensor, bool]:
    """Values as they would be stored, though the model may hold another dtype."""
    if isinstance(values, np.ndarray):
        stored, finite = kernels.store(values, dtype)
        return torch.from_numpy(stored).view(_STORED[dtype]), finite
    rounded = values.to(_STORED[dtype])
    return rounded, bool(torch.isfinite(rounded).all())


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """By numpy where it can: torch's threads would stand in the way of the executor's."""
    if target.device.type == "cpu" and source.dtype == target.dtype:
        bits = torch.int16 if source.dtype != torch.float32 else torch.int32
        np.copyto(target.view(bits).numpy(), source.view(bits).numpy())
    else:
        target.copy_(source)
