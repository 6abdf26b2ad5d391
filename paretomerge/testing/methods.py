"""Contracts that a new merge method must pass, for authors of methods. Needs no test framework: each check raises
AssertionError with a sentence that says which law fails, for which settings and shape.

A test of a new row of METHODS is

    check_method(METHODS["mine"])
    check_copies(METHODS["mine"])  # where merging copies of one model must give that model
    check_one_hot(METHODS["mine"])  # where a weight of 1 among weights of 0 must give that model

and worked examples with `merge_tensors`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from paretomerge.checkpoint.operand import InMemoryTensor, Operand
from paretomerge.merging.methods import Method, Parameter
from paretomerge.merging.methods.inputs import BLOCK, Inputs

Settings = Mapping[str, Any]

SHAPES = ((1009,), (37, 53), (4, 6, 31))
"""A vector, a matrix, a stack of matrices."""

LARGE = (300, 517)
"""A matrix of several blocks, for methods that do not hold whole tensors."""

_EVERYTHING = 1 << 60  # elements: a tensor in one block


def merge_tensors(
    method: Method,
    base: torch.Tensor | None,
    sources: Sequence[torch.Tensor],
    parameters: Sequence[Settings] | None = None,
    options: Settings | None = None,
    *,
    block: int | None = None,
    seed: int = 0,
) -> torch.Tensor:
    """Merge one tensor of every model, as the engine does: float32, in the shape of the sources.

    base: theta_0, or None. A method that takes the base as one of the models gets it as the first source.
    parameters: each source's own settings (the base's first, where it is a source); options: those of the whole merge.
    What they leave out takes the row's default; a required setting has none. Two or more axes count as a matrix.
    block: elements at a time, by default the engine's; seed: of random masks.
    """
    inputs = inputs_of(method, base, sources, parameters, options, seed)
    with _as_the_engine():
        combine = method.combine(inputs)
        return torch.cat([combine(piece) for piece in inputs.blocks(block)]).view(inputs.shape)


def inputs_of(
    method: Method,
    base: torch.Tensor | None,
    sources: Sequence[torch.Tensor],
    parameters: Sequence[Settings] | None = None,
    options: Settings | None = None,
    seed: int = 0,
) -> Inputs:
    """What the method's function is called with; arguments as of `merge_tensors`. Unknown settings are an error."""
    first = [base] if base is not None and method.base in ("source", "optional") else []
    operands: list[Operand] = [InMemoryTensor(tensor.contiguous()) for tensor in (*first, *sources)]
    reference = (
        InMemoryTensor(base.contiguous())
        if base is not None and method.base in ("required", "reference")
        else None
    )
    given = parameters if parameters is not None else [{}] * len(operands)
    assert len(given) == len(operands), (
        f"{method.name}: expected settings for {len(operands)} sources, got {len(given)}"
    )
    own = [_filled(method, each, per_source=True) for each in given]
    whole = _filled(method, options or {}, per_source=False)
    shape = operands[0].shape
    return Inputs(
        "tensor", shape, reference, operands, own, whole, seed=seed, matrix=len(shape) >= 2
    )


def check_method(method: Method, **settings: Any) -> None:
    """The laws of every method, at its defaults and with each setting changed in turn, for several shapes.

    - The inputs are not written to.
    - The result is finite, in float32, and the same each time.
    - It does not depend on the size of the blocks or their order, bit for bit.
    - Where the row says `symmetric`, the order of the models changes it by rounding only, which may tip a threshold for
      one entry in a thousand. (Random masks go by place: they are not asked; a plan puts the models into one order.)

    settings: values to use in place of the ones tried here, such as steps=5 of a costly method.
    """
    assert _elements(LARGE) > BLOCK, "the large shape must have several blocks"
    for shape in SHAPES if method.whole else (*SHAPES, LARGE):
        for base, sources in _models(method, shape):
            every = list(
                settings_of(method, len(sources) + _base_is_source(method, base), settings)
            )
            for parameters, options in every[1:2] or every if shape == LARGE else every:
                _check_case(method, base, sources, parameters, options)


