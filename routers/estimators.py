"""Every router there is, by kind."""

from __future__ import annotations

from routers.base import Fitted, Router
from routers.fixed import FixedRouter
from routers.kmeans import KMeansRouter
from routers.knn import KnnRouter
from routers.linear import LinearRouter
from routers.mlp import MlpRouter
from routers.ridge import RidgeRouter

FITTED: dict[str, type[Fitted]] = {
    "linear": LinearRouter,
    "ridge": RidgeRouter,
    "kmeans": KMeansRouter,
    "knn": KnnRouter,
    "mlp": MlpRouter,
    "fixed": FixedRouter,
}
"""Fitted on scores; the last is the baseline."""

ROUTERS: dict[str, type[Router]] = {**FITTED}
