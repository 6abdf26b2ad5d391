"""Methods with random masks: the draws differ (`mask-address` in deviations.py), the statistics must not."""

from pathlib import Path

import pytest
import torch

from tests.conformance.compare import weights

SEEDS = 20
_HEAD = "{merge_method: METHOD, base_model: $wide-base, dtype: float32, "
_ONE = (
    _HEAD
    + "slices: [{sources: [{model: $wide-base, layer_range: [0, 1]}, {model: $wide-ada, layer_range: [0, 1]}]}], "
)
_TWO = (
    _HEAD
    + "slices: [{sources: [{model: $wide-base, layer_range: [0, 1]}, {model: $wide-ada, layer_range: [0, 1]}, "
    "{model: $wide-bob, layer_range: [0, 1]}]}], "
)
RECIPES = {
    "dare_linear": _ONE + "parameters: {weight: 1, density: 0.3}}",
    "dare_linear unscaled": _ONE
    + "parameters: {weight: 1, density: 0.7, rescale: false}}",
    "dare_linear two": _TWO + "parameters: {weight: 0.5, density: 0.5, lambda: 1.5}}",
    "dare_ties": _TWO + "parameters: {weight: 0.5, density: 0.4}}",
    "dare_ties mean": _TWO
    + "parameters: {weight: 0.5, density: 0.4, normalize: true}}",
    "della": _ONE + "parameters: {weight: 1, density: 0.5}}",
    "della unscaled": _ONE
    + "parameters: {weight: 1, density: 0.5, epsilon: 0.4, rescale: false}}",
    "della two": _TWO + "parameters: {weight: 0.5, density: 0.4, epsilon: 0.2}}",
    "della_linear": _ONE + "parameters: {weight: 1, density: 0.6, epsilon: 0.3}}",
    "della_linear even": _ONE
    + "parameters: {weight: 1, density: 0.6, epsilon: 0.0, rescale: false}}",
    "della_linear two": _TWO + "parameters: {weight: 0.7, density: 0.6, epsilon: 0.3}}",
}


def statistics(merged: dict[str, torch.Tensor], models: Path) -> torch.Tensor:
    """Of the merged delta over all tensors: shares kept of all and of the larger half, L1 norm and mean per entry."""
    base, ada = weights(models / "wide-base"), weights(models / "wide-ada")
    deltas = {name: (merged[name] - base[name]).double() for name in merged}
    larger = {
        name: (d := (ada[name] - base[name]).abs()) > d.median() for name in merged
    }
    flat = torch.cat([delta.flatten() for delta in deltas.values()])
    of_larger = torch.cat([deltas[name][larger[name]] for name in deltas])
    return torch.stack(
        [
            (flat != 0).double().mean(),
            (of_larger != 0).double().mean(),
            flat.abs().mean(),
            flat.mean(),
        ]
    )


@pytest.mark.parametrize("name", RECIPES)
def test_statistics_as_mergekit(name, ask, ours, checkpoints):
    text = RECIPES[name].replace("METHOD", name.split()[0])
    samples = []
    for merge in (
        lambda seed: ours(text, seed=seed),
        lambda seed: ask(text, seed=seed).out,
    ):
        samples.append(
            torch.stack(
                [statistics(weights(merge(seed)), checkpoints) for seed in range(SEEDS)]
            )
        )
    error = torch.sqrt(sum(sample.var(0) / SEEDS for sample in samples))
    apart = (samples[0].mean(0) - samples[1].mean(0)).abs()
    # what rescaling fixes exactly has no variance: there the rounding of float32 is the measure
    allowed = 3 * error + 1e-5 * samples[1].abs().mean(0)
    assert (apart <= allowed).all(), (
        f"kept, kept of the larger half, L1, mean: apart {apart.tolist()}, allowed {allowed.tolist()}"
    )
