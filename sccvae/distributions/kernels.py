"""Log mass of negative binomial counts and its gradients in one pass, on the CPU, by numba.

What zeros need (log NB(0) and its derivatives) torch computes on the whole matrix; the loop does the rest for the
non-zero counts alone, in float64. Plain torch (in ``counts``) gives the same numbers; it is used on other devices and
where numba is missing.
"""

from __future__ import annotations

import math
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

#: Whole counts up to this one have their log-gamma and digamma differences by recurrence.
SMALL = 20


def applies(x: Tensor, *parameters: Tensor) -> bool:
    """Whether the kernels can be used: CPU tensors of one floating type, and numba there."""
    types = {t.dtype for t in (x, *parameters)}
    return len(types) == 1 and all(t.device.type == "cpu" for t in (x, *parameters)) and _has_numba()


@cache
def _has_numba() -> bool:
    return find_spec("numba") is not None


@cache
def _loop() -> Any:
    """The compiled loop over non-zero counts; numba is imported, and once compiles, when it is first needed."""
    import numba

    def compiled(function: Any) -> Any:
        options = {"error_model": "numpy", "nogil": True}
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # no folder that can be written to: compiled anew in each session
            return numba.njit(**options)(function)

    @compiled
    def digamma(v):
        """Derivative of log-gamma at v > 0: its asymptotic series (Abramowitz and Stegun, 6.3.18) from 8 on."""
        below = 0.0
        while v < 8.0:  # psi(v) = psi(v + 1) - 1 / v
            below -= 1.0 / v
            v += 1.0
        i = 1.0 / (v * v)
        tail = i * (1 / 12 - i * (1 / 120 - i * (1 / 252 - i * (1 / 240 - i / 132))))
        return below + math.log(v) - 0.5 / v - tail

    @compiled
    def seen(x, log_mu, log_theta, theta, zero, d_mu, d_theta, total):
        """Replace the derivatives where x > 0 and sum the log mass over genes.

        x (m, G), log_mu, zero, d_mu, d_theta (n, G), log_theta and theta (m, G) or (1, G), total (n,); n is a multiple
        of m.
        """
        for i in range(len(log_mu)):
            row = i % len(x)
            own = row if len(theta) > 1 else 0
            acc = 0.0
            for j in range(x.shape[1]):
                count = np.float64(x[row, j])
                if not count > 0.0:
                    acc += zero[i, j]
                    continue
                t, u = theta[own, j], np.float64(log_theta[own, j])
                a = np.float64(log_mu[i, j]) - u
                e = math.exp(-abs(a))
                ratio = e if a < 0 else 1.0 / e  # mu / theta
                plus = math.log1p(e) + max(a, 0.0)  # log(1 + mu / theta)
                if count <= SMALL and count == math.floor(count):
                    ways, gap = 1.0, 0.0
                    for k in range(int(count)):
                        ways *= (t + k) / (k + 1.0)
                        gap += 1.0 / (t + k)
                    ways = math.log(ways) if count > 1.0 else u
                else:
                    ways = math.lgamma(count + t) - math.lgamma(t) - math.lgamma(count + 1.0)
                    gap = digamma(count + t) - digamma(t)
                acc += ways - t * plus - count * (plus - a)
                slope = (count - t * ratio) / (1.0 + ratio)  # theta (x - mu) / (theta + mu)
                d_mu[i, j] = slope
                d_theta[i, j] = t * (gap - plus) - slope
            total[i] = acc

    return seen


def _flat(x: Tensor, log_mu: Tensor, log_theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments without gradient: x (m, G), log_mu (n, G) and log_theta (1 or m or n, G), contiguous."""
    width = x.shape[-1]
    log_theta = log_theta.detach().reshape(-1, width)
    if len(log_theta) not in (1, len(x)):  # as many as draws of z
        x = x.expand(log_mu.shape).reshape(-1, width)
    return x.detach().contiguous(), log_mu.detach().reshape(-1, width).contiguous(), log_theta.contiguous()


def _fill(x: Tensor, log_mu: Tensor, log_theta: Tensor, zero: Tensor, d_mu: Tensor, d_theta: Tensor) -> Tensor:
    """Run the loop; (n,)."""
    total = log_mu.new_empty(len(log_mu))
    theta = log_theta.double().exp()
    arrays = (t.numpy() for t in (x, log_mu, log_theta, theta, zero, d_mu, d_theta, total))
    _loop()(*arrays)
    return total


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


class _NB(torch.autograd.Function):
    """Log mass of x summed over genes, (..., n); derivatives are found with it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_mu: Tensor, log_theta: Tensor) -> Tensor:
        """See :func:`nb_sum`."""
        flat = _flat(x, log_mu, log_theta)
        zero, d_mu, d_theta = _zeros(*flat[1:])
        total = _fill(*flat, zero, d_mu, d_theta)
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
        nb_zero, d_mu, d_theta = _zeros(*flat[1:])
        logits_flat = logits.detach().expand(log_mu.shape).reshape(nb_zero.shape)
        expressed = logsigmoid(-logits_flat)
        zero = torch.logaddexp(logits_flat + expressed, expressed + nb_zero)  # logsigmoid(l) = l + logsigmoid(-l)
        from_nb = (expressed + nb_zero - zero).exp_()  # P(a zero is no structural one)
        seen = (flat[0] > 0).repeat(len(zero) // len(flat[0]), 1)
        total = _fill(*flat, zero, d_mu.mul_(from_nb), d_theta.mul_(from_nb))
        total += torch.where(seen, expressed, 0.0).sum(-1)
        d_logits = torch.where(seen, 0.0, 1 - from_nb) - torch.sigmoid(logits_flat)
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
