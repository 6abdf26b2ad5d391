"""Merge methods: one table of all methods, one file per family of methods.

To add a merge method:

1. Write `name(inputs: Inputs) -> BlockMerger` in the file of its family, for example
   `task_vectors.py`. `merging/block.py` says what the function receives and returns; `common.py`
   has what families share.
2. Add the row `Method("name", "task_vectors", ...)` to `table.py`. Recipes, search spaces, the
   command line and reports read the table; no other file lists the methods.
3. Add the row to docs/methods.md, which a test compares with the table, and a worked example to
   `tests/merging/methods/test_papers.py` (`cases.py` there merges small tensors in one line).
   `tests/merging/test_methods.py` runs the contract on every row; its sets `NOT_COPIES` and
   `NOT_ONE_HOT` name the methods that break a law on purpose. If mergekit has the method, add
   recipes to tests/conformance/method_recipes.py.
4. A search can use every method on deltas (`base="required"`) that has a `weight`. If it has
   parameters that a search may vary, add their ranges to `SEARCH_RANGES` in
   `space/weights/method_parameters.py`, or their names to `SETTABLE` there, and to docs/spaces.md.
   If a source with weight 0 changes the merge, set `zero_weight_counts`. If `lambda` does not stand
   for larger weights, unset `scales_with_lambda`. `baseline_weight` and `baseline_density` are what
   a search tries first.

Importing this package does not import torch: the file of a family is imported when it merges.
"""

from paretomerge.merging.methods.method import Method, Parameter
from paretomerge.merging.methods.table import IGNORED_PARAMETERS, METHODS

__all__ = ["IGNORED_PARAMETERS", "METHODS", "Method", "Parameter"]
