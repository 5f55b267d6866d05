"""Log masses of Poisson, negative binomial and zero-inflated negative binomial counts, in plain torch.

A cell's log mass is the sum of log p(0) over its zeros, cheap and dense, and of the full log mass over its non-zero
counts (about a tenth of a single-cell matrix). Only these need log-gamma. They run in float64: for a large theta
lgamma(x + theta) - lgamma(theta) cancels in float32, and for a large count so do the terms of the log mass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus


def nb_zero(log_mu: Tensor, log_theta: Tensor) -> Tensor:
    """Log NB(0): -theta log(1 + mu / theta)."""
    return -log_theta.exp() * softplus(log_mu - log_theta)


def zinb_zero(log_mu: Tensor, log_theta: Tensor, logits: Tensor) -> Tensor:
    """Log(pi + (1 - pi) NB(0)) with pi = sigmoid(logits)."""
    return torch.logaddexp(logsigmoid(logits), logsigmoid(-logits) + nb_zero(log_mu, log_theta))


def zinb_seen(x: Tensor, log_mu: Tensor, log_theta: Tensor, logits: Tensor) -> Tensor:
    """Log((1 - pi) NB(x)): the log mass of x > 0."""
    return logsigmoid(-logits) + log_nb(x, log_mu, log_theta)


def log_poisson(x: Tensor, log_mu: Tensor) -> Tensor:
    """Log mass of Poisson(mu), element-wise, in nats; computed in float64.

    Parameters
    ----------
    x
        Counts, any shape, floating.
    log_mu
        Log of the mean, broadcastable to x.

    Returns
    -------
    Log mass, of the broadcast shape.
    """
    dtype, x, log_mu = log_mu.dtype, x.double(), log_mu.double()
    return (_times(x, log_mu) - log_mu.exp() - torch.lgamma(x + 1)).to(dtype)


def log_nb(x: Tensor, log_mu: Tensor, log_theta: Tensor) -> Tensor:
    """Log mass of the negative binomial with mean mu and variance mu + mu^2 / theta, element-wise; computed in float64.

    Parameters
    ----------
    x
        Counts, any shape, floating.
    log_mu, log_theta
        Log of the mean and of the inverse dispersion, broadcastable to x.

    Returns
    -------
    Log mass, of the broadcast shape.

    References
    ----------
    Lopez et al. 2018, Deep generative modeling for single-cell transcriptomics, Methods.
    """
    dtype, x, log_mu, log_theta = log_mu.dtype, x.double(), log_mu.double(), log_theta.double()
    theta = log_theta.exp()
    ways = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    return (ways + nb_zero(log_mu, log_theta) - _times(x, softplus(log_theta - log_mu))).to(dtype)


def _times(x: Tensor, y: Tensor) -> Tensor:
    """X y, and 0 where x is, also where y is infinite: a mean of 0 gives no counts for sure."""
    return torch.where(x > 0, x * y, 0.0)


def log_zinb(x: Tensor, log_mu: Tensor, log_theta: Tensor, logits: Tensor) -> Tensor:
    """Log mass of the zero-inflated negative binomial, element-wise, in nats; computed in float64.

    Parameters
    ----------
    x
        Counts, any shape, floating.
    log_mu, log_theta
        Log of the mean and of the inverse dispersion of the NB part, broadcastable to x.
    logits
        Log odds of a structural zero, broadcastable to x.

    Returns
    -------
    Log mass, of the broadcast shape.

    References
    ----------
    Lopez et al. 2018, Deep generative modeling for single-cell transcriptomics, Methods.
    """
    parameters = (log_mu.double(), log_theta.double(), logits.double())
    return torch.where(x > 0, zinb_seen(x, *parameters), zinb_zero(*parameters)).to(log_mu.dtype)


def sum_over_genes(zero: Tensor, x: Tensor, log_mass: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """Sum over genes of ``zero`` where x is 0 and of ``log_mass(x, *parameters)`` elsewhere, (..., n).

    zero is (..., n, G), x (n, G), each parameter (..., n or 1, G).
    """
    seen = x > 0
    if x.device.type != "cpu":  # to find them would have the CPU wait for the device
        return torch.where(seen, log_mass(x, *parameters), zero).sum(-1)
    rows, columns = seen.nonzero(as_tuple=True)
    at = [p[..., rows if p.shape[-2] > 1 else torch.zeros_like(rows), columns].double() for p in parameters]
    values = log_mass(x[rows, columns], *at)  # (..., nnz)
    total = values.new_zeros((*values.shape[:-1], x.shape[0])).index_add(-1, rows, values)
    return (torch.where(seen, 0.0, zero).sum(-1) + total).to(zero.dtype)
