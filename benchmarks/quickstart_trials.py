"""Proves that two versions of the package run the same quickstart: trials, scores, checkpoint.

    python -m benchmarks.quickstart_trials dump FILE [--study FOLDER]       # in one version
    python -m benchmarks.quickstart_trials compare FILE [--study FOLDER]    # in the other

FOLDER is the `out` of a finished study, with its record `study.db` and the checkpoint `picked`. The
record is read through Optuna alone, so that records of every version can be read. `compare` prints
every difference and exits with status 1 if there is one. Numbers have to be equal to the last bit,
so both versions run on one machine.
"""

import argparse
import hashlib
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna

from benchmarks.reporting import REPOSITORY, documented_parser

STUDY = REPOSITORY / "paretomerge-quickstart" / "runs" / "study"
STUDY_NAME = "paretomerge"
HELD_OUT = "held_out/"
_ABSOLUTE_PATH = re.compile(r"/[^\s'\"]*/([^\s'\"/]+)")
_LONGEST = 100  # characters of a value that are printed


def read_quickstart(folder: Path, picked: Path) -> dict[str, Any]:
    """All that has to be equal: the trials, the picked recipe, a digest of its weights."""
    return {
        "trials": read_trials(folder / "study.db"),
        "checkpoint": read_checkpoint(picked),
    }


def read_trials(database: Path) -> list[dict[str, Any]]:
    """Parameters, values, state, scores and held-out scores of every trial."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        # Optuna may write to a database that it opens.
        copy = shutil.copy(database, folder)
        study = optuna.load_study(study_name=STUDY_NAME, storage=f"sqlite:///{copy}")
        held_out = held_out_scores(study.user_attrs)
        trials = []
        for trial in study.get_trials(deepcopy=False):
            trials.append(
                {
                    "number": trial.number,
                    "params": trial.params,
                    "values": trial.values,
                    "state": trial.state.name,
                    "scores": trial.user_attrs.get("scores"),
                    "held_out": held_out.get(str(trial.number), {}),
                }
            )
    # As a file has it: tuples are lists.
    text = json.dumps(trials)
    plain: list[dict[str, Any]] = json.loads(text)
    return plain


def held_out_scores(attributes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Number of the trial -> `objectives` and `watched` -> scores.

    attributes: the study's, of which `held_out/NUMBER/objectives` are read.
    """
    scores: dict[str, dict[str, Any]] = {}
    for name, value in attributes.items():
        if name.startswith(HELD_OUT):
            number, _, group = name.removeprefix(HELD_OUT).partition("/")
            scores.setdefault(number, {})[group] = value
    return scores


def read_checkpoint(folder: Path) -> dict[str, str]:
    """The recipe, absolute paths cut to their last name, and the SHA-256 of the weights."""
    recipe = (folder / "mergekit_config.yml").read_text()
    weights = (folder / "model.safetensors").read_bytes()
    return {
        "recipe": _ABSOLUTE_PATH.sub(r"\1", recipe),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }


def differences(before: object, after: object, place: str = "") -> Iterator[str]:
    """Every place where two readings differ, in words."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            inner = f"{place}/{key}"
            yield from differences(before.get(key), after.get(key), inner)
    elif isinstance(before, list) and isinstance(after, list):
        if len(before) != len(after):
            yield f"{place}: {len(before)} entries before, {len(after)} after"
        for i, (old, new) in enumerate(zip(before, after, strict=False)):
            yield from differences(old, new, f"{place}/{i}")
    elif not same(before, after):
        yield f"{place}: {shortened(before)} before, {shortened(after)} after"


def same(before: object, after: object) -> bool:
    """Whether two values are equal; NaN equals itself."""
    return before == after or (before != before and after != after)


def shortened(value: object) -> str:
    """The value as text, not too long."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def parse_arguments() -> argparse.Namespace:
    """The command line, as this module's docstring has it."""
    parser = documented_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("dump", "compare"):
        command = commands.add_parser(name)
        command.add_argument("file", type=Path)
        command.add_argument(
            "--study", type=Path, default=STUDY, help="folder of the study"
        )
        command.add_argument(
            "--picked", type=Path, help="checkpoint (default: STUDY/picked)"
        )
    return parser.parse_args()


def main() -> int:
    """Dump or compare; the exit status."""
    arguments = parse_arguments()
    picked = arguments.picked or arguments.study / "picked"
    reading = read_quickstart(arguments.study, picked)
    n_trials = len(reading["trials"])
    if arguments.command == "dump":
        arguments.file.write_text(json.dumps(reading, indent=1) + "\n")
        print(f"{n_trials} trials and a checkpoint written to {arguments.file}")
        return 0
    found = list(differences(json.loads(arguments.file.read_text()), reading))
    for difference in found:
        print(difference)
    print(f"{n_trials} trials and a checkpoint compared, {len(found)} differences")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
