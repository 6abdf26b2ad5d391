"""What benchmarks have in common that run searches on several seeds: their arguments, and a mean with its spread."""

import argparse
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path


def arguments(about: str | None, several: str, names: Iterable[str]) -> argparse.Namespace:
    """`run FOLDER [--seeds ...] [--SEVERAL ...]` or `table`; what was chosen of `names` is in `chosen`."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="what", required=True)
    measuring = commands.add_parser("run")
    measuring.add_argument("folder", type=Path)
    measuring.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    measuring.add_argument(
        f"--{several}", dest="chosen", nargs="+", choices=list(names), default=list(names)
    )
    commands.add_parser("table")
    return parser.parse_args()


def spread(values: Sequence[float], digits: int = 3) -> str:
    """The mean and, of two values or more, their standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"
