"""Averages of whole models: linear (model soups), model_stock, and passthrough of one model."""

import itertools

import torch
from torch import Tensor

from paretomerge.merging.block import Block, BlockMerger, Inputs
from paretomerge.merging.methods.common import (
    gram_matrix,
    linear_combination,
    sum_tensors,
)
from paretomerge.merging.parameter_values import number_in

_MIN_DIVISOR = 1e-6  # Model Stock's cosines and ratio are not divided by less


def linear(inputs: Inputs) -> BlockMerger:
    """The sum of w_i theta_i, divided by sum w_i if `normalize` is on.

    Wortsman et al. 2022, "Model soups", arXiv 2203.05482.
    """
    weights = inputs.per_source("weight")
    divisor = 1.0
    if inputs.flag("normalize"):
        divisor = sum(weights)
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
    # about + scale (theta - about) = scale theta + about (1 - scale)
    shift = about * (1 - scale)

    def merge_block(block: Block) -> Tensor:
        return block.source(0).mul_(scale).add_(shift)

    return merge_block


def model_stock(inputs: Inputs) -> BlockMerger:
    """Model Stock: t mean(theta_i) + (1 - t) theta_0, t = K cos / (1 + (K - 1) cos).

    Jang et al. 2024, arXiv 2403.19522, eq. 6. cos is the mean cosine of the pairs of tau_i, over
    the whole tensor or, with `filter_wise`, over each row. A tau_i of zero leaves the base.
    """
    k = inputs.n_sources
    if inputs.flag("filter_wise"):
        return _model_stock_by_row(inputs)
    products = torch.from_numpy(gram_matrix(inputs, deltas=True))
    one_row = products[..., None]
    t = _model_stock_ratio(one_row).item()
    # theta_0 + t / K sum tau_i
    weights = [t / k] * k
    return linear_combination(weights, 1 - t)


def _model_stock_by_row(inputs: Inputs) -> BlockMerger:
    k = inputs.n_sources

    def merge_block(block: Block) -> Tensor:
        deltas = block.deltas()
        rows_of_products = []
        for delta in deltas:
            products = [_row_products(delta, other) for other in deltas]
            rows_of_products.append(torch.stack(products))
        t = _model_stock_ratio(torch.stack(rows_of_products))
        t = t.to(deltas[0].dtype)
        # theta_0 + t / K sum tau_i, with the t of each row
        merged = sum_tensors(deltas)
        weights = t / k
        merged.mul_(weights[:, None])
        return merged.add_(block.base)

    return merge_block


def _row_products(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of the rows of two matrices, `(rows,)` in float64."""
    return (a.double() * b.double()).sum(1)


def _model_stock_ratio(products: Tensor) -> Tensor:
    """Model Stock's t.

    Args:
        products: Inner products of tau_i, (K, K, rows) in float64.

    Returns:
        t of each row, `(rows,)`; 0 where the formula has no value, so that the base stays.
    """
    k = len(products)
    cosines = []
    for i, j in itertools.combinations(range(k), 2):
        length_i = products[i, i].sqrt()
        length_j = products[j, j].sqrt()
        divisor = (length_i * length_j).clamp_min(_MIN_DIVISOR)
        cosine = products[i, j] / divisor
        # Rounding can take a cosine beyond 1.
        cosines.append(cosine.clamp(-1, 1))
    mean_cosine = torch.stack(cosines).mean(0)
    # Eq. 6: t = K cos / (1 + (K - 1) cos)
    divisor = 1 + (k - 1) * mean_cosine
    is_zero = divisor.abs() < _MIN_DIVISOR
    ones = torch.ones_like(divisor)
    divisor = torch.where(is_zero, ones, divisor)
    t = k * mean_cosine / divisor
    return torch.where(is_zero, torch.zeros_like(t), t)
