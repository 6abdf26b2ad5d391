"""The recurrent network behind `policy.py`: what to decide next, after what has been decided, for a preference."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from torch import nn
from torch.distributions import Beta

from paretomerge.search.encoding import Encoding

Array = NDArray[np.float64]
_MOST = 16  # integers with at most so many values are choices, the rest are numbers
_HIDDEN = 48
_INSIDE = (
    1e-3  # numbers are kept this far from their bounds, where a Beta distribution may be infinite
)
_SHARPEST = 60.0  # of a Beta distribution's two parameters


@dataclass(frozen=True)
class Decisions:
    """b paths of k decisions, in the order of the walk. choices `(b, k)` int, 0 where it is a number. numbers `(b, k)` in
    [0, 1], 0 where it is a choice. counts `(b, k)`: whether the decision means anything.
    """

    choices: torch.Tensor
    numbers: torch.Tensor
    counts: torch.Tensor

    def take(self, rows: NDArray[np.intp]) -> "Decisions":
        return Decisions(self.choices[rows], self.numbers[rows], self.counts[rows])

    @classmethod
    def cat(cls, parts: Sequence["Decisions"]) -> "Decisions":
        return cls(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)))


@dataclass(frozen=True)
class Reading:
    """What the network says of paths. logs, entropy `(b, k)`: of each decision, 0 where it does not count. values `(b, k + 1)`:
    the reward expected before each decision, and at the end.
    """

    logs: torch.Tensor
    entropy: torch.Tensor
    values: torch.Tensor
    counts: torch.Tensor

    @property
    def likelihood(self) -> torch.Tensor:
        """Mean log-probability of a decision, `(b,)`."""
        return self.logs.sum(1) / self.counts.sum(1).clamp(min=1)

    def take(self, rows: NDArray[np.intp]) -> "Reading":
        return Reading(self.logs[rows], self.entropy[rows], self.values[rows], self.counts[rows])

    @classmethod
    def cat(cls, parts: Sequence["Reading"]) -> "Reading":
        return cls(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)))


class Paths:
    """The order of a space's decisions, a parent before what it makes count, and points as paths."""

    def __init__(self, encoding: Encoding) -> None:
        self.encoding = encoding
        self.names = _in_order(encoding)
        self.sizes = [_values(encoding.space[name]) for name in self.names]
        kinds = [
            repr(encoding.space[name]) for name in self.names
        ]  # like decisions share what is learnt of their values
        self.kinds = [sorted(set(kinds)).index(kind) for kind in kinds]
        self.first = [encoding.columns[name].start for name in self.names]

    def decisions(self, x: Array, places: Sequence[int] | None = None) -> Decisions:
        """x `(b, d)`, settled as far as the decisions at `places` (by default all) depend on it."""
        places = range(len(self.names)) if places is None else places
        choices = np.zeros((len(x), len(places)), dtype=np.int64)
        numbers = np.zeros(choices.shape)
        for column, k in enumerate(places):
            part, size = x[:, self.encoding.columns[self.names[k]]], self.sizes[k]
            if part.shape[1] > 1:
                choices[:, column] = part.argmax(1)
            elif size:
                choices[:, column] = np.rint(part[:, 0] * (size - 1))
            else:
                numbers[:, column] = part[:, 0]
        counts = self.encoding.active_mask(x)[:, [self.first[k] for k in places]]
        choices, numbers = np.where(counts, choices, 0), np.where(counts, numbers, 0.0)
        return Decisions(
            torch.as_tensor(choices), torch.as_tensor(numbers), torch.as_tensor(counts)
        )

    def put(self, x: Array, k: int, values: Array) -> None:
        """Write decision k into x `(b, d)`: an index for a choice, a number in [0, 1] else."""
        columns, size = self.encoding.columns[self.names[k]], self.sizes[k]
        if columns.stop - columns.start > 1:
            x[:, columns] = np.eye(columns.stop - columns.start)[values.astype(int)]
        else:
            x[:, columns.start] = values / (size - 1) if size > 1 else values


