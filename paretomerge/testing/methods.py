"""The contract of merge methods: laws that a new method must keep, for its author.

Needs no test framework. Each check raises AssertionError with a message that names the law, the
parameters and the shape. A test of a new row of METHODS is

    check_method(METHODS["mine"])
    check_copies(METHODS["mine"])  # if a merge of copies of one model must give that model
    check_one_hot(METHODS["mine"])  # if weight 1 among weights of 0 must give that model

and worked examples with `merge_tensors`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from paretomerge.checkpoint.operand import InMemoryTensor, Operand
from paretomerge.merging.block import CPU_BLOCK, Inputs
from paretomerge.merging.methods import Method, Parameter
from paretomerge.merging.parameter_values import number_in
from paretomerge.merging.statistics import Statistic
from paretomerge.types import Params, ParamValue

SHAPES = ((1009,), (37, 53), (4, 6, 31))
"""A vector, a matrix, a stack of matrices."""

LARGE_SHAPE = (300, 517)
"""A matrix of several blocks, for methods that do not hold whole tensors."""

_ONE_BLOCK = 1 << 60  # elements: a tensor in one block
_TOLERANCE = 1e-5  # relative to the largest entry, at least absolute


ParamDict = dict[str, ParamValue]


class Case(NamedTuple):
    """Parameters to test a method with.

    Attributes:
        parameters: Those of each source.
        options: Those of the whole merge.
    """

    parameters: list[ParamDict]
    options: ParamDict


class _Models(NamedTuple):
    """One tensor of a base (None: the recipe has none) and of several sources."""

    base: Tensor | None
    sources: list[Tensor]

    def tensors(self) -> list[Tensor]:
        if self.base is None:
            return self.sources
        return [*self.sources, self.base]


def merge_tensors(
    method: Method,
    base: Tensor | None,
    sources: Sequence[Tensor],
    parameters: Sequence[Params] | None = None,
    options: Params | None = None,
    *,
    block: int | None = None,
    seed: int = 0,
    statistics: Sequence[Statistic | None] = (),
) -> Tensor:
    """Merge one tensor of every model, as the engine does.

    Args:
        method: The row of the method.
        base: theta_0, or None. A method that takes the base as one of the models gets it as the
            first source.
        sources: theta_i, all of one shape. Two or more axes count as a matrix.
        parameters: The parameters of each source; those of the base come first where it is a
            source. Missing ones take the row's default; a required one must be there.
        options: The parameters of the whole merge.
        block: Elements merged at a time; by default the engine's number.
        seed: The seed of random masks.
        statistics: What calibration text says about the tensor of each source, for methods that
            need data.

    Returns:
        The merged tensor in float32.

    Example:
        >>> import torch
        >>> from paretomerge.merging.methods import METHODS
        >>> base, source = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])
        >>> merge_tensors(METHODS["task_arithmetic"], base, [source], [{"weight": 0.5}])
        tensor([2., 2.])
    """
    inputs = make_inputs(method, base, sources, parameters, options, seed, statistics)
    with _as_the_engine():
        merge_block = method.function(inputs)
        merged = [merge_block(piece) for piece in inputs.blocks(block)]
        return torch.cat(merged).view(inputs.shape)


def make_inputs(
    method: Method,
    base: Tensor | None,
    sources: Sequence[Tensor],
    parameters: Sequence[Params] | None = None,
    options: Params | None = None,
    seed: int = 0,
    statistics: Sequence[Statistic | None] = (),
) -> Inputs:
    """Build what the method's function is called with. See `merge_tensors` for the arguments.

    Returns:
        The inputs of one tensor.

    Raises:
        AssertionError: If a parameter is unknown, or a required one is missing.
    """
    listed = list(sources)
    if base is not None and _base_is_source(method, base):
        listed = [base, *listed]
    operands: list[Operand] = []
    for tensor in listed:
        operands.append(InMemoryTensor(tensor.contiguous()))
    reference = None
    if base is not None and method.base in ("required", "reference"):
        reference = InMemoryTensor(base.contiguous())
    if parameters is None:
        parameters = [{}] * len(operands)
    assert len(parameters) == len(operands), (
        f"{method.name}: expected parameters for {len(operands)} sources, got {len(parameters)}"
    )
    all_parameters = []
    for values in parameters:
        all_parameters.append(_with_defaults(method, values, per_source=True))
    shape = operands[0].shape
    return Inputs(
        name="tensor",
        shape=shape,
        base=reference,
        sources=operands,
        parameters=all_parameters,
        options=_with_defaults(method, options or {}, per_source=False),
        seed=seed,
        is_matrix=len(shape) >= 2,
        statistics=tuple(statistics),
    )


def check_method(method: Method, **fixed: ParamValue) -> None:
    """Check the laws of every method, at its defaults and with each parameter changed in turn.

    - The inputs are not written to.
    - The result is finite, in float32, and the same each time.
    - It does not depend on the size of the blocks or their order, bit for bit.
    - Where the row says `symmetric`, the order of the sources changes the result by rounding only.
      Rounding may tip a threshold for one entry in a thousand. Methods with random masks are
      exempt: masks depend on the place of a source, and a plan sorts the sources.

    Args:
        method: The row of the method.
        **fixed: Values to use instead of the ones tried here, such as steps=5 for a costly method.

    Raises:
        AssertionError: If a law is broken.
    """
    large_numel = torch.Size(LARGE_SHAPE).numel()
    assert large_numel > CPU_BLOCK, "LARGE_SHAPE must have several blocks"
    shapes = SHAPES if method.whole_tensors else (*SHAPES, LARGE_SHAPE)
    for shape in shapes:
        for models in _example_models(method, shape):
            k = _source_count(method, models)
            cases = list(method_cases(method, k, fixed))
            # One case is enough for a costly shape: the second, which sparsifies.
            if shape == LARGE_SHAPE and len(cases) > 1:
                cases = cases[1:2]
            for case in cases:
                _check_case(method, models, case)


def check_copies(method: Method, **fixed: ParamValue) -> None:
    """Check that a merge of copies of one model gives that model, with weights that sum to 1.

    Args:
        method: The row of the method.
        **fixed: Values to use instead of the defaults.

    Raises:
        AssertionError: If the law is broken.
    """
    for shape in SHAPES:
        for models in _example_models(method, shape):
            model = models.sources[0]
            copies = [model] * len(models.sources)
            base = models.base
            if _base_is_source(method, base):
                base = model
            k = _source_count(method, models)
            parameters, options = next(method_cases(method, k, fixed))
            merged = merge_tensors(
                method,
                base,
                copies,
                _normalized(parameters),
                options,
                statistics=example_statistics(method, models.sources),
            )
            law = f"{method.name} {shape}: copies of one model"
            _assert_close(merged, model, law)


def _normalized(parameters: list[ParamDict]) -> list[ParamDict]:
    """The parameters with weights that sum to 1, where there are weights."""
    if not all("weight" in values for values in parameters):
        return parameters
    weights = [number_in(values, "weight") for values in parameters]
    # Some methods divide by the sum and some do not; with a sum of 1 the law is the same for both.
    total = sum(weights)
    normalized = []
    for values, weight in zip(parameters, weights, strict=True):
        normalized.append(values | {"weight": weight / total})
    return normalized


def check_one_hot(method: Method, **fixed: ParamValue) -> None:
    """Check that a weight of 1 among weights of 0 gives that model, at the defaults.

    Args:
        method: The row of the method.
        **fixed: Values to use instead of the defaults.

    Raises:
        AssertionError: If the law is broken.
    """
    for shape in SHAPES:
        for base, sources in _example_models(method, shape):
            models = list(sources)
            if base is not None and _base_is_source(method, base):
                models = [base, *sources]
            defaults = next(method_cases(method, len(models), fixed))
            for i, model in enumerate(models):
                one_hot = []
                for j, values in enumerate(defaults.parameters):
                    weight = 1.0 if i == j else 0.0
                    one_hot.append(values | {"weight": weight})
                merged = merge_tensors(
                    method,
                    base,
                    sources,
                    one_hot,
                    defaults.options,
                    statistics=example_statistics(method, sources),
                )
                law = f"{method.name} {shape}: weight 1 of model {i} alone"
                _assert_close(merged, model, law)


def method_cases(
    method: Method,
    k: int,
    fixed: Params | None = None,
) -> Iterator[Case]:
    """Parameters to test a method with: first the defaults, then each parameter changed in turn.

    A required parameter is 0.3 for the whole merge and 0.5, 0.75, 1.0, ... for the sources. A share
    that keeps everything by default (`density`) hides the effect of other parameters, so it is 0.4
    while these change.

    Args:
        method: The row of the method.
        k: The number of sources.
        fixed: Values to use instead of the ones tried here.

    Yields:
        The parameters of each source, and those of the whole merge.
    """
    fixed = fixed or {}
    start: ParamDict = {}
    for parameter in method.parameters:
        if parameter.default is not None:
            start[parameter.name] = parameter.default
    start.update(fixed)
    for changes in _changes(method, start, fixed):
        values = start | changes
        parameters: list[ParamDict] = [{} for _ in range(k)]
        options: ParamDict = {}
        for parameter in method.parameters:
            name = parameter.name
            if not parameter.per_source:
                options[name] = values.get(name, 0.3)
                continue
            for i in range(k):
                required = 0.5 + 0.25 * i
                parameters[i][name] = values.get(name, required)
        yield Case(parameters, options)


def _changes(
    method: Method,
    start: Params,
    fixed: Params,
) -> list[ParamDict]:
    """What each case changes in the values `start`."""
    free = [parameter for parameter in method.parameters if parameter.name not in fixed]
    share_names = [parameter.name for parameter in free if _is_share(parameter)]
    shares: ParamDict = dict.fromkeys(share_names, 0.4)
    changes: list[ParamDict] = [{}]
    if shares:
        changes.append(shares)
    for parameter in free:
        if parameter.name in shares:
            continue
        for value in _other_values(parameter):
            changes.append(shares | {parameter.name: value})
    flags = [parameter.name for parameter in free if _is_flag(parameter)]
    # Flags may interact, so one case turns all of them.
    if len(flags) > 1:
        turned = {name: not start[name] for name in flags}
        changes.append(shares | turned)
    return changes


def _other_values(parameter: Parameter) -> Sequence[bool | int | float | str]:
    """Values besides the default that show whether a parameter has an effect."""
    default = parameter.default
    if parameter.choices:
        return [choice for choice in parameter.choices if choice is not default]
    if isinstance(default, bool):
        return [not default]
    if default is None:
        return []
    # Twice the default; 1 where the default is 0, because twice 0 would change nothing.
    other = default * 2 or 1
    if other > parameter.high:
        return [default / 2]
    return [type(default)(other)]


def _is_flag(parameter: Parameter) -> bool:
    return isinstance(parameter.default, bool) and not parameter.choices


def _is_share(parameter: Parameter) -> bool:
    # True == 1.0 in Python, so a flag would pass the comparison below.
    if isinstance(parameter.default, bool):
        return False
    if parameter.name in ("weight", "vote"):
        return False
    return parameter.default == 1.0 and parameter.low == 0.0


def _with_defaults(
    method: Method,
    values: Params,
    per_source: bool,
) -> ParamDict:
    """The values, and the row's defaults for the others of the same kind."""
    defaults: ParamDict = {}
    for parameter in method.parameters:
        if parameter.per_source == per_source:
            defaults[parameter.name] = parameter.default
    kind = "a source" if per_source else "the whole merge"
    assert set(values) <= set(defaults), (
        f"{method.name}: expected parameters of {kind} among {sorted(defaults)}, "
        f"got {sorted(values)}"
    )
    filled = {**defaults, **values}
    missing = [name for name, value in filled.items() if value is None]
    assert not missing, (
        f"{method.name}: expected a value for {missing}, which have no default"
    )
    return filled


