"""The table of merge methods.

Plan, engine, search space, command line and documentation read it. `__init__.py` says how to add a
row. A test compares docs/methods.md with the table.
"""

from collections.abc import Sequence

from paretomerge.merging.methods.method import Method, Parameter
from paretomerge.merging.parameter_values import number_in
from paretomerge.types import Params

IGNORED_PARAMETERS = ("int8_mask",)
"""Parameters of mergekit that change nothing in a result. Every method accepts them."""

_MIN_WEIGHT_SUM = 1e-8  # mergekit divides by no smaller sum
_MIN_EPS = (
    1e-20  # what is multiplied by a delta must stay a number that float32 can hold
)

# Some parameters have another default, or another meaning, in some methods: mergekit's defaults
# stand.
WEIGHT = Parameter("weight", per_source=True)
EQUAL_WEIGHT = Parameter("weight", default=1.0, per_source=True)
SCE_WEIGHT = Parameter(
    "weight",
    default=1.0,
    per_source=True,
    note="sce: `weight` scales a source's delta; mergekit ignores it",
)
DENSITY = Parameter("density", default=1.0, per_source=True, low=0.0, high=1.0)
EPSILON = Parameter("epsilon", default=0.15, per_source=True)
GAMMA = Parameter("gamma", default=0.01, per_source=True, low=0.0, high=1.0)
LAMBDA = Parameter("lambda", default=1.0)
NORMALIZE = Parameter("normalize", default=True)
NO_NORMALIZE = Parameter("normalize", default=False)
RESCALE = Parameter("rescale", default=True, choices=(True, False, "inverse_density"))
NO_RESCALE = Parameter(
    "rescale", default=False, choices=(True, False, "inverse_density")
)
VOTE = Parameter("vote", default=1.0, per_source=True, low=0.0)
T = Parameter("t")
RAM_EPSILON = Parameter("epsilon", default=1e-5, low=0.0)
ALPHA = Parameter("alpha", default=0.9, low=0.0, high=1.0)


def _check_eps(parameters: Sequence[Params], options: Params) -> str | None:
    """Where no source has a gradient, the mean is taken with equal weights eps."""
    if number_in(options, "eps") < _MIN_EPS:
        return f"expected eps of at least {_MIN_EPS}, got {options['eps']}"
    return None


def _check_weight_sum(parameters: Sequence[Params], options: Params) -> str | None:
    """Weights that are divided by their sum must not add up to zero."""
    normalizes = options.get("normalize", True) and options.get(
        "normalize_weights", True
    )
    weights = [number_in(values, "weight") for values in parameters]
    if normalizes and abs(sum(weights)) < _MIN_WEIGHT_SUM:
        return f"expected weights with a sum other than 0, got {weights}"
    return None


def _check_keep_probabilities(
    parameters: Sequence[Params], options: Params
) -> str | None:
    """DELLA keeps entries with probabilities from density - epsilon to density + epsilon."""
    for values in parameters:
        density = number_in(values, "density")
        epsilon = number_in(values, "epsilon")
        lowest = density - abs(epsilon)
        highest = density + abs(epsilon)
        sparsifies = 0 < density < 1
        if sparsifies and not (lowest > 0 and highest < 1):
            return (
                "expected 0 < density - epsilon and density + epsilon < 1, "
                f"got density {density} and epsilon {epsilon}"
            )
    return None


