"""The public names: what a user can import, and that importing does nothing."""

import doctest
import importlib
import inspect
import json
import re
import subprocess
import sys

import pytest

import paretomerge as pm
from tests.conftest import REPOSITORY

EXAMPLE_FREE = {"__version__"}
ERRORS = {name for name in pm.__all__ if name.endswith("Error")}

FRESH = """
import importlib, json, pkgutil, sys
import paretomerge
for module in pkgutil.walk_packages(paretomerge.__path__, "paretomerge."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
kinds = {name: type(getattr(paretomerge, name)).__name__ for name in paretomerge.__all__}
print(json.dumps(kinds))
"""


def test_every_public_name_is_what_it_is_after_all_submodules_are_imported():
    """`paretomerge.merge` once was a module there."""
    done = subprocess.run(
        [sys.executable, "-c", FRESH], capture_output=True, text=True, check=True
    )
    kinds = json.loads(done.stdout)
    assert set(kinds) == set(pm.__all__)
    assert "module" not in kinds.values()
    assert kinds["merge"] == kinds["plan_merge"] == kinds["load_study"] == "function"
    assert kinds["Study"] == "type" and kinds["__version__"] == "str"


def test_the_list_is_sorted_and_nothing_else_is_there():
    assert pm.__all__ == sorted(pm.__all__) and dir(pm) == pm.__all__
    with pytest.raises(AttributeError, match="nothing"):
        pm.nothing  # noqa: B018


@pytest.mark.parametrize("name", sorted(set(pm.__all__) - EXAMPLE_FREE))
def test_every_public_name_has_a_docstring_with_an_example_that_runs(name):
    value = getattr(pm, name)
    doc = inspect.getdoc(value)
    assert doc and len(doc.splitlines()[0]) <= 120
    if name in ERRORS:
        return
    assert "Example:" in doc, f"{name} has no example"
    if inspect.isfunction(value) or inspect.isclass(value):
        home = importlib.import_module(value.__module__)
        finder = doctest.DocTestFinder(recurse=False)
        (test,) = finder.find(value, name, globs=vars(home) | {"pm": pm})
        assert test.examples, f"{name}'s example has no doctest"
        result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
        assert result.failed == 0


def test_public_methods_of_a_study_say_what_they_take_and_give():
    for name, method in inspect.getmembers(pm.Study, inspect.isfunction):
        if name.startswith("_"):
            continue
        doc = inspect.getdoc(method) or ""
        parameters = [p for p in inspect.signature(method).parameters if p != "self"]
        assert not parameters or "Args:" in doc, name
        for parameter in parameters:
            assert f"{parameter}:" in doc, f"{name}: {parameter}"


def test_the_documentation_names_every_public_name():
    text = (REPOSITORY / "docs" / "api.md").read_text()
    for name in set(pm.__all__) - EXAMPLE_FREE:
        assert re.search(rf"\b{name}\b", text), name


def test_importing_does_nothing_heavy():
    code = (
        "import sys, paretomerge, paretomerge.cli.main\n"
        "heavy = ('torch', 'transformers', 'botorch', 'optuna', 'lm_eval', 'pandas', 'plotly')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["paretomerge", "paretomerge.cli"])
def test_python_m_runs_the_command_line(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "quickstart" in done.stdout


# Makes the libraries of a search look as if they were not installed, then runs a command.
WITHOUT_SEARCH = """
import re, sys
from importlib.metadata import requires

names = [r for r in requires("paretomerge") if r.endswith('extra == "search"')]
hidden = {re.match(r"\\w+", name).group() for name in names}
assert {"lm_eval", "botorch", "optuna"} <= hidden

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
"""
COMMANDS = (
    WITHOUT_SEARCH
    + """
import json
from paretomerge.cli.main import main

for arguments in json.loads(sys.argv[1]):
    sys.argv = ["paretomerge", *arguments]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, (arguments, stop.code)
"""
)
MODELS = REPOSITORY / "paretomerge" / "examples" / "specialists" / "models"
RECIPE = f"""
merge_method: ties
base_model: {MODELS}/base
models:
  - {{model: {MODELS}/order, parameters: {{weight: 0.5, density: 0.4}}}}
  - {{model: {MODELS}/mirror, parameters: {{weight: 0.5, density: 0.4}}}}
tokenizer_source: union
chat_template: chatml
"""


def run_without_search(code, *arguments, folder):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
    )


def test_merging_needs_no_library_of_the_search(tmp_path):
    (tmp_path / "recipe.yml").write_text(RECIPE)
    commands = [
        ["--version"],
        ["methods"],
        ["plan", "recipe.yml"],
        ["merge", "recipe.yml", "out"],
        ["kinship", str(MODELS / "base"), str(MODELS / "order")],
    ]
    done = run_without_search(COMMANDS, json.dumps(commands), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_search_without_its_libraries_says_what_to_install(tmp_path):
    code = WITHOUT_SEARCH + "from paretomerge.cli.main import main; main()"
    done = run_without_search(code, "quickstart", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.endswith("pip install 'paretomerge[search]'\n")
    assert done.stderr.count("\n") == 1
    code = WITHOUT_SEARCH + "import paretomerge as pm; print(pm.merge); pm.Study"
    done = run_without_search(code, folder=tmp_path)
    assert "function merge" in done.stdout
    last_line = done.stderr.splitlines()[-1]
    assert last_line.startswith("ImportError: ")
    assert last_line.endswith("pip install 'paretomerge[search]'")
