"""The recurrent policy network behind `policy.py`, and search spaces as sequences of decisions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import Generator
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    IntDistribution,
)
from torch import Tensor, nn
from torch.distributions import Beta

from paretomerge.search.encoding import Encoding, Indices
from paretomerge.types import Array

_MAX_CHOICES = 16  # an integer with more values is treated as a number
_HIDDEN = 48
# Numbers stay this far inside their bounds, where a Beta distribution's density may be infinite.
_MARGIN = 1e-3
_MAX_CONCENTRATION = 60.0  # added to 1; limits how narrow a Beta distribution becomes


@dataclass(frozen=True)
class Trajectories:
    """b sequences of k decisions each, in the order in which they are made.

    Attributes:
        choices: `(b, k)` int64: the index that was chosen; 0 where the decision is a number.
        numbers: `(b, k)` in [0, 1]: the number; 0 where the decision is a choice.
        active: `(b, k)` bool: whether the decision's parameter is active.
    """

    choices: Tensor
    numbers: Tensor
    active: Tensor

    def take(self, rows: Indices) -> "Trajectories":
        """Select some of the trajectories."""
        return Trajectories(
            choices=self.choices[rows],
            numbers=self.numbers[rows],
            active=self.active[rows],
        )

    @classmethod
    def cat(cls, parts: Sequence["Trajectories"]) -> "Trajectories":
        """Concatenate batches of trajectories."""
        return cls(
            choices=torch.cat([part.choices for part in parts]),
            numbers=torch.cat([part.numbers for part in parts]),
            active=torch.cat([part.active for part in parts]),
        )


@dataclass(frozen=True)
class Evaluation:
    """What the network computes for b trajectories of k decisions.

    Attributes:
        log_prob: `(b, k)`: the log-probability of each decision, 0 where it is inactive.
        entropy: `(b, k)`: the entropy of each decision's distribution, 0 where it is inactive.
        values: `(b, k + 1)`: the reward expected before each decision, and at the end.
        active: `(b, k)` bool, as of the trajectories.
    """

    log_prob: Tensor
    entropy: Tensor
    values: Tensor
    active: Tensor

    @property
    def mean_log_prob(self) -> Tensor:
        """The mean log-probability of an active decision, `(b,)`."""
        n_active = self.active.sum(1)
        # A point may have no active decision.
        n_active = n_active.clamp(min=1)
        return self.log_prob.sum(1) / n_active

    def take(self, rows: Indices) -> "Evaluation":
        """Select some of the trajectories."""
        return Evaluation(
            log_prob=self.log_prob[rows],
            entropy=self.entropy[rows],
            values=self.values[rows],
            active=self.active[rows],
        )

    @classmethod
    def cat(cls, parts: Sequence["Evaluation"]) -> "Evaluation":
        """Concatenate the evaluations of several batches."""
        return cls(
            log_prob=torch.cat([part.log_prob for part in parts]),
            entropy=torch.cat([part.entropy for part in parts]),
            values=torch.cat([part.values for part in parts]),
            active=torch.cat([part.active for part in parts]),
        )


class DecisionSequence:
    """A search space as a sequence of decisions, one per parameter, parents before children.

    Args:
        encoding: The space.

    Attributes:
        encoding: The space.
        names: The parameter of each decision.
        n_choices: The number of choices of each decision; 0 for a number.
        kinds: An index per decision. Decisions with equal distributions have the same kind, and
            the network shares its weights among them.
    """

    def __init__(self, encoding: Encoding) -> None:
        self.encoding = encoding
        self.names = _parents_first(encoding)
        distributions = [encoding.space[name] for name in self.names]
        self.n_choices = [_count_choices(d) for d in distributions]
        # Distributions of Optuna cannot be sorted, but their representations can.
        texts = [repr(d) for d in distributions]
        distinct = sorted(set(texts))
        self.kinds = [distinct.index(text) for text in texts]
        self._columns = [encoding.columns[name] for name in self.names]

    def trajectories(
        self, x: Array, positions: Sequence[int] | None = None
    ) -> Trajectories:
        """Read the decisions that lead to given points.

        Args:
            x: Points `(b, d)`, valid in the parameters at `positions` and their parents.
            positions: Which decisions to read, by default all.

        Returns:
            b trajectories of `len(positions)` decisions.
        """
        if positions is None:
            positions = range(len(self.names))
        shape = (len(x), len(positions))
        choices = np.zeros(shape, dtype=np.int64)
        numbers = np.zeros(shape)
        for i, k in enumerate(positions):
            columns = self._columns[k]
            part = x[:, columns]
            n_choices = self.n_choices[k]
            number = part[:, 0]
            if part.shape[1] > 1:
                choices[:, i] = part.argmax(1)
            elif n_choices:
                # An integer with few values has one coordinate, and its values are choices.
                indices = number * (n_choices - 1)
                choices[:, i] = np.rint(indices)
            else:
                numbers[:, i] = number
        # All columns of a parameter are active or none is.
        first_columns = [self._columns[k].start for k in positions]
        mask = self.encoding.active_mask(x)
        active = mask[:, first_columns]
        active_choices = np.where(active, choices, 0)
        active_numbers = np.where(active, numbers, 0.0)
        return Trajectories(
            choices=torch.as_tensor(active_choices),
            numbers=torch.as_tensor(active_numbers),
            active=torch.as_tensor(active),
        )

    def write(
        self,
        x: Array,
        k: int,
        values: Array,
    ) -> None:
        """Write decision k into points, in place.

        Args:
            x: Points `(b, d)`.
            k: The position of the decision.
            values: `(b,)`: indices of choices, or numbers in [0, 1].
        """
        columns = self._columns[k]
        n_choices = self.n_choices[k]
        width = columns.stop - columns.start
        if width > 1:
            one_hot = np.eye(width)
            indices = values.astype(int)
            x[:, columns] = one_hot[indices]
        elif n_choices > 1:
            x[:, columns.start] = values / (n_choices - 1)
        else:
            x[:, columns.start] = values


class PolicyNetwork(nn.Module):
    """A GRU that makes one decision after the other, for a preference among the objectives.

    Decisions of one kind share output heads and embeddings, and each position has an embedding of
    its own. All weights are float64, so that training with another number of threads gives the same
    result up to the last digits.

    Args:
        decisions: The search space.
        m: The number of objectives.
    """

    kinds: Tensor
    n_choices: Tensor

    def __init__(self, decisions: DecisionSequence, m: int) -> None:
        super().__init__()
        self.decisions = decisions
        n_positions = len(decisions.names)
        distinct_kinds = set(decisions.kinds)
        n_kinds = len(distinct_kinds)
        # At least two outputs per head, for the two parameters of a Beta distribution.
        self._width = max([2, *decisions.n_choices])
        n_outputs = n_kinds * self._width
        f64 = torch.float64
        self.preference_layer = nn.Linear(m, _HIDDEN, dtype=f64)
        self.position_embedding = nn.Embedding(n_positions, _HIDDEN, dtype=f64)
        self.choice_embedding = nn.Embedding(n_outputs, _HIDDEN, dtype=f64)
        self.number_embedding = nn.Embedding(n_kinds, _HIDDEN, dtype=f64)
        self.gru = nn.GRU(_HIDDEN, _HIDDEN, batch_first=True, dtype=f64)
        # A head sees the state and the position of its decision.
        self.heads = nn.Linear(2 * _HIDDEN, n_outputs, dtype=f64)
        self.critic = nn.Linear(_HIDDEN, 1, dtype=f64)
        with torch.no_grad():
            # Small weights make all choices about equally likely before training.
            self.heads.weight.mul_(0.1)
            self.heads.bias.zero_()
        kinds = torch.tensor(decisions.kinds)
        n_choices = torch.tensor(decisions.n_choices)
        self.register_buffer("kinds", kinds)
        self.register_buffer("n_choices", n_choices)

    def evaluate(self, trajectories: Trajectories, preferences: Tensor) -> Evaluation:
        """Compute log-probabilities, entropies and values of whole trajectories.

        Args:
            trajectories: b trajectories of all k decisions.
            preferences: The weight of each objective for each trajectory, `(b, m)`.

        Returns:
            The evaluation, with gradients.
        """
        b, k = trajectories.choices.shape
        positions = range(k)
        embedded = self.preference_layer(preferences)
        initial = torch.tanh(embedded)
        inputs = self._inputs(trajectories, positions)
        hidden = initial[None]
        later, _ = self.gru(inputs, hidden)
        first = initial[:, None]
        states = torch.cat([first, later], 1)
        # The last state is after the last decision: it has a value but decides nothing.
        deciding = states[:, :-1]
        logits = self._logits(deciding, positions)
        log_prob, entropy = _categorical(logits, trajectories.choices)
        is_number = torch.eq(self.n_choices, 0)
        if is_number.any():
            number_logits = logits[:, is_number]
            beta = _beta(number_logits)
            numbers = trajectories.numbers[:, is_number]
            numbers = numbers.clamp(_MARGIN, 1 - _MARGIN)
            mask = is_number.expand(b, k)
            number_log_prob = beta.log_prob(numbers)  # type: ignore[no-untyped-call]
            number_entropy = beta.entropy()  # type: ignore[no-untyped-call]
            log_prob = log_prob.masked_scatter(mask, number_log_prob)
            entropy = entropy.masked_scatter(mask, number_entropy)
        inactive = ~trajectories.active
        values = self.critic(states)
        return Evaluation(
            log_prob=log_prob.masked_fill(inactive, 0.0),
            entropy=entropy.masked_fill(inactive, 0.0),
            values=values[..., 0],
            active=trajectories.active,
        )

    def sample(
        self, preferences: Array, rng: Generator, random_share: float = 0.0
    ) -> Array:
        """Draw points decision by decision.

        Args:
            preferences: The weight of each objective for each point, `(b, m)`.
            rng: The source of randomness.
            random_share: The probability that a decision is drawn uniformly, in [0, 1].

        Returns:
            Points `(b, d)`, all valid in the space.
        """
        decisions = self.decisions
        shape = (len(preferences), decisions.encoding.d)
        x = np.zeros(shape)
        embedded = self.preference_layer(torch.as_tensor(preferences))
        state = torch.tanh(embedded)
        hidden = state[None]
        for k, n_choices in enumerate(decisions.n_choices):
            position = [k]
            logits = self._logits(state[:, None], position)
            logits = logits[:, 0]
            if n_choices:
                valid_logits = logits[:, :n_choices]
                values = _sample_choices(valid_logits, rng, random_share)
            else:
                values = _sample_numbers(logits, rng, random_share)
            decisions.write(x, k, values)
            decided = decisions.trajectories(x, position)
            inputs = self._inputs(decided, position)
            states, hidden = self.gru(inputs, hidden)
            state = states[:, 0]
        return decisions.encoding.project(x)

    def _inputs(self, trajectories: Trajectories, positions: Sequence[int]) -> Tensor:
        """The GRU's inputs `(b, positions, hidden)`: each position and what was decided there.

        An inactive decision contributes its position alone.
        """
        # `positions` may be a range.
        indices = torch.tensor(list(positions))
        kinds = self.kinds[indices]
        n_choices = self.n_choices[indices]
        is_number = torch.eq(n_choices, 0)
        # Row `kind * width + choice` of the table is that of a choice in a kind of decision.
        first_rows = kinds * self._width
        rows = first_rows + trajectories.choices
        choice = self.choice_embedding(rows)
        # 0 is the middle of the range.
        centred = trajectories.numbers[..., None] - 0.5
        number = self.number_embedding(kinds) * centred
        mask = is_number[:, None]
        decision = torch.where(mask, number, choice)
        position: Tensor = self.position_embedding(indices)
        is_active = trajectories.active[..., None]
        return torch.where(is_active, decision, 0.0) + position

    def _logits(self, states: Tensor, positions: Sequence[int]) -> Tensor:
        """`(b, positions, width)` from the states before each decision; -inf if invalid."""
        # `positions` may be a range.
        indices = torch.tensor(list(positions))
        embedding = self.position_embedding(indices)
        b = len(states)
        embedding = embedding.expand(b, -1, -1)
        features = torch.cat([states, embedding], -1)
        outputs = self.heads(features)
        width = self._width
        all_kinds = outputs.unflatten(-1, (-1, width))
        columns = torch.arange(len(indices))
        kinds = self.kinds[indices]
        logits: Tensor = all_kinds[:, columns, kinds]
        n_choices = self.n_choices[indices]
        n_choices = n_choices[:, None]
        is_beyond = torch.arange(width) >= n_choices
        # Numbers have 0 choices and use the first two outputs.
        is_invalid = is_beyond & (n_choices > 0)
        return logits.masked_fill(is_invalid, -torch.inf)


def _categorical(logits: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of choices, both `(b, k)`; logits `(b, k, width)`."""
    log_probs = torch.log_softmax(logits, -1)
    probs = log_probs.exp()
    # 0 * -inf would be NaN.
    is_impossible = log_probs == -torch.inf
    finite = log_probs.masked_fill(is_impossible, 0.0)
    weighted = probs * finite
    entropy = -weighted.sum(-1)
    indices = choices[..., None]
    chosen = log_probs.gather(-1, indices)
    return chosen[..., 0], entropy


