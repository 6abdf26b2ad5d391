"""Where a trial's time goes on the specialists: `python benchmarks/overhead.py` prints the split and its share.

The goal: asking, merging and bookkeeping together take less than a third of a trial's time.
"""

import tempfile
from collections import Counter
from pathlib import Path

from paretomerge.config.build import load_study
from paretomerge.study.loop import Event
from paretomerge.study.study import Placement, Study

STUDY = Path(__file__).resolve().parent.parent / "examples" / "specialists" / "study.yaml"


def main() -> None:
    shipped, config = load_study(STUDY)
    with tempfile.TemporaryDirectory() as folder:
        placement = Placement(shipped.dtype, shipped.device)
        study = Study(folder, shipped.space, shipped.goals, shipped.sampler, placement=placement)
        events: list[Event] = []
        study.run(config.trials, events.append)
    totals: Counter[str] = Counter()
    for event in events[1:]:  # the first trial loads the models
        totals.update(event.seconds)
    whole = sum(totals.values())
    for part in ("ask", "merge", "evaluate", "record"):
        print(
            f"{part:10s} {totals[part] / len(events[1:]):6.3f} s a trial  {totals[part] / whole:6.1%}"
        )
    print(
        f"overhead   {1 - totals['evaluate'] / whole:6.1%} of a trial (goal: under 33.3 %), {len(events)} trials, {whole:.0f} s"
    )


if __name__ == "__main__":
    main()
