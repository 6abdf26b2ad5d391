from typing import Any

import pytest

from paretomerge.record.changes import describe_changes


@pytest.mark.parametrize(
    ("before", "now", "text"),
    [
        ({"seed": 0}, {"seed": 1}, "seed changed since (seed: 0, now 1)"),
        (
            {"space": {"subset": False, "methods": ["ties"], "order": "given"}},
            {"space": {"subset": True, "methods": ["sce"], "order": "given"}},
            "space changed since (space.methods: ['ties'], now ['sce']; "
            "space.subset: false, now true)",
        ),
        (
            {"objectives": [{"task": "a"}, {"task": "b"}]},
            {"objectives": [{"task": "a"}, {"task": "b", "metric": "acc"}]},
            "objectives changed since (objectives.1.metric: not set, now 'acc')",
        ),
        (
            {"files of base": "12ab", "dtype": "float32"},
            {"files of base": "34cd"},
            "dtype, files of base changed since (dtype: 'float32', now not set)",
        ),
        (
            {"files of base": "12"},
            {"files of base": "3"},
            "files of base changed since",
        ),
    ],
)
def test_what_changed_is_said(
    before: dict[str, Any], now: dict[str, Any], text: str
) -> None:
    assert describe_changes(before, now) == text


def test_many_changes_are_cut() -> None:
    before = {"space": {str(i): 0 for i in range(8)}}
    now = {"space": {str(i): 1 for i in range(8)}}
    assert describe_changes(before, now).endswith("space.4: 0, now 1; and 3 more)")
