"""Gates from prompts, from random numbers, or trained: arrays for every place that has one.

In a layer's raw input the first token's state is many times as long as the others' and the same for every text (an
attention sink: Xiao et al. 2023, arXiv 2309.17453). In a mean over n tokens it weighs 1/n, so that a plain gate tells
short texts from long ones and nothing else. A centred gate is orthogonal to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from builder.checkpoints import Array, Tensor
from builder.errors import MixError
from builder.journal import Journal
from builder.mix import features, train
from builder.mix.features import Seen
from builder.mix.layouts import SHARED_GATE, Look
from builder.mix.plan import Plan
from builder.mix.spec import Expert, Spec
from builder.mix.train import Text, without
from builder.progress import Progress

PARALLEL = 5.0
"""From this condition number on gates are nearly parallel (mergekit's threshold)."""
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Gates:
    """The gates' tensors, each with what the checkpoint calls it, and what is to be said of them."""

    tensors: Mapping[str, tuple[Tensor, Array]]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Linear:
    """Logits weight_EH (h - mean_H) + bias_E; shared_1H is the gate of a shared expert."""

    weight_EH: Doubles
    mean_H: Doubles
    bias_E: Doubles
    shared_1H: Doubles | None = None

    def parts(self) -> dict[str, Doubles]:
        """By what a layout calls them."""
        found = {".gate.weight": self.weight_EH, ".gate.mean": self.mean_H, ".gate.bias": self.bias_E}
        return found if self.shared_1H is None else {**found, SHARED_GATE: self.shared_1H}


def from_prompts(plan: Plan) -> Gates:
    """g_e = normalise(mean h(positive) - mean h(negative)), h what the gate will see, averaged over a text."""
    spec, prompts = plan.spec, _Prompts.of(plan.spec)
    looks = [Look()] * len(plan.looks) if spec.gate_mode == "cheap_embed" else list(plan.looks.values())
    seen = features.pooled(plan.shared, prompts.texts, looks)
    folded = plan.layout.name != "composed"
    gates = [prompts.gate(each, look, folded=folded) for each, look in zip(seen, looks, strict=True)]
    found = {place: gate.parts() for place, gate in zip(plan.looks, gates, strict=True)}
    free = all(expert.negative_prompts is None for expert in spec.experts)
    return Gates(_named(plan, found), tuple(_warnings(plan, [gate.weight_EH for gate in gates], free)))


def random(plan: Plan) -> Gates:
    """Seeded: normal, or uniform as torch's layers begin."""
    draws, hidden = np.random.default_rng(plan.spec.seed), plan.hidden
    uniform, found = plan.spec.gate_mode == "uniform_random", {}
    for place in plan.looks:
        shape = (len(plan.spec.experts) + len(plan.spec.shared_experts), hidden)
        edge = math.sqrt(1 / hidden)
        values = draws.uniform(-edge, edge, shape) if uniform else draws.standard_normal(shape)
        own, shared = np.split(values, [len(plan.spec.experts)])
        gate = Linear(own, np.zeros(hidden), np.zeros(len(own)), shared if len(shared) else None)
        found[place] = gate.parts()
    return Gates(_named(plan, found))


def trained(plan: Plan, texts: Sequence[Text], journal: Journal | None, progress: Progress | None) -> Gates:
    """Trained on texts, with everything else frozen."""
    return Gates(_named(plan, train.gates(plan, texts, journal, progress)))


@dataclass(frozen=True)
class _Prompts:
    """Every text once, and which of them speak for an expert and against it, by their places."""

    spec: Spec
    texts: tuple[str, ...]

    @classmethod
    def of(cls, spec: Spec) -> _Prompts:
        members = (*spec.experts, *spec.shared_experts)
        said = [text for each in members for text in (*each.positive_prompts, *(each.negative_prompts or ()))]
        return cls(spec, tuple(dict.fromkeys(said)))

    def gate(self, seen: Seen, look: Look, *, folded: bool) -> Linear:
        """One place's gate. folded: made orthogonal to the mean, which the layout has no place for."""
        experts, vectors_NH = self.spec.experts, seen.means_NH
        positives = [self._mean(vectors_NH, each.positive_prompts) for each in experts]
        negatives = [self._negative(vectors_NH, each) for each in experts]
        mean_H = np.mean(positives, axis=0) if self.spec.centred else np.zeros(vectors_NH.shape[1])
        off = [mean_H] if self.spec.centred and folded else []
        off += [seen.first_H] if self.spec.centred and look.raw else []
        pairs = zip(positives, negatives, experts, strict=True)
        weight_EH = np.stack([_direction(p - n, off, each.source_model) for p, n, each in pairs])
        middles = np.mean([positives, negatives], axis=0) - mean_H
        bias_E = -np.einsum("eh,eh->e", weight_EH, middles) if self.spec.bias else np.zeros(len(experts))
        shared = [
            _direction(self._mean(vectors_NH, each.positive_prompts) - self._negative(vectors_NH, each), [], "shared")
            for each in self.spec.shared_experts
        ]
        return Linear(weight_EH, mean_H, bias_E, np.stack(shared) if shared else None)

    def _mean(self, vectors_NH: Doubles, texts: Sequence[str]) -> Doubles:
        if not texts:
            return np.zeros(vectors_NH.shape[1])
        found: Doubles = vectors_NH[[self.texts.index(text) for text in texts]].mean(axis=0)
        return found

    def _negative(self, vectors_NH: Doubles, expert: Expert) -> Doubles:
        """What is taken off: its own negatives; without a word on them the other experts' positives."""
        if expert.negative_prompts is not None or expert in self.spec.shared_experts:
            return self._mean(vectors_NH, expert.negative_prompts or ())
        own = {*expert.positive_prompts}
        every = dict.fromkeys(text for each in self.spec.experts for text in each.positive_prompts)
        return self._mean(vectors_NH, [text for text in every if text not in own])


def _direction(difference_H: Doubles, off: Sequence[Doubles], name: str) -> Doubles:
    """A difference of length one; what of it lies along the vectors `off` is taken out."""
    left_H = without(difference_H, off)
    length, left = float(np.linalg.norm(difference_H)), float(np.linalg.norm(left_H))
    # What rounding leaves of equal vectors has no direction.
    if left <= 1e-6 * length or not left:
        raise MixError(f"the prompts of {name} leave its gate no direction: give it prompts that others do not have")
    return left_H / left


def _named(plan: Plan, found: Mapping[str, Mapping[str, Doubles]]) -> dict[str, tuple[Tensor, Array]]:
    """The layout's tensors with their values; parts that it has no place for are left out."""
    values = {f"{place}{part}": each for place, parts in found.items() for part, each in parts.items()}
    return {
        name: (tensor, np.ascontiguousarray(values[name], np.float32).reshape(tensor.shape))
        for name, tensor in plan.gates.items()
    }


def condition(weight_EH: Doubles, *, free: bool) -> float:
    """The condition number of gates of length one.

    free: each gate's negatives are the others' positives, so the gates sum to zero with some weights and one singular
    value is zero whatever the prompts: it is left out.
    """
    values = np.linalg.svd(weight_EH / np.linalg.norm(weight_EH, axis=1, keepdims=True), compute_uv=False)
    smallest = values[-2] if free else values[-1]
    return float(values[0] / smallest) if smallest > 1e-12 * values[0] else math.inf


def _warnings(plan: Plan, weights: Sequence[Doubles], free: bool) -> list[str]:
    found = [condition(weight_EH, free=free) for weight_EH in weights]
    over = [number for number in found if number > PARALLEL]
    if not over:
        return []
    worst = list(plan.looks)[found.index(max(found))]
    return [
        f"the gates are nearly parallel in {len(over)} of {len(found)} places, the most in {worst}, with a condition "
        f"number of {max(found):.3g}: some experts will hardly be chosen; give prompts that differ more"
    ]