def _beta(logits: Tensor) -> Beta:
    """The Beta distribution of the first two of `(..., width)` logits (Chou et al. 2017).

    Both parameters are above 1, so the density has one mode, inside the bounds.
    """
    raw = logits[..., :2]
    positive = nn.functional.softplus(raw)
    concentration = 1 + positive.clamp(max=_MAX_CONCENTRATION)
    alpha = concentration[..., 0]
    beta = concentration[..., 1]
    return Beta(alpha, beta, validate_args=False)


def _sample_choices(
    logits: Tensor,
    rng: Generator,
    random_share: float,
) -> Array:
    """Indices `(b,)` as floats, drawn by inverting the cumulative distribution."""
    b, n_choices = logits.shape
    probabilities = torch.softmax(logits, -1).numpy()
    uniform = random_share / n_choices
    policy_share = 1 - random_share
    mixed = policy_share * probabilities + uniform
    cumulative = mixed.cumsum(1)
    # Rounding may leave the last value below 1, so the uniform numbers are scaled by it.
    total = cumulative[:, -1:]
    threshold = rng.random((b, 1)) * total
    is_passed = threshold >= cumulative
    indices = is_passed.sum(1)
    indices = indices.clip(max=n_choices - 1)
    drawn: Array = indices.astype(float)
    return drawn


