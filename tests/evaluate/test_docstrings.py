import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["evaluator", "function", "time_limit"])
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(f"paretomerge.evaluate.{name}")
    outcome = doctest.testmod(module)
    assert outcome.attempted and not outcome.failed