def _example_models(method: Method, shape: tuple[int, ...]) -> Iterator[_Models]:
    """Random models in float32; of matrices also in bfloat16, where many deltas are equal."""
    least, most = method.models
    k = max(3, least)
    k = min(k, most or 3)
    # Here the base counts as one of the models.
    if method.base == "source":
        k -= 1
    dtypes = [torch.float32]
    if len(shape) == 2:
        dtypes.append(torch.bfloat16)
    for dtype in dtypes:
        generator = torch.Generator().manual_seed(len(shape))
        base = torch.randn(shape, generator=generator)
        sources = []
        for _ in range(k):
            delta = 0.1 * torch.randn(shape, generator=generator)
            sources.append((base + delta).to(dtype))
        if method.base != "none":
            yield _Models(base.to(dtype), sources)
        # These methods must work without a base as well.
        if method.base in ("none", "optional", "reference"):
            yield _Models(None, sources)


def example_statistics(
    method: Method, sources: Sequence[Tensor]
) -> list[Statistic | None]:
    """Random statistics of tensors, for a method that needs data.

    Args:
        method: The row of the method.
        sources: The tensors, all of one shape.

    Returns:
        One for each source; [] for methods that need none, and for tensors that have none.
    """
    shape = tuple(sources[0].shape)
    if method.statistics is None or (method.statistics != "fisher" and len(shape) != 2):
        return []
    statistics: list[Statistic | None] = []
    for index in range(len(sources)):
        generator = torch.Generator().manual_seed(100 + index)
        if method.statistics == "fisher":
            squares = torch.randn(shape, generator=generator).square()
            statistics.append(Statistic(InMemoryTensor(squares), norm=1.0 + index))
            continue
        # More rows than columns, so that each is known.
        x = torch.randn((3 * shape[-1], shape[-1]), generator=generator)
        gram = x.T @ x / len(x)
        statistics.append(Statistic(InMemoryTensor(gram)))
    return statistics