_ROWS = (
    # Averages, and interpolation on a sphere
    Method(
        "linear",
        "averaging",
        (WEIGHT, NORMALIZE),
        base="optional",
        check=_check_weight_sum,
        multi_pass=False,
        ns_per_entry=2.7,
        rule="sum w_i theta_i, divided by sum w_i",
        paper="Wortsman et al. 2022, arXiv 2203.05482",
    ),
    Method(
        "slerp",
        "spherical",
        (T,),
        base="source",
        models=(2, 2),
        symmetric=False,
        ns_per_entry=4.0,
        rule="spherical interpolation of two, from the base (t = 0); "
        "a line where they are nearly colinear",
        paper="Shoemake 1985",
    ),
    Method(
        "nuslerp",
        "spherical",
        (
            WEIGHT,
            Parameter("nuslerp_flatten", default=True),
            Parameter("nuslerp_row_wise", default=False),
        ),
        base="reference",
        models=(2, 2),
        symmetric=False,
        ns_per_entry=3.5,
        rule="spherical interpolation by weights, of whole tensors, rows or columns; "
        "of the taus where there is a base",
        paper="mergekit",
    ),
    Method(
        "multislerp",
        "spherical",
        (
            WEIGHT,
            Parameter("normalize_weights", default=True),
            Parameter("eps", default=1e-8, low=0.0),
        ),
        base="reference",
        check=_check_weight_sum,
        ns_per_entry=3.3,
        rule="weighted mean direction at the weighted mean length; "
        "of the taus where there is a base",
        paper="mergekit",
    ),
    Method(
        "karcher",
        "spherical",
        (
            Parameter("max_iter", default=10, low=0),
            Parameter("tol", default=1e-5, low=0.0),
        ),
        base="optional",
        ns_per_entry=3.4,
        rule="mean on the sphere, iterated, at the mean length",
        paper="Karcher 1977",
    ),
    # Sums of task vectors
    Method(
        "task_arithmetic",
        "task_vectors",
        (WEIGHT, LAMBDA, NO_NORMALIZE),
        multi_pass=False,
        ns_per_entry=2.3,
        rule="theta_0 + lambda sum w_i tau_i",
        paper="Ilharco et al. 2023, arXiv 2212.04089",
    ),
    Method(
        "ties",
        "task_vectors",
        (WEIGHT, DENSITY, LAMBDA, NORMALIZE, NO_RESCALE, VOTE),
        ns_per_entry=5.6,
        baseline_density=0.2,  # the top 20 %, as published
        rule="keep each tau's largest entries, elect signs, average what agrees",
        paper="Yadav et al. 2023, arXiv 2306.01708",
    ),
    Method(
        "dare_linear",
        "task_vectors",
        (WEIGHT, DENSITY, LAMBDA, RESCALE, NO_NORMALIZE),
        ns_per_entry=5.9,
        rule="drop entries at random, rescale, sum",
        paper="Yu et al. 2024, arXiv 2311.03099",
    ),
    Method(
        "dare_ties",
        "task_vectors",
        (WEIGHT, DENSITY, LAMBDA, RESCALE, NO_NORMALIZE, VOTE),
        ns_per_entry=6.2,
        rule="drop entries at random, rescale, elect signs, sum what agrees",
        paper="Yu et al. 2024, arXiv 2311.03099",
    ),
    Method(
        "della",
        "task_vectors",
        (WEIGHT, DENSITY, EPSILON, LAMBDA, RESCALE, NORMALIZE, VOTE),
        check=_check_keep_probabilities,
        ns_per_entry=11.2,
        rule="drop entries at random, small ones of a row more often, rescale, elect signs",
        paper="Deep et al. 2024, arXiv 2406.11617",
    ),
    Method(
        "della_linear",
        "task_vectors",
        (WEIGHT, DENSITY, EPSILON, LAMBDA, RESCALE, NO_NORMALIZE),
        check=_check_keep_probabilities,
        ns_per_entry=10.5,
        rule="drop entries at random, small ones of a row more often, rescale, sum",
        paper="Deep et al. 2024, arXiv 2406.11617",
    ),
    Method(
        "breadcrumbs",
        "task_vectors",
        (WEIGHT, DENSITY, GAMMA, LAMBDA, NO_RESCALE, NO_NORMALIZE),
        ns_per_entry=5.6,
        rule="drop the top gamma and the bottom 1 - density - gamma by magnitude, sum",
        paper="Davari and Belilovsky 2024, arXiv 2312.06795",
    ),
    Method(
        "breadcrumbs_ties",
        "task_vectors",
        (WEIGHT, DENSITY, GAMMA, LAMBDA, NO_RESCALE, NO_NORMALIZE, VOTE),
        ns_per_entry=5.7,
        rule="drop the top gamma and the bottom 1 - density - gamma by magnitude, elect signs",
        paper="Davari and Belilovsky 2024, arXiv 2312.06795",
    ),
    # Entry by entry, and averages with the base
    Method(
        "sce",
        "entrywise",
        (SCE_WEIGHT, Parameter("select_topk", default=1.0, low=0.0), VOTE),
        ns_per_entry=10.5,
        baseline_weight=1.0,  # as published: without weights
        rule="keep what varies most over the models, weigh by mean squares, erase minority signs",
        paper="Wan et al. 2024, arXiv 2408.07990",
    ),
    Method(
        "model_stock",
        "averaging",
        (Parameter("filter_wise", default=False),),
        models=(2, None),
        ns_per_entry=3.2,
        rule="t mean + (1 - t) theta_0, t from the angle between the taus",
        paper="Jang et al. 2024, arXiv 2403.19522",
    ),
    Method(
        "nearswap",
        "entrywise",
        (T,),
        base="source",
        models=(2, 2),
        symmetric=False,
        multi_pass=False,
        rule="from the base towards the other by min(1, t / |difference|) of the way",
        paper="mergekit",
    ),
    Method(
        "arcee_fusion",
        "entrywise",
        (),
        base="source",
        models=(2, 2),
        symmetric=False,
        rule="take the other model's changes of importance above median + 1.5 IQR",
        paper="mergekit",
    ),
    Method(
        "ram",
        "entrywise",
        (RAM_EPSILON,),
        multi_pass=False,
        rule="changes of one model alone kept, shared ones averaged",
        paper="arXiv 2601.13572",
    ),
    Method(
        "ramplus_tl",
        "entrywise",
        (
            RAM_EPSILON,
            Parameter("r", default=0.1, low=0.0),
            Parameter("alpha", default=0.2, low=0.0),
        ),
        rule="ram, with a model's own changes scaled up by its share of shared ones",
        paper="arXiv 2601.13572",
    ),
    # Crossover of two models
    Method(
        "crossover",
        "evolution",
        (
            Parameter("t", default=0.5, low=0.0, high=1.0),
            Parameter("crossover_rate", default=0.5, low=0.0, high=1.0),
        ),
        base="source",
        models=(2, 2),
        symmetric=False,
        multi_pass=False,
        ns_per_entry=3.0,
        rule="a random share of the entries moves from the base by t towards the other",
        paper="Du et al. 2024, arXiv 2406.12208",
    ),
    # Layer stacking
    Method(
        "passthrough",
        "averaging",
        (
            Parameter("scale", default=1.0, per_source=True),
            Parameter("about", default=0.0, per_source=True),
        ),
        base="none",
        models=(1, 1),
        multi_pass=False,
        ns_per_entry=4.5,
        rule="one source's tensor, what it has beyond `about` times scale: layer stacking",
        paper="Akiba et al. 2024, arXiv 2403.13187",
    ),
    # Competition and consensus between tasks
    Method(
        "pcb",
        "entrywise",
        (
            EQUAL_WEIGHT,
            Parameter("density", default=0.1, per_source=True, low=0.0, high=1.0),
            LAMBDA,
        ),
        models=(2, None),
        whole_tensors=True,
        zero_weight_counts=True,
        ns_per_entry=None,
        rule="scores inside and between tasks weigh the top d entries in a mean",
        paper="Du et al. 2024, arXiv 2410.02396",
    ),
    Method(
        "consensus_ta",
        "entrywise",
        (
            EQUAL_WEIGHT,
            LAMBDA,
            Parameter("mask_lambda", default=0.4, low=0.0),
            Parameter("k", default=2, low=0),
        ),
        models=(2, None),
        multi_pass=False,
        rule="task arithmetic on the entries that at least k tasks call their own",
        paper="Wang et al. 2024, arXiv 2405.07813",
    ),
    # Singular vectors of whole matrices
    Method(
        "tsv",
        "spectral",
        (EQUAL_WEIGHT, LAMBDA),
        whole_tensors=True,
        ns_per_entry=None,
        baseline_weight=1.0,
        rule="top 1/K singular vectors of each tau, made orthogonal to each other",
        paper="Gargiulo et al. 2025, arXiv 2412.00081",
    ),
    Method(
        "iso_c",
        "spectral",
        (EQUAL_WEIGHT, LAMBDA),
        models=(2, None),
        whole_tensors=True,
        ns_per_entry=None,
        baseline_weight=1.0,
        rule="the sum of the taus with a flat spectrum",
        paper="Marczak et al. 2025, arXiv 2502.04959",
    ),
    Method(
        "iso_cts",
        "spectral",
        (
            EQUAL_WEIGHT,
            LAMBDA,
            Parameter("common_fraction", default=0.8, low=0.0, high=1.0),
        ),
        models=(2, None),
        whole_tensors=True,
        ns_per_entry=None,
        baseline_weight=1.0,
        rule="iso_c, plus directions of each task's own",
        paper="Marczak et al. 2025, arXiv 2502.04959",
    ),
    Method(
        "wudi",
        "spectral",
        (
            EQUAL_WEIGHT,
            LAMBDA,
            Parameter("steps", default=300, low=0),
            Parameter("lr", default=1e-5, low=0.0),
        ),
        whole_tensors=True,
        ns_per_entry=None,
        scales_with_lambda=False,
        baseline_weight=1.0,
        rule="the tau that interferes least with every task, by gradient descent per matrix",
        paper="Cheng et al. 2025, arXiv 2503.08099",
    ),
    # Means weighed by statistics of the sources on text
    Method(
        "regmean",
        "calibrated",
        (EQUAL_WEIGHT, ALPHA, LAMBDA, NORMALIZE),
        whole_tensors=True,
        ns_per_entry=None,
        baseline_weight=None,
        statistics="regmean",
        rule="theta_0 + lambda (sum w_i G_i)^-1 sum w_i G_i tau_i, G_i = E x x^T of the inputs",
        paper="Jin et al. 2023, arXiv 2212.09849",
    ),
    Method(
        "regmean_pp",
        "calibrated",
        (EQUAL_WEIGHT, LAMBDA, NORMALIZE),
        whole_tensors=True,
        ns_per_entry=None,
        baseline_weight=None,
        statistics="regmean_pp",
        rule="regmean, on inputs that came through the merged lower layers",
        paper="Nguyen et al. 2025, arXiv 2508.03121",
    ),
    Method(
        "fisher",
        "calibrated",
        (
            EQUAL_WEIGHT,
            Parameter("eps", default=1e-6, low=0.0),
            Parameter("normalize_fisher", default=True),
            LAMBDA,
            NORMALIZE,
        ),
        multi_pass=False,
        check=_check_eps,
        ns_per_entry=None,
        baseline_weight=None,
        statistics="fisher",
        rule="theta_0 + lambda sum c_i (F_i + eps) tau_i / sum c_i (F_i + eps), "
        "c_i = w_i / norm(F_i), F_i the mean squared gradient",
        paper="Matena and Raffel 2022, arXiv 2111.09832",
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in _ROWS}
"""Name -> method."""
