"""From the `sampler:` of a study of lineages to its sampler."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from paretomerge.errors import ConfigError, unknown_name
from paretomerge.search.options import check_option, resolve_seed
from paretomerge.space.lineage import LineageSearchSpace
from paretomerge.study.lineage.evolver import EvolverBreeder
from paretomerge.study.lineage.individuals import RecordedIndividuals
from paretomerge.study.lineage.kinship import KinshipBreeder
from paretomerge.study.lineage.sampler import Breeder, LineageSampler
from paretomerge.types import Array

_BREEDERS: dict[str, Callable[..., Breeder]] = {
    "evolver": EvolverBreeder,
    "kinship": KinshipBreeder,
}


def lineage_sampler(
    name: str,
    options: Mapping[str, Any],
    space: LineageSearchSpace,
    individuals: RecordedIndividuals,
    products: Callable[[], Array],
    seed: int,
) -> LineageSampler:
    """Make the sampler of a study of lineages.

    Args:
        name: `evolver` or `kinship`.
        options: Its options, and `seed`.
        space: The space.
        individuals: The trials of the study's record.
        products: Returns the inner products of the sources' deltas.
        seed: The study's seed.

    Returns:
        The sampler.

    Raises:
        ConfigError: The name, an option or its value is invalid.
    """
    if name not in _BREEDERS:
        raise ConfigError(
            f"sampler: a lineage is searched by evolver or kinship, and not by {name}; set "
            "`sampler: evolver`"
        )
    breeder = _BREEDERS[name]
    values = dict(options)
    seed = values.pop("seed", seed)
    check_option(f"sampler: {name}: seed", 0, seed)
    accepted = inspect.signature(breeder).parameters
    for option in values:
        if option not in accepted:
            names = [*accepted, "seed"]
            problem = unknown_name(f"option of {name}", option, names)
            raise ConfigError(f"sampler: {problem}")
    return LineageSampler(
        breeder(**values), space, individuals, products, resolve_seed(seed)
    )
