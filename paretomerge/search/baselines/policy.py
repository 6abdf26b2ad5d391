"""HM3's learned policy (arXiv 2409.18893, sec. 3.2) as a sampler.

A recurrent network decides the parameters of a point one after the other, each with the earlier
ones as context. Where the space is one of routes, this is a walk through the blocks of a model.
Good points become likely. Differences from the paper:

- The preference among the objectives is an input of the network, so one training serves every
  trade-off. HM3 trains one network per preference.
- An evaluation is expensive. Between two evaluations the policy therefore trains on evaluated
  points only, drawn as often as the policy would choose them. Their reward under any preference is
  known and costs nothing.
- It imitates the best evaluated points for a preference (self-imitation, Oh et al. 2018, arXiv
  1806.05635). A few dozen episodes are too few to learn that most routes are broken, but the
  baseline recipes are examples of routes that work.
- Inactive decisions and invalid choices are masked; nothing invalid is ever evaluated.
- The reward has no cost per layer: the size is an objective of its own.

Training is PPO (Schulman et al. 2017, arXiv 1707.06347, eq. 7) with generalised advantage
estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16) and a reward at the end. Numbers are
drawn from Beta distributions (Chou, Maturana & Scherer 2017), whose support ends at the bounds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from paretomerge.errors import ConfigError
from paretomerge.pareto.preference import divisors
from paretomerge.search.baselines.policy_network import (
    DecisionSequence,
    Evaluation,
    PolicyNetwork,
    Trajectories,
)
from paretomerge.search.encoding import Indices
from paretomerge.search.options import check_options
from paretomerge.search.point_sampler import Archive
from paretomerge.types import Array

_PREFERENCES = 6  # per update
_REPLAYED = 16  # evaluated points per preference and update
_EPOCHS = 3  # gradient steps per update
_FIRST_UPDATES = 20  # before the first proposal, to learn from the startup trials
_CLIP = 0.2  # PPO's epsilon: the largest relative change of a decision's probability in an update
_VALUE_WEIGHT = 0.5  # of the critic's squared error in the loss
_MAX_GRADIENT_NORM = 2.0
# Added to the standard deviation that the advantages are divided by: it may be 0.
_MIN_DEVIATION = 1e-3
# Share of the plain weighted sum in the reward: without it, points that differ only in objectives
# other than the worst would have equal rewards.
_AUGMENTATION = 0.05
# How far below the median a broken model is carries little information.
_MAX_SHORTFALL = 2.0
# A reward that is lower by this much is imitated 1/e as often.
_IMITATION_TEMPERATURE = 0.03
_CANDIDATES = 8  # per proposal; the sampler takes the first that is new


@dataclass
class PolicyProposer:
    """A policy trained by PPO on the trials so far.

    Proposals are a function of the seed and of the trials in their order, so a resumed study
    continues exactly.

    Attributes:
        n_startup: The number of feasible trials before it proposes.
        updates: Updates of the network per trial.
        learning_rate: Of Adam.
        entropy_weight: The weight of the decisions' entropy in the loss at first. It falls with the
            square root of the number of trials.
        imitation_weight: The weight of imitating the best evaluated points.
        random_decisions: The mean number of decisions of a proposal that are drawn uniformly.
        discount: gamma of the advantages, in (0, 1].
        gae_lambda: lambda of the advantages, in [0, 1].
        seed: The seed of the network and its training.

    Raises:
        ConfigError: An option is out of its range.
    """

    n_startup: int = 10
    updates: int = 2
    learning_rate: float = 3e-3
    entropy_weight: float = 0.005
    imitation_weight: float = 2.0
    random_decisions: float = 3.0
    discount: float = 0.99
    gae_lambda: float = 0.95
    seed: int = 0
    _learner: "_Learner | None" = field(
        default=None, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        check_options("policy", self)
        if self.n_startup < 1 or self.updates < 1 or not self.learning_rate > 0:
            raise ConfigError(
                f"policy: expected n_startup and updates of 1 or more and learning_rate above 0, "
                f"got {self.n_startup}, {self.updates} and {self.learning_rate}"
            )
        shares = (self.entropy_weight, self.imitation_weight, self.random_decisions)
        if min(shares) < 0:
            raise ConfigError(
                f"policy: expected entropy_weight, imitation_weight and random_decisions of 0 or "
                f"more, got {self.entropy_weight}, {self.imitation_weight} and "
                f"{self.random_decisions}"
            )
        if not (0 < self.discount <= 1 and 0 <= self.gae_lambda <= 1):
            raise ConfigError(
                f"policy: expected 0 < discount <= 1 and 0 <= gae_lambda <= 1, "
                f"got {self.discount} and {self.gae_lambda}"
            )

    def propose(self, archive: Archive, rng: Generator) -> Array:
        """Train on the new trials and draw points for a random preference.

        Args:
            archive: The trials so far.
            rng: The source of randomness.

        Returns:
            Points `(k, d)`; none while there are fewer than `n_startup` feasible trials.
        """
        usable = archive.usable
        if len(usable) < self.n_startup:
            return np.zeros((0, archive.encoding.d))
        if self._learner is None or not self._learner.can_continue_with(archive):
            self._learner = _Learner(self, archive)
        x = archive.x[usable]
        y = archive.y[usable]
        self._learner.learn(x, y)
        return self._learner.sample(rng)


class _Learner:
    """The network, its optimizer and the trials that it has been trained on."""

    def __init__(self, policy: PolicyProposer, archive: Archive) -> None:
        self.policy = policy
        self.decisions = DecisionSequence(archive.encoding)
        self.m = archive.y.shape[1]
        d = archive.encoding.d
        self._x = np.zeros((0, d))
        self._y = np.zeros((0, self.m))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(policy.seed)
            self.network = PolicyNetwork(self.decisions, self.m)
        parameters = self.network.parameters()
        self._optimizer = torch.optim.Adam(parameters, lr=policy.learning_rate)

    def can_continue_with(self, archive: Archive) -> bool:
        """Whether the archive begins with the trials of the training so far.

        It does not if a trial with a lower number has finished later than the others.
        """
        encoding = archive.encoding
        trained = self.decisions.encoding
        same_conditions = encoding.conditions == trained.conditions
        same_space = encoding.space == trained.space and same_conditions
        if not same_space or archive.y.shape[1] != self.m:
            return False
        begin = archive.usable[: len(self._x)]
        x = archive.x[begin]
        y = archive.y[begin]
        return np.array_equal(x, self._x) and np.array_equal(y, self._y)

    def learn(self, x: Array, y: Array) -> None:
        """Train on each new trial in its order.

        So a process that proposes less often, or starts again, learns the same.
        """
        policy = self.policy
        startup = policy.n_startup
        n_trained = len(self._x)
        first = max(n_trained + 1, startup)
        for n in range(first, len(x) + 1):
            x_begin = x[:n]
            y_begin = y[:n]
            updates = policy.updates
            if n == startup:
                updates = _FIRST_UPDATES
            for step in range(updates):
                # Numbers of its own for each step: training does not depend on restarts.
                rng = np.random.default_rng([policy.seed, n, step])
                self._update(x_begin, y_begin, rng)
        self._x = x.copy()
        self._y = y.copy()

    def sample(self, rng: Generator) -> Array:
        """Points `(k, d)` for one preference."""
        # Uniform over all preferences.
        preference = rng.dirichlet(np.ones(self.m))
        preferences = np.tile(preference, (_CANDIDATES, 1))
        n_decisions = len(self.decisions.names)
        random_share = min(self.policy.random_decisions / n_decisions, 1.0)
        with torch.no_grad():
            return self.network.sample(preferences, rng, random_share)

    def _update(
        self,
        x: Array,
        y: Array,
        rng: Generator,
    ) -> None:
        """One PPO update on evaluated points."""
        batch = self._draw_batch(x, y, rng)
        share = self.policy.n_startup / len(x)
        decay = share**0.5
        entropy_weight = self.policy.entropy_weight * decay
        for _ in range(_EPOCHS):
            evaluation = self.network.evaluate(batch.trajectories, batch.preferences)
            ppo_loss = _ppo_loss(evaluation, batch, entropy_weight)
            imitation = (batch.imitation * evaluation.mean_log_prob).sum()
            loss = ppo_loss - self.policy.imitation_weight * imitation
            self._optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(
                self.network.parameters(), _MAX_GRADIENT_NORM
            )
            self._optimizer.step()

    def _draw_batch(
        self,
        x: Array,
        y: Array,
        rng: Generator,
    ) -> "_Batch":
        """For some preferences, the evaluated points that the policy would choose."""
        drawn_preferences = rng.dirichlet(np.ones(self.m), _PREFERENCES)
        evaluated = self.decisions.trajectories(x)
        trajectories = []
        evaluations = []
        preferences = []
        rewards = []
        imitation = []
        for preference in drawn_preferences:
            with torch.no_grad():
                row = torch.as_tensor(preference)
                repeated = row.expand(len(x), -1)
                evaluation = self.network.evaluate(evaluated, repeated)
            mean_log_prob = evaluation.mean_log_prob.numpy()
            rows = _draw_rows(mean_log_prob, rng)
            reward = scalarise(y, preference)[rows]
            repeated_preference = np.tile(preference, (len(rows), 1))
            trajectories.append(evaluated.take(rows))
            evaluations.append(evaluation.take(rows))
            preferences.append(repeated_preference)
            rewards.append(reward)
            imitation.append(_imitation_weights(reward))
        before = Evaluation.cat(evaluations)
        every_preference = np.concatenate(preferences)
        reward_tensor = torch.as_tensor(np.concatenate(rewards))
        # The weights of one preference sum to 1, and so do those of the batch.
        imitation_weights = np.concatenate(imitation) / _PREFERENCES
        advantage = advantages(
            before.values[:, :-1],
            reward_tensor,
            before.active,
            self.policy.discount,
            self.policy.gae_lambda,
        )
        return _Batch(
            trajectories=Trajectories.cat(trajectories),
            preferences=torch.as_tensor(every_preference),
            before=before,
            reward=reward_tensor,
            advantage=advantage,
            imitation=torch.as_tensor(imitation_weights),
        )


@dataclass(frozen=True)
class _Batch:
    """What one update trains on: b trajectories of k decisions.

    Attributes:
        trajectories: The decisions.
        preferences: `(b, m)`.
        before: The network's evaluation before the update.
        reward: `(b,)`.
        advantage: `(b, k)`.
        imitation: The weight of each trajectory in the imitation loss, `(b,)`; sums to 1.
    """

    trajectories: Trajectories
    preferences: Tensor
    before: Evaluation
    reward: Tensor
    advantage: Tensor
    imitation: Tensor


def _ppo_loss(
    evaluation: Evaluation,
    batch: _Batch,
    entropy_weight: float,
) -> Tensor:
    """Clipped surrogate, squared error of the critic and entropy (Schulman et al. 2017, eq. 9)."""
    before = batch.before
    active = before.active
    advantage = batch.advantage
    active_advantage = advantage[active]
    mean = active_advantage.mean()
    deviation = active_advantage.std()
    normalised = (advantage - mean) / (deviation + _MIN_DEVIATION)
    log_ratio = evaluation.log_prob - before.log_prob
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - _CLIP, 1 + _CLIP)
    plain = ratio * normalised
    clipped = clipped_ratio * normalised
    surrogate = torch.minimum(plain, clipped)
    # The return of each decision; the value at the end should be the reward itself.
    values_before = before.values[:, :-1]
    target = advantage + values_before
    values = evaluation.values[:, :-1]
    final_value = evaluation.values[:, -1]
    step_error = values - target
    final_error = final_value - batch.reward
    squared_error = step_error.square()
    step_loss = squared_error[active].mean()
    final_loss = final_error.square().mean()
    value_loss = _VALUE_WEIGHT * (step_loss + final_loss)
    policy_loss = -surrogate[active].mean()
    entropy = evaluation.entropy[active].mean()
    return policy_loss + value_loss - entropy_weight * entropy


def advantages(
    values: Tensor,
    reward: Tensor,
    active: Tensor,
    discount: float,
    gae_lambda: float,
) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) with a reward at the end.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lambda A_{t+1}. The reward comes
    with the last active decision. An inactive decision takes no time.

    Args:
        values: V before each decision, `(b, k)`.
        reward: `(b,)`.
        active: Which decisions are active, `(b, k)` bool.
        discount: gamma.
        gae_lambda: lambda.

    Returns:
        `(b, k)`, 0 where a decision is inactive.
    """
    next_value = reward
    advantage = torch.zeros_like(reward)
    result = torch.zeros_like(values)
    is_last = torch.ones_like(reward, dtype=torch.bool)
    n_decisions = values.shape[1]
    for k in reversed(range(n_decisions)):
        is_active = active[:, k]
        value = values[:, k]
        # The reward itself, which stands in for V after the last decision, is not discounted.
        weight = torch.where(is_last, 1.0, discount)
        delta = weight * next_value - value
        # gamma lambda A_{t+1}
        later = discount * gae_lambda * advantage
        accumulated = delta + later
        advantage = torch.where(is_active, accumulated, advantage)
        next_value = torch.where(is_active, value, next_value)
        result[:, k] = torch.where(is_active, advantage, 0.0)
        is_last = is_last & ~is_active
    return result


