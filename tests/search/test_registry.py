import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import optuna
import pytest
import yaml
from optuna.distributions import FloatDistribution

from paretomerge.errors import ConfigError
from paretomerge.search.baselines.scalarised import ScalarisedSampler
from paretomerge.search.mmmo.sampler import MMMOSampler
from paretomerge.search.point_sampler import PointSampler
from paretomerge.search.registry import PRESETS, SearchProblem, make
from paretomerge.testing import CONDITIONS, SPACE, check_define_by_run, check_sampler
from tests.conftest import REPOSITORY
from tests.studies import open_search

SMALL = {
    "cma": {"population_size": 4},
    "evolver": {"population_size": 5},
    "m2n2": {"archive_size": 5},
    "map": {"generations": 5},
}
ITS_OWN_STATE = (
    "random",
    "nsga2",
    "nsga3",
    "tpe",
    "gp",
)  # Optuna's: lost with the process
COSTLY = {
    "gp": {"trials": 9, "objectives": (2,)},
    "mmmo": {"trials": 7, "objectives": (2,)},
    "policy": {"trials": 10, "objectives": (1, 3)},
    "map": {"trials": 13, "objectives": (1, 3)},
}
LOCAL = [name for name in PRESETS if name != "llm"]


def problem(seed: int = 0, **changes) -> SearchProblem:
    settings = {"conditions": CONDITIONS, "starts": 4, "sources": 2, "trials": 18}
    return SearchProblem(SPACE, 2, seed, **(settings | changes))


@pytest.mark.parametrize("name", LOCAL)
def test_every_preset_keeps_the_contract(name):
    check_sampler(
        lambda seed: make(name, problem(seed), SMALL.get(name)),
        exact=name not in ITS_OWN_STATE,
        repeats=name in (*ITS_OWN_STATE, "cma"),
        **COSTLY.get(name, {}),
    )


@pytest.mark.parametrize("name", LOCAL)
def test_every_preset_takes_parameters_as_they_come(name):
    check_define_by_run(
        lambda seed: make(name, SearchProblem({}, 2, seed, starts=4), SMALL.get(name))
    )


def test_every_row_says_what_it_is():
    assert list(PRESETS) == [row.name for row in PRESETS.values()]
    for row in PRESETS.values():
        assert row.rule and row.paper and not row.rule.endswith(".")


def test_the_budget_sets_the_population():
    assert make("nsga2", problem(trials=60)).population_size == 20
    assert make("nsga2", problem(trials=1000)).population_size == 50
    assert make("nsga2", problem(), {"population_size": 7}).population_size == 7
    nsga3 = make("nsga3", SearchProblem(SPACE, 6, trials=60))
    assert nsga3.population_size == 20


@pytest.mark.parametrize(("size", "parts"), [(None, 4), (10, 3), (50, 8)])
def test_nsga3_has_no_more_directions_than_members(monkeypatch, size, parts):
    given = {}
    monkeypatch.setattr(
        optuna.samplers, "NSGAIIISampler", lambda **options: given.update(options)
    )
    make(
        "nsga3",
        SearchProblem(SPACE, 3, trials=60),
        {} if size is None else {"population_size": size},
    )
    assert given["dividing_parameter"] == parts and given["population_size"] == (
        size or 20
    )


def test_policy_begins_where_it_is_told():
    sampler = make("policy", problem(), {"n_startup": 3})
    assert sampler.n_startup == sampler.proposer.n_startup == 3


