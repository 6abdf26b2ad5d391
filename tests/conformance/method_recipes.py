"""Recipes by hand, method by method: every setting, and the values at which a formula may divide by zero or change its branch."""

from typing import Any

from tests.conformance.recipes import models

A, B, C = "$ada", "$bob", "$cyd"
# one entry of the norms at least, but few of the larger tensors'
FEW = [{"filter": "norm", "value": 0.1}, {"value": 0.015}]


def by_weight(
    method: str,
    *weights: float,
    base: str | None = "$base",
    parameters: dict[str, Any] | None = None,
    **settings: Any,
) -> str:
    """The first len(weights) experts with these weights and the same settings."""
    return models(
        method,
        {
            m: {"weight": w, **settings}
            for m, w in zip((A, B, C), weights, strict=False)
        },
        base,
        parameters,
    )


def wide(
    method: str,
    *weights: float,
    parameters: dict[str, Any] | None = None,
    **settings: Any,
) -> str:
    experts = {
        f"$wide-{m}": {"weight": w, **settings}
        for m, w in zip(("ada", "bob", "cyd"), weights, strict=False)
    }
    return models(method, experts, "$wide-base", parameters)


def bare(method: str, *sources: str, base: str | None = None, **parameters: Any) -> str:
    """Sources without parameters of their own."""
    return models(method, {source: {} for source in sources}, base, parameters)


