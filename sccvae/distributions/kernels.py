"""Log mass of negative binomial counts and its gradients in one pass, on the CPU, by numba.

Two loops for each cell. One over all genes as if the count were zero, in float32, which the compiler turns into vector
instructions (for float64 torch does it); one over the counts that are not zero, in float64. Plain torch (in ``counts``)
gives the same numbers; it is used on other devices and where numba is missing.
"""

from __future__ import annotations

import math
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus


def applies(x: Tensor, *parameters: Tensor) -> bool:
    """Whether the kernels can be used: CPU tensors of one floating type, and numba there."""
    types = {t.dtype for t in (x, *parameters)}
    return len(types) == 1 and all(t.device.type == "cpu" for t in (x, *parameters)) and _has_numba()


@cache
def _has_numba() -> bool:
    return find_spec("numba") is not None


def _flat(x: Tensor, log_mu: Tensor, log_theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments without gradient: x (m, G), log_mu (n, G) and log_theta (1 or m or n, G), contiguous."""
    width = x.shape[-1]
    log_theta = log_theta.detach().reshape(-1, width)
    if len(log_theta) not in (1, len(x)):  # as many as draws of z
        x = x.expand(log_mu.shape).reshape(-1, width)
    return x.detach().contiguous(), log_mu.detach().reshape(-1, width).contiguous(), log_theta.contiguous()


def _run(loop: str, *tensors: Tensor) -> None:
    from sccvae.distributions import _loops  # numba is imported, and once compiles, when it is first needed

    getattr(_loops, loop)(*(t.numpy() for t in tensors))


def _zeros(log_mu: Tensor, log_theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log NB(0) and its derivatives by log mu and log theta, (n, G)."""
    repeats = len(log_mu) // len(log_theta)
    theta = log_theta.exp()
    if len(log_theta) > 1 and repeats > 1:
        log_theta, theta = log_theta.repeat(repeats, 1), theta.repeat(repeats, 1)
    a = log_mu - log_theta
    zero = softplus(a).mul_(-theta)
    d_mu = torch.sigmoid_(a).mul_(-theta)
    return zero, d_mu, zero - d_mu


def _to(shape: torch.Size, gradient: Tensor) -> Tensor:
    """The gradient (n, G) of a parameter that was broadcast from ``shape``."""
    n = math.prod(shape[:-1])
    return gradient.reshape(-1, n, shape[-1]).sum(0).reshape(shape)


def _seen(x: Tensor, zero: Tensor) -> Tensor:
    """Where the count is not zero, (n, G), for x (m, G)."""
    return (x > 0).repeat(len(zero) // len(x), 1)


class _NB(torch.autograd.Function):
    """Log mass of x summed over genes, (..., n); derivatives are found with it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_mu: Tensor, log_theta: Tensor) -> Tensor:
        """See :func:`nb_sum`."""
        flat = _flat(x, log_mu, log_theta)
        theta = flat[2].double().exp()
        if x.dtype == torch.float32:
            d_mu, d_theta, total = torch.empty_like(flat[1]), torch.empty_like(flat[1]), log_mu.new_empty(len(flat[1]))
            _run("nb", *flat, theta.float(), d_mu, d_theta, total)
        else:
            zero, d_mu, d_theta = _zeros(*flat[1:])
            total = zero.masked_fill_(_seen(flat[0], zero), 0.0).sum(-1)
        _run("seen", *flat, theta, d_mu, d_theta, total)
        ctx.save_for_backward(d_mu, d_theta)
        ctx.shapes = log_mu.shape, log_theta.shape
        return total.reshape(log_mu.shape[:-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor]:
        """Gradients by log mu and log theta, of their shapes, for that of the result, (..., n)."""
        d_mu, d_theta = ctx.saved_tensors
        g = gradient.reshape(-1, 1)
        by_theta = g.T @ d_theta if math.prod(ctx.shapes[1][:-1]) == 1 else g * d_theta
        return None, (g * d_mu).reshape(ctx.shapes[0]), _to(ctx.shapes[1], by_theta)


class _ZINB(torch.autograd.Function):
    """As :class:`_NB`, zero-inflated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_mu: Tensor, log_theta: Tensor, logits: Tensor) -> Tensor:
        """See :func:`zinb_sum`."""
        flat = _flat(x, log_mu, log_theta)
        theta = flat[2].double().exp()
        logits_flat = logits.detach().expand(log_mu.shape).reshape(flat[1].shape).contiguous()
        if x.dtype == torch.float32:
            d_mu, d_theta, d_logits = (torch.empty_like(flat[1]) for _ in range(3))
            total = log_mu.new_empty(len(d_mu))
            _run("zinb", *flat, theta.float(), logits_flat, d_mu, d_theta, d_logits, total)
        else:
            nb_zero, d_mu, d_theta = _zeros(*flat[1:])
            expressed = logsigmoid(-logits_flat)
            zero = torch.logaddexp(logits_flat + expressed, expressed + nb_zero)  # logsigmoid(l) = l + logsigmoid(-l)
            from_nb = (expressed + nb_zero - zero).exp_()  # P(a zero is no structural one)
            seen = _seen(flat[0], zero)
            total = torch.where(seen, expressed, zero).sum(-1)
            d_mu, d_theta = d_mu.mul_(from_nb), d_theta.mul_(from_nb)
            d_logits = torch.where(seen, 0.0, 1 - from_nb) - torch.sigmoid(logits_flat)
        _run("seen", *flat, theta, d_mu, d_theta, total)
        ctx.save_for_backward(d_mu, d_theta, d_logits)
        ctx.shapes = log_mu.shape, log_theta.shape, logits.shape
        return total.reshape(log_mu.shape[:-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        """Gradients by log mu, log theta and the logits, of their shapes, for that of the result, (..., n)."""
        g = gradient.reshape(-1, 1)
        by_mu, by_theta, by_logits = (_to(s, g * d) for s, d in zip(ctx.shapes, ctx.saved_tensors, strict=True))
        return None, by_mu, by_theta, by_logits


def nb_sum(x: Tensor, log_mu: Tensor, log_theta: Tensor) -> Tensor:
    """Log mass of negative binomial counts in nats, summed over genes.

    Parameters
    ----------
    x
        Counts, (n, G).
    log_mu
        Log of the mean, (..., n, G).
    log_theta
        Log of the inverse dispersion, (1, G), (n, G) or (..., n, G).

    Returns
    -------
    (..., n), with gradients of first order by the two parameters.
    """
    return _NB.apply(x, log_mu, log_theta)


def zinb_sum(x: Tensor, log_mu: Tensor, log_theta: Tensor, logits: Tensor) -> Tensor:
    """Log mass of zero-inflated negative binomial counts in nats, summed over genes.

    Parameters
    ----------
    x, log_mu, log_theta
        As for :func:`nb_sum`.
    logits
        Log odds of a structural zero, (..., n, G).

    Returns
    -------
    (..., n), with gradients of first order by the three parameters.
    """
    return _ZINB.apply(x, log_mu, log_theta, logits)
