"""Kullback-Leibler divergences in closed form, summed over the sample axis (source text 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_normal(loc_q: Tensor, scale_q: Tensor, loc_p: Tensor, scale_p: Tensor) -> Tensor:
    """KL(N(loc_q, scale_q) || N(loc_p, scale_p)) of diagonal normals, in nats (source text, equation 4.13).

    Parameters
    ----------
    loc_q, scale_q
        Mean and standard deviation of q, (..., d), floating.
    loc_p, scale_p
        Mean and standard deviation of p, broadcastable to (..., d).

    Returns
    -------
    (...,) sum over the d latent dimensions; never negative, but for rounding.
    """
    ratio = scale_q / scale_p
    shift = (loc_q - loc_p) / scale_p
    return 0.5 * (ratio.square() + shift.square() - 1 - 2 * torch.log(ratio)).sum(-1)


def kl_standard_normal(loc: Tensor, scale: Tensor) -> Tensor:
    """KL(N(loc, scale) || N(0, I)) of a diagonal normal, in nats (source text, equation 4.13).

    Parameters
    ----------
    loc, scale
        Mean and standard deviation, (..., d), floating.

    Returns
    -------
    (...,) sum over the d latent dimensions; never negative, but for rounding.
    """
    return 0.5 * (scale.square() + loc.square() - 1 - 2 * torch.log(scale)).sum(-1)
