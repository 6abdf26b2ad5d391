import pytest

import paretomerge as pm
from paretomerge.config.overrides import with_overrides


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["trials=30"], {"trials": 30, "evaluate": {"race": True}}),
        (
            ["evaluate.search_items=9", "evaluate.race=95%"],
            {"trials": 60, "evaluate": {"race": "95%", "search_items": 9}},
        ),
        (["space.methods=[ties]"], {"space": {"methods": ["ties"]}}),
        (["out=runs/a=b"], {"out": "runs/a=b"}),
        (["sampler="], {"sampler": None}),
    ],
)
def test_keys_are_set_and_all_others_stay(overrides, expected):
    content = {"trials": 60, "evaluate": {"race": True}}
    changed = with_overrides(content, overrides)
    assert changed == content | expected
    assert content == {"trials": 60, "evaluate": {"race": True}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trials", "write key=value"),
        ("=3", "write key=value"),
        ("a..b=3", "write key=value"),
        ("trials.x=3", "has no keys there, but 60"),
        ("out=[", "cannot be read as YAML"),
    ],
)
def test_wrong_overrides_are_told(override, message):
    with pytest.raises(pm.ConfigError, match=message):
        with_overrides({"trials": 60}, [override])


def test_a_study_with_overrides(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text("base: b\nmodels: [m, n]\nobjectives: [{sparsity: true}]\n")
    study = pm.load_study(file, ["trials=7", "evaluate.batch_size=3"])
    assert study.settings.budget.trials == 7
    assert study.settings.evaluation.batch_size == 3
    with pytest.raises(pm.ConfigError, match="did you mean 'trials'"):
        pm.load_study(file, ["trails=7"])
