"""The one table of merge methods. Plan, engine, search space and documentation read its rows.

A method is a pure function on the tensors of one name, in float32::

    combine(base, sources, weights_and_knobs, options, masks) -> merged

see `Inputs`. A new method is one function, one row here and one test.
"""

from paretomerge.merge.methods.averaging import linear, model_stock, passthrough, slerp
from paretomerge.merge.methods.method import Inputs, Knob, Method
from paretomerge.merge.methods.task_vectors import dare_linear, dare_ties, task_arithmetic, ties

WEIGHT = Knob("weight", per_source=True)
DENSITY = Knob("density", default=1.0, per_source=True, low=0.0, high=1.0)
LAMBDA = Knob("lambda", default=1.0)
NORMALIZE = Knob("normalize", default=True)
SUM = Knob("normalize", default=False)
RESCALE = Knob("rescale", default=True, choices=(True, False, "inverse_density"))

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("linear", linear, (WEIGHT, NORMALIZE), base="optional", paper="Wortsman et al. 2022, arXiv 2203.05482"),
        Method("slerp", slerp, (Knob("t", low=0.0, high=1.0),), base="source", models=(2, 2), paper="Shoemake 1985"),
        Method("task_arithmetic", task_arithmetic, (WEIGHT, LAMBDA, SUM), paper="Ilharco et al. 2023, arXiv 2212.04089"),
        Method("ties", ties, (WEIGHT, DENSITY, LAMBDA, NORMALIZE), paper="Yadav et al. 2023, arXiv 2306.01708"),
        Method("dare_linear", dare_linear, (WEIGHT, DENSITY, LAMBDA, RESCALE, SUM), paper="Yu et al. 2024, arXiv 2311.03099"),
        Method("dare_ties", dare_ties, (WEIGHT, DENSITY, LAMBDA, RESCALE, SUM), paper="Yu et al. 2024, arXiv 2311.03099"),
        Method("model_stock", model_stock, (), models=(2, None), paper="Jang et al. 2024, arXiv 2403.19522"),
        Method(
            "passthrough",
            passthrough,
            (Knob("scale", default=1.0, per_source=True),),
            base="none",
            models=(1, 1),
            paper="layer stacking",
        ),
    )
}

__all__ = ["METHODS", "Inputs", "Knob", "Method"]
