"""`python -m benchmarks.landscape make | fit | probe | check | verify`, from the repository's root."""

import argparse

from .check import check
from .fit import build
from .landscape import Landscape
from .merges import Merges


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.landscape", description=__doc__)
    parser.add_argument("what", choices=["make", "fit", "probe", "check", "verify"])
    parser.add_argument(
        "--merges", type=int, help="make: how many to propose, the known starts aside"
    )
    parser.add_argument("--rounds", type=int, default=6, help="probe: of 24 merges each")
    parser.add_argument("--seed", type=int, default=0, help="probe: another one each time")
    arguments = parser.parse_args()
    if arguments.what == "make":
        from .make import MERGES, make  # loads the engine and the models

        make(arguments.merges or MERGES)
    elif arguments.what == "fit":
        build(Merges.load())
    elif arguments.what == "probe":
        from .probe import probe

        landscape = Landscape.load()
        build(probe(landscape, arguments.rounds, seed=arguments.seed), landscape.processes)
    elif arguments.what == "check":
        check(Landscape.load())
    else:
        from .verify import verify

        verify(Landscape.load())


if __name__ == "__main__":
    main()
