from pathlib import Path

import pytest
import yaml

from paretomerge.config.tolerant import load_right_keys
from paretomerge.errors import ConfigError

RIGHT = {
    "base": "b",
    "models": ["m", "n"],
    "objectives": [{"task": "a"}, {"sparsity": True}],
    "evaluate": {"include_path": "tasks"},
}


def test_wrong_keys_are_left_out_and_the_rest_stays(tmp_path: Path) -> None:
    objectives = [{"task": "a"}, {"taks": "b"}, {"size": "layer"}, {"sparsity": True}]
    content = RIGHT | {
        "objectives": objectives,
        "evaluate": {"include_path": "tasks", "batch_size": 0, "bach_size": 3},
        "dtype": "int8",
        "sampler": 3,
        "trails": 5,
        "seed": 7,
    }
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(content))
    config = load_right_keys(file)
    assert config is not None and config.seed == 7 and config.dtype is None
    assert [objective.task for objective in config.objectives] == ["a", None]
    assert config.evaluate.include_path == "tasks"
    assert config.evaluate.batch_size == 16
    file.write_text(yaml.safe_dump(RIGHT))
    assert load_right_keys(file, ["seed=1"]).seed == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("key", ["base", "models", "objectives"])
def test_a_study_without_a_required_key_is_none(tmp_path: Path, key: str) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(RIGHT | {key: None}))
    assert load_right_keys(file) is None
    file.write_text("")
    with pytest.raises(ConfigError, match="empty"):
        load_right_keys(file)
