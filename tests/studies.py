"""Studies for tests: a study.yaml as the search that it describes."""

from pathlib import Path

from paretomerge.study.build import build_search
from paretomerge.study.search import Search
from paretomerge.study.study import load_study


def open_search(path: Path) -> Search:
    """Everything of a study.yaml, loaded."""
    return build_search(load_study(path).settings)
