"""Two linear layers with a ReLU between (the paper's MLP router), trained on scores or on log-likelihoods.

H hidden units, D features, E experts, N prompts, B a batch.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from routers.base import Arrays, Estimate, Evidence, Vector
from routers.folds import folds
from routers.shapes import Shapes

HIDDEN = 64
STEPS, BATCH = 1000, 128
RATE, DECAY = 3e-4, 10.0
"""AdamW's, with a cosine schedule: the decay keeps 64 units from learning 5,000 prompts by heart."""

HELD_OUT = 4
"""One prompt in so many tells how far the scores are from the estimates: 64 units know their own by heart."""

Loss = Literal["scores", "likelihood"]
Weights = tuple[Vector, Vector, Vector, Vector]


class MlpRouter:
    """quality = W2 relu(W1 h + b1) + b2."""

    kind: ClassVar[str] = "mlp"

    def __init__(self, experts: tuple[str, ...], weights: Weights, std_E: Vector) -> None:
        self._experts = experts
        self._weights = weights
        self._std_E = std_E

    @classmethod
    def fit(cls, experts: tuple[str, ...], vectors_ND: Vector, scores_NE: NDArray[np.float64], seed: int = 0) -> Self:
        """Trained on the squared error of the scores; the spread is of errors on prompts that were held out for it."""
        held_N = folds(len(vectors_ND), HELD_OUT, seed)[0]
        weights = train(vectors_ND, scores_NE, seed)
        trial = weights if held_N.all() else train(vectors_ND[~held_N], scores_NE[~held_N], seed)
        errors_NE = scores_NE[held_N] - forward(trial, vectors_ND[held_N])[1]
        return cls(experts, weights, np.sqrt((errors_NE**2).mean(axis=0)).astype(np.float32))

    @property
    def experts(self) -> tuple[str, ...]:
        return self._experts

    @property
    def dimension(self) -> int:
        return int(self._weights[0].shape[1])

    def estimate(self, vector_D: Vector) -> Estimate:
        return Estimate(forward(self._weights, vector_D)[1], self._std_E, Evidence("weights"))

    def arrays(self) -> dict[str, NDArray[Any]]:
        names = ("up", "up_bias", "down", "down_bias")
        return dict(zip(names, self._weights, strict=True)) | {"std": self._std_E}

    @classmethod
    def from_arrays(cls, experts: tuple[str, ...], arrays: Arrays) -> Self:
        shapes = Shapes(cls.kind, arrays, E=len(experts))
        weights = (
            shapes.take("up", "H", "D"),
            shapes.take("up_bias", "H"),
            shapes.take("down", "E", "H"),
            shapes.take("down_bias", "E"),
        )
        return cls(experts, weights, shapes.take("std", "E"))


def forward(weights: Weights, vectors: Vector) -> tuple[Vector, Vector]:
    """Hidden activations [..., H] and outputs [..., E] of vectors [..., D]."""
    up_HD, up_H, down_EH, down_E = weights
    hidden = np.maximum(vectors @ up_HD.T + up_H, 0)
    return hidden, hidden @ down_EH.T + down_E


def train(
    vectors_ND: Vector, targets_NE: NDArray[np.float64], seed: int, *, loss: Loss = "scores", hidden: int = HIDDEN
) -> Weights:
    """Weights (up [H, D], its bias, down [E, H], its bias), in seconds on a CPU.

    scores: the mean squared error. likelihood: -log sum_e p(e|x) p_e(y|x), with softmax outputs p(e|x) and `targets`
    the experts' log-likelihoods of the answer: what a gate would learn by language modelling with its experts frozen,
    without running them (PAPER.md 5). At top-1 a gate gets no gradient through renormalised weights; here it does.
    """
    rng = np.random.default_rng(seed)
    size, width, experts = len(vectors_ND), vectors_ND.shape[1], targets_NE.shape[1]
    scale = np.float32(np.sqrt(width))  # unit vectors have small entries; the up layer takes this in at the end
    inputs_ND, wanted_NE = vectors_ND * scale, targets_NE.astype(np.float32)
    up_HD = rng.normal(0, np.sqrt(2 / width), (hidden, width)).astype(np.float32)
    down_EH = rng.normal(0, 0.1 * np.sqrt(1 / hidden), (experts, hidden)).astype(np.float32)
    start_E = wanted_NE.mean(axis=0) if loss == "scores" else np.zeros(experts, np.float32)
    weights: Weights = (up_HD, np.zeros(hidden, np.float32), down_EH, start_E)
    adam = _AdamW(weights)
    order, at = rng.permutation(size), 0
    for step in range(STEPS):
        if at >= size:
            order, at = rng.permutation(size), 0
        rows, at = order[at : at + BATCH], at + BATCH
        adam.step(_gradients(weights, inputs_ND[rows], wanted_NE[rows], loss), step / STEPS)
    return (up_HD * scale, *weights[1:])


def _gradients(weights: Weights, inputs_BD: Vector, targets_BE: Vector, loss: Loss) -> list[Vector]:
    hidden_BH, outputs_BE = forward(weights, inputs_BD)
    if loss == "scores":
        by_output_BE = 2 * (outputs_BE - targets_BE) / len(inputs_BD)
    else:
        # d/dz -log sum_e softmax(z)_e exp(l_e) = p(e) - p(e|y)
        by_output_BE = (_softmax(outputs_BE) - _softmax(outputs_BE + targets_BE)) / len(inputs_BD)
    by_hidden_BH = (by_output_BE @ weights[2]) * (hidden_BH > 0)
    return [
        by_hidden_BH.T @ inputs_BD,
        by_hidden_BH.sum(axis=0),
        by_output_BE.T @ hidden_BH,
        by_output_BE.sum(axis=0),
    ]


class _AdamW:
    """Changes the weights in place (Loshchilov and Hutter, arXiv 1711.05101); biases do not decay."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._means = [np.zeros_like(each) for each in weights]
        self._squares = [np.zeros_like(each) for each in weights]
        self._steps = 0

    def step(self, gradients: list[Vector], passed: float) -> None:
        """One step; `passed` is how much of the training is over, 0 to 1."""
        self._steps += 1
        rate = RATE * 0.5 * (1 + np.cos(np.pi * passed))
        for weight, gradient, mean, square in zip(self._weights, gradients, self._means, self._squares, strict=True):
            mean += 0.1 * (gradient - mean)
            square += 0.001 * (gradient**2 - square)
            move = mean / (1 - 0.9**self._steps) / (np.sqrt(square / (1 - 0.999**self._steps)) + 1e-8)
            if weight.ndim == 2:
                move = move + DECAY * weight
            weight -= np.float32(rate) * move


def _softmax(outputs_BE: Vector) -> Vector:
    exp_BE = np.exp(outputs_BE - outputs_BE.max(axis=1, keepdims=True))
    shares_BE: Vector = exp_BE / exp_BE.sum(axis=1, keepdims=True)
    return shares_BE
