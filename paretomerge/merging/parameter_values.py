"""Typed access to the values of a merge's parameters."""

from paretomerge.types import Params


def number_in(parameters: Params, name: str) -> float:
    """The number that the parameter `name` is set to; a plan fills in the defaults."""
    value = parameters[name]
    assert value is not None, f"the parameter {name} has no value"
    return float(value)
