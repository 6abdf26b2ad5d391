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
    content = config.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)
