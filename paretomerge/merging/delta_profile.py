"""How alike fine-tunes are, and where they moved: one pass over the checkpoints, a block at a time.

Model Kinship (Hu et al. 2024, arXiv 2410.12613, sec. 3): the similarity of two deltas tau_i = theta_i - theta_0, taken as
one long vector each, by cosine, Pearson correlation or Euclidean distance. The same pass gives the mass (squared L2
norm) of every tensor's delta: the delta profile.
"""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paretomerge.checkpoint.architecture import Architecture
from paretomerge.checkpoint.operand import FLOAT_DTYPES, Operand, matrix_shape
from paretomerge.errors import CheckpointError, ConfigError
from paretomerge.merging.plan.make import open_weights
from paretomerge.merging.plan.plan import Weights

Matrix = NDArray[np.float64]

_BLOCK = (
    1 << 15
)  # entries of each model at a time: in float64, three of them stay in a core's cache
_THREADS = 2  # one reads while the other multiplies


@dataclass(frozen=True)
class DeltaProfile:
    """Deltas of K sources to one base.

    base: its name. sources: name -> path. size: entries compared. mass: tensor -> squared L2 norm of each source's delta.
    products: (K, K) scalar products of the deltas. sums: (K,) sums of their entries.
    """

    base: str
    sources: Mapping[str, str]
    size: int
    mass: Mapping[str, tuple[float, ...]]
    products: tuple[tuple[float, ...], ...]
    sums: tuple[float, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.sources)

    @property
    def norms(self) -> Matrix:
        """(K,) L2 norms of the deltas."""
        return np.sqrt(np.diag(np.asarray(self.products)))

    @property
    def cosine(self) -> Matrix:
        """(K, K); 0 for a source that is the base."""
        return _scaled(np.asarray(self.products))

    @property
    def pearson(self) -> Matrix:
        """(K, K) correlations of the entries; 0 where all entries of a delta are equal."""
        sums = np.asarray(self.sums)
        return _scaled(np.asarray(self.products) - np.outer(sums, sums) / max(self.size, 1))

    @property
    def euclidean(self) -> Matrix:
        """(K, K) distances between the sources, in units of the weights."""
        products = np.asarray(self.products)
        squares = np.diag(products)
        return np.asarray(
            np.sqrt(np.maximum(squares[:, None] + squares[None, :] - 2 * products, 0.0))
        )

    def by_layer(self, architecture: Architecture, role: str | None = None) -> Matrix:
        """(L, K) mass of each layer; of one role's tensors alone, if given. Embeddings, final norm and head are in none."""
        mass = np.zeros((architecture.depth, len(self.sources)))
        for name, row in self.mass.items():
            layer = architecture.layer(name)
            if layer is not None and role in (None, architecture.role(name)):
                mass[layer] += row
        return mass

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "DeltaProfile":
        """What `to_json` wrote; anything else is a ConfigError."""
        try:
            data: dict[str, Any] = json.loads(text)
            return cls(
                str(data["base"]),
                {str(name): str(path) for name, path in data["sources"].items()},
                int(data["size"]),
                {str(tensor): tuple(map(float, row)) for tensor, row in data["mass"].items()},
                tuple(tuple(map(float, row)) for row in data["products"]),
                tuple(map(float, data["sums"])),
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"expected a delta profile in JSON, got {error!r}; delete the file, it is made again"
            ) from error

    def of(self, names: tuple[str, ...]) -> "DeltaProfile":
        """The profile of some of the sources, in that order."""
        at = [self.names.index(name) for name in names]
        return DeltaProfile(
            self.base,
            {name: self.sources[name] for name in names},
            self.size,
            {tensor: tuple(row[i] for i in at) for tensor, row in self.mass.items()},
            tuple(tuple(self.products[i][j] for j in at) for i in at),
            tuple(self.sums[i] for i in at),
        )


