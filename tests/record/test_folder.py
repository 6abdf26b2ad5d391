from pathlib import Path

import pytest

from paretomerge.errors import StudyError
from paretomerge.record.folder import check_writable, make_folder


def test_a_check_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    make_folder(tmp_path / "a" / "b")
    check_writable(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_a_place_that_takes_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (Path("/proc/none/x"), tmp_path / "file" / "x"):
        for check in (check_writable, make_folder):
            with pytest.raises(StudyError, match=r"cannot write.*Set another `out`"):
                check(folder)