def test_optunas_classes_and_our_own_by_their_names():
    for name in (
        "NSGAIISampler",
        "TPESampler",
        "RandomSampler",
        "GPSampler",
        "QMCSampler",
        "NSGAIIISampler",
    ):
        assert type(make(name, problem())) is getattr(optuna.samplers, name)
    assert isinstance(make("MMMOSampler", problem(), {"elites": 3}), MMMOSampler)
    assert isinstance(
        make("CmaEsSampler", SearchProblem(SPACE, 1)), optuna.samplers.CmaEsSampler
    )


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("nsga", {}, "did you mean 'nsga"),
        ("MMOSampler", {}, "did you mean 'MMMOSampler'"),
        ("nsga2", {"population": 3}, "did you mean 'population_size'"),
        ("nsga2", {"population_size": 1}, "population_size"),
        ("tpe", {"n_startup": 3}, "did you mean 'n_startup_trials'"),
        ("mmmo", {"elite": 3}, "did you mean 'elites'"),
        ("evolver", {"populaton_size": 3}, "did you mean 'population_size'"),
        ("evolver", {"population_size": 3}, "population_size of 4 or more"),
        (
            "evolver",
            {"population_size": "many"},
            "evolver: population_size: expected a whole number, got 'many'",
        ),
        ("evolver", {"differential": 0}, "0 < differential <= 2"),
        ("kinship", {"top": 1}, "top >= 2"),
        ("m2n2", {"archive_size": 1}, "archive_size >= 2"),
        ("map", {"generations": 0}, "generations >= 1"),
        ("qmc", {"generations": 3}, "unknown option of qmc"),
        ("mmmo", {"seed": "x"}, "seed: expected a whole number, got 'x'"),
        (
            "mmmo",
            {"reference": [1]},
            "reference: expected 2 numbers, one per objective, got 1",
        ),
        (
            "mmmo",
            {"reference": 3},
            "reference: expected a list of finite numbers, one per objective, got 3",
        ),
        (
            "mmmo",
            {"reference": [float("nan"), 0]},
            "reference: expected a list of finite numbers",
        ),
        (
            "mmmo",
            {"reference": ["a", "b"]},
            "reference: expected a list of finite numbers",
        ),
        ("mmmo", {"n_startup": "x"}, "n_startup: expected a whole number, got 'x'"),
        ("mmmo", {"crossover": 7}, "crossover: expected a probability, got 7"),
        ("mmmo", {"refit": float("nan")}, "refit: expected a number, got nan"),
        ("mmmo", {"conditions": 3}, "unknown option of mmmo 'conditions'"),
        (
            "mmmo",
            {"importance": {"weight/a": "x"}},
            "importance: weight/a: expected a number, got 'x'",
        ),
        ("map", {"n_startup": "x"}, "n_startup: expected a whole number, got 'x'"),
        ("kinship", {"max_kinship": 7}, "max_kinship in [-1, 1]"),
        (
            "policy",
            {"learning_rate": True},
            "learning_rate: expected a number, got True",
        ),
        (
            "tpe",
            {"n_startup_trials": "x"},
            "n_startup_trials: expected a whole number, got 'x'",
        ),
        (
            "nsga2",
            {"crossover_prob": "x"},
            "crossover_prob: expected a number, got 'x'",
        ),
        ("GridSampler", {}, "unknown name 'GridSampler'"),
        ("cma", {"start": 5}, "start: expected parameters and their values, got 5"),
        ("cma", {"start": {"wieght/a": 1}}, "did you mean 'weight/a'"),
        (
            "cma",
            {"start": {"weight/a": "x"}},
            "start: weight/a: expected a number, got 'x'",
        ),
        ("cma", {"weights": [1, 2, 3]}, "expected 2 numbers"),
        ("cma", {"weights": [-1, 2]}, "0 or more"),
        ("cma", {"weights": "equal"}, "list of numbers"),
        ("cma", {"kind": "chebyshev"}, "did you mean 'tchebycheff'"),
        ("cma", {"sigma": 0}, "0 < sigma"),
        ("cma", {"population_size": 2}, "3 or more"),
        ("CmaEsSampler", {}, "choose `cma`"),
        ("llm", {"inner": "llm"}, "another sampler"),
        ("llm", {"modle": "x"}, "did you mean 'model'"),
        ("llm", {"inner": "nsga"}, "did you mean 'nsga"),
    ],
)
def test_what_cannot_be_followed_is_refused(name, options, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        make(name, problem(), options)


def test_a_language_model_in_front_of_a_preset(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("OPENAI_MODEL", "any")
    sampler = make("llm", problem(), {"inner": "evolver", "share": 0.25})
    assert isinstance(sampler.inner, PointSampler)


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("gp", "greenlet"),
        ("GPSampler", "greenlet"),
        ("cma", "cmaes"),
        ("CmaEsSampler", "cmaes"),
    ],
)
def test_a_library_that_is_missing_is_said_when_the_sampler_is_made(
    monkeypatch, name, library
):
    monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    told = f"needs the library {library}, which is not installed: pip install 'paretom"
    with pytest.raises(ConfigError, match=re.escape(told)):
        make(name, SearchProblem(SPACE, 1))


def test_a_study_whose_sampler_lacks_a_library_does_not_begin(
    monkeypatch, tmp_path, pico
):
    monkeypatch.setitem(sys.modules, "greenlet", None)
    with pytest.raises(ConfigError, match="GPSampler needs the library greenlet"):
        open_search(written(tmp_path, pico, "gp"))


@pytest.mark.parametrize("library", ["greenlet", "cmaes"])
def test_libraries_that_samplers_import_late_are_installed_for_a_search(library):
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    needed = tomllib.loads(text)["project"]["optional-dependencies"]["search"]
    assert any(requirement.startswith(library) for requirement in needed)
    pins = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert any(pin.startswith(f"{library}==") for pin in pins)