def _check_case(
    method: Method,
    models: _Models,
    case: Case,
) -> None:
    first = models.sources[0]
    # The start of every message
    tensors = f"{tuple(first.shape)} {first.dtype}"
    first_parameters = case.parameters[0]
    where = f"{method.name} {tensors} {first_parameters} {case.options}"
    before = [tensor.clone() for tensor in models.tensors()]
    statistics = example_statistics(method, models.sources)
    merged = merge_tensors(method, *models, *case, statistics=statistics)
    is_float32 = merged.dtype == torch.float32
    assert is_float32, f"{where}: expected float32, got {merged.dtype}"
    assert torch.isfinite(merged).all(), f"{where}: the result has NaN or infinity"
    again = merge_tensors(method, *models, *case, statistics=statistics)
    assert torch.equal(merged, again), (
        f"{where}: another run gives another result, by {_distance(merged, again):.3g}"
    )
    _check_blocks(method, models, case, merged, where)
    _check_symmetry(method, models, case, merged, where)
    after = models.tensors()
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old, new), f"{where}: an input was written to"


def _check_blocks(
    method: Method,
    models: _Models,
    case: Case,
    merged: Tensor,
    where: str,
) -> None:
    """The result does not depend on the size of the blocks or their order."""
    statistics = example_statistics(method, models.sources)
    inputs = make_inputs(method, *models, *case, statistics=statistics)
    columns = models.sources[0].shape[-1]
    # (elements of a block, -1 for the last block first)
    layouts = (
        (1, 1),
        (3 * columns, 1),
        (7 * columns, -1),
        (_ONE_BLOCK, 1),
    )
    for elements, step in layouts:
        blocks = list(inputs.blocks(elements))
        with _as_the_engine():
            merge_block = method.function(inputs)
            pieces = [merge_block(block) for block in blocks[::step]]
        # The same step again: it reverses the reversed pieces.
        in_order = pieces[::step]
        other = torch.cat(in_order).view(merged.shape)
        order = "blocks" if step > 0 else "blocks, the last first,"
        rows = max(1, elements // columns)
        rows = min(rows, inputs.rows)
        distance = _distance(merged, other)
        assert torch.equal(merged, other), (
            f"{where}: {order} of {rows} rows change the result, by {distance:.3g}"
        )


def _check_symmetry(
    method: Method,
    models: _Models,
    case: Case,
    merged: Tensor,
    where: str,
) -> None:
    """The order of the sources matters only where the row says so, or masks are random."""
    if not method.symmetric:
        return
    # A method does not state that its masks are random; another seed shows it.
    statistics = example_statistics(method, models.sources)
    other_seed = merge_tensors(method, *models, *case, seed=1, statistics=statistics)
    has_random_masks = not torch.equal(merged, other_seed)
    if has_random_masks:
        return
    # A base that is one of the sources stays the first.
    lead = _base_is_source(method, models.base)
    first = case.parameters[:lead]
    others = case.parameters[lead:]
    reversed_parameters = first + others[::-1]
    reversed_sources = models.sources[::-1]
    reversed_models = _Models(models.base, reversed_sources)
    turned = merge_tensors(
        method,
        *reversed_models,
        reversed_parameters,
        case.options,
        statistics=statistics[::-1],
    )
    distances = (turned - merged).abs()
    differs = distances > _tolerance(merged)
    share = float(differs.float().mean())
    assert share <= 1e-3, (
        f"{where}: the order of the models changes {share:.2%} of the result, "
        f"by {_distance(turned, merged):.3g}"
    )


def _source_count(method: Method, models: _Models) -> int:
    return len(models.sources) + _base_is_source(method, models.base)


def _base_is_source(method: Method, base: Tensor | None) -> int:
    """1 if the base is among the sources, else 0."""
    if base is None:
        return 0
    return int(method.base in ("source", "optional"))


def _assert_close(
    actual: Tensor,
    expected: Tensor,
    law: str,
) -> None:
    distance = _distance(actual, expected)
    within = distance <= _tolerance(expected)
    assert within, f"{law}: off by {distance:.3g}"


def _tolerance(tensor: Tensor) -> float:
    largest = float(tensor.abs().max())
    return _TOLERANCE * max(1.0, largest)


def _distance(a: Tensor, b: Tensor) -> float:
    differences = a.float() - b.float()
    return float(differences.abs().max())


@contextmanager
def _as_the_engine() -> Iterator[None]:
    """One thread and no gradients, as the engine runs methods."""
    # Laws are checked bit for bit, so the checks must not run in another way than a merge.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(threads)


__all__ = [
    "LARGE_SHAPE",
    "SHAPES",
    "Case",
    "check_copies",
    "check_method",
    "check_one_hot",
    "make_inputs",
    "merge_tensors",
    "method_cases",
]
