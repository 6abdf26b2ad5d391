"""Every script of the benchmarks imports the package as it is now."""

import importlib
import pkgutil

import pytest

import benchmarks

MODULES = [
    module.name
    for module in pkgutil.walk_packages(benchmarks.__path__, "benchmarks.")
    if not module.ispkg
]


@pytest.mark.parametrize("name", MODULES)
def test_a_script_can_be_imported(name):
    module = importlib.import_module(name)
    assert module.__doc__, name
