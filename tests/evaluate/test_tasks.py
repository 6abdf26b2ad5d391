"""How many examples a task has, and what is said where there are none."""

import json
from pathlib import Path

import pytest

from paretomerge.errors import EvaluationError
from paretomerge.evaluate.tasks import HarnessTask, TaskLoader

TASK = """
task: {name}
dataset_path: json
test_split: train
dataset_kwargs: {{data_files: {data}}}
output_type: generate_until
doc_to_text: '{{{{q}}}}'
doc_to_target: '{{{{a}}}}'
{more}
generation_kwargs: {{until: ['.'], max_gen_toks: 2}}
metric_list: [{{metric: exact_match}}]
"""


def loader(folder: Path, n: int, more: str = "", **settings: object) -> TaskLoader:
    data = folder / "data.jsonl"
    lines = [json.dumps({"q": "a" * i, "a": "b"}) for i in range(1, n + 1)]
    data.write_text("\n".join(lines))
    text = TASK.format(name="letters", data=data, more=more)
    (folder / "letters.yaml").write_text(text)
    made = TaskLoader(include_path=folder, **settings)  # type: ignore[arg-type]
    made.check({"mine": HarnessTask("letters")})
    return made


def test_a_task_has_its_own_number_of_search_examples(tmp_path: Path) -> None:
    tasks = loader(tmp_path, 10, search_items=4)
    for own, expected in ((None, 4), (2, 2), (9, 9)):
        spec = HarnessTask("letters", search_items=own)
        assert len(tasks.load("mine", spec, "search")) == expected
        assert len(tasks.load("mine", spec, "held_out")) == 10 - expected


def test_held_out_examples_have_a_greatest_number(tmp_path: Path) -> None:
    spec = HarnessTask("letters")
    everything = loader(tmp_path, 10, search_items=4)
    all_held_out = everything.load("mine", spec, "held_out").content_digests
    for most, expected in ((3, 3), (6, 6), (100, 6)):
        tasks = loader(tmp_path, 10, search_items=4, held_out_items=most)
        held_out = tasks.load("mine", spec, "held_out")
        assert len(held_out) == expected
        assert set(held_out.content_digests) <= set(all_held_out)
        search = tasks.load("mine", spec, "search")
        assert len(search) == 4
        assert not set(search.content_digests) & set(held_out.content_digests)


def test_an_error_names_the_score(tmp_path: Path) -> None:
    tasks = loader(tmp_path, 10)
    spec = HarnessTask("letters", search_items=10)
    with pytest.raises(
        EvaluationError, match=r"mine: search_items must be between 1 and 9.*not 10"
    ):
        tasks.load("mine", spec, "search")


def test_a_task_without_examples(tmp_path: Path) -> None:
    (tmp_path / "utils.py").write_text(
        "def none(dataset):\n    return dataset.select([])\n"
    )
    tasks = loader(tmp_path, 3, "process_docs: !function utils.none")
    with pytest.raises(EvaluationError, match="mine: task 'letters' has no examples"):
        tasks.load("mine", HarnessTask("letters"), "search")
    for text, message in (("", "has no examples"), ("{broken", "cannot be loaded: ")):
        tasks = loader(tmp_path, 1)
        (tmp_path / "data.jsonl").write_text(text)
        with pytest.raises(EvaluationError, match=f"mine: task 'letters' {message}"):
            tasks.load("mine", HarnessTask("letters"), "search")


def test_one_example_cannot_be_split(tmp_path: Path) -> None:
    tasks = loader(tmp_path, 1)
    with pytest.raises(EvaluationError, match="mine: one example cannot be"):
        tasks.load("mine", HarnessTask("letters"), "search")


def test_every_unknown_task_is_named(tmp_path: Path) -> None:
    tasks = loader(tmp_path, 2)
    with pytest.raises(EvaluationError) as raised:
        tasks.check({"a": HarnessTask("leters"), "b": HarnessTask("nothing_at_all")})
    assert "'leters'" in raised.value.parts[0]
    assert "'nothing_at_all'" in raised.value.parts[1]
