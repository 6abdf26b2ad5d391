"""The `space:` section of a study.yaml."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from paretomerge.errors import ConfigError
from paretomerge.space.weights.layers import Grouping
from paretomerge.space.weights.method_parameters import ParameterBounds


class Section(BaseModel):
    """A section of a study.yaml: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _checked_groups(value: Any) -> Any:
    """Check `groups` and return it unchanged."""
    # Unchanged, because the value is written back to files and into the study's identity.
    if value is None:
        return None
    try:
        Grouping.parse(value)
    except ConfigError as error:
        raise ValueError(str(error).removeprefix("groups: ")) from error
    return value


Groups = Annotated[Any, AfterValidator(_checked_groups)]


class GranularityConfig(Section):
    """How finely weights or densities are split."""

    bounds: tuple[float, float] | None = None
    groups: Groups = None
    roles: bool | dict[str, list[str]] = False
    smooth: bool = False


class RoutesConfig(Section):
    """Routes through layers."""

    form: Literal["edits", "indicators"] = "edits"
    blocks: int | None = Field(default=None, ge=1)
    scale: tuple[float, float] | Literal[False] = (0.7, 1.4)
    most: int | None = Field(default=None, ge=1)
    repeats: int | None = Field(default=None, ge=1)
    match: str | None = None


class SpaceConfig(Section):
    """What the search may vary: weights, with `routes` the way through the layers.

    With `lineage: true` each trial merges two earlier ones.

    The defaults are those of `WeightSpace`.
    """

    routes: RoutesConfig | None = None
    # Not `false`, which the identity of older records would lack.
    lineage: Literal[True] | None = None
    methods: list[str] = Field(
        default=["task_arithmetic", "ties", "dare_ties"], min_length=1
    )
    groups: Groups = 1
    method_groups: Groups = 1
    weight: GranularityConfig = GranularityConfig()
    density: GranularityConfig = GranularityConfig()
    method_parameters: dict[str, ParameterBounds] = {}
    subset: bool = False
    near_duplicates: float | None = Field(default=None, gt=0, le=1)
    order: Literal["given", "kinship"] = "given"
    importance: bool = False

    @model_validator(mode="after")
    def _one_kind(self) -> "SpaceConfig":
        # The keys that the file sets: defaults of the weight space do not contradict `routes`.
        others = sorted(self.model_fields_set - {"routes"})
        if self.routes is not None and others:
            raise ValueError(
                f"`routes` stands alone, without {', '.join(others)}: weights are not searched "
                "along routes"
            )
        others = sorted(self.model_fields_set - {"lineage"})
        if self.lineage is not None and others:
            raise ValueError(
                f"`lineage` stands alone, without {', '.join(others)}: its merges have no "
                "parameters but their parents"
            )
        return self
