"""Write a commented study.yaml to begin with."""

import os
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import yaml

from paretomerge.checkpoint.reference import model_parts
from paretomerge.config.settings import check_device
from paretomerge.errors import ConfigError
from paretomerge.space.sources import named_sources

_TEMPLATE = """\
# A study of paretomerge. Every key: docs/study.md. Relative paths start from this file's folder.
#   paretomerge plan {name}        # checks it and estimates its time
#   paretomerge search {name}      # runs it; run it again to resume
base: {base}
models:
{models}
# What to improve; a front needs two or more. Tasks are those of lm-evaluation-harness:
# `lm_eval ls tasks` lists them.
objectives:{examples}
{tasks}
  # - task: mmlu
  #   search_items: 50                 # its own number, in place of evaluate.search_items
  # - function: my_metrics:brevity     # in my_metrics.py: def brevity(model, tokenizer) -> float
  #   direction: minimize
  # - sparsity: true                   # closeness to the base

# What may vary. More groups of layers make a finer and slower search.
space:
  methods: [{methods}]
  groups: 1
{starts}
# RegMean reads what each model was tuned for. It was better than merges without data wherever both
# were measured (docs/systems.md). To search over it, put `methods: [regmean]` above, and:
# calibration:
#   data:                              # a file such as math.jsonl, or a task's search examples
{calibration}

evaluate:
  search_items: 200                    # of each task; the other examples are held out
  # batch_size: 16

# watch: [hellaswag]                   # scored on held-out examples at the end, never searched on
# constraints:
#   - task: hellaswag
#     at_least: 0.4

# tokenizer_source: base               # base or union, where the models have other tokens
# chat_template: auto
device: {device}
trials: 60
out: runs/study
"""
_TASKS = ("arc_easy", "piqa")
_EXAMPLES = "                            # two examples: put your own tasks here"
_METHODS = ("task_arithmetic", "ties")


def write_study_file(
    file: Path,
    base: str,
    models: Sequence[str],
    tasks: Sequence[str],
    device: str,
    methods: Sequence[str] = _METHODS,
    starts: Sequence[str] = (),
) -> None:
    """Write a commented study.yaml.

    Args:
        file: The file, which must not exist.
        base: The base model.
        models: The fine-tunes, two or more.
        tasks: Tasks of lm-evaluation-harness; two examples by default.
        device: `cpu`, `cuda` or `cuda:N`.
        methods: Merge methods to search over.
        starts: Recipe files to try first, from the file's folder.

    Raises:
        ConfigError: The file exists or cannot be written, there are fewer than two models, or the
            device has another form.
    """
    if file.exists():
        raise ConfigError(f"{file}: exists; remove it, or name another with --file")
    if len(models) < 2:
        raise ConfigError("init: name the base and two or more fine-tunes of it")
    check_device("--device", device)
    names = [_from_folder(file.parent, model) for model in models]
    # Refused here and not at the first search: two models of one name.
    named_sources(names)
    starts_key = ""
    if starts:
        starts_key = f"starts: [{', '.join(starts)}]  # recipes to try first\n"
    text = _TEMPLATE.format(
        methods=", ".join(methods),
        starts=starts_key,
        name=file.name,
        base=_quoted(_from_folder(file.parent, base)),
        models="\n".join(f"  - {_quoted(name)}" for name in names),
        examples="" if tasks else _EXAMPLES,
        tasks="\n".join(f"  - task: {_quoted(task)}" for task in tasks or _TASKS),
        calibration=_calibration(names, tasks or _TASKS),
        device=device,
    )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be written: {error.strerror}; name another file with --file"
        ) from error


def _calibration(names: Sequence[str], tasks: Sequence[str]) -> str:
    """Commented lines that give each model a text: the tasks in turn, for the user to correct."""
    lines = []
    for name, task in zip(names, cycle(tasks), strict=False):
        lines.append(f"#     {_quoted(name)}: {{ task: {_quoted(task)} }}")
    return "\n".join(lines)


def next_step(file: Path | str, tasks: Sequence[str]) -> str:
    """Say what to do with a new study.yaml.

    Args:
        file: The file, as it is to be shown.
        tasks: The tasks that were asked for.

    Returns:
        The command; without tasks, that the file has examples in their place.
    """
    command = f"paretomerge search {file}"
    if tasks:
        return f"next: {command}"
    examples = " and ".join(_TASKS)
    return (
        f"next: put your own tasks in place of {examples} in {file} (docs/study.md, "
        f"`objectives`), then: {command}"
    )


def _from_folder(folder: Path, model: str) -> str:
    """A local model's path from the study's folder; anything else is a name on the Hub."""
    return "+".join(_part_from_folder(folder, part) for part in model_parts(model))


def _part_from_folder(folder: Path, part: str) -> str:
    path = Path(part).expanduser()
    if not path.exists():
        return part
    relative = os.path.relpath(path, folder)
    # With a dot: `math` could be read as a name on the Hub.
    return relative if relative.startswith("..") else f"./{relative}"


def _quoted(text: str) -> str:
    """A string as YAML, with quotes where it needs them."""
    return yaml.safe_dump(text, width=1000).removesuffix("...\n").strip()
