import pytest
import yaml

from paretomerge.config import load_config, load_study
from paretomerge.errors import ConfigError, ParetoMergeError
from paretomerge.search.mmmo import MMMOSampler


def write(tmp_path, pico, **changes):
    (tmp_path / "mine.py").write_text("def score(model, tokenizer):\n    return 1.0\n\n\ndef other(model, tokenizer):\n    return 2.0\n")
    data = {
        "base": str(pico / "base"),
        "models": [str(pico / "ada"), str(pico / "bob")],
        "objectives": [{"function": "mine:score"}, {"function": "mine:other", "direction": "minimize"}],
        "sampler": {"name": "MMMOSampler"},
    } | changes
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in data.items() if v is not None}))
    return path


def test_a_small_file_is_enough(tmp_path, pico):
    study, config = load_study(write(tmp_path, pico))
    assert [(o.name, o.maximise) for o in study.objectives] == [("score", True), ("other", False)]
    assert isinstance(study.sampler, MMMOSampler) and config.trials == 60
    assert study.folder == tmp_path / "runs" / "study"
    assert set(study.space.sources) == {"ada", "bob"}


def test_the_shipped_study_is_read(specialists):
    config = load_config(specialists / "study.yaml")
    assert [o.title for o in config.objectives] == ["sort", "reverse", "translate"]
    assert len(config.watch) == 6


def test_other_samplers_by_name(tmp_path, pico):
    study, _ = load_study(write(tmp_path, pico, sampler={"name": "NSGAIISampler", "population_size": 10}))
    assert type(study.sampler).__name__ == "NSGAIISampler"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"modles": []}, "did you mean 'models'"),
        ({"space": {"method": ["ties"]}}, "did you mean 'methods'"),
        ({"space": {"methods": ["tie"]}}, "unknown searchable method 'tie'"),
        ({"space": {"weight": {"bounds": [1, 0]}}}, "low < high"),
        ({"models": ["one"]}, "models"),
        ({"models": None}, "models: Field required"),
        ({"objectives": [{"task": "a", "function": "b:c"}]}, "expected one of `task`"),
        ({"objectives": [{"function": "mine:score", "direction": "up"}]}, "direction"),
        ({"objectives": [{"function": "mine:score"}, {"function": "mine:score"}]}, "twice"),
        ({"objectives": [{"function": "mine:scor"}]}, "scor"),
        ({"objectives": [{"taks": "a"}]}, "did you mean 'task'"),
        ({"sampler": {"name": "MMOSampler"}}, "did you mean 'MMMOSampler'"),
        ({"sampler": {"name": "MMMOSampler", "elite": 3}}, "did you mean 'elites'"),
        ({"sampler": {"name": "CmaEsSampler"}}, "one objective"),
        ({"trials": 0}, "trials"),
        ({"dtype": "int8"}, "dtype"),
        ({"evaluate": {"splits": {"search": "a"}}}, "held_out"),
        ({"base": "./nowhere"}, "there is no such folder"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path, pico, changes, told):
    with pytest.raises(ParetoMergeError, match=told):
        load_study(write(tmp_path, pico, **changes))


def test_no_file_and_no_yaml(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "study.yaml")
    (tmp_path / "study.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="expected YAML"):
        load_config(tmp_path / "study.yaml")
