"""Squared gradients of single examples, against torch.func, and the merge that they weigh."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call, grad
from transformers import AutoModelForCausalLM

from paretomerge.calibration.gradients import measure_squares, trained_parameters
from paretomerge.calibration.text import Tokens
from paretomerge.merging.engine import merged_tensors
from paretomerge.merging.plan.make import make_plan
from paretomerge.merging.statistics import open_statistics
from tests.calibration.models import save_gpt2
from tests.conftest import EXPERTS
from tests.merging.methods.cases import close, merged


def network(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder).float().eval()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("memory", [1, 1 << 30])
def test_squares_are_those_of_each_examples_gradient(
    pico: Path, tmp_path: Path, family: str, memory: int
):
    folder = pico / "ada"
    if family == "gpt2":
        save_gpt2(tmp_path)
        folder = tmp_path / "one"
    model = network(folder)
    ids = torch.tensor([[3, 9, 4, 12, 8, 5], [7, 7, 2, 19, 3, 6], [5, 4, 3, 2, 9, 9]])
    start = 3

    def loss(parameters, row, one_hot):
        inputs = {"input_ids": row[None], "use_cache": False}
        logits = functional_call(model, parameters, args=(), kwargs=inputs).logits[0]
        log_probabilities = logits.log_softmax(-1)
        return -(log_probabilities[start - 1 : -1] * one_hot[start:]).sum()

    by_name = {name: p.detach() for name, p in model.named_parameters()}
    one_hots = torch.nn.functional.one_hot(ids, model.config.vocab_size)
    by_example = []
    for row, one_hot in zip(ids, one_hots, strict=True):
        by_example.append(grad(loss)(by_name, row, one_hot))
    expected = {}
    for name in by_name:
        expected[name] = torch.stack([gradient[name] for gradient in by_example])
    parameters = trained_parameters(model, list(model.state_dict()))
    examples = [Tokens(tuple(row.tolist()), start) for row in ids]
    measured = dict(measure_squares(model, parameters, examples, memory))
    assert measured.keys() <= expected.keys()
    assert len(measured) == len(by_name)
    for name, squares in measured.items():
        torch.testing.assert_close(
            squares, expected[name].square().mean(0), rtol=1e-4, atol=1e-7, msg=name
        )
    # Not the square of the sum, which published programs take.
    name = next(name for name in measured if "mlp" in name)
    of_sum = expected[name].sum(0).square() / len(ids)
    assert not torch.allclose(measured[name], of_sum, rtol=0.1)


def test_a_merge_with_measured_squares(pico: Path, pico_calibration: Path):
    eps = 1e-4
    data = {
        "merge_method": "fisher",
        "base_model": str(pico / "base"),
        "models": [{"model": str(pico / expert)} for expert in EXPERTS],
        "parameters": {"eps": eps},
        "dtype": "float32",
        "calibration": str(pico_calibration),
    }
    manifest = open_statistics(str(pico_calibration)).manifest
    squares = {}
    for entry in manifest.sources:
        file = entry.statistics["fisher"].file
        squares[Path(entry.name).name] = load_file(pico_calibration / file)
    states = {}
    for expert in EXPERTS:
        model = AutoModelForCausalLM.from_pretrained(pico / expert).float()
        states[expert] = model.state_dict()
    for name, tensor in merged_tensors(make_plan(data)):
        numerator, denominator = 0.0, 0.0
        for expert in EXPERTS:
            of_all = [
                values.double().square().sum() for values in squares[expert].values()
            ]
            norm = torch.stack(of_all).sum().sqrt()
            weight = (squares[expert][name].double() + eps) / norm
            numerator = numerator + weight * states[expert][name].double()
            denominator = denominator + weight
        expected = numerator / denominator
        torch.testing.assert_close(
            tensor.double(), expected, rtol=1e-4, atol=1e-6, msg=name
        )


def test_without_statistics_it_is_the_average():
    base, sources = torch.zeros(4), [torch.ones(4), torch.full((4,), 4.0)]
    for method in ("regmean", "regmean_pp", "fisher"):
        close(merged(method, base, sources), [2.5] * 4)
        close(merged(method, base, sources, [1.0, 3.0]), [3.25] * 4)
        close(merged(method, base, sources, [0.5, 0.25], normalize=False), [1.5] * 4)