def check_copies(method: Method, **settings: Any) -> None:
    """Merging copies of one model gives that model, at the defaults and with weights that sum to 1."""
    for shape in SHAPES:
        for base, sources in _models(method, shape):
            if _base_is_source(method, base):
                base = sources[0]
            copies = [sources[0]] * len(sources)
            parameters, options = next(
                settings_of(method, len(sources) + _base_is_source(method, base), settings)
            )
            total = sum(parameter.get("weight", 1.0) for parameter in parameters)
            parameters = [
                parameter | {"weight": parameter["weight"] / total}
                if "weight" in parameter
                else parameter
                for parameter in parameters
            ]
            _same(
                merge_tensors(method, base, copies, parameters, options),
                copies[0],
                f"{method.name} {shape}: copies of one model",
            )


def check_one_hot(method: Method, **settings: Any) -> None:
    """A weight of 1 among weights of 0 gives that model, at the defaults."""
    for shape in SHAPES:
        for base, sources in _models(method, shape):
            models = (
                [base, *sources]
                if base is not None and _base_is_source(method, base)
                else list(sources)
            )
            parameters, options = next(settings_of(method, len(models), settings))
            for i, model in enumerate(models):
                hot = [
                    parameter | {"weight": float(i == j)} for j, parameter in enumerate(parameters)
                ]
                _same(
                    merge_tensors(method, base, sources, hot, options),
                    model,
                    f"{method.name} {shape}: weight 1 of model {i} alone",
                )


