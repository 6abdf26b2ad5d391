"""The tables of `benchmarks.search`: who stands where at 30, 60, 100 and 300 evaluations."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import ttest_1samp

from benchmarks.reporting import Entry, markdown_table, read_entries
from paretomerge.types import Array

EVERY = 10
"""Evaluations between two points of a curve."""

BUDGETS = (30, 60, 100, 300)
OURS = "mmmo"
CLOSEST = "botorch"
"""The peer that is measured on more seeds where five do not tell it from ours."""

SEEDS = range(5)
"""The seeds of the tables of all peers."""

PAIR_BUDGET = 60
PAIR_TITLE = f"### {OURS} and {CLOSEST} at {PAIR_BUDGET} evaluations, where five seeds show a tie"


@dataclass(frozen=True)
class Cell:
    """One search: a peer and a seed on one problem.

    Attributes:
        peer: which optimiser.
        seed: of the optimiser and of the noise.
        share: of the true front's hypervolume after 10, 20, ... evaluations.
        seconds: mean per ask, over each ten evaluations.
    """

    peer: str
    seed: int
    share: tuple[float, ...]
    seconds: tuple[float, ...]

    @property
    def evaluations(self) -> int:
        """How long the search was."""
        return len(self.share) * EVERY

    def entry(self) -> Entry:
        """The cell as a line of the result file."""
        return {
            "peer": self.peer,
            "seed": self.seed,
            "share": [round(value, 5) for value in self.share],
            "seconds": [round(value, 4) for value in self.seconds],
        }


Cells = Mapping[tuple[str, int], Cell]
"""(peer, seed) -> cell, of one problem."""

Problems = Mapping[str, Cells]
"""Name of the problem -> its cells."""


def load(path: Path) -> dict[tuple[str, int], Cell]:
    """The cells of one problem; the last one where there are several of a peer and seed."""
    cells: dict[tuple[str, int], Cell] = {}
    for entry in read_entries(path):
        key = (entry["peer"], entry["seed"])
        share, seconds = tuple(entry["share"]), tuple(entry["seconds"])
        cells[key] = Cell(*key, share, seconds)
    return cells


# ----- one problem at one budget


@dataclass(frozen=True)
class Row:
    """One problem at one budget.

    Attributes:
        problem: its name.
        budget: evaluations.
        shares: peer -> share by seed, of the seeds that every listed peer has.
    """

    problem: str
    budget: int
    shares: Mapping[str, Array]

    def rank(self, peer: str) -> int:
        """1 + the number of peers with a larger mean."""
        mean = self.mean(peer)
        return 1 + sum(self.mean(other) > mean for other in self.shares)

    def mean(self, peer: str) -> float:
        """The mean over the seeds."""
        return float(self.shares[peer].mean())

    @property
    def best(self) -> str:
        """The peer with the largest mean."""
        return max(self.shares, key=self.mean)

    def ties_with_best(self, peer: str) -> bool:
        """Whether the peer is not significantly different from the best one."""
        best = self.shares[self.best]
        return not differs(best - self.shares[peer])


def differs(difference: Array) -> bool:
    """Whether a difference over the seeds is significant: paired t-test, p < 0.05.

    The test has no answer where the difference is the same at every seed: it is then significant
    unless it is zero.
    """
    if np.ptp(difference) < 1e-9:
        is_zero = abs(difference[0]) <= 1e-9
        return len(difference) > 1 and not is_zero
    return bool(ttest_1samp(difference, 0.0).pvalue < 0.05)


def row(problem: str, cells: Cells, budget: int, peers: Iterable[str]) -> Row | None:
    """The row of the peers that were measured; None where none was.

    The seeds are those of the peer that has the most, so that a peer which is half measured does
    not shrink the sample of the others. Peers that lack a seed are left out.
    """
    last = budget // EVERY - 1
    by_peer: dict[str, dict[int, float]] = {}
    for (peer, seed), cell in cells.items():
        if cell.evaluations >= budget:
            by_peer.setdefault(peer, {})[seed] = cell.share[last]
    listed = {peer: by_peer[peer] for peer in peers if peer in by_peer}
    if not listed:
        return None
    most_measured = max(listed.values(), key=len)
    seeds = sorted(most_measured)
    shares = {}
    for peer, by_seed in listed.items():
        if set(seeds) <= set(by_seed):
            shares[peer] = np.array([by_seed[seed] for seed in seeds])
    return Row(problem, budget, shares)


def rows_at(problems: Problems, budget: int, peers: Sequence[str]) -> list[Row]:
    """The rows of all problems on which one of the peers was measured."""
    rows = []
    for name, cells in problems.items():
        problem_row = row(name, cells, budget, peers)
        if problem_row is not None:
            rows.append(problem_row)
    return rows


# ----- the tables of all peers


def results(problems: Problems, all_peers: Iterable[str] = ()) -> str:
    """The published tables of all peers.

    Parts of ours that are switched have their own table (`ablation`), and so have problems on which
    no other peer was measured. Peers of `all_peers` that were not measured are named.
    """
    pair = pair_table(problems)
    problems, _ = by_contest(of_all_peers(problems))
    measured = {peer for cells in problems.values() for peer, _ in cells}
    peers = ours_first(without_settings(measured))
    everyone = ours_first(without_settings({*measured, *all_peers}))
    parts = [summary(problems, peers), not_measured(problems, everyone)]
    for budget in BUDGETS:
        rows = rows_at(problems, budget, peers)
        if rows:
            parts += [f"### {budget} evaluations", shares_table(rows, peers)]
        if budget == PAIR_BUDGET and pair:
            parts += [PAIR_TITLE, pair]
    parts.append("### Evaluations to reach 95 % of what NSGA-II has at 300")
    parts.append(evaluations_table(problems, peers))
    parts.append("### Seconds per ask, over all evaluations")
    parts.append(seconds_table(problems, peers))
    return "\n\n".join(parts)


def of_all_peers(problems: Problems) -> Problems:
    """The cells of the seeds that every peer is measured on."""
    of_all: dict[str, Cells] = {}
    for name, cells in problems.items():
        of_all[name] = {key: cell for key, cell in cells.items() if key[1] in SEEDS}
    return of_all


def pair_table(problems: Problems) -> str:
    """Ours beside the closest peer, where both were measured on more seeds; else empty."""
    lines = []
    for r in rows_at(problems, PAIR_BUDGET, (OURS, CLOSEST)):
        n_seeds = len(r.shares[r.best])
        if len(r.shares) < 2 or n_seeds <= len(SEEDS):
            continue
        test = ttest_1samp(r.shares[OURS] - r.shares[CLOSEST], 0.0)
        interval = test.confidence_interval()
        lines.append(
            [
                r.problem,
                str(n_seeds),
                share_cell(r, OURS),
                share_cell(r, CLOSEST),
                f"{interval.low:+.3f} to {interval.high:+.3f}",
                f"{test.pvalue:.2f}",
            ]
        )
    header = ["", "seeds", OURS, CLOSEST, "difference, 95 % interval", "p"]
    return table(header, lines) if lines else ""


def by_contest(problems: Problems) -> tuple[dict[str, Cells], dict[str, Cells]]:
    """The problems on which another peer than ours was measured, and the others."""
    contested, apart = {}, {}
    for name, cells in problems.items():
        if all(is_ours(peer) for peer, _ in cells):
            apart[name] = cells
        else:
            contested[name] = cells
    return contested, apart


def is_ours(peer: str) -> bool:
    """Whether it is ours, with parts switched or not."""
    return peer.split()[0] == OURS


def without_settings(peers: Iterable[str]) -> list[str]:
    """Peers alone; a peer with a part or a setting has a space in its name."""
    return [peer for peer in peers if " " not in peer]


def ours_first(peers: Iterable[str]) -> list[str]:
    """By name, ours first."""
    return sorted(peers, key=lambda peer: (peer != OURS, peer))


def summary(problems: Problems, peers: Sequence[str]) -> str:
    """How often ours is first, second, third at each budget."""
    lines = []
    for budget in BUDGETS:
        rows = []
        for r in rows_at(problems, budget, peers):
            has_others = len(r.shares) > 1
            if OURS in r.shares and has_others:
                rows.append(r)
        if rows:
            lines.append([str(budget), *rank_cells(rows)])
    header = ["evaluations", "rows", "first", "second", "third", "worse"]
    header += ["first, share", "first or tied"]
    parts = [f"Where `{OURS}` stands:", table(header, lines)]
    for peer in ("nsga2", "nsga2 for 300", "cma"):
        sentence = reached(problems, peer)
        if sentence:
            parts.append(sentence)
    return "\n\n".join(parts)


def rank_cells(rows: Sequence[Row]) -> list[str]:
    """Number of rows, how often ours has each rank, and how often it is first or tied."""
    ranks = [r.rank(OURS) for r in rows]
    first, second, third = (ranks.count(rank) for rank in (1, 2, 3))
    worse = len(rows) - first - second - third
    counts = [len(rows), first, second, third, worse]
    tied = 0
    for r, rank in zip(rows, ranks, strict=True):
        tied += rank == 1 or r.ties_with_best(OURS)
    first_share = first / len(rows)
    return [*map(str, counts), f"{first_share:.0%}", str(tied)]


def not_measured(problems: Problems, peers: Sequence[str]) -> str:
    """Which peers are missing from which rows: a first place among few is worth less."""
    lines = []
    for budget in BUDGETS:
        rows = rows_at(problems, budget, peers)
        absent = []
        for peer in peers:
            count = sum(peer not in r.shares for r in rows)
            if count:
                absent.append(f"{peer} ({count} of {len(rows)} rows)")
        if rows and absent:
            lines.append(f"- at {budget} evaluations: {', '.join(absent)}")
    if not lines:
        return "Every peer is in every row."
    return "Not measured yet, and so not ranked:\n\n" + "\n".join(lines)


def reached(problems: Problems, peer: str) -> str:
    """On how many problems ours has at 60 evaluations what `peer` has at 300."""
    wins = total = 0
    for name, cells in problems.items():
        early = row(name, cells, 60, (OURS,))
        late = row(name, cells, 300, (peer,))
        if early and late:
            total += 1
            wins += early.mean(OURS) >= late.mean(peer)
    if not total:
        return ""
    claim = f"What `{peer}` has at 300 evaluations, `{OURS}` has at 60"
    return f"{claim} on {wins} of {total} problems."


def shares_table(rows: Sequence[Row], peers: Sequence[str]) -> str:
    """Mean and deviation of each peer on each problem, the best in bold."""
    present = {peer for r in rows for peer in r.shares}
    peers = [peer for peer in peers if peer in present]
    lines = []
    for r in rows:
        n_seeds = len(r.shares[r.best])
        our_rank = str(r.rank(OURS)) if OURS in r.shares else ""
        cells = [share_cell(r, peer) for peer in peers]
        lines.append([r.problem, str(n_seeds), our_rank, *cells])
    return table(["", "seeds", "our rank", *peers], lines)


def share_cell(r: Row, peer: str) -> str:
    """Mean and deviation over the seeds."""
    if peer not in r.shares:
        return ""
    shares = r.shares[peer]
    deviation = shares.std(ddof=1) if len(shares) > 1 else 0
    text = f"{shares.mean():.3f} ± {deviation:.3f}"
    return f"**{text}**" if r.rank(peer) == 1 else text


def evaluations_table(problems: Problems, peers: Sequence[str]) -> str:
    """Evaluations, to the next ten, until a peer's mean reaches the target."""
    lines = []
    for name, cells in problems.items():
        target = row(name, cells, 300, ("nsga2",))
        if target is not None:
            goal = 0.95 * target.mean("nsga2")
            texts = [evaluations_until(goal, cells, peer) for peer in peers]
            lines.append([name, *texts])
    return table(["", *peers], lines)


