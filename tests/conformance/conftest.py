"""The models and one mergekit process, for the session; without an oracle every test that asks for it is skipped and says why."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paretomerge.merging.engine import merge
from paretomerge.recipe import Recipe
from tests.conformance.checkpoints import build
from tests.conformance.oracle import Answer, Oracle, OracleMissingError, find_or_install
from tests.conformance.recipes import write


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with all models; treat it as read-only."""
    return build(tmp_path_factory.mktemp("conformance") / "models")


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    try:
        process = Oracle(find_or_install(), tmp_path_factory.mktemp("oracle") / "log")
    except OracleMissingError as error:
        pytest.skip(str(error))
    yield process
    process.close()


@pytest.fixture
def ask(oracle: Oracle, checkpoints: Path, tmp_path: Path) -> Callable[..., Answer]:
    """Give a recipe's text to mergekit."""
    counter = itertools.count()

    def ask(text: str, seed: int = 0) -> Answer:
        here = tmp_path / f"oracle-{next(counter)}"
        return oracle.merge(
            write(text, checkpoints, here.with_suffix(".yml")), here, seed=seed
        )

    return ask


@pytest.fixture
def ours(checkpoints: Path, tmp_path: Path) -> Callable[..., Path]:
    """Merge a recipe's text with paretomerge."""
    counter = itertools.count()

    def ours(text: str, seed: int = 0) -> Path:
        here = tmp_path / f"ours-{next(counter)}"
        recipe = Recipe.load(write(text, checkpoints, here.with_suffix(".yml")))
        return merge(dataclasses.replace(recipe, seed=seed), here)

    return ours
