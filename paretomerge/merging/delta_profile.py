"""Similarity of task vectors (model kinship), and where in a model they are.

Hu et al. 2024 (Model Kinship, arXiv 2410.12613, sec. 3) compare fine-tunes by their deltas, or task
vectors, tau_i = theta_i - theta_0. Each tau_i is one long vector; the similarity is the cosine, the
Pearson correlation or the Euclidean distance. One pass over the checkpoints, a block at a time,
also gives the squared L2 norm of the tau_i of every tensor.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np

from paretomerge.checkpoint.architecture import Architecture
from paretomerge.checkpoint.operand import FLOAT_DTYPES, Operand, matrix_shape
from paretomerge.errors import CheckpointError, ConfigError, ErrorCollector
from paretomerge.merging.plan.belonging import find_mismatch
from paretomerge.merging.plan.make import open_weights
from paretomerge.merging.plan.one_layout import arrange_like
from paretomerge.merging.plan.plan import Weights
from paretomerge.types import Array

Floats = tuple[float, ...]

_BLOCK = (
    1 << 15
)  # entries per model: in float64, three blocks stay in the cache of a core
_THREADS = 2  # one reads while the other multiplies


@dataclass(frozen=True)
class DeltaProfile:
    """Task vectors tau_i of K sources relative to one base.

    Attributes:
        base: The name of the base.
        sources: Name -> path.
        size: The number of entries that were compared.
        mass: Tensor -> squared L2 norm of each source's tau_i there.
        products: (K, K) inner products of the tau_i.
        sums: (K,) sums of the entries of the tau_i.
    """

    base: str
    sources: Mapping[str, str]
    size: int
    mass: Mapping[str, Floats]
    products: tuple[Floats, ...]
    sums: Floats

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sources."""
        return tuple(self.sources)

    @property
    def norms(self) -> Array:
        """(K,) L2 norms of the tau_i."""
        squared_norms = np.diag(np.asarray(self.products))
        return np.sqrt(squared_norms)

    @property
    def cosine(self) -> Array:
        """(K, K) cosines of the tau_i; 0 for a source that equals the base."""
        return _normalized(np.asarray(self.products))

    @property
    def pearson(self) -> Array:
        """(K, K) correlations of the entries; 0 where all entries of a tau_i are equal."""
        sums = np.asarray(self.sums)
        # n cov(x, y) = sum x y - sum x sum y / n
        products_of_means = np.outer(sums, sums) / max(self.size, 1)
        return _normalized(np.asarray(self.products) - products_of_means)

    @property
    def euclidean(self) -> Array:
        """(K, K) Euclidean distances between the sources, in units of the weights."""
        products = np.asarray(self.products)
        squares = np.diag(products)
        # |x - y|^2 = |x|^2 + |y|^2 - 2 x y; rounding can make it negative.
        squared_distances = np.add.outer(squares, squares) - 2 * products
        squared_distances = np.maximum(squared_distances, 0.0)
        return np.asarray(np.sqrt(squared_distances))

    def by_layer(self, architecture: Architecture, role: str | None = None) -> Array:
        """Squared L2 norms of the tau_i of each layer.

        Args:
            architecture: The architecture of the base.
            role: Only count tensors of this role (`attention`, `mlp`, ...); by default all.

        Returns:
            (L, K). Embeddings, the final norm and the head belong to no layer.
        """
        mass = np.zeros((architecture.depth, len(self.sources)))
        for name, row in self.mass.items():
            layer = architecture.layer(name)
            has_role = role in (None, architecture.role(name))
            if layer is not None and has_role:
                mass[layer] += row
        return mass

    def to_json(self) -> str:
        """The profile as JSON text."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "DeltaProfile":
        """Read what `to_json` wrote.

        Args:
            text: JSON.

        Returns:
            The profile.

        Raises:
            ConfigError: If the text is not a profile.
        """
        try:
            data = json.loads(text)
            sources = data["sources"].items()
            mass = data["mass"].items()
            return cls(
                base=str(data["base"]),
                sources={str(name): str(path) for name, path in sources},
                size=int(data["size"]),
                mass={str(tensor): _floats(row) for tensor, row in mass},
                products=tuple(_floats(row) for row in data["products"]),
                sums=_floats(data["sums"]),
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"expected a delta profile in JSON, got {error!r}; "
                "delete the file, and it is computed again"
            ) from error

    def of(self, names: tuple[str, ...]) -> "DeltaProfile":
        """The profile of the sources `names`, in that order."""
        indices = [self.names.index(name) for name in names]

        def select(row: Floats) -> Floats:
            return tuple(row[i] for i in indices)

        mass = {}
        for tensor, row in self.mass.items():
            mass[tensor] = select(row)
        rows_of_products = [self.products[i] for i in indices]
        return DeltaProfile(
            base=self.base,
            sources={name: self.sources[name] for name in names},
            size=self.size,
            mass=mass,
            products=tuple(select(row) for row in rows_of_products),
            sums=select(self.sums),
        )


def _floats(values: Iterable[float]) -> Floats:
    return tuple(float(value) for value in values)


def profile(
    base: str,
    sources: Mapping[str, str],
    opened: Mapping[str, Weights] | None = None,
    allow_mismatch: bool = False,
    same_vocabulary: bool = True,
) -> DeltaProfile:
    """Compare fine-tunes with their base and with each other, reading each once.

    Deltas are computed in float32, as in merges, and summed in float64. Memory: half a megabyte per
    model and thread.

    Args:
        base: The base model.
        sources: Name -> path, or path+adapter.
        opened: Models that are open already, by path.
        allow_mismatch: Whether to compare models that do not seem to come from the base.
        same_vocabulary: Whether all models have one vocabulary. Without one, rows of embeddings
            and heads are other tokens in other models, so these tensors are left out.

    Returns:
        The profile. Tensors that a source lacks, and tensors of integers, are left out for all.

    Raises:
        CheckpointError: If a model cannot be read, shapes differ, no tensor is common to all, or a
            model does not seem to come from the base.
    """
    weights = open_weights((base, *sources.values()), opened)
    for path in sources.values():
        if path != base:
            weights[path] = arrange_like(base, weights[base], path, weights[path])
    source_weights = [weights[path] for path in sources.values()]
    operands_by_tensor = _common_operands(
        weights[base], source_weights, same_vocabulary
    )
    if not operands_by_tensor:
        raise CheckpointError(
            f"expected tensors that {base} and every model have, got none; "
            "do the models come from one base?"
        )
    for name, operands in operands_by_tensor.items():
        _check_one_shape(name, operands, (base, *sources))
    # Other shapes say more plainly what is wrong, so they come first.
    if not allow_mismatch:
        _check_belonging(base, sources, weights, same_vocabulary)
    k = len(sources)
    products = np.zeros((k, k))
    sums = np.zeros(k)
    size = 0
    mass: dict[str, Floats] = {}
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="kinship") as pool:
        results = pool.map(_tensor_products, operands_by_tensor.values())
        # In the order of the tensors, so that sums do not depend on the threads.
        for name, (tensor_products, tensor_sums) in zip(
            operands_by_tensor, results, strict=True
        ):
            products += tensor_products
            sums += tensor_sums
            size += math.prod(operands_by_tensor[name][0].shape)
            mass[name] = _floats(np.diag(tensor_products))
    return DeltaProfile(
        base=base,
        sources=dict(sources),
        size=size,
        mass=mass,
        products=tuple(_floats(row) for row in products),
        sums=_floats(sums),
    )


def _check_belonging(
    base: str,
    sources: Mapping[str, str],
    weights: Mapping[str, Weights],
    same_vocabulary: bool,
) -> None:
    problems = ErrorCollector()
    for path in sources.values():
        with problems.collect():
            mismatch = find_mismatch(
                base, weights[base], path, weights[path], same_vocabulary
            )
            mismatch.raise_if_any()
    problems.raise_if_any()


def _common_operands(
    base: Weights,
    sources: Sequence[Weights],
    same_vocabulary: bool,
) -> dict[str, list[Operand]]:
    """Tensor of the base -> its operand and those of all sources; floats that all models have."""
    operands_by_tensor: dict[str, list[Operand]] = {}
    for name in sorted(base.headers):
        header = base.headers[name]
        if header.dtype not in FLOAT_DTYPES:
            continue
        is_per_token = base.architecture.vocabulary_axis(name, header.shape) is not None
        if is_per_token and not same_vocabulary:
            continue
        operands = [base.operand(name)]
        for source in sources:
            # Some architectures name a tensor differently, or tie it to another.
            source_name = source.architecture.find_equivalent(name)
            if source_name is None:
                continue
            if source.headers[source_name].dtype in FLOAT_DTYPES:
                operands.append(source.operand(source_name))
        if len(operands) == 1 + len(sources):
            operands_by_tensor[name] = operands
    return operands_by_tensor


def _check_one_shape(
    name: str,
    operands: list[Operand],
    models: tuple[str, ...],
) -> None:
    distinct_shapes = {operand.shape for operand in operands}
    if len(distinct_shapes) == 1:
        return
    shapes = []
    for model, operand in zip(models, operands, strict=True):
        shape = list(operand.shape)
        shapes.append(f"{model} {shape}")
    raise CheckpointError(
        f"{name}: expected one shape, got {', '.join(shapes)}; "
        "do the models come from one base, with one vocabulary?"
    )


def _tensor_products(operands: list[Operand]) -> tuple[Array, Array]:
    """(K, K) inner products and (K,) sums of the tau_i of one tensor; the base comes first."""
    # Not at the top: the command line reads profiles without torch.
    import torch

    base, sources = operands[0], operands[1:]
    rows, columns = matrix_shape(base.shape)
    k = len(sources)
    products = torch.zeros(k, k, dtype=torch.float64)
    sums = torch.zeros(k, dtype=torch.float64)
    step = max(1, _BLOCK // max(columns, 1))
    for first in range(0, rows if columns else 0, step):
        end = min(first + step, rows)
        base_rows = base.rows(first, end)
        deltas = torch.empty(k, base_rows.numel(), dtype=torch.float64)
        for i, source in enumerate(sources):
            # In float32, as merges take it; `deltas` makes it float64.
            delta = source.rows(first, end)
            delta.sub_(base_rows)
            deltas[i] = delta.view(-1)
        products.addmm_(deltas, deltas.T)
        sums.add_(deltas.sum(1))
    return products.numpy(), sums.numpy()


def _normalized(products: Array) -> Array:
    """Inner products over the lengths of their vectors, in [-1, 1]; 0 where a length is 0."""
    # Rounding can make a variance negative.
    squares = np.maximum(np.diag(products), 0.0)
    lengths = np.sqrt(squares)
    divisors = np.outer(lengths, lengths)
    cosines = np.divide(
        products,
        divisors,
        out=np.zeros_like(products),
        where=divisors > 0,
    )
    return np.asarray(cosines.clip(-1, 1))


def order_by_similarity(profile: DeltaProfile) -> tuple[str, ...]:
    """Order the sources so that the first ones are the most diverse.

    The first is the source with the lowest mean cosine to the others. Each next one is the source
    whose nearest among the chosen is the farthest. Of equal ones the earlier comes first.

    Args:
        profile: The task vectors.

    Returns:
        The names of the sources.
    """
    cosine = profile.cosine
    remaining = list(range(len(profile.sources)))
    chosen: list[int] = []
    while remaining:
        similarity = {}
        for i in remaining:
            if chosen:
                similarity[i] = cosine[i][chosen].max()
            else:
                similarity[i] = cosine[i].sum()
        # `min` takes the first of equal ones, and `remaining` is in order.
        least_similar = min(remaining, key=similarity.__getitem__)
        chosen.append(least_similar)
        remaining.remove(least_similar)
    return tuple(profile.names[i] for i in chosen)


def near_duplicates(profile: DeltaProfile, threshold: float) -> dict[str, str]:
    """Find sources that are nearly copies of an earlier one.

    Args:
        profile: The task vectors.
        threshold: The cosine of two tau_i above which they are near-duplicates, in (0, 1].

    Returns:
        Source to leave out -> the most similar earlier source that stays.

    Raises:
        ConfigError: If the threshold is out of range.
    """
    if not 0 < threshold <= 1:
        raise ConfigError(
            f"near_duplicates: expected a cosine above 0 and up to 1, got {threshold}"
        )
    cosine = profile.cosine
    duplicates: dict[str, str] = {}
    for i, name in enumerate(profile.names):
        earlier = range(i)
        retained = [j for j in earlier if profile.names[j] not in duplicates]
        if not retained:
            continue
        to_retained = cosine[i][retained]
        nearest = retained[int(to_retained.argmax())]
        if cosine[i][nearest] > threshold:
            duplicates[name] = profile.names[nearest]
    return duplicates
