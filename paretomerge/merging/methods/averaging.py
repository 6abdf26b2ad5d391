"""Averages of whole models: linear (model soups), model_stock, and passthrough of one model."""

import itertools

import torch

from paretomerge.merging.block import Block, BlockMerger, Inputs
from paretomerge.merging.methods.common import gram_matrix, linear_combination, sum_tensors
from paretomerge.merging.parameter_values import number_in

_MIN_DIVISOR = 1e-6  # Model Stock's cosines and ratio are not divided by less


def linear(inputs: Inputs) -> BlockMerger:
    """The sum of w_i theta_i, divided by sum w_i if `normalize` is on.

    Wortsman et al. 2022, "Model soups", arXiv 2203.05482.
    """
    weights = inputs.per_source("weight")
    divisor = sum(weights) if inputs.flag("normalize") else 1.0
    return linear_combination([weight / divisor for weight in weights])


def passthrough(inputs: Inputs) -> BlockMerger:
    """Layer stacking: about + scale (theta - about) of the one source.

    Akiba et al. 2024, arXiv 2403.13187. `scale` multiplies the tensor. A norm whose neutral weight
    is 1 is scaled with `about: 1`: what it has beyond that value is scaled.
    """
    scale = number_in(inputs.parameters[0], "scale")
    about = number_in(inputs.parameters[0], "about")
    if about == 0:
        return linear_combination([scale])
    shift = about * (1 - scale)

    def merge_block(block: Block) -> torch.Tensor:
        return block.source(0).mul_(scale).add_(shift)

    return merge_block


def model_stock(inputs: Inputs) -> BlockMerger:
    """Model Stock: t mean(theta_i) + (1 - t) theta_0, t = K cos / (1 + (K - 1) cos).

    Jang et al. 2024, arXiv 2403.19522, eq. 6. cos is the mean cosine of the pairs of tau_i, over
    the whole tensor or, with `filter_wise`, over each row. A tau_i of zero leaves the base.
    """
    k = len(inputs.sources)
    if inputs.flag("filter_wise"):
        return _model_stock_by_row(inputs)
    products = torch.from_numpy(gram_matrix(inputs, deltas=True))
    t = _model_stock_ratio(products[..., None]).item()
    return linear_combination([t / k] * k, 1 - t)


def _model_stock_by_row(inputs: Inputs) -> BlockMerger:
    k = len(inputs.sources)

    def merge_block(block: Block) -> torch.Tensor:
        deltas = [block.delta(i) for i in range(k)]
        rows_of_products = []
        for a in deltas:
            products = [(a.double() * b.double()).sum(1) for b in deltas]
            rows_of_products.append(torch.stack(products))
        t = _model_stock_ratio(torch.stack(rows_of_products)).to(deltas[0].dtype)
        return sum_tensors(deltas).mul_((t / k)[:, None]).add_(block.base)

    return merge_block


def _model_stock_ratio(products: torch.Tensor) -> torch.Tensor:
    """Model Stock's t.

    Args:
        products: Inner products of tau_i, (K, K, rows) in float64.

    Returns:
        t of each row, `(rows,)`; 0 where the formula has no value, so that the base stays.
    """
    k = len(products)
    cosines = []
    for i, j in itertools.combinations(range(k), 2):
        lengths = products[i, i].sqrt() * products[j, j].sqrt()
        cosine = products[i, j] / lengths.clamp_min(_MIN_DIVISOR)
        cosines.append(cosine.clamp(-1, 1))
    mean_cosine = torch.stack(cosines).mean(0)
    divisor = 1 + (k - 1) * mean_cosine
    is_zero = divisor.abs() < _MIN_DIVISOR
    safe_divisor = torch.where(is_zero, torch.ones_like(divisor), divisor)
    return torch.where(is_zero, torch.zeros_like(mean_cosine), k * mean_cosine / safe_divisor)
