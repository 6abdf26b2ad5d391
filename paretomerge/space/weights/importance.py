"""Importance of a parameter: how large the deltas are that it governs.

A sampler may expect small effects from parameters that govern small deltas.
"""

from collections.abc import Iterator

import numpy as np

from paretomerge.merging.delta_profile import DeltaProfile
from paretomerge.space.weights.parameters import ParameterSpace

_LEAST_IMPORTANCE = 0.01
"""Lower limit as a share of the largest importance of the same kind."""

_ALL_SOURCES = ""
"""In place of a source, for parameters that govern all sources' deltas."""


def parameter_importance(
    space: ParameterSpace, profile: DeltaProfile
) -> dict[str, float]:
    """Return the importance of every parameter.

    Args:
        space: The parameters.
        profile: Mass (squared L2 norm) of the deltas of each tensor and source.

    Returns:
        Parameter -> L2 norm of the deltas that it governs, divided by the geometric mean over the
        parameters of its kind (`weight`, `density`, `use`, `method`, ...).
    """
    by_kind: dict[str, dict[str, float]] = {}
    masses = _governed_mass(space, profile)
    for name, mass in masses.items():
        kind, *_ = name.split("/")
        norm = np.sqrt(mass)
        norms = by_kind.setdefault(kind, {})
        norms[name] = float(norm)
    importance: dict[str, float] = {}
    for norms in by_kind.values():
        importance |= _relative(norms)
    return {name: importance[name] for name in space.distributions}


def _relative(norms: dict[str, float]) -> dict[str, float]:
    """Norms divided by their geometric mean."""
    # The surrogate divides length scales by the importance, so it must not be 0, also for a part of
    # the model that did not move.
    largest = max(norms.values())
    least = largest * _LEAST_IMPORTANCE
    if least == 0:
        least = 1.0
    limited = {}
    for name, norm in norms.items():
        limited[name] = max(norm, least)
    values = list(limited.values())
    logs = np.log(values)
    mean_log = np.mean(logs)
    geometric_mean = float(np.exp(mean_log))
    relative = {}
    for name, norm in limited.items():
        relative[name] = norm / geometric_mean
    return relative


def _governed_mass(
    space: ParameterSpace,
    profile: DeltaProfile,
) -> dict[str, float]:
    """Parameter -> mass of the deltas that it governs."""
    masses = dict.fromkeys(space.distributions, 0.0)
    columns = {}
    for source in space.sources:
        columns[source] = profile.names.index(source)
    governed = _governed_tensors(space, profile)
    for tensor, name, source, share in governed:
        # Fixed parameters, and densities that no method has, have a name but are not searched.
        if name not in masses:
            continue
        row = profile.mass[tensor]
        if source == _ALL_SOURCES:
            # Not the sum of the row: a profile can have more sources than the space.
            masses_by_source = [row[column] for column in columns.values()]
            mass = sum(masses_by_source)
        else:
            mass = row[columns[source]]
        masses[name] += share * mass
    return masses


def _governed_tensors(
    space: ParameterSpace,
    profile: DeltaProfile,
) -> Iterator[tuple[str, str, str, float]]:
    """Yield (tensor, parameter, source, share of the tensor that the parameter governs)."""
    # Names do not depend on the tensor, and there can be thousands of tensors.
    names = {}
    for kind, layout in space.layouts.items():
        for source in space.sources:
            names[kind, source] = layout.names(source)
    for tensor in profile.mass:
        group = space.method_group(tensor)
        for kind in ("method", *space.method_bounds):
            name = space.names(kind)[group]
            yield tensor, name, _ALL_SOURCES, 1.0
        for source in space.sources:
            yield tensor, f"use/{source}", source, 1.0
            for kind, layout in space.layouts.items():
                # Between two control points, each governs its share of the tensor.
                coefficients = layout.coefficients[tensor]
                for cell, share in coefficients.items():
                    name = names[kind, source][cell]
                    yield tensor, name, source, share