LATE_IMPORTS = """
import optuna
from paretomerge.search.registry import SearchProblem, make
from paretomerge.testing import SPACE

study = optuna.create_study(
    directions=["maximize"] * 2, sampler=make("gp", SearchProblem(SPACE, 2))
)
for i in range(12):
    trial = study.ask(SPACE)
    study.tell(trial, [i % 5, i % 3])
"""


def test_gp_has_all_that_optuna_asks_for():
    """In a process of its own: Optuna says what it lacks only once, when it first proposes."""
    command = [sys.executable, "-c", LATE_IMPORTS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "unavailable" not in done.stderr
    assert "[W " not in done.stderr


def test_a_seed_may_be_any_integer():
    for name in LOCAL:
        study = optuna.create_study(
            directions=["maximize"] * 2, sampler=make(name, problem(-3))
        )
        assert study.ask(dict(SPACE)).params


def test_the_sobol_sequence_fills_every_interval_once():
    space = {"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1)}
    study = optuna.create_study(
        directions=["maximize"] * 2, sampler=make("qmc", SearchProblem(space, 2))
    )
    for _ in range(16):
        study.tell(study.ask(space), [0.0, 0.0])
    for name in space:
        assert sorted(int(16 * t.params[name]) for t in study.trials) == list(range(16))


def test_the_table_is_not_to_be_written_to():
    with pytest.raises(TypeError):
        PRESETS["mine"] = PRESETS["random"]
    assert inspect.isfunction(PRESETS["random"].build)


@pytest.mark.parametrize(
    "sampler",
    [
        "evolver",
        {"name": "evolver", "population_size": 8},
        "MMMOSampler",
        "TPESampler",
        {"name": "cma"},
    ],
)
def test_study_yaml_takes_a_name_or_a_name_with_options(tmp_path, pico, sampler):
    study = open_search(written(tmp_path, pico, sampler))
    expected = {
        "evolver": PointSampler,
        "MMMOSampler": MMMOSampler,
        "TPESampler": optuna.samplers.TPESampler,
        "cma": ScalarisedSampler,
    }
    assert (
        type(study.sampler)
        is expected[sampler if isinstance(sampler, str) else sampler["name"]]
    )


@pytest.mark.parametrize(
    ("sampler", "told"),
    [
        ({"population": 8}, "a name such as .* or `name` and options"),
        ({"name": 3}, "a name such as .* or `name` and options"),
        ("", "unknown name"),
    ],
)
def test_study_yaml_without_a_name_is_refused(tmp_path, pico, sampler, told):
    with pytest.raises(ConfigError, match=told):
        open_search(written(tmp_path, pico, sampler))


def test_the_documentation_has_every_preset():
    text = (Path(__file__).parents[2] / "docs" / "samplers.md").read_text()
    for name in PRESETS:
        assert f"| `{name}` |" in text and f"**`{name}`**" in text


def table_rows(text):
    """The cells of every row of the tables in a text."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip(" *`") for cell in line.split("|")[1:-1]] for line in lines]


def test_the_table_of_what_to_use_when_is_that_of_the_benchmark():
    docs = REPOSITORY / "docs"
    benchmark = (docs / "lab" / "search-benchmark.md").read_text(encoding="utf-8")
    text = (docs / "samplers.md").read_text(encoding="utf-8")
    section = text.split("## Which sampler, when\n")[1].split("\n## ")[0]
    header, _, *rows = table_rows(section)
    assert [row[0] for row in rows] == ["30", "60", "100", "300"]
    assert set(header[1:]) == set(LOCAL)
    for row in rows:
        part = benchmark.split(f"### {row[0]} evaluations\n")[1].split("\n###")[0]
        names, *measured = table_rows(part)
        (cells,) = [cells for cells in measured if cells[0] == "landscape-noisy"]
        means = {
            name: cell.partition(" ")[0]
            for name, cell in zip(names, cells, strict=True)
        }
        assert row[1:] == [means.get(name, "") for name in header[1:]]


def written(folder, pico, sampler):
    (folder / "mine.py").write_text(
        "def score(model, tokenizer):\n    return 1.0\n\n\n"
        "def other(model, tokenizer):\n    return 2.0\n"
    )
    models = {
        "base": str(pico / "base"),
        "models": [str(pico / "ada"), str(pico / "bob")],
    }
    data = models | {
        "objectives": [{"function": "mine:score"}, {"function": "mine:other"}],
        "sampler": sampler,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(data))
    return path
