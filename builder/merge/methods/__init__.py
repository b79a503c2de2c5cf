"""Merge methods by the name that a recipe gives them, one function or family a file: the one visible table.

d_i = x_i - b is the task vector of input i, b the base, w_i its weight. Every method computes in fp32, with fp64 for
norms and dot products, and equals mergekit 0.1.5's of that name where that one is right.
"""

from __future__ import annotations

from functools import partial

from builder.merge.method import Method, Parameter
from builder.merge.methods.fisher import fisher
from builder.merge.methods.fusion import arcee_fusion
from builder.merge.methods.linear import linear, passthrough
from builder.merge.methods.nearswap import nearswap
from builder.merge.methods.ram import ram
from builder.merge.methods.regmean import regmean
from builder.merge.methods.sce import sce
from builder.merge.methods.spherical import karcher, multislerp, nuslerp, slerp
from builder.merge.methods.stock import model_stock
from builder.merge.methods.task import (
    breadcrumbs,
    check_della,
    check_della_linear,
    check_sum,
    dare,
    della,
    survey_ties,
    task_arithmetic,
    ties,
)

_WEIGHT = Parameter(per_model=True)
_DENSITY = Parameter(default=1.0, per_model=True, low=0, high=1)
_LAMBDA = Parameter(default=1.0)
_EPSILON = Parameter(default=0.15, per_model=True, low=0, below=1)
_GAMMA = Parameter(default=0.01, per_model=True, low=0, below=1)
_YES, _NO = Parameter("flag", True), Parameter("flag", False)
_STATISTICS = Parameter("path", per_model=True)


def _rescale(default: bool) -> Parameter:
    return Parameter("choice", default, choices=(True, False, "l1", "density"))


def _task(normalize: bool, rescale: bool = False, **more: Parameter) -> dict[str, Parameter]:
    return {
        "weight": _WEIGHT,
        "density": _DENSITY,
        "normalize": _YES if normalize else _NO,
        "rescale": _rescale(rescale),
        "lambda": _LAMBDA,
        **more,
    }


METHODS: dict[str, Method] = {
    "linear": Method(linear, {"weight": _WEIGHT, "normalize": _YES}, check=check_sum),
    "passthrough": Method(passthrough, {"scale": Parameter(default=None, per_model=True)}, most=1),
    "slerp": Method(slerp, {"t": Parameter()}, base="required", most=1),
    "nuslerp": Method(
        nuslerp,
        {"weight": _WEIGHT, "nuslerp_flatten": _YES, "nuslerp_row_wise": _NO},
        base="optional",
        least=2,
        most=2,
        check=check_sum,
    ),
    "multislerp": Method(
        multislerp,
        {"weight": _WEIGHT, "normalize_weights": _YES, "eps": Parameter(default=1e-8, low=0)},
        base="optional",
        check=check_sum,
    ),
    "karcher": Method(
        karcher, {"max_iter": Parameter("integer", 10, low=1), "tol": Parameter(default=1e-5, above=0, high=1)}
    ),
    "model_stock": Method(model_stock, {"filter_wise": _NO}, base="required", least=2),
    "task_arithmetic": Method(
        task_arithmetic,
        {"weight": _WEIGHT, "normalize": _NO, "lambda": _LAMBDA},
        base="required",
        check=check_sum,
    ),
    "ties": Method(
        ties,
        _task(normalize=True, trim=Parameter("choice", "tensor", choices=("tensor", "global"))),
        base="required",
        survey=survey_ties,
    ),
    "dare_linear": Method(
        partial(dare, elect=False),
        _task(normalize=False, rescale=True),
        base="required",
        check=check_sum,
        random=True,
    ),
    "dare_ties": Method(partial(dare, elect=True), _task(normalize=False, rescale=True), base="required", random=True),
    "della": Method(
        partial(della, elect=True),
        _task(normalize=True, rescale=True, epsilon=_EPSILON),
        base="required",
        check=check_della,
        random=True,
    ),
    "della_linear": Method(
        partial(della, elect=False),
        _task(normalize=False, rescale=True, epsilon=_EPSILON),
        base="required",
        check=check_della_linear,
        random=True,
    ),
    "breadcrumbs": Method(
        partial(breadcrumbs, elect=False), _task(normalize=False, gamma=_GAMMA), base="required", check=check_sum
    ),
    "breadcrumbs_ties": Method(partial(breadcrumbs, elect=True), _task(normalize=False, gamma=_GAMMA), base="required"),
    "sce": Method(sce, {"select_topk": Parameter(default=1.0, low=0, high=1)}, base="required"),
    "arcee_fusion": Method(arcee_fusion, base="required", most=1),
    "nearswap": Method(nearswap, {"t": Parameter(low=0)}, base="required", most=1),
    "ram": Method(ram, {"epsilon": Parameter(default=1e-5, low=0)}, base="required"),
    "ramplus_tl": Method(
        ram,
        {
            "epsilon": Parameter(default=1e-5, low=0),
            "r": Parameter(default=0.1, low=0),
            "alpha": Parameter(default=0.2, low=0),
        },
        base="required",
    ),
    "fisher": Method(
        fisher,
        {"weight": Parameter(default=1.0, per_model=True, low=0), "statistics": _STATISTICS},
        check=check_sum,
    ),
    "regmean": Method(
        regmean,
        {
            "weight": Parameter(default=1.0, per_model=True, low=0),
            "statistics": _STATISTICS,
            "reduction": Parameter(default=0.9, low=0, high=1),
        },
        check=check_sum,
    ),
}