def evaluations_until(goal: float, cells: Cells, peer: str) -> str:
    """Evaluations until the mean over the seeds reaches the goal; empty without a search."""
    curves = [cell.share for cell in cells_of(peer, cells)]
    if not curves:
        return ""
    length = min(len(curve) for curve in curves)
    mean = np.mean([curve[:length] for curve in curves], axis=0)
    reaching = np.flatnonzero(mean >= goal)
    if not len(reaching):
        return f"> {length * EVERY}"
    return str((reaching[0] + 1) * EVERY)


def cells_of(peer: str, cells: Cells) -> list[Cell]:
    """The cells of one peer, one per seed."""
    return [cell for cell in cells.values() if cell.peer == peer]


def seconds_table(problems: Problems, peers: Sequence[str]) -> str:
    """Mean seconds per ask of each peer on each problem."""
    lines = []
    for name, cells in problems.items():
        texts = []
        for peer in peers:
            means = [np.mean(cell.seconds) for cell in cells_of(peer, cells)]
            texts.append(f"{np.mean(means):.3f}" if means else "")
        lines.append([name, *texts])
    return table(["", *peers], lines)


# ----- the ablation


def ablation(problems: Problems) -> str:
    """Ours beside ours with a part switched.

    Problems on which no other peer was measured have a table of their own: no choice was made on
    them.
    """
    rule = (
        "The hypervolume of `mmmo` minus that of the variant. "
        "Better and worse: paired t-test over the seeds, p < 0.05."
    )
    contested, apart = by_contest(of_all_peers(problems))
    parts = [rule, switched_table(contested)]
    if apart:
        parts.append(
            f"The same on problems that no choice was made on: {', '.join(apart)}."
        )
        parts.append(switched_table(apart))
    return "\n\n".join(parts)


def switched_table(problems: Problems) -> str:
    """The mean difference over the problems, and on how many it is significant."""
    measured = {peer for cells in problems.values() for peer, _ in cells}
    switched = [peer for peer in measured if is_ours(peer) and peer != OURS]
    lines = []
    for peer in sorted(switched):
        texts = [gain_cell(problems, peer, budget) for budget in BUDGETS]
        lines.append([peer, *texts])
    return table(["", *(f"{budget} evaluations" for budget in BUDGETS)], lines)


def gain_cell(problems: Problems, peer: str, budget: int) -> str:
    """What ours has more than the switched one; empty where they were not both measured."""
    means = []
    better = worse = 0
    for r in rows_at(problems, budget, (OURS, peer)):
        if len(r.shares) < 2:
            continue
        gain = r.shares[OURS] - r.shares[peer]
        means.append(gain.mean())
        if differs(gain):
            better += gain.mean() > 0
            worse += gain.mean() < 0
    if not means:
        return ""
    mean = np.array(means).mean()
    return f"{mean:+.4f} ({better} better, {worse} worse of {len(means)})"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, or a sentence where there are no lines."""
    if not lines:
        return "Nothing measured yet."
    return markdown_table(header, lines, spaced=True)
