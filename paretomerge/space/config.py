"""The `space:` part of study.yaml -> the space that it describes."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from paretomerge.checkpoint.architecture import Architecture
from paretomerge.errors import ConfigError
from paretomerge.merge.kinship import Profile, by_kinship, profile, twins
from paretomerge.space.dials import Dial
from paretomerge.space.knobs import Setting
from paretomerge.space.layers import Grouping
from paretomerge.space.weights import WeightSpace


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _grammar(value: Any) -> Any:
    """`groups` as it stands in the file, once it is known to be right."""
    try:
        Grouping.read(value)
    except ConfigError as error:
        raise ValueError(str(error).removeprefix("groups: ")) from error
    return value


Groups = Annotated[Any, AfterValidator(_grammar)]


class DialConfig(_Strict):
    """How finely weights or densities are split. `layer_groups: 4` is an older name of `groups: 4`."""

    bounds: tuple[float, float]
    groups: Groups = 1
    roles: bool | dict[str, list[str]] = False
    smooth: bool = False

    @model_validator(mode="before")
    @classmethod
    def _one_name(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "layer_groups" not in data:
            return data
        if "groups" in data:
            raise ValueError("expected one of `groups` and `layer_groups`, got both")
        return {"groups" if key == "layer_groups" else key: value for key, value in data.items()}

    @property
    def dial(self) -> Dial:
        return Dial(self.bounds, Grouping.read(self.groups), self.roles, self.smooth)


class WeightConfig(DialConfig):
    bounds: tuple[float, float] = (-0.5, 1.5)


class DensityConfig(DialConfig):
    bounds: tuple[float, float] = (0.1, 1.0)


class SpaceConfig(_Strict):
    """What the search may vary."""

    methods: list[str] = Field(default=["task_arithmetic", "ties", "dare_ties"], min_length=1)
    method_groups: Groups = 1
    weight: WeightConfig = WeightConfig()
    density: DensityConfig = DensityConfig()
    knobs: dict[str, Setting] = {}
    subset: bool = False
    twins: float | None = Field(default=None, gt=0, le=1)
    order: Literal["given", "kinship"] = "given"
    importance: bool = False

    @property
    def profiled(self) -> bool:
        """Whether the deltas must be looked at before anything else."""
        by_profile = any(Grouping.read(g).by == "profile" for g in (self.method_groups, self.weight.groups, self.density.groups))
        return by_profile or self.importance or self.twins is not None or self.order == "kinship"


def build_space(
    config: SpaceConfig, base: str, sources: Mapping[str, str], architecture: Architecture, seed: int, folder: Path
) -> WeightSpace:
    """The space over `sources` (name -> path). folder: where the delta profile is kept, if one is needed."""
    deltas = kept_profile(folder, base, sources) if config.profiled else None
    notes: list[str] = []
    if deltas:
        dropped = twins(deltas, config.twins) if config.twins is not None else {}
        for twin, kept in dropped.items():
            cosine = deltas.cosine[deltas.names.index(twin)][deltas.names.index(kept)]
            notes.append(f"{twin} is left out: the cosine of its delta to that of {kept} is {cosine:.3f}, above {config.twins:g}")
        deltas = deltas.of(tuple(name for name in deltas.names if name not in dropped))
        deltas = deltas.of(by_kinship(deltas)) if config.order == "kinship" else deltas
    return WeightSpace(
        base,
        deltas.sources if deltas else sources,
        architecture,
        tuple(config.methods),
        config.weight.dial,
        config.density.dial,
        seed,
        method_groups=Grouping.read(config.method_groups),
        knobs=config.knobs,
        subset=config.subset,
        profile=deltas,
        notes=tuple(notes),
    )


def kept_profile(folder: Path, base: str, sources: Mapping[str, str]) -> Profile:
    """The delta profile, kept in `folder` for the next time; another one where a model's files have changed since."""
    files = [_stamps(model) for model in (base, *sources.values())]
    key = hashlib.sha256(json.dumps([base, dict(sources), files]).encode()).hexdigest()[:12]
    file = folder / f"deltas-{key}.json"
    if file.is_file():
        try:
            return Profile.from_json(file.read_text(encoding="utf-8"))
        except (ConfigError, OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: {error}") from error
    made = profile(base, sources)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}")
    unfinished.write_text(made.to_json(), encoding="utf-8")
    unfinished.replace(file)
    return made


def _stamps(model: str) -> list[tuple[str, int, int]]:
    """Name, size and time of a local model's weights, its adapter's included; what comes from the Hub does not change."""
    found = [file for part in model.split("+") if Path(part).is_dir() for file in sorted(Path(part).glob("*.safetensors"))]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in found]
