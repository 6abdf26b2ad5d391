"""Contracts for plug-ins: laws that a merge method, a search space or a sampler must keep.

They need no test framework. Each check raises AssertionError with a message that names the law.

- Merge methods (`methods`): `check_method`, `check_copies`, `check_one_hot`, `merge_tensors`.
- Search spaces (`spaces`): `check_space`, `same_recipe`.
- Samplers (`samplers`): `check_sampler`, `check_define_by_run`.
"""

from paretomerge.testing.methods import (
    LARGE_SHAPE,
    SHAPES,
    Case,
    check_copies,
    check_method,
    check_one_hot,
    make_inputs,
    merge_tensors,
    method_cases,
)
from paretomerge.testing.samplers import (
    CONDITIONS,
    SPACE,
    check_define_by_run,
    check_sampler,
)
from paretomerge.testing.spaces import check_space, same_recipe

__all__ = [
    "CONDITIONS",
    "LARGE_SHAPE",
    "SHAPES",
    "SPACE",
    "Case",
    "check_copies",
    "check_define_by_run",
    "check_method",
    "check_one_hot",
    "check_sampler",
    "check_space",
    "make_inputs",
    "merge_tensors",
    "method_cases",
    "same_recipe",
]
