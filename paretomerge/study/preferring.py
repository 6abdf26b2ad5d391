"""What a study's preference changes."""

from collections.abc import Mapping
from dataclasses import replace

from paretomerge.config.settings import StudySettings
from paretomerge.errors import ConfigError
from paretomerge.pareto.preference import KNEE, Preference, PreferSetting
from paretomerge.space.specs import LineageSpace


def preference_notes(settings: StudySettings) -> list[str]:
    """Say where a preference has no effect.

    Args:
        settings: The study.

    Returns:
        Notes for the user.
    """
    if settings.prefer is None:
        return []
    if isinstance(settings.space, LineageSpace):
        return ["a search of lineages ignores `prefer`; only the pick follows it"]
    # The table of samplers takes a second to import.
    from paretomerge.search.registry import prefers

    sampler = settings.sampler
    name = sampler.get("name") if isinstance(sampler, Mapping) else sampler
    if isinstance(name, str) and prefers(name) == "ignored":
        return [f"sampler {name} ignores `prefer`; only the pick follows it"]
    return []


def refining_settings(
    settings: StudySettings, prefer: PreferSetting | None
) -> StudySettings:
    """The settings of a search whose next proposals improve a preference.

    Args:
        settings: The study.
        prefer: The preference; by default the study's own. Without any, and for the knee, all
            objectives count alike.

    Returns:
        The settings.

    Raises:
        ConfigError: The preference names no objective.
    """
    names = [measure.name for measure in settings.objectives]
    wanted = settings.prefer if prefer is None else prefer
    if wanted is None or wanted == KNEE:
        wanted = dict.fromkeys(names, 1.0)
    Preference.parse(wanted, names)
    if settings.then is not None:
        raise ConfigError(
            "refine: a study with a second level (`then`) cannot be refined; raise `then.trials`"
        )
    sampler = {"name": "mmmo", "prefer_after": 0}
    # `until` is about the front, which refining does not improve.
    budget = replace(settings.budget, until=None)
    return replace(settings, prefer=wanted, sampler=sampler, budget=budget)