def settings_of(
    method: Method, k: int, fixed: Settings | None = None
) -> Iterator[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """(parameters of each of k sources, options): first the defaults, then each setting changed in turn.

    A required setting takes 0.3 for the whole merge and 0.5, 0.75, 1.0, ... for the sources. Where other settings are
    changed, and at the end, shares that keep everything by default are 0.4 to show what the others do.
    """
    fixed = fixed or {}
    start = {
        parameter.name: parameter.default
        for parameter in method.parameters
        if parameter.default is not None
    } | dict(fixed)
    shares = {
        parameter.name: 0.4
        for parameter in method.parameters
        if _is_share(parameter) and parameter.name not in fixed
    }
    changes: list[dict[str, Any]] = [{}, *([shares] if shares else [])]
    for parameter in method.parameters:
        if parameter.name not in fixed and parameter.name not in shares:
            changes += [shares | {parameter.name: value} for value in _others(parameter)]
    flags = [
        parameter.name
        for parameter in method.parameters
        if isinstance(parameter.default, bool)
        and not parameter.choices
        and parameter.name not in fixed
    ]
    if len(flags) > 1:
        changes.append(shares | {name: not start[name] for name in flags})
    for change in changes:
        values = start | change
        own = [
            {
                parameter.name: values.get(parameter.name, 0.5 + 0.25 * i)
                for parameter in method.parameters
                if parameter.per_source
            }
            for i in range(k)
        ]
        yield (
            own,
            {
                parameter.name: values.get(parameter.name, 0.3)
                for parameter in method.parameters
                if not parameter.per_source
            },
        )


def _others(parameter: Parameter) -> list[Any]:
    """Values besides the default that show whether a setting is heeded."""
    if parameter.choices:
        return [choice for choice in parameter.choices if choice is not parameter.default]
    if isinstance(parameter.default, bool):
        return [not parameter.default]
    if parameter.default is None:
        return []
    other = parameter.default * 2 or 1  # twice 0 is 0
    return [type(parameter.default)(other)] if other <= parameter.high else [parameter.default / 2]


def _is_share(parameter: Parameter) -> bool:
    return (
        not isinstance(parameter.default, bool)
        and parameter.default == 1.0
        and parameter.name != "weight"
        and parameter.low == 0.0
    )


def _filled(method: Method, given: Settings, per_source: bool) -> dict[str, Any]:
    known = {
        parameter.name: parameter
        for parameter in method.parameters
        if parameter.per_source == per_source
    }
    kind = "a source" if per_source else "the whole merge"
    assert set(given) <= set(known), (
        f"{method.name}: expected settings of {kind} among {sorted(known)}, got {sorted(given)}"
    )
    filled = {name: given.get(name, parameter.default) for name, parameter in known.items()}
    missing = [name for name, value in filled.items() if value is None]
    assert not missing, f"{method.name}: expected a value for {missing}, which have no default"
    return filled


def _models(
    method: Method, shape: tuple[int, ...]
) -> Iterator[tuple[torch.Tensor | None, list[torch.Tensor]]]:
    """(base or None, sources) of that shape: float32; of matrices also bfloat16, whose deltas often have equal magnitudes."""
    least, most = method.models
    k = min(max(3, least), most or 3) - (method.base == "source")
    for dtype in (torch.float32, torch.bfloat16) if len(shape) == 2 else (torch.float32,):
        generator = torch.Generator().manual_seed(len(shape))
        base = torch.randn(shape, generator=generator)
        sources = [
            (base + 0.1 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(k)
        ]
        yield (None if method.base == "none" else base.to(dtype)), sources
        if method.base in ("optional", "reference"):
            yield None, sources


def _check_case(
    method: Method,
    base: torch.Tensor | None,
    sources: list[torch.Tensor],
    parameters: list[dict[str, Any]],
    options: dict[str, Any],
) -> None:
    where = f"{method.name} {tuple(sources[0].shape)} {sources[0].dtype} {parameters[0]} {options}"
    kept = [tensor.clone() for tensor in (*sources, *([] if base is None else [base]))]
    merged = merge_tensors(method, base, sources, parameters, options)
    assert merged.dtype == torch.float32, f"{where}: expected float32, got {merged.dtype}"
    assert torch.isfinite(merged).all(), f"{where}: the result has NaN or infinity"
    row = sources[0].shape[-1]
    again = merge_tensors(method, base, sources, parameters, options)
    assert torch.equal(merged, again), (
        f"{where}: another run gives another result, by {_apart(merged, again):.3g}"
    )
    inputs = inputs_of(method, base, sources, parameters, options)
    for size, turn in ((1, 1), (3 * row, 1), (7 * row, -1), (_EVERYTHING, 1)):
        with _as_the_engine():
            combine = method.combine(inputs)
            pieces = [combine(piece) for piece in list(inputs.blocks(size))[::turn]]
        other = torch.cat(pieces[::turn]).view(merged.shape)
        kind = f"{'blocks' if turn > 0 else 'blocks, the last first,'} of {min(max(1, size // row), inputs.extent[0])} rows"
        assert torch.equal(merged, other), (
            f"{where}: {kind} change the result, by {_apart(merged, other):.3g}"
        )
    if method.symmetric and not _random(method, base, sources, parameters, options, merged):
        lead = _base_is_source(method, base)
        turned = merge_tensors(
            method, base, sources[::-1], parameters[:lead] + parameters[lead:][::-1], options
        )
        tolerance = 1e-5 * max(1.0, float(merged.abs().max()))
        share = float(((turned - merged).abs() > tolerance).float().mean())
        assert share <= 1e-3, (
            f"{where}: the order of the models changes {share:.2%} of the result, by {_apart(turned, merged):.3g}"
        )
    for before, after in zip(kept, (*sources, *([] if base is None else [base])), strict=True):
        assert torch.equal(before, after), f"{where}: an input was written to"


def _random(
    method: Method,
    base: torch.Tensor | None,
    sources: list[torch.Tensor],
    parameters: list[dict[str, Any]],
    options: dict[str, Any],
    merged: torch.Tensor,
) -> bool:
    return not torch.equal(
        merged, merge_tensors(method, base, sources, parameters, options, seed=1)
    )


def _base_is_source(method: Method, base: torch.Tensor | None) -> int:
    return int(base is not None and method.base in ("source", "optional"))


def _elements(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def _same(actual: torch.Tensor, expected: torch.Tensor, law: str) -> None:
    tolerance = 1e-5 * max(1.0, float(expected.abs().max()))
    assert _apart(actual, expected) <= tolerance, f"{law}: off by {_apart(actual, expected):.3g}"


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


@contextmanager
def _as_the_engine() -> Iterator[None]:
    """One thread and no gradients, as the engine runs methods."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(before)


__all__ = [
    "LARGE",
    "SHAPES",
    "Settings",
    "check_copies",
    "check_method",
    "check_one_hot",
    "inputs_of",
    "merge_tensors",
    "settings_of",
]
