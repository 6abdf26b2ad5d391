"""The prompts that a router is trained on: from files, or from the search examples of a study."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from paretomerge.errors import ConfigError, ErrorCollector, unknown_name
from paretomerge.systems.line_texts import read_line_texts

if TYPE_CHECKING:
    from paretomerge.evaluate.harness import TaskExamples
    from paretomerge.study.study import Study

_KEYS = ("prompt", "text")


def read_prompts(file: Path) -> list[str]:
    """Read prompts from a file.

    Args:
        file: Text with a prompt in each line, or `.jsonl` with an object with the key `prompt` (or
            `text`), or a string, in each line. Empty lines are left out.

    Returns:
        The prompts, in their order.

    Raises:
        ConfigError: The file cannot be read, or a line has no prompt.
    """
    return read_line_texts(file, _KEYS, str(file))


def study_prompts(
    study: "Study", tasks: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """Take the prompts of a study's tasks, from its search examples alone.

    Args:
        study: The study.
        tasks: Name of a source -> names of the study's tasks whose prompts belong to it.

    Returns:
        Name of a source -> the distinct prompts, as the harness sends them to a model.

    Raises:
        ConfigError: The study has no such task.
    """
    from paretomerge.evaluate.evaluator import evaluators_in
    from paretomerge.evaluate.harness import HarnessEvaluator
    from paretomerge.study.parts import StudyParts

    goals = StudyParts(study.settings).goals()
    examples: dict[str, TaskExamples] = {}
    for part in evaluators_in(goals.evaluator):
        if isinstance(part, HarnessEvaluator):
            examples |= part.examples("search")
    problems = ErrorCollector()
    prompts: dict[str, list[str]] = {}
    for source, names in tasks.items():
        # A dict, since the answers of a multiple-choice question share their prompt.
        distinct: dict[str, None] = {}
        for name in names:
            with problems.collect():
                if name not in examples:
                    raise ConfigError(
                        f"--task {source}={name}: {unknown_name('task', name, examples)}"
                    )
                for requests in examples[name].requests:
                    distinct |= dict.fromkeys(
                        str(request.args[0]) for request in requests
                    )
        prompts[source] = list(distinct)
    problems.raise_if_any()
    return prompts
