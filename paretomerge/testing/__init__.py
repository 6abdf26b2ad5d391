"""Contracts that a new part must pass, for its author: a merge method (`methods`), a search space (`spaces`), a sampler
(`samplers`). They need no test framework: each check raises AssertionError with a sentence that says which law fails."""

from paretomerge.testing.methods import (
    LARGE,
    SHAPES,
    Settings,
    check_copies,
    check_method,
    check_one_hot,
    inputs_of,
    merge_tensors,
    settings_of,
)
from paretomerge.testing.samplers import CONDITIONS, SPACE, check_define_by_run, check_sampler
from paretomerge.testing.spaces import check_space, same_recipe

__all__ = [
    "CONDITIONS",
    "LARGE",
    "SHAPES",
    "SPACE",
    "Settings",
    "check_copies",
    "check_define_by_run",
    "check_method",
    "check_one_hot",
    "check_sampler",
    "check_space",
    "inputs_of",
    "merge_tensors",
    "same_recipe",
    "settings_of",
]