def profile(
    base: str,
    sources: Mapping[str, str],
    already: Mapping[str, Weights] | None = None,
    watch: Callable[[int, int], None] | None = None,
) -> DeltaProfile:
    """Compare `sources` (name -> path, or path+adapter) with `base` and with each other, in one reading of each.

    Tensors that a source lacks, and whole numbers, are left out for all; shapes must agree. Deltas are taken in float32,
    as merges take them, and summed in float64. Memory: half a megabyte per model and thread.
    already: models that are open. watch: called with (tensors done, of how many).
    """
    opened = open_weights((base, *sources.values()), already)
    first = opened[base]
    names = [name for name in sorted(first.headers) if first.headers[name].dtype in FLOAT_DTYPES]
    shared = [
        (name, [_stand_in(opened[path], name) for path in sources.values()]) for name in names
    ]
    shared = [(name, theirs) for name, theirs in shared if None not in theirs]
    if not shared:
        raise CheckpointError(
            f"expected tensors that {base} and every model have, got none; do the models come from one base?"
        )
    pairs = [
        (
            name,
            [
                first.operand(name),
                *(opened[p].operand(t) for p, t in zip(sources.values(), theirs, strict=True) if t),
            ],
        )
        for name, theirs in shared
    ]
    for name, operands in pairs:
        _one_shape(name, operands, (base, *sources))
    k = len(sources)
    products, sums, size = np.zeros((k, k)), np.zeros(k), 0
    mass: dict[str, tuple[float, ...]] = {}
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="kinship") as pool:
        for done, ((name, operands), (gram, total)) in enumerate(
            zip(pairs, pool.map(_tensor, (o for _, o in pairs)), strict=True), 1
        ):
            products += gram
            sums += total
            size += int(np.prod(operands[0].shape, dtype=np.int64))
            mass[name] = tuple(np.diag(gram).tolist())
            if watch:
                watch(done, len(pairs))
    return DeltaProfile(
        base, dict(sources), size, mass, tuple(map(tuple, products.tolist())), tuple(sums.tolist())
    )


def order_by_similarity(profile: DeltaProfile) -> tuple[str, ...]:
    """The sources so that those which come first are the most diverse: the one least like the others by mean cosine, then
    each time the one whose nearest among the chosen is the farthest. Of equals the earlier."""
    cosine = profile.cosine
    left = list(range(len(profile.sources)))
    chosen: list[int] = []
    while left:
        near = {i: max(cosine[i][j] for j in chosen) if chosen else cosine[i].sum() for i in left}
        chosen.append(min(left, key=lambda i: (near[i], i)))
        left.remove(chosen[-1])
    return tuple(profile.names[i] for i in chosen)


def near_duplicates(profile: DeltaProfile, threshold: float) -> dict[str, str]:
    """Sources to leave out -> the earlier source, kept, whose delta has a cosine above `threshold` to theirs."""
    if not 0 < threshold <= 1:
        raise ConfigError(
            f"near_duplicates: expected a cosine above 0 and up to 1, got {threshold}"
        )
    cosine = profile.cosine
    dropped: dict[str, str] = {}
    for i, name in enumerate(profile.names):
        kept = [j for j in range(i) if profile.names[j] not in dropped]
        nearest = max(kept, key=lambda j: cosine[i][j], default=None)
        if nearest is not None and cosine[i][nearest] > threshold:
            dropped[name] = profile.names[nearest]
    return dropped


def _stand_in(weights: Weights, name: str) -> str | None:
    """The source's tensor for one of the base: floats only."""
    found = weights.architecture.find_equivalent(name)
    return found if found is not None and weights.headers[found].dtype in FLOAT_DTYPES else None


def _one_shape(name: str, operands: list[Operand], models: tuple[str, ...]) -> None:
    if len({operand.shape for operand in operands}) > 1:
        told = ", ".join(
            f"{model} {list(o.shape)}" for model, o in zip(models, operands, strict=True)
        )
        raise CheckpointError(
            f"{name}: expected one shape, got {told}; do the models come from one base, with one vocabulary?"
        )


def _tensor(operands: list[Operand]) -> tuple[Matrix, Matrix]:
    """(K, K) products and (K,) sums of the deltas of one tensor; the base comes first."""
    import torch

    rows, columns = matrix_shape(operands[0].shape)
    k = len(operands) - 1
    gram, total = torch.zeros(k, k, dtype=torch.float64), torch.zeros(k, dtype=torch.float64)
    step = max(1, _BLOCK // max(columns, 1))
    for first in range(0, rows if columns else 0, step):
        end = min(first + step, rows)
        theta = operands[0].rows(first, end)
        deltas = torch.empty((k, theta.numel()), dtype=torch.float64)
        for row, operand in zip(deltas, operands[1:], strict=True):
            row.copy_(operand.rows(first, end).sub_(theta).view(-1))
        gram.addmm_(deltas, deltas.T)
        total.add_(deltas.sum(1))
    return gram.numpy(), total.numpy()


def _scaled(products: Matrix) -> Matrix:
    """Products over the lengths of their factors, in [-1, 1]; 0 where a length is 0."""
    lengths = np.sqrt(np.maximum(np.diag(products), 0.0))
    outer = np.outer(lengths, lengths)
    scaled = np.divide(products, outer, out=np.zeros_like(products), where=outer > 0)
    return np.asarray(scaled.clip(-1, 1))