def scalarise(y: Array, preference: Sequence[float] | Array) -> Array:
    """Compute the reward of points under a preference: the augmented Tchebycheff scalar.

    Shortfalls from the best of each objective are in units of the distance from the median to the
    best, and at most 2.

    Args:
        y: Values `(n, m)`, maximised.
        preference: The weight of each objective, `(m,)`; sums to 1.

    Returns:
        `(n,)`: 0 at best, -2 at worst.
    """
    best = y.max(0)
    median = np.median(y, axis=0)
    extent = best - median
    scale = divisors(extent)
    relative = (best - y) / scale
    shortfall = np.minimum(relative, _MAX_SHORTFALL)
    weighted = shortfall * np.asarray(preference)
    worst = weighted.max(1)
    total = weighted.sum(1)
    sum_part = _AUGMENTATION * total
    reward: Array = -(1 - _AUGMENTATION) * worst - sum_part
    return reward


def _draw_rows(mean_log_prob: Array, rng: Generator) -> Indices:
    """Indices of evaluated points, drawn as often as the policy would choose them; all if few.

    The log-probability is per decision: in a long sequence the likeliest point would otherwise
    crowd out all others.
    """
    n = len(mean_log_prob)
    if n <= _REPLAYED:
        return np.arange(n)
    # Relative to the greatest, so that exp does not underflow everywhere.
    relative = mean_log_prob - mean_log_prob.max()
    share = np.exp(relative)
    probabilities = share / share.sum()
    return rng.choice(n, _REPLAYED, replace=False, p=probabilities)


def _imitation_weights(rewards: Array) -> Array:
    """The share of each point in what is imitated; sums to 1."""
    shortfall = rewards - rewards.max()
    share = np.exp(shortfall / _IMITATION_TEMPERATURE)
    weights: Array = share / share.sum()
    return weights