AVERAGES = {
    "linear": by_weight("linear", 0.3, 0.7, base=None),
    "linear-three": by_weight("linear", 0.5, 1.5, 1.0, base=None),
    "linear-one": by_weight("linear", 0.4, base=None),
    "linear-negative": by_weight("linear", 1.4, -0.4, base=None),
    "linear-zero-weight": by_weight("linear", 0.0, 2.0, base=None),
    "linear-sum": by_weight(
        "linear", 0.5, 0.25, -0.5, base=None, parameters={"normalize": False}
    ),
    "linear-sum-to-zero-unnormalized": by_weight(
        "linear", 1.0, -1.0, base=None, parameters={"normalize": False}
    ),
    "linear-normalize-as-number": by_weight(
        "linear", 0.5, 0.25, base=None, parameters={"normalize": 0.0}
    ),
    "linear-same-model-cancels": models(
        "linear", {A: {"weight": 0.5}, "$twin": {"weight": 0.5}}, None
    ),
    "linear-unlisted-base": bare("linear", A, B, base="$base", weight=1.0),
    "linear-listed-base": models(
        "linear", {A: {"weight": 1}, "$base": {"weight": 2}}, "$base"
    ),
    "slerp": bare("slerp", "$base", A, base="$base", t=0.3),
    "slerp-base-second": bare("slerp", A, "$base", base="$base", t=0.3),
    "slerp-base-unlisted": bare("slerp", A, base="$base", t=0.3),
    "slerp-start": bare("slerp", "$base", A, base="$base", t=0.0),
    "slerp-end": bare("slerp", "$base", A, base="$base", t=1.0),
    "slerp-colinear": bare("slerp", "$base", "$twin", base="$base", t=0.3),
    "slerp-between-experts": bare("slerp", A, B, base=A, t=0.5),
    "slerp-gradient": bare("slerp", "$base", A, base="$base", t=[0, 0.5, 0.3, 0.7, 1]),
    "slerp-halves": bare(
        "slerp",
        "$base",
        A,
        base="$base",
        t=[
            {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
            {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
            {"value": 0.5},
        ],
    ),
    "slerp-wide": bare("slerp", "$wide-base", "$wide-ada", base="$wide-base", t=0.25),
    "nuslerp": by_weight("nuslerp", 0.4, 0.6, base=None),
    "nuslerp-uneven": by_weight("nuslerp", 3.0, 1.0, base=None),
    "nuslerp-one-weight-zero": by_weight("nuslerp", 0.0, 1.0, base=None),
    "nuslerp-base": by_weight("nuslerp", 0.4, 0.6),
    "nuslerp-base-wide": wide("nuslerp", 0.3, 0.9),
    "nuslerp-columns": by_weight(
        "nuslerp", 0.4, 0.6, base=None, parameters={"nuslerp_flatten": False}
    ),
    "nuslerp-rows": by_weight(
        "nuslerp",
        0.4,
        0.6,
        base=None,
        parameters={"nuslerp_flatten": False, "nuslerp_row_wise": True},
    ),
    "nuslerp-rows-flat": by_weight(
        "nuslerp", 0.4, 0.6, base=None, parameters={"nuslerp_row_wise": True}
    ),
    "nuslerp-base-columns": by_weight(
        "nuslerp", 0.4, 0.6, parameters={"nuslerp_flatten": False}
    ),
    "nuslerp-base-rows": by_weight(
        "nuslerp",
        0.4,
        0.6,
        parameters={"nuslerp_flatten": False, "nuslerp_row_wise": True},
    ),
    "nuslerp-colinear": models(
        "nuslerp", {"$base": {"weight": 1}, "$twin": {"weight": 2}}, None
    ),
    "nuslerp-base-still": models(
        "nuslerp", {A: {"weight": 1}, "$twin": {"weight": 2}}, "$base"
    ),
    "nuslerp-sum-to-zero": by_weight("nuslerp", 1.0, -1.0, base=None),
    "nuslerp-negative": by_weight("nuslerp", 1.5, -0.5, base=None),
    "multislerp": by_weight("multislerp", 0.3, 0.7, base=None),
    "multislerp-three": by_weight("multislerp", 0.5, 0.25, 1.0, base=None),
    "multislerp-three-base": by_weight("multislerp", 0.5, 0.25, 1.0),
    "multislerp-unnormalized": by_weight(
        "multislerp", 0.5, 0.25, 1.0, base=None, parameters={"normalize_weights": False}
    ),
    "multislerp-eps": by_weight(
        "multislerp", 0.5, 0.25, base=None, parameters={"eps": 1e-4}
    ),
    "multislerp-wide": wide("multislerp", 0.5, 0.25, 1.0),
    "multislerp-negative": by_weight("multislerp", 1.5, -0.5, base=None),
    "multislerp-zero-weight": by_weight("multislerp", 0.0, 1.0, 0.5),
    "multislerp-still": models(
        "multislerp", {"$base": {"weight": 1}, "$twin": {"weight": 2}}, None
    ),
    "karcher": bare("karcher", A, B),
    "karcher-three": bare("karcher", A, B, C),
    "karcher-base": bare("karcher", A, B, C, base="$base"),
    "karcher-one-step": bare("karcher", A, B, C, max_iter=1),
    "karcher-coarse": bare("karcher", A, B, C, tol=0.5),
    "karcher-wide": bare(
        "karcher", "$wide-ada", "$wide-bob", "$wide-cyd", max_iter=30, tol=1e-7
    ),
    "karcher-still": bare("karcher", "$base", "$twin"),
    "stock": bare("model_stock", A, B, base="$base"),
    "stock-three": bare("model_stock", A, B, C, base="$base"),
    "stock-listed-base": bare("model_stock", "$base", A, B, C, base="$base"),
    "stock-rows": bare("model_stock", A, B, C, base="$base", filter_wise=True),
    "stock-wide": bare(
        "model_stock", "$wide-ada", "$wide-bob", "$wide-cyd", base="$wide-base"
    ),
    "stock-wide-rows": bare(
        "model_stock",
        "$wide-ada",
        "$wide-bob",
        "$wide-cyd",
        base="$wide-base",
        filter_wise=True,
    ),
    "stock-still": bare("model_stock", A, "$twin", base="$base"),
    "stock-still-rows": bare("model_stock", A, "$twin", base="$base", filter_wise=True),
    "nearswap": bare("nearswap", "$base", A, base="$base", t=0.01),
    "nearswap-small": bare("nearswap", "$base", A, base="$base", t=0.0001),
    "nearswap-zero": bare("nearswap", "$base", A, base="$base", t=0.0),
    "nearswap-base-unlisted": bare("nearswap", A, base="$base", t=0.005),
    "nearswap-gradient": bare("nearswap", "$base", A, base="$base", t=[0.001, 0.02]),
    "fusion": bare("arcee_fusion", "$base", A, base="$base"),
    "fusion-still": bare("arcee_fusion", "$base", "$twin", base="$base"),
    "fusion-base-second": bare("arcee_fusion", A, "$base", base="$base"),
    "fusion-base-unlisted": bare("arcee_fusion", A, base="$base"),
    "fusion-wide": bare("arcee_fusion", "$wide-base", "$wide-ada", base="$wide-base"),
    "fusion-qwen": bare("arcee_fusion", "$qwen-base", "$qwen-ada", base="$qwen-base"),
}

DELTAS = {
    "arithmetic": by_weight("task_arithmetic", 0.3, 0.7),
    "arithmetic-three": by_weight(
        "task_arithmetic", 0.5, 0.25, 0.25, parameters={"lambda": 1.3}
    ),
    "arithmetic-negative": by_weight("task_arithmetic", 1.0, -0.5),
    "arithmetic-mean": by_weight(
        "task_arithmetic", 1.0, 3.0, parameters={"normalize": True}
    ),
    "arithmetic-sum-to-zero": by_weight(
        "task_arithmetic", 1.0, -1.0, parameters={"normalize": True}
    ),
    "arithmetic-one": by_weight("task_arithmetic", 0.5),
    "arithmetic-zero": by_weight("task_arithmetic", 0.0, 0.0),
    "arithmetic-lambda-gradient": by_weight(
        "task_arithmetic", 1.0, 0.5, parameters={"lambda": [0.5, 1.5]}
    ),
    "arithmetic-listed-base": models(
        "task_arithmetic", {"$base": {}, A: {"weight": 0.5}}, "$base"
    ),
    "ties": by_weight("ties", 0.5, 0.5, density=0.5),
    "ties-three": by_weight("ties", 0.5, 1.0, 0.25, density=0.3),
    "ties-full": by_weight("ties", 0.5, 1.0, 0.25, density=1.0),
    "ties-thin": by_weight("ties", 0.5, 1.0, density=0.07),
    "ties-keeps-one-entry": by_weight("ties", 0.5, 1.0, density=0.01),
    "ties-keeps-nothing": by_weight("ties", 0.5, 1.0, density=0.0),
    "ties-sum": by_weight(
        "ties", 0.5, 1.0, 0.25, density=0.4, parameters={"normalize": False}
    ),
    "ties-lambda": by_weight("ties", 0.5, 1.0, density=0.4, parameters={"lambda": 0.6}),
    "ties-negative": by_weight("ties", 1.0, -0.5, 0.25, density=0.4),
    "ties-all-negative": by_weight("ties", -1.0, -0.5, density=0.4),
    "ties-sum-to-zero": by_weight("ties", 1.0, -1.0, density=0.4),
    "ties-zero-weight": by_weight("ties", 0.0, 1.0, density=0.4),
    "ties-one": by_weight("ties", 0.7, density=0.4),
    "ties-still": models(
        "ties",
        {"$twin": {"weight": 1, "density": 0.5}, A: {"weight": 1, "density": 0.5}},
        "$base",
    ),
    "ties-rescale": by_weight(
        "ties", 1.0, 0.5, density=0.4, parameters={"rescale": True}
    ),
    "ties-int8-mask": by_weight(
        "ties", 1.0, 0.5, density=0.4, parameters={"int8_mask": True}
    ),
    "ties-density-gradient": by_weight("ties", 1.0, 0.5, density=[1, 0.7, 0.1]),
    "ties-wide": wide("ties", 0.5, 1.0, 0.25, density=0.2),
    "ties-listed-base": models(
        "ties",
        {
            "$base": {},
            A: {"weight": 1, "density": 0.3},
            B: {"weight": 1, "density": 0.6},
        },
        "$base",
    ),
    "dare-linear-full": by_weight("dare_linear", 0.5, 1.0, density=1.0),
    "dare-ties-full": by_weight("dare_ties", 0.5, 1.0, -0.25, density=1.0),
    "dare-ties-full-mean": by_weight(
        "dare_ties",
        0.5,
        1.0,
        density=1.0,
        parameters={"normalize": True, "lambda": 1.2},
    ),
    "breadcrumbs": by_weight("breadcrumbs", 0.5, 1.0, density=0.9, gamma=FEW),
    "breadcrumbs-gamma": by_weight("breadcrumbs", 0.5, 1.0, density=0.5, gamma=0.2),
    "breadcrumbs-default": by_weight(
        "breadcrumbs", 0.5, 1.0, density=0.7, gamma=FEW[:1]
    ),
    "breadcrumbs-over": by_weight("breadcrumbs", 0.5, 1.0, density=0.9, gamma=0.2),
    "breadcrumbs-without-outliers": by_weight(
        "breadcrumbs", 0.5, 1.0, density=0.7, gamma=0.0
    ),
    "breadcrumbs-few-outliers": by_weight("breadcrumbs", 0.5, 1.0, density=0.7),
    "breadcrumbs-keeps-nothing": by_weight(
        "breadcrumbs", 0.5, 1.0, density=0.02, gamma=0.0
    ),
    "breadcrumbs-ties-few-outliers": by_weight(
        "breadcrumbs_ties", 0.5, 1.0, density=0.7
    ),
    "breadcrumbs-full": by_weight("breadcrumbs", 0.5, 1.0),
    "breadcrumbs-wide": wide("breadcrumbs", 0.5, 1.0, -0.5, density=0.85, gamma=FEW),
    "breadcrumbs-mean": by_weight(
        "breadcrumbs", 0.5, 1.0, density=0.8, gamma=0.07, parameters={"normalize": True}
    ),
    "breadcrumbs-thin": by_weight("breadcrumbs", 0.5, 1.0, density=0.01, gamma=FEW),
    "breadcrumbs-ties": by_weight("breadcrumbs_ties", 0.5, 1.0, density=0.9, gamma=FEW),
    "breadcrumbs-ties-wide": wide(
        "breadcrumbs_ties", 0.5, 1.0, 0.5, density=0.6, gamma=0.05
    ),
    "breadcrumbs-ties-negative": by_weight(
        "breadcrumbs_ties", 0.5, -1.0, 0.7, density=0.6, gamma=0.08
    ),
    "breadcrumbs-ties-rescale": by_weight(
        "breadcrumbs_ties",
        0.5,
        1.0,
        density=0.6,
        gamma=0.08,
        parameters={"rescale": True},
    ),
    "sce": bare("sce", A, B, base="$base"),
    "sce-three": bare("sce", A, B, C, base="$base"),
    "sce-tenth": bare("sce", A, B, C, base="$base", select_topk=0.1),
    "sce-selects-nothing": bare("sce", A, B, C, base="$base", select_topk=0.01),
    "sce-zero": bare("sce", A, B, C, base="$base", select_topk=0.0),
    "sce-half": bare("sce", A, B, C, base="$base", select_topk=0.5),
    "sce-wide": bare(
        "sce", "$wide-ada", "$wide-bob", "$wide-cyd", base="$wide-base", select_topk=0.3
    ),
    "sce-still": bare("sce", A, "$twin", base="$base", select_topk=0.5),
    "sce-gradient": bare("sce", A, B, C, base="$base", select_topk=[0.1, 1.0]),
    "ram": bare("ram", A, B, base="$base"),
    "ram-three": bare("ram", A, B, C, base="$base", epsilon=0.02),
    "ram-wide": bare(
        "ram",
        "$wide-ada",
        "$wide-bob",
        "$wide-cyd",
        base="$wide-base",
        epsilon=0.05,
    ),
    "ram-one": bare("ram", A, base="$base", epsilon=0.02),
    "ram-still": bare("ram", A, "$twin", base="$base"),
    "ramplus": bare("ramplus_tl", A, B, base="$base"),
    "ramplus-three": bare("ramplus_tl", A, B, C, base="$base", epsilon=0.02),
    "ramplus-scaled": bare(
        "ramplus_tl", A, B, C, base="$base", epsilon=0.03, r=0.8, alpha=0.5
    ),
    "ramplus-wide": bare(
        "ramplus_tl",
        "$wide-ada",
        "$wide-bob",
        "$wide-cyd",
        base="$wide-base",
        epsilon=0.05,
        r=0.5,
    ),
    "ramplus-still": bare("ramplus_tl", A, "$twin", base="$base"),
}
