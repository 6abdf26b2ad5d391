"""The landscape as an optimiser sees it: parameters in, scores and standard errors out, in two milliseconds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution

from paretomerge.errors import ConfigError
from paretomerge.pareto.front import hypervolume

from .merges import FILE, HERE, Array, Merges, standard_error
from .process import Process, features, sigmoid

SURROGATE = HERE / "surrogate.npz"


@dataclass(frozen=True)
class Landscape:
    """m tasks over a mixed space of a choice and nine numbers. All objectives are maximised.

    processes: one per task; coefficients `(m, n)` of their posterior means. error: root mean square of the surrogate's
    leave-one-out error `(m,)`. reference `(m,)`: the worst measured source per task less a tenth of their range.
    front_rows: method and numbers of points of the surrogate's own front; hypervolume: that of the whole front.
    """

    merges: Merges
    processes: tuple[Process, ...]
    coefficients: Array
    error: Array
    reference: Array
    front_rows: tuple[np.ndarray, Array]
    hypervolume: float

    @classmethod
    def load(cls, merges: Path = FILE, surrogate: Path = SURROGATE) -> "Landscape":
        data = Merges.load(merges)
        with np.load(surrogate) as kept:
            parts = {name: kept[name] for name in kept.files}
        if parts["coefficients"].shape != (len(data.tasks), len(data)):
            raise ConfigError(
                f"{surrogate}: expected a surrogate of the {len(data)} merges of {merges}, got another; run `fit`"
            )
        settings = zip(parts["projection"], parts["settings"].tolist(), strict=True)
        processes = tuple(Process(projection, *numbers) for projection, numbers in settings)
        front = (parts["front_method"], parts["front_numbers"])
        return cls(
            data,
            processes,
            parts["coefficients"],
            parts["error"],
            parts["reference"],
            front,
            float(parts["hypervolume"]),
        )

    def save(self, file: Path = SURROGATE) -> None:
        np.savez_compressed(
            file,
            projection=np.stack([p.projection for p in self.processes]),
            settings=np.array(
                [[p.variance, p.slope, p.noise, p.roughness] for p in self.processes]
            ),
            coefficients=self.coefficients,
            error=self.error,
            reference=self.reference,
            front_method=self.front_rows[0],
            front_numbers=self.front_rows[1],
            hypervolume=np.array(self.hypervolume),
        )

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.merges.tasks

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """The space as Optuna knows it, every parameter in it."""
        return self.merges.space.distributions

    @property
    def conditions(self) -> dict[str, tuple[tuple[str, tuple[str, ...]], ...]]:
        """name -> (parent, values) pairs: a density counts only under a method that reads one."""
        return self.merges.space.conditions

    @property
    def starts(self) -> dict[str, dict[str, Any]]:
        """What is known without a search, by name: each source alone, the soup, published defaults."""
        return self.merges.starts

    @property
    def front(self) -> list[dict[str, Any]]:
        """Parameters of a sample of the surrogate's Pareto front."""
        return [self.merges.space.point(m, row) for m, row in zip(*self.front_rows, strict=True)]

    def evaluate(
        self,
        params: Mapping[str, Any],
        items: int | None = None,
        rng: np.random.Generator | None = None,
    ) -> tuple[Array, Array]:
        """Scores `(m,)` and their standard errors `(m,)` at one point.

        items: None for the surrogate's noise-free scores (errors 0); n for the shares of right answers among n items a
        task, drawn from `rng`. Raises ConfigError where a parameter is unknown, missing or out of bounds.
        """
        truth = self.scores([params])[0]
        if items is None:
            return truth, np.zeros(len(truth))
        if items < 2 or rng is None:
            raise ConfigError(
                f"evaluate: expected items of at least 2 and a random generator, got items={items}, rng={rng}"
            )
        drawn = rng.binomial(items, truth) / items
        return drawn, standard_error(drawn, items)

    def scores(self, points: Sequence[Mapping[str, Any]]) -> Array:
        """Noise-free scores `(n, m)` of several points."""
        return self.predict(*self.merges.space.rows(points))

    def predict(self, method: np.ndarray, numbers: Array) -> Array:
        """Noise-free scores `(n, m)` of rows as `Space.rows` makes them."""
        x = features(self.merges.space, method, numbers)
        columns = []
        for process, coefficients, (known, slopes) in zip(
            self.processes, self.coefficients, self._known, strict=True
        ):
            logit = (
                process.smooth(x @ process.projection, known) @ coefficients
                + slopes[0]
                + (2 * x - 1) @ slopes[1:]
            )
            columns.append(sigmoid(logit))
        return np.stack(columns, axis=1)

    def share(self, points: Sequence[Mapping[str, Any]]) -> float:
        """The noise-free hypervolume of `points` as a share of that of the surrogate's front: 0 to 1."""
        return (
            hypervolume(self.scores(points), self.reference) / self.hypervolume if points else 0.0
        )

    def objective(
        self, items: int | None = None, seed: int = 0
    ) -> Callable[[optuna.Trial], tuple[float, ...]]:
        """A function for `Study.optimize`; it leaves the standard errors in the trial's user attribute `stderr`.

        Densities are asked for only where the method reads them.
        """
        rng = np.random.default_rng(seed)

        def evaluate(trial: optuna.Trial) -> tuple[float, ...]:
            params: dict[str, Any] = {}
            for name, distribution in self.distributions.items():
                if all(
                    params[parent] in values for parent, values in self.conditions.get(name, ())
                ):
                    params[name] = _suggest(trial, name, distribution)
            values, stderr = self.evaluate(params, items, rng)
            trial.set_user_attr("stderr", stderr.tolist())
            return tuple(values.tolist())

        return evaluate

    @cached_property
    def _known(self) -> list[tuple[Array, Array]]:
        """Per task: the projected merges, and the constant and slopes that the linear part comes to."""
        x = features(self.merges.space, self.merges.method, self.merges.numbers)
        affine = np.concatenate([np.ones((len(x), 1)), 2 * x - 1], axis=1)
        pairs = zip(self.processes, self.coefficients, strict=True)
        return [
            (x @ process.projection, process.slope * coefficients @ affine)
            for process, coefficients in pairs
        ]


def _suggest(trial: optuna.Trial, name: str, distribution: Any) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    return trial.suggest_float(name, distribution.low, distribution.high)
