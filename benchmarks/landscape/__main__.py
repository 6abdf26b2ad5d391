"""`python -m benchmarks.landscape make | fit | probe | check | verify`."""

from benchmarks import landscape
from benchmarks.landscape.check import check
from benchmarks.landscape.fit import build
from benchmarks.reporting import documented_parser
from paretomerge.problems import MergeLandscape, ScoredMerges


def main() -> None:
    """Run one of the commands."""
    parser = documented_parser(landscape.__doc__)
    parser.add_argument("command", choices=["make", "fit", "probe", "check", "verify"])
    parser.add_argument(
        "--merges", type=int, default=3000, help="make: without the baselines"
    )
    parser.add_argument(
        "--rounds", type=int, default=6, help="probe: of 24 merges each"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="probe: another one each time"
    )
    arguments = parser.parse_args()
    if arguments.command == "make":
        from benchmarks.landscape.make import make  # loads the engine and the models

        make(arguments.merges)
    elif arguments.command == "fit":
        build(ScoredMerges.load())
    elif arguments.command == "probe":
        from benchmarks.landscape.probe import probe

        shipped = MergeLandscape.load()
        merges = probe(shipped, arguments.rounds, seed=arguments.seed)
        build(merges, shipped.processes)
    elif arguments.command == "check":
        check(MergeLandscape.load())
    else:
        from benchmarks.landscape.verify import verify

        verify(MergeLandscape.load())


if __name__ == "__main__":
    main()
