"""Settings of one task in a study.yaml, and what they mean for the study's record."""

import pytest
import yaml

import paretomerge as pm
from paretomerge.record.changes import describe_changes
from paretomerge.space.build import Pool
from paretomerge.study.identity import question_of, study_identity

CHAT = {"apply_chat_template": True, "gen_kwargs": {"top_k": 1, "max_gen_toks": 9}}
KEYS = {
    "num_fewshot": 2,
    **CHAT,
    "fewshot_as_multiturn": False,
    "system_instruction": "Be brief.",
    "think_end_token": 7,
    "add_bos_token": False,
}


def content(**changes):
    return {
        "base": "base",
        "models": ["a", "b"],
        "objectives": [{"task": "gsm8k"}, {"task": "gsm8k", "name": "chat", **KEYS}],
        "constraints": [{"task": "arc_easy", "add_bos_token": True, "at_least": 0.5}],
        "watch": [
            "piqa",
            {"task": "arc_easy", "name": "arc_chat", **CHAT},
            {"perplexity": "wiki.txt", "metric": "bits_per_byte"},
        ],
        **changes,
    }


def load(tmp_path, **changes):
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(content(**changes)))
    return pm.load_study(file)


def test_a_file_says_it_as_python_does(tmp_path):
    settings = load(tmp_path).settings
    assert settings.objectives[1] == pm.Task("gsm8k", name="chat", **KEYS)
    assert settings.constraints[0].measure == pm.Task("arc_easy", add_bos_token=True)
    assert settings.watch == (
        pm.Task("piqa"),
        pm.Task("arc_easy", name="arc_chat", **CHAT),
        pm.Perplexity("wiki.txt", "bits_per_byte"),
    )
    text = pm.load_study(tmp_path).to_yaml()
    written = yaml.safe_load(text)
    for key in ("objectives", "constraints", "watch"):
        assert written[key] == content()[key]
    (tmp_path / "again.yaml").write_text(text)
    again = pm.load_study(tmp_path / "again.yaml").settings
    assert (again.measures, again.watch) == (settings.measures, settings.watch)


def test_the_schema_has_the_keys():
    schema = pm.StudyConfig.model_json_schema()
    # A watched task is a name, or its keys.
    entries = schema["properties"]["watch"]["items"]["oneOf"]
    assert entries == [{"type": "string"}, {"$ref": "#/$defs/WatchConfig"}]
    for section in ("ObjectiveConfig", "ConstraintConfig", "WatchConfig"):
        assert set(KEYS) <= set(schema["$defs"][section]["properties"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"objectives": [{"sparsity": True, "add_bos_token": True}]},
            "objectives.0: add_bos_token: only a `task` takes this key",
        ),
        (
            {"watch": [{"task": "piqa", "nmu_fewshot": 2}]},
            "watch.0: unknown key 'nmu_fewshot'; did you mean 'num_fewshot'?",
        ),
        ({"watch": [{"name": "x"}]}, "watch.0: set exactly one of `task`"),
        ({"watch": [{"task": "piqa", "num_fewshot": -1}]}, "watch.0.num_fewshot: "),
        ({"watch": ["gsm8k"]}, "'gsm8k' is the name of two scores; set another `name`"),
        (
            {"objectives": [{"task": "x"}, {"task": "x", **CHAT}]},
            "'x' is the name of two scores; set another `name`",
        ),
        (
            {"objectives": [{"task": "x", "fewshot_as_multiturn": True}]},
            "x: fewshot_as_multiturn: needs `apply_chat_template`",
        ),
    ],
)
def test_what_is_wrong_is_named_by_its_key(tmp_path, changes, message):
    with pytest.raises(pm.ConfigError) as caught:
        load(tmp_path, **changes)
    assert message in str(caught.value)


def test_a_direction_of_a_watched_task_is_refused():
    watch = [pm.Task("piqa", direction="maximize")]
    with pytest.raises(pm.ConfigError, match="watch: piqa: what is watched is only"):
        pm.Study("base", ["a", "b"], [pm.Task("gsm8k")], watch=watch)


def test_another_setting_of_a_task_is_another_study(tmp_path):
    def identity(**changes):
        settings = load(tmp_path, **changes).settings
        described = study_identity(settings, Pool("base", {}))
        return described, question_of(settings, described)

    before, question = identity()
    other = {**KEYS, "gen_kwargs": {"max_gen_toks": 9, "top_k": 1}}
    objectives = [{"task": "gsm8k"}, {"task": "gsm8k", "name": "chat", **other}]
    same, same_question = identity(objectives=objectives)
    assert same == before and not question.differences(same_question)
    # A watched task may change.
    assert identity(watch=["mmlu"])[0] == before
    objectives[1]["add_bos_token"] = True
    now, other_question = identity(objectives=objectives)
    assert "objectives.1.add_bos_token: false, now true" in describe_changes(
        before, now
    )
    assert question.differences(other_question) == "score 'chat'"
