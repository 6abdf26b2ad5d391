"""The setting `workers`: where trials are evaluated, and how many at a time."""

from collections.abc import Mapping
from dataclasses import dataclass

from paretomerge.arguments import (
    Reader,
    as_integer,
    describe,
    integer,
    number,
    optional,
    read_fields,
    word,
)
from paretomerge.errors import ConfigError, unknown_name

_RAY_READERS: Mapping[str, Reader] = {
    "count": optional(integer(1)),
    "address": optional(word),
    "num_cpus": number,
    "num_gpus": optional(number),
}


@dataclass(frozen=True)
class RayWorkers:
    """Trials are evaluated by actors of a Ray cluster.

    Attributes:
        count: The number of actors. By default as many as the cluster has room for.
        address: The cluster's address; None for the running one, or else a new one of this machine.
        num_cpus: Processors of each actor.
        num_gpus: GPUs of each actor. By default 1 where the study's device is a GPU.

    Raises:
        ConfigError: A number is out of range, or an argument has a wrong type.

    Example:
        >>> RayWorkers(num_cpus=4).num_cpus
        4.0
    """

    count: int | None = None
    address: str | None = None
    num_cpus: float = 1.0
    num_gpus: float | None = None

    def __post_init__(self) -> None:
        read_fields(self, _RAY_READERS, "workers.ray.")


def as_workers(name: str, value: object) -> int | RayWorkers:
    """Read the setting `workers`.

    Args:
        name: The argument, for the message.
        value: A number, `ray`, `{"ray": {...}}` or `RayWorkers`.

    Returns:
        A number of processes, or a cluster's actors.

    Raises:
        ConfigError: It is none of these.
    """
    if isinstance(value, RayWorkers):
        return value
    if value == "ray":
        return RayWorkers()
    if isinstance(value, Mapping) and set(value) == {"ray"}:
        options = value["ray"] or {}
        if isinstance(options, Mapping):
            unknown = set(options) - set(_RAY_READERS)
            if unknown:
                key = sorted(unknown)[0]
                raise ConfigError(
                    f"{name}.ray: {unknown_name('key', key, _RAY_READERS)}"
                )
            return RayWorkers(**options)
    count = as_integer(value)
    if count is not None and count >= 1:
        return count
    raise ConfigError(
        f"{name}: expected a number of processes of 1 or more, `ray`, or "
        f"{{'ray': {{'num_cpus': 4}}}}, got {describe(value)}"
    )
