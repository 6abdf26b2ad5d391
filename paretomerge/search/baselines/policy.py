"""HM3's learned policy (2409.18893, sec. 3.2) as a sampler: a path is walked decision by decision, and good paths become likely.

A point of the space is a path: its parameters are decided one after the other by a recurrent network that has seen those before.
Where the space is one of routes, that is a walk through the blocks of a model. Differences from the paper:

- The network is told the preference, so that one training serves every trade-off; HM3 trains one per preference.
- Evaluating is what is dear. So between two evaluations the policy walks known paths only, as often as it would take them: their
  reward under any preference is known and costs nothing.
- It imitates the best known paths for a preference (self-imitation, Oh et al. 2018, arXiv 1806.05635): a few dozen episodes do not
  teach from nothing that most routes are broken, but the known starts show routes that are not.
- Decisions that do not count, and values that one does not have, are masked; nothing invalid is ever evaluated.
- No cost per layer in the reward: the size is an objective of its own.

PPO (Schulman et al. 2017, arXiv 1707.06347, eq. 7) with generalised advantages (Schulman et al. 2016, arXiv 1506.02438, eq. 16)
and a terminal reward. Numbers are drawn from Beta distributions (Chou, Maturana & Scherer 2017), which end where the bounds are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from paretomerge.errors import ConfigError
from paretomerge.search.baselines.path_network import Decisions, PathNetwork, Paths, Reading
from paretomerge.search.options import check_options
from paretomerge.search.point_sampler import Archive

Array = NDArray[np.float64]
_PREFERENCES = 6  # of one update
_WALKS = 16  # known paths per preference and update
_ROUNDS = 3  # of gradient steps per update
_FIRST = 20  # updates before the first proposal: what was known beforehand is learnt
_CLIP = 0.2  # PPO: how far the probability of a decision may move in one update, relatively
_LARGEST = 2.0  # a gradient's norm
_SPREAD = 0.05  # share of the plain weighted sum in the reward: below the best, every objective still counts
_NEAR_BEST = 0.03  # what is worse by so much is imitated 1/e as often
_CANDIDATES = 8  # walked for one proposal; the first that is new is taken


@dataclass
class Policy:
    """A `Proposer`. Its proposals are a function of the seed and of the trials, in their order: a resumed study goes on alike.

    starts: feasible trials that are needed before it proposes. updates: of the network per trial from then on. rate: of Adam.
    entropy: weight of the decisions' entropy at first; it falls with the root of the number of trials. imitation: weight of the
    best known paths. surprise: how many decisions of a walk are taken at random. decay, trace: gamma and lambda of the advantages.
    """

    starts: int = 10
    updates: int = 2
    rate: float = 3e-3
    entropy: float = 0.005
    imitation: float = 2.0
    surprise: float = 3.0
    decay: float = 0.99
    trace: float = 0.95
    seed: int = 0
    _learner: "_Learner | None" = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_options("policy", self)
        if self.starts < 1 or self.updates < 1 or not self.rate > 0:
            got = f"{self.starts}, {self.updates} and {self.rate}"
            raise ConfigError(
                f"policy: expected starts and updates of 1 or more and a rate above 0, got {got}"
            )
        if min(self.entropy, self.imitation, self.surprise) < 0:
            got = f"{self.entropy}, {self.imitation} and {self.surprise}"
            raise ConfigError(
                f"policy: expected an entropy, an imitation and a surprise of 0 or more, got {got}"
            )
        if not (0 < self.decay <= 1 and 0 <= self.trace <= 1):
            raise ConfigError(
                f"policy: expected 0 < decay <= 1 and 0 <= trace <= 1, got {self.decay} and {self.trace}"
            )

    def propose(self, archive: Archive, rng: np.random.Generator) -> Array:
        """Walks `(k, d)` for one preference, drawn at random."""
        usable = archive.usable
        if len(usable) < self.starts:
            return np.zeros((0, archive.encoding.d))
        if self._learner is None or not self._learner.knows(archive):
            self._learner = _Learner(self, archive)
        self._learner.learn(archive.x[usable], archive.y[usable])
        return self._learner.walk(rng)


class _Learner:
    """The network, and what it has learnt from."""

    def __init__(self, policy: Policy, archive: Archive) -> None:
        self.policy = policy
        self.paths = Paths(archive.encoding)
        self.m = archive.y.shape[1]
        self._x = np.zeros((0, archive.encoding.d))
        self._y = np.zeros((0, self.m))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(policy.seed)
            self.network = PathNetwork(self.paths, self.m)
        self._optimizer = torch.optim.Adam(self.network.parameters(), lr=policy.rate)

    def knows(self, archive: Archive) -> bool:
        """Whether what was learnt from is how the archive begins; else a trial that ran beside others has come in late."""
        n, usable = len(self._x), archive.usable
        same = (
            archive.encoding.space == self.paths.encoding.space
            and archive.encoding.conditions == self.paths.encoding.conditions
        )
        if not same or archive.y.shape[1] != self.m:
            return False
        return np.array_equal(archive.x[usable[:n]], self._x) and np.array_equal(
            archive.y[usable[:n]], self._y
        )

    def learn(self, x: Array, y: Array) -> None:
        """From each trial that is new, in their order: whoever asks less often, or begins again, learns the same."""
        for n in range(max(len(self._x) + 1, self.policy.starts), len(x) + 1):
            for step in range(_FIRST if n == self.policy.starts else self.policy.updates):
                self._update(x[:n], y[:n], np.random.default_rng([self.policy.seed, n, step]))
        self._x, self._y = x.copy(), y.copy()

    def walk(self, rng: np.random.Generator) -> Array:
        """Points `(k, d)` for one preference."""
        preferences = np.tile(rng.dirichlet(np.ones(self.m)), (_CANDIDATES, 1))
        with torch.no_grad():
            return self.network.walk(
                preferences, rng, min(self.policy.surprise / len(self.paths.names), 1.0)
            )

    def _update(self, x: Array, y: Array, rng: np.random.Generator) -> None:
        """PPO on known paths: for some preferences, those that the policy would take."""
        drawn = rng.dirichlet(np.ones(self.m), _PREFERENCES)
        known = self.paths.decisions(x)
        batch, told, rewards = [], [], []
        for preference in drawn:
            with torch.no_grad():
                reading = self.network.read(known, torch.as_tensor(preference).expand(len(x), -1))
            rows = _taken(reading.likelihood.numpy(), rng)
            batch.append(known.take(rows))
            told.append(reading.take(rows))
            rewards.append(rewarded(y, preference)[rows])
        preferences = torch.as_tensor(np.repeat(drawn, [len(r) for r in rewards], axis=0))
        imitated = torch.as_tensor(
            np.concatenate([_nearly_best(r) for r in rewards]) / _PREFERENCES
        )
        paths, before = Decisions.cat(batch), Reading.cat(told)
        reward = torch.as_tensor(np.concatenate(rewards))
        gains = advantages(
            before.values[:, :-1], reward, paths.counts, self.policy.decay, self.policy.trace
        )
        entropy = self.policy.entropy * (self.policy.starts / len(x)) ** 0.5
        for _ in range(_ROUNDS):
            now = self.network.read(paths, preferences)
            loss = (
                _ppo(now, before, gains, reward, entropy)
                - self.policy.imitation * (imitated * now.likelihood).sum()
            )
            self._optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), _LARGEST)
            self._optimizer.step()


def _ppo(
    now: Reading, before: Reading, gains: torch.Tensor, reward: torch.Tensor, entropy: float
) -> torch.Tensor:
    """The loss: clipped surrogate, squared error of the values, entropy. gains `(b, k)`, reward `(b,)`."""
    counts = before.counts
    centred = (gains - gains[counts].mean()) / (gains[counts].std() + 1e-3)
    ratio = (now.logs - before.logs).exp()
    surrogate = torch.minimum(ratio * centred, ratio.clamp(1 - _CLIP, 1 + _CLIP) * centred)
    goals = gains + before.values[:, :-1]
    off = (now.values[:, :-1] - goals).square()[counts].mean() + (
        now.values[:, -1] - reward
    ).square().mean()
    return -surrogate[counts].mean() + 0.5 * off - entropy * now.entropy[counts].mean()


def advantages(
    values: torch.Tensor, reward: torch.Tensor, counts: torch.Tensor, decay: float, trace: float
) -> torch.Tensor:
    """`(b, k)`, 0 where a decision does not count: then it takes no time. values `(b, k)`: before each decision. reward `(b,)`:
    comes with the last one that counts.
    """
    ahead, carried = reward, torch.zeros_like(reward)
    out = torch.zeros_like(values)
    last = torch.ones_like(reward, dtype=torch.bool)
    for k in reversed(range(values.shape[1])):
        on = counts[:, k]
        delta = torch.where(last, 1.0, decay) * ahead - values[:, k]
        carried = torch.where(on, delta + decay * trace * carried, carried)
        ahead = torch.where(on, values[:, k], ahead)
        out[:, k] = torch.where(on, carried, 0.0)
        last = last & ~on
    return out


def rewarded(y: Array, preference: Sequence[float] | Array) -> Array:
    """`(n,)`: what points y `(n, m)` (maximised) are worth under a preference `(m,)` that sums to 1: 0 at best, -2 at worst.

    The augmented Tchebycheff scalar, objectives in units of what lies between the median of the points and the best; how far below
    the median a broken model is tells little.
    """
    top, middle = y.max(0), np.median(y, axis=0)
    extent = np.where(top - middle > 1e-12, top - middle, 1.0)
    shortfall = np.minimum((top - y) / extent, 2.0) * np.asarray(preference)
    return np.asarray(-(1 - _SPREAD) * shortfall.max(1) - _SPREAD * shortfall.sum(1))


def _taken(likelihood: Array, rng: np.random.Generator) -> NDArray[np.intp]:
    """Some known paths, as often as the policy takes them; all where they are few.

    likelihood `(n,)`: log-probability per decision, so that in long paths one does not crowd out the others.
    """
    if len(likelihood) <= _WALKS:
        return np.arange(len(likelihood))
    share = np.exp(likelihood - likelihood.max())
    return rng.choice(len(likelihood), _WALKS, replace=False, p=share / share.sum())


def _nearly_best(rewards: Array) -> Array:
    """How much each path is imitated; sums to 1."""
    share = np.exp((rewards - rewards.max()) / _NEAR_BEST)
    return np.asarray(share / share.sum())
