"""Plans: a recipe, checked against the headers of its models, as one job per tensor of the result.

How a recipe becomes a plan (`make.make_plan`):

1. `parameters` checks the recipe's parameters against those of its method.
2. `make` opens the models; `steps` opens earlier steps of the recipe as models; `one_layout`
   gives all of them the names that the result has.
3. `layout` walks over modules and slices (`slices`): which layers make each layer of the result.
4. `tensor_jobs` makes the job of one tensor: inputs, parameters, shape and dtype.
5. `plan` holds the jobs and makes the result's config; `cost` estimates what they cost.
"""

from paretomerge.merging.plan.cost import Cost, estimate_cost
from paretomerge.merging.plan.make import make_plan, open_weights
from paretomerge.merging.plan.plan import Plan, TensorJob, TensorRef, Weights

__all__ = [
    "Cost",
    "Plan",
    "TensorJob",
    "TensorRef",
    "Weights",
    "estimate_cost",
    "make_plan",
    "open_weights",
]