class PathNetwork(nn.Module):
    """A GRU over decisions; like decisions share heads and embeddings, and each has one of its own place. float64: what is
    learnt is then the same for any number of threads, but for the last digits.
    """

    kinds: torch.Tensor
    sizes: torch.Tensor

    def __init__(self, paths: Paths, m: int) -> None:
        super().__init__()
        self.paths = paths
        kinds, self._width = len(set(paths.kinds)), max([2, *paths.sizes])
        self.start = nn.Linear(m, _HIDDEN, dtype=torch.float64)
        self.place = nn.Embedding(len(paths.names), _HIDDEN, dtype=torch.float64)
        self.value = nn.Embedding(kinds * self._width, _HIDDEN, dtype=torch.float64)
        self.number = nn.Embedding(kinds, _HIDDEN, dtype=torch.float64)
        self.cell = nn.GRU(_HIDDEN, _HIDDEN, batch_first=True, dtype=torch.float64)
        self.heads = nn.Linear(2 * _HIDDEN, kinds * self._width, dtype=torch.float64)
        self.critic = nn.Linear(_HIDDEN, 1, dtype=torch.float64)
        with torch.no_grad():
            self.heads.weight.mul_(0.1)  # every choice about as likely at first
            self.heads.bias.zero_()
        self.register_buffer("kinds", torch.tensor(paths.kinds))
        self.register_buffer("sizes", torch.tensor(paths.sizes))

    def read(self, decisions: Decisions, preferences: torch.Tensor) -> Reading:
        """preferences `(b, m)`."""
        b, k = decisions.choices.shape
        start = torch.tanh(self.start(preferences))
        states, _ = self.cell(self._told(decisions, range(k)), start[None])
        states = torch.cat([start[:, None], states], 1)  # before each decision, and at the end
        logits = self._logits(states[:, :-1], range(k))
        logs, entropy = self._chosen(logits, decisions.choices)
        is_number = torch.eq(self.sizes, 0)
        if is_number.any():
            beta = _beta(logits[:, is_number])
            numbers = decisions.numbers[:, is_number].clamp(_INSIDE, 1 - _INSIDE)
            logs = logs.masked_scatter(is_number.expand(b, k), beta.log_prob(numbers))  # type: ignore[no-untyped-call]
            entropy = entropy.masked_scatter(is_number.expand(b, k), beta.entropy())  # type: ignore[no-untyped-call]
        off = ~decisions.counts
        return Reading(
            logs.masked_fill(off, 0.0),
            entropy.masked_fill(off, 0.0),
            self.critic(states)[..., 0],
            decisions.counts,
        )

    def walk(self, preferences: Array, rng: np.random.Generator, surprise: float = 0.0) -> Array:
        """Settled points `(b, d)`, drawn decision by decision; preferences `(b, m)`.

        surprise: how often a decision is taken at random.
        """
        paths, b = self.paths, len(preferences)
        x = np.zeros((b, paths.encoding.d))
        start = torch.tanh(self.start(torch.as_tensor(preferences)))
        state, hidden = start, start[None]
        for k, size in enumerate(paths.sizes):
            logits = self._logits(state[:, None], [k])[:, 0]
            if size:
                shares = (
                    (1 - surprise) * torch.softmax(logits[:, :size], -1).numpy() + surprise / size
                ).cumsum(1)
                values = (
                    (rng.random((b, 1)) * shares[:, -1:] >= shares)
                    .sum(1)
                    .clip(max=size - 1)
                    .astype(float)
                )
            else:
                beta = _beta(logits)
                drawn = rng.beta(beta.concentration1.numpy(), beta.concentration0.numpy())
                values = np.where(rng.random(b) < surprise, rng.random(b), drawn).clip(
                    _INSIDE, 1 - _INSIDE
                )
            paths.put(x, k, values)
            states, hidden = self.cell(self._told(paths.decisions(x, [k]), [k]), hidden)
            state = states[:, 0]
        return paths.encoding.project(x)

    def _told(self, decisions: Decisions, places: Sequence[int]) -> torch.Tensor:
        """What the GRU reads after decisions at these places: which, and what was decided; only which, where it does not count."""
        kinds = self.kinds[list(places)]
        is_number = torch.eq(self.sizes[list(places)], 0)
        chosen = self.value(kinds * self._width + decisions.choices)
        told = torch.where(
            is_number[:, None], self.number(kinds) * (decisions.numbers[..., None] - 0.5), chosen
        )
        place: torch.Tensor = self.place(torch.tensor(list(places)))
        return torch.where(decisions.counts[..., None], told, 0.0) + place

    def _logits(self, states: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
        """`(b, places, width)` from the states before the decisions; what a decision cannot be is masked."""
        at = self.place(torch.tensor(list(places))).expand(len(states), -1, -1)
        every = self.heads(torch.cat([states, at], -1)).unflatten(-1, (-1, self._width))
        kinds = self.kinds[list(places)]
        own: torch.Tensor = every[:, torch.arange(len(kinds)), kinds]
        sizes = self.sizes[list(places)]
        impossible = (torch.arange(self._width) >= sizes[:, None]) & (sizes[:, None] > 0)
        return own.masked_fill(impossible, -torch.inf)

    def _chosen(
        self, logits: torch.Tensor, choices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability and entropy of choices, both `(b, k)`."""
        logs = torch.log_softmax(logits, -1)
        entropy = -(logs.exp() * logs.masked_fill(logs == -torch.inf, 0.0)).sum(-1)
        return logs.gather(-1, choices[..., None])[..., 0], entropy


def _beta(logits: torch.Tensor) -> Beta:
    """From the first two of `(..., width)`; with one top inside, for both parameters are above 1."""
    both = 1 + nn.functional.softplus(logits[..., :2]).clamp(max=_SHARPEST)
    return Beta(both[..., 0], both[..., 1], validate_args=False)


def _values(distribution: BaseDistribution) -> int:
    """How many choices a decision has; 0 for a number."""
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    if isinstance(distribution, IntDistribution) and not distribution.log:
        count = (distribution.high - distribution.low) // (distribution.step or 1) + 1
        return count if count <= _MOST else 0
    return 0


def _in_order(encoding: Encoding) -> list[str]:
    """The parameters in their order, but for parents, which come before what they make count."""
    ordered: dict[str, None] = {}

    def add(name: str) -> None:
        for parent, _ in encoding.conditions.get(name, ()):
            add(parent)
        ordered[name] = None

    for name in encoding.space:
        add(name)
    return list(ordered)
