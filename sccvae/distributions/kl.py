"""Kullback-Leibler divergences in closed form, summed over the sample axis (source text 2.2)."""

from __future__ import annotations

from typing import Any

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
    (...,) sum over the d latent dimensions; never negative, but for rounding. With gradients of first order.
    """
    return _KLStandardNormal.apply(loc, scale)


class _KLStandardNormal(torch.autograd.Function):
    """A third of the operations that autograd would take, each far smaller than its launch."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, scale: Tensor) -> Tensor:
        """The divergence in nats, (...,), for loc and scale (..., d)."""
        ctx.save_for_backward(loc, scale)
        twice = torch.addcmul(loc.square(), scale, scale).sub_(scale.log(), alpha=2).sum(-1)
        return twice.sub_(loc.shape[-1]).mul_(0.5)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients by loc and scale, (..., d), for that of the result, (...,)."""
        loc, scale = ctx.saved_tensors
        g = g[..., None]
        return g * loc, g * (scale - scale.reciprocal())


def kl_categorical(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(Cat(q) || Cat(p)) in nats.

    Parameters
    ----------
    log_q, log_p
        Log-probabilities, (..., K), floating; those of p are broadcast. An expectation of log p under a distribution of
        p gives the expected divergence.

    Returns
    -------
    (...,) sum over the K classes.
    """
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def kl_dirichlet(concentration_q: Tensor, concentration_p: Tensor) -> Tensor:
    """KL(Dir(a) || Dir(b)) in nats.

    Parameters
    ----------
    concentration_q, concentration_p
        Concentrations a and b, (..., K), positive, floating.

    Returns
    -------
    (...,) never negative, but for rounding. Computed in float64, as large log-gammas cancel; on Apple's GPU, which has
    none, in the type given.

    References
    ----------
    Penny 2001, Kullback-Leibler divergences of normal, gamma, Dirichlet and Wishart densities, section 3.
    """
    a, b = torch.broadcast_tensors(concentration_q, concentration_p)
    if a.device.type != "mps":
        a, b = a.double(), b.double()
    normaliser = torch.lgamma(a.sum(-1)) - torch.lgamma(b.sum(-1)) + (torch.lgamma(b) - torch.lgamma(a)).sum(-1)
    return (normaliser + ((a - b) * expected_log_probability(a)).sum(-1)).to(concentration_q.dtype)


def expected_log_probability(concentration: Tensor) -> Tensor:
    """E[log d] for d ~ Dir(concentration), (..., K) nats: digamma of each minus that of their sum.

    Parameters
    ----------
    concentration
        (..., K), positive, floating.

    Returns
    -------
    (..., K).
    """
    return torch.digamma(concentration) - torch.digamma(concentration.sum(-1, keepdim=True))