def _sample_numbers(
    logits: Tensor,
    rng: Generator,
    random_share: float,
) -> Array:
    """Numbers `(n,)` inside [0, 1] from logits `(n, width)`."""
    n = len(logits)
    beta = _beta(logits)
    a = beta.concentration1.numpy()
    b = beta.concentration0.numpy()
    drawn = rng.beta(a, b)
    is_random = rng.random(n) < random_share
    uniform = rng.random(n)
    numbers = np.where(is_random, uniform, drawn)
    return numbers.clip(_MARGIN, 1 - _MARGIN)


def _count_choices(distribution: BaseDistribution) -> int:
    """The number of choices of a decision; 0 where it is a number."""
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    if isinstance(distribution, IntDistribution) and not distribution.log:
        extent = distribution.high - distribution.low
        count = extent // distribution.step + 1
        if count <= _MAX_CHOICES:
            return count
        return 0
    return 0


def _parents_first(encoding: Encoding) -> list[str]:
    """The parameters in the order of the space, except that parents come before their children."""
    # A dict keeps the order, and each name once.
    ordered: dict[str, None] = {}

    def add(name: str) -> None:
        for parent, _ in encoding.conditions.get(name, ()):
            add(parent)
        ordered[name] = None

    for name in encoding.space:
        add(name)
    return list(ordered)
