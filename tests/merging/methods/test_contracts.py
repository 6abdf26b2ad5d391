"""The published contract finds what it is for: methods that break one law each."""

from dataclasses import replace

import pytest
import torch

import paretomerge.merging.methods.averaging as family
from paretomerge.merging.methods import METHODS, Method
from paretomerge.merging.methods.common import linear_combination
from paretomerge.testing import (
    check_copies,
    check_method,
    check_one_hot,
    make_inputs,
    merge_tensors,
    method_cases,
)

MINE = replace(METHODS["task_arithmetic"], name="mine", family="averaging")
STATE = [0]


def block_mean(inputs):
    return lambda block: block.base + block.base.mean()


def writes(inputs):
    def combine(block):
        inputs.sources[0].tensor.add_(1e-3)
        return block.source(0)

    return combine


def counts(inputs):
    STATE[0] += 1
    return lambda block: block.base + STATE[0]


def overflows(inputs):
    return lambda block: block.source(0) / 0


def doubles(inputs):
    return lambda block: block.source(0).double()


def first(inputs):
    return linear_combination([1.0] + [0.0] * (len(inputs.sources) - 1))


def carries(inputs):
    seen = []

    def combine(block):
        seen.append(block.first)
        return block.base + len(seen) * 0 + (block.first if seen != sorted(seen) else 0)

    return combine


BROKEN = {
    block_mean: "rows change the result",
    writes: "another run gives another result|an input was written to",
    counts: "another run gives another result",
    overflows: "NaN or infinity",
    doubles: "float32",
    first: "the order of the models changes",
    carries: "the last first",
}


@pytest.mark.parametrize("function", BROKEN)
def test_a_broken_method_is_found(function, monkeypatch):
    monkeypatch.setattr(family, "mine", function, raising=False)
    with pytest.raises(AssertionError, match=BROKEN[function]):
        check_method(MINE)


def test_methods_without_a_law_are_found(monkeypatch):
    monkeypatch.setattr(
        family,
        "mine",
        lambda inputs: linear_combination([0.9] * len(inputs.sources)),
        raising=False,
    )
    check_method(MINE)
    with pytest.raises(AssertionError, match="copies of one model"):
        check_copies(MINE)
    with pytest.raises(AssertionError, match="weight 1 of model 0 alone"):
        check_one_hot(MINE)


def test_an_order_that_matters_is_allowed_where_the_row_says_so(monkeypatch):
    monkeypatch.setattr(family, "mine", first, raising=False)
    check_method(replace(MINE, symmetric=False))


def test_every_setting_is_tried():
    for method in METHODS.values():
        tried = list(method_cases(method, 3))
        for parameter in method.parameters:
            values = [
                case[0][0][parameter.name]
                if parameter.per_source
                else case[1][parameter.name]
                for case in tried
            ]
            assert parameter.default is None or len(set(map(str, values))) > 1, (
                f"{method.name}: {parameter.name}"
            )


def test_settings_are_checked():
    tensor = torch.zeros(3)
    for method, parameters, options, message in (
        ("ties", [{"weight": 1.0, "wieght": 1}], {}, "parameters of a source"),
        ("ties", [{"weight": 1.0}], {"density": 1}, "parameters of the whole merge"),
        ("ties", [{}], {}, "expected a value for"),
        ("ties", [{"weight": 1.0}] * 2, {}, "for 1 sources, got 2"),
    ):
        with pytest.raises(AssertionError, match=message):
            merge_tensors(METHODS[method], tensor, [tensor], parameters, options)


def test_the_base_goes_where_the_method_wants_it():
    base, source = torch.zeros(2, 3), torch.ones(2, 3)
    cases = {
        "task_arithmetic": (True, 1),
        "slerp": (False, 2),
        "karcher": (False, 2),
        "multislerp": (True, 1),
        "passthrough": (False, 1),
    }
    for name, (reference, count) in cases.items():
        method: Method = METHODS[name]
        parameters = [
            {
                parameter.name: 1.0
                for parameter in method.parameters
                if parameter.per_source
            }
        ] * count
        inputs = make_inputs(
            method,
            base,
            [source],
            parameters,
            {
                parameter.name: 0.5
                for parameter in method.parameters
                if parameter.name == "t"
            },
        )
        assert (inputs.base is not None, len(inputs.sources)) == (reference, count), (
            name
        )
        assert inputs.is_matrix
