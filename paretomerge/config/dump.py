"""A study's content as the text of a study.yaml."""

import yaml

from paretomerge.config.schema import StudyConfig


def dump_config(config: StudyConfig) -> str:
    """Write a study.yaml.

    Args:
        config: The content.

    Returns:
        YAML with every key that differs from its default.
    """
    # Keys at their default are left out, as in a file that a user writes by hand.
    content = config.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
    # In the order of the schema and not of the alphabet, as a user would write it.
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)
