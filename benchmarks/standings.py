"""What `benchmarks/search.py` has measured, as Markdown: who stands where at 30, 60, 100 and 300 evaluations."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ttest_1samp

Array = NDArray[np.float64]
EVERY = 10
BUDGETS = (30, 60, 100, 300)
OURS = "mmmo"


@dataclass(frozen=True)
class Cell:
    """One search: peer and seed on one problem.

    share: of the true front's hypervolume after 10, 20, ... evaluations; seconds: mean per ask over each ten.
    """

    peer: str
    seed: int
    share: tuple[float, ...]
    seconds: tuple[float, ...]

    @property
    def evaluations(self) -> int:
        return len(self.share) * EVERY

    def line(self) -> str:
        shares, seconds = [round(v, 5) for v in self.share], [round(v, 4) for v in self.seconds]
        return json.dumps(
            {"peer": self.peer, "seed": self.seed, "share": shares, "seconds": seconds}
        )


Cells = Mapping[tuple[str, int], Cell]


def load(path: Path) -> dict[tuple[str, int], Cell]:
    """The cells of one problem by (peer, seed); of several the last. A line that an interrupt cut short is no cell."""
    cells: dict[tuple[str, int], Cell] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        cells[entry["peer"], entry["seed"]] = Cell(
            entry["peer"], entry["seed"], tuple(entry["share"]), tuple(entry["seconds"])
        )
    return cells


@dataclass(frozen=True)
class Row:
    """One problem at one budget: peer -> share by seed, of the seeds that every listed peer has."""

    problem: str
    budget: int
    shares: Mapping[str, Array]

    def rank(self, peer: str) -> int:
        """1 + the number of peers with a larger mean."""
        return 1 + sum(s.mean() > self.shares[peer].mean() for s in self.shares.values())

    @property
    def best(self) -> str:
        return max(self.shares, key=lambda peer: float(self.shares[peer].mean()))

    def tied(self, peer: str) -> bool:
        """Not told from the best."""
        return not _told_apart(self.shares[self.best] - self.shares[peer])


def _told_apart(difference: Array) -> bool:
    """Paired t-test over the seeds, p < 0.05; the same difference at every seed is told apart, none at all is not."""
    if np.ptp(difference) < 1e-9:
        return bool(len(difference) > 1 and abs(difference[0]) > 1e-9)
    return bool(ttest_1samp(difference, 0.0).pvalue < 0.05)


def row(problem: str, cells: Cells, budget: int, peers: Iterable[str]) -> Row | None:
    """None where nothing was measured. Peers whose runs are shorter, or who lack a seed, are left out of this row.

    The seeds are those of whichever peer has the most; so one that is half done does not shrink the others' sample.
    """
    at = budget // EVERY - 1
    long: dict[str, dict[int, float]] = {}
    for (peer, seed), cell in cells.items():
        if cell.evaluations >= budget:
            long.setdefault(peer, {})[seed] = cell.share[at]
    listed = {peer: long[peer] for peer in peers if peer in long}
    if not listed:
        return None
    seeds = sorted(max(listed.values(), key=lambda by: len(by)))
    shares = {
        peer: np.array([by[s] for s in seeds])
        for peer, by in listed.items()
        if set(seeds) <= set(by)
    }
    return Row(problem, budget, shares)


def results(found: Mapping[str, Cells], known: Iterable[str] = ()) -> str:
    """The published tables of all peers; parts of ours that are switched have theirs (`ablation`), and so have problems on which nobody
    else was measured.

    known: every peer that there is; who is among them and was not measured is named.
    """
    found = {name: cells for name, cells in found.items() if _contested(cells)}
    measured = {peer for cells in found.values() for peer, _ in cells}
    # parts and settings of a peer, which have spaces in their names, are none themselves
    peers, everyone = (
        _order(peer for peer in names if " " not in peer)
        for names in (measured, {*measured, *known})
    )
    parts = [_summary(found, peers), _missing(found, everyone)]
    for budget in BUDGETS:
        rows = [r for name, cells in found.items() if (r := row(name, cells, budget, peers))]
        if rows:
            parts += [f"### {budget} evaluations", _matrix(rows, peers)]
    parts += ["### Evaluations to reach 95 % of what NSGA-II has at 300", _to_reach(found, peers)]
    parts += ["### Seconds per ask, over all evaluations", _seconds(found, peers)]
    return "\n\n".join(parts)


def ablation(found: Mapping[str, Cells]) -> str:
    """Ours beside ours with a part switched; apart, on problems on which nobody else was measured, so that no choice was made on them."""
    rule = "What `mmmo` has more of the hypervolume than itself so switched; better and worse: paired t-test over the seeds, p < 0.05."
    contested = {name: cells for name, cells in found.items() if _contested(cells)}
    apart = {name: cells for name, cells in found.items() if name not in contested}
    parts = [rule, _switched(contested)]
    if apart:
        parts += [
            f"The same on problems that served for nothing else: {', '.join(apart)}.",
            _switched(apart),
        ]
    return "\n\n".join(parts)


def _contested(cells: Cells) -> bool:
    return any(peer.split()[0] != OURS for peer, _ in cells)


def _switched(found: Mapping[str, Cells]) -> str:
    """The mean difference over the problems, and on how many it is told from zero."""
    peers = sorted(
        {
            peer
            for cells in found.values()
            for peer, _ in cells
            if peer.split()[0] == OURS and peer != OURS
        }
    )
    lines = []
    for peer in peers:
        cells_of = [str(peer)]
        for budget in BUDGETS:
            rows = [row(name, cells, budget, (OURS, peer)) for name, cells in found.items()]
            gains = [r.shares[OURS] - r.shares[peer] for r in rows if r and len(r.shares) == 2]
            if not gains:
                cells_of.append("")
                continue
            means = np.array([g.mean() for g in gains])
            clear = [_clear(g) for g in gains]
            cells_of.append(
                f"{means.mean():+.4f} ({clear.count(1)} better, {clear.count(-1)} worse of {len(gains)})"
            )
        lines.append(cells_of)
    return _markdown(["", *(f"{b} evaluations" for b in BUDGETS)], lines)


def _clear(difference: Array) -> int:
    """1 or -1 where the difference is told from zero, else 0."""
    return int(np.sign(difference.mean())) if _told_apart(difference) else 0


def _order(peers: Iterable[str]) -> list[str]:
    return sorted(peers, key=lambda peer: (peer != OURS, peer))


def _summary(found: Mapping[str, Cells], peers: Sequence[str]) -> str:
    lines = []
    for budget in BUDGETS:
        rows = [
            r
            for name, cells in found.items()
            if (r := row(name, cells, budget, peers)) and OURS in r.shares and len(r.shares) > 1
        ]
        if not rows:
            continue
        ranks = [r.rank(OURS) for r in rows]
        places = [
            str(ranks.count(1)),
            str(ranks.count(2)),
            str(ranks.count(3)),
            str(sum(k > 3 for k in ranks)),
        ]
        tied = sum(rank == 1 or r.tied(OURS) for rank, r in zip(ranks, rows, strict=True))
        lines.append(
            [str(budget), str(len(rows)), *places, f"{ranks.count(1) / len(rows):.0%}", str(tied)]
        )
    head = [
        "evaluations",
        "rows",
        "first",
        "second",
        "third",
        "worse",
        "first, share",
        "first or tied",
    ]
    reached = [
        text for peer in ("nsga2", "nsga2 for 300", "cma") if (text := _reached(found, peer))
    ]
    return "\n\n".join([f"Where `{OURS}` stands:", _markdown(head, lines), *reached])


def _missing(found: Mapping[str, Cells], known: Sequence[str]) -> str:
    """Who is not in which rows: a first place among few is worth less."""
    lines = []
    for budget in BUDGETS:
        rows = [r for name, cells in found.items() if (r := row(name, cells, budget, known))]
        absent = {peer: sum(peer not in r.shares for r in rows) for peer in known}
        texts = [f"{peer} ({count} of {len(rows)} rows)" for peer, count in absent.items() if count]
        if rows and texts:
            lines.append(f"- at {budget} evaluations: {', '.join(texts)}")
    return (
        "Not measured yet, and so not ranked:\n\n" + "\n".join(lines)
        if lines
        else "Every peer is in every row."
    )


def _reached(found: Mapping[str, Cells], peer: str) -> str:
    """On how many problems ours has at 60 evaluations what `peer` has at 300."""
    yes = rows = 0
    for name, cells in found.items():
        early, late = row(name, cells, 60, (OURS,)), row(name, cells, 300, (peer,))
        if early and late:
            rows += 1
            yes += bool(early.shares[OURS].mean() >= late.shares[peer].mean())
    return (
        f"What `{peer}` has at 300 evaluations, `{OURS}` has at 60 on {yes} of {rows} problems."
        if rows
        else ""
    )


def _matrix(rows: Sequence[Row], peers: Sequence[str]) -> str:
    peers = [peer for peer in peers if any(peer in r.shares for r in rows)]
    lines = []
    for r in rows:
        texts = [
            r.problem,
            str(len(next(iter(r.shares.values())))),
            str(r.rank(OURS)) if OURS in r.shares else "",
        ]
        for peer in peers:
            s = r.shares.get(peer)
            text = "" if s is None else f"{s.mean():.3f} ± {s.std(ddof=1) if len(s) > 1 else 0:.3f}"
            texts.append(f"**{text}**" if s is not None and r.rank(peer) == 1 else text)
        lines.append(texts)
    return _markdown(["", "seeds", "our rank", *peers], lines)


def _to_reach(found: Mapping[str, Cells], peers: Sequence[str]) -> str:
    """To the next ten, on the mean over the seeds."""
    lines = []
    for name, cells in found.items():
        target = row(name, cells, 300, ("nsga2",))
        if target is None:
            continue
        line = [name]
        for peer in peers:
            curves = [c.share for (p, _), c in cells.items() if p == peer]
            length = min((len(c) for c in curves), default=0)
            mean = np.mean([c[:length] for c in curves], axis=0) if length else np.zeros(0)
            there = np.flatnonzero(mean >= 0.95 * target.shares["nsga2"].mean())
            line.append(
                str((there[0] + 1) * EVERY)
                if len(there)
                else f"> {length * EVERY}"
                if length
                else ""
            )
        lines.append(line)
    return _markdown(["", *peers], lines)


def _seconds(found: Mapping[str, Cells], peers: Sequence[str]) -> str:
    lines = []
    for name, cells in found.items():
        of = {
            peer: [np.mean(c.seconds) for (p, _), c in cells.items() if p == peer] for peer in peers
        }
        lines.append([name, *(f"{np.mean(v):.3f}" if (v := of[peer]) else "" for peer in peers)])
    return _markdown(["", *peers], lines)


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    if not lines:
        return "Nothing measured yet."
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join("| " + " | ".join(r) + " |" for r in rows)
