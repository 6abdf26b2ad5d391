import subprocess
import sys

import pytest

import paretomerge


def test_public_names():
    assert paretomerge.__all__ == sorted(paretomerge.__all__)
    assert {"Recipe", "merge", "Study", "MMMOSampler"} <= set(paretomerge.__all__)
    for name in paretomerge.__all__:
        assert getattr(paretomerge, name) is not None
    with pytest.raises(AttributeError):
        paretomerge.nothing  # noqa: B018


def test_importing_does_nothing_heavy():
    code = "import sys, paretomerge, paretomerge.cli.main; print([m for m in ('torch', 'transformers', 'botorch', 'optuna') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
