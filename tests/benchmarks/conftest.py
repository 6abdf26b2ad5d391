"""The benchmarks are scripts: their folder is where they import each other from."""

import sys

import pytest

from tests.conftest import REPOSITORY


@pytest.fixture(scope="package", autouse=True)
def scripts():
    folder = str(REPOSITORY / "benchmarks")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)
