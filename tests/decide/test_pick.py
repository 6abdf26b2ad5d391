import pytest

from paretomerge.decide.pick import Choice, check_out, choose, write_pick
from paretomerge.errors import CheckpointError, ConfigError
from tests.study.test_search import make


def test_choices_from_the_command_line():
    assert Choice.parse("a=0.7,b=0.3", None, False).prefer == {"a": 0.7, "b": 0.3}
    assert Choice.parse(None, 3, False).text == "its number, 3"
    assert Choice.parse(None, None, False) == Choice()
    assert Choice.parse(None, None, True).text == Choice().text
    assert Choice.parse("mean", None, False).text == "the mean of the objectives"
    for arguments in ((("a=1"), 3, False), (None, 3, True)):
        with pytest.raises(ConfigError, match="not several"):
            Choice.parse(*arguments)
    with pytest.raises(ConfigError, match="objective=weight"):
        Choice.parse("a", None, False)


def test_picks_are_on_the_front_and_follow_the_preference(pico, tmp_path):
    study = make(pico, tmp_path / "s")
    with pytest.raises(ConfigError, match="run the search first"):
        choose(study.results(), Choice())
    study.run(9)
    front = {t.number for t in study.front()}
    up, down = (
        choose(study.results(), Choice(prefer={name: 1.0}))
        for name in ("f/up", "f/down")
    )
    assert {up.number, down.number, choose(study.results(), Choice()).number} <= front
    assert up.scores["f/up"].value == max(
        t.scores["f/up"].value for t in study.trials()
    )
    assert down.scores["f/down"].value == min(
        t.scores["f/down"].value for t in study.trials()
    )
    assert choose(study.results(), Choice(trial=4)).number == 4
    for choice, told in (
        (Choice(trial=99), "below 9"),
        (Choice(prefer={"f/upp": 1}), "did you mean 'f/up'"),
        (Choice(prefer={"f/up": -1}), "0 or more"),
        (Choice(prefer={"f/up": 0}), "above 0"),
    ):
        with pytest.raises(ConfigError, match=told):
            choose(study.results(), choice)
    study.hold_out([up])
    picked = study.trials()[up.number]
    picked_by = Choice(prefer={"f/up": 1.0}).text
    out = write_pick(study.results(), picked, tmp_path / "out", picked_by)
    card = (out / "README.md").read_text()
    assert (
        f"Trial {up.number}" in card
        and "picked by the preference f/up=1." in card
        and "| f/up | " in card
    )


def test_a_folder_that_cannot_be_written_is_told_beforehand(tmp_path):
    check_out(tmp_path / "new" / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "kept").touch()
    with pytest.raises(CheckpointError, match="--overwrite"):
        check_out(tmp_path / "old")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        check_out(tmp_path / "old", overwrite=True)
    (tmp_path / "old" / "config.json").touch()
    check_out(tmp_path / "old", overwrite=True)
    names = sorted(path.name for path in tmp_path.rglob("*"))
    assert names == ["config.json", "kept", "old"]
