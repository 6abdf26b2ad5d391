"""How much of what each source does a merge would break, judged from weights alone.

Cheng et al. 2025 (Whoever started the interference should end it), arXiv 2503.08099: the inputs of
a linear layer on task i lie close to the row space of tau_i, so what a merged delta tau does to
these inputs, against what tau_i does, is |(tau - tau_i) tau_i^T|^2 (their eq. 9). Divided by
|tau_i tau_i^T|^2 it is 0 for the source itself and 1 for the base. `wudi` minimises a sum of such
terms. Here each merge method is measured by it, and the scale lambda of a merge is chosen by it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from paretomerge.suggest.sample import Directions


@dataclass
class Interference:
    """The interference of a merged delta s tau with every source, as a function of the scale s.

    For source i it is 1 - 2 s b_i / a_i + s^2 c_i / a_i, with a_i = |tau_i tau_i^T|^2,
    b_i = <tau tau_i^T, tau_i tau_i^T> and c_i = |tau tau_i^T|^2, each summed over matrices. tau_i
    stands for its leading directions, U S V^T, so that |tau tau_i^T| = |tau V S|.
    """

    _a: dict[str, float] = field(default_factory=dict)
    _b: dict[str, float] = field(default_factory=dict)
    _c: dict[str, float] = field(default_factory=dict)

    def add(
        self,
        merged: Tensor,
        deltas: Mapping[str, Tensor],
        directions: Mapping[str, Directions],
    ) -> None:
        """Add one matrix.

        Args:
            merged: `(outputs, inputs)`, the merged delta tau.
            deltas: Source -> tau_i, of the same shape.
            directions: Source -> its leading directions.
        """
        for source, delta in deltas.items():
            weighted_inputs = directions[source].inputs * directions[source].strengths
            of_source = (delta @ weighted_inputs).double()
            of_merge = (merged @ weighted_inputs).double()
            _add(self._a, source, of_source.square().sum())
            _add(self._b, source, (of_merge * of_source).sum())
            _add(self._c, source, of_merge.square().sum())

    def at(self, scale: float = 1.0) -> dict[str, float]:
        """Source -> interference with the merged delta times `scale`.

        A source that equals the base is left out: nothing can be lost of it.
        """
        interference = {}
        for source, a in self._a.items():
            if a > 0:
                linear = 2 * scale * self._b[source]
                quadratic = scale**2 * self._c[source]
                interference[source] = 1 - (linear - quadratic) / a
        return interference

    def mean(self, scale: float = 1.0) -> float:
        """The mean over the sources; 0 where all equal the base."""
        values = self.at(scale).values()
        return sum(values) / len(values) if values else 0.0

    def best_scale(self) -> float:
        """The scale with the least mean; 1 for a merge that is the base."""
        linear = 0.0
        quadratic = 0.0
        for source, a in self._a.items():
            if a > 0:
                linear += self._b[source] / a
                quadratic += self._c[source] / a
        return linear / quadratic if quadratic > 0 else 1.0


def _add(sums: dict[str, float], source: str, value: Tensor) -> None:
    sums[source] = sums.get(source, 0.0) + float(value)
