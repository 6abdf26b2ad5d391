"""What facts about deltas mean for a merge, in sentences."""

from collections.abc import Iterator
from itertools import combinations

from paretomerge.suggest.facts import DeltaFacts

_ALIKE = 0.5  # cosine of deltas that tell nearly the same
_UNRELATED = 0.15  # and of deltas that have little in common
_DUPLICATES = 0.95
_LOW_RANK = 0.25  # share of the rank that holds 90 % of the energy
_UNEQUAL = 2.0  # ratio of the largest delta to the smallest
_SPARSE = 0.5  # share of entries that a fine-tune left as they were
_LARGE = 0.3  # norm of a delta over that of the base

_AVERAGES = ("linear", "model_stock")
_VOTES = ("ties", "dare_ties", "della", "breadcrumbs_ties", "sce")
_SPECTRAL = ("tsv", "iso_c", "iso_cts")
_SUMS = ("task_arithmetic", "dare_linear", "della_linear", "breadcrumbs")


def findings_of(facts: DeltaFacts) -> tuple[str, ...]:
    """What the deltas are like, and what follows for any merge.

    Args:
        facts: The facts.

    Returns:
        Sentences.
    """
    return (
        *_about_sources(facts),
        *_about_directions(facts),
        *_about_pairs(facts),
        *_about_signs(facts),
    )


def reasons_for(method: str, facts: DeltaFacts) -> tuple[str, ...]:
    """What speaks for a method or against it, given the facts.

    Args:
        method: The merge method.
        facts: The facts.

    Returns:
        Sentences; none where the facts say nothing.
    """
    k = len(facts.names)
    cosine = _mean_of_pairs(facts, "cosine")
    conflict = _mean_of_pairs(facts, "sign_conflict")
    reasons = []
    if method in _AVERAGES and cosine < _UNRELATED:
        reasons.append(f"The deltas are unrelated: an average leaves 1/{k} of each.")
    if method in _AVERAGES and cosine > _ALIKE:
        reasons.append("The deltas are alike: an average keeps what they share.")
    if method in _SUMS and cosine < _UNRELATED:
        reasons.append("The deltas are unrelated: a sum keeps more of each.")
    if method in _SUMS and cosine > _ALIKE:
        reasons.append("The deltas are alike: a sum counts what they share twice.")
    if method in _VOTES and conflict > _UNRELATED:
        reasons.append(f"A vote settles the signs that conflict ({conflict:.0%}).")
    if method in _SPECTRAL and facts.share_of_rank.mean() < _LOW_RANK:
        reasons.append(
            "The deltas are of low rank: their main directions fit beside each other."
        )
    return tuple(reasons)


def _about_sources(facts: DeltaFacts) -> Iterator[str]:
    norms = dict(zip(facts.names, facts.relative_norms.tolist(), strict=True))
    for i, name in enumerate(facts.names):
        if norms[name] == 0:
            yield f"{name} is the base in the measured layers: it adds nothing there."
        elif facts.unchanged[i] > _SPARSE:
            yield f"{name} left {facts.unchanged[i]:.0%} of the entries as they were."
    moved = {name: norm for name, norm in norms.items() if norm > 0}
    if len(moved) < 2:
        return
    largest = max(moved, key=moved.__getitem__)
    smallest = min(moved, key=moved.__getitem__)
    ratio = moved[largest] / moved[smallest]
    if ratio > _UNEQUAL:
        yield (
            f"{largest} moved {ratio:.1f} times as far as {smallest}: with equal weights "
            f"{largest} dominates, so search a weight per source."
        )
    if moved[largest] > _LARGE:
        yield (
            f"{largest} moved by {moved[largest]:.0%} of the base's norm: far for a fine-tune. "
            "Merges of such models often fail; check that the base is the right one."
        )


def _about_directions(facts: DeltaFacts) -> Iterator[str]:
    share = float(facts.share_of_rank.mean())
    if 0 < share < _LOW_RANK:
        count = float(facts.directions.mean())
        yield (
            f"The deltas are of low rank: {count:.0f} directions hold 90 % of a matrix's change "
            f"({share:.0%} of its rank)."
        )


def _about_pairs(facts: DeltaFacts) -> Iterator[str]:
    for i, j in combinations(range(len(facts.names)), 2):
        if facts.cosine[i, j] > _DUPLICATES:
            yield (
                f"{facts.names[i]} and {facts.names[j]} are nearly one model (cosine "
                f"{facts.cosine[i, j]:.2f}): merging them gains little."
            )
    cosine = _mean_of_pairs(facts, "cosine")
    if cosine > _ALIKE:
        yield f"The deltas are alike (mean cosine {cosine:.2f})."
    elif cosine < _UNRELATED:
        yield (
            f"The deltas have little in common (mean cosine {cosine:.2f}): the models learned "
            "different things."
        )
    else:
        yield f"The deltas share a part (mean cosine {cosine:.2f})."


def _about_signs(facts: DeltaFacts) -> Iterator[str]:
    conflict = _mean_of_pairs(facts, "sign_conflict")
    yield (
        f"Where two models change the same weights, {conflict:.0%} of it is in opposite "
        "directions (50 % for unrelated changes)."
    )


def _mean_of_pairs(facts: DeltaFacts, fact: str) -> float:
    """The mean of a matrix of facts over all pairs of sources."""
    matrix = getattr(facts, fact)
    pairs = list(combinations(range(len(facts.names)), 2))
    total = sum(float(matrix[i, j]) for i, j in pairs)
    return total / len(pairs)
