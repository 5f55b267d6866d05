"""Log mass of negative binomial counts and its gradients in one pass, on the CPU, by numba.

Two loops for each cell. One over all genes as if the count were zero, in float32, which the compiler turns into vector
instructions (for float64 torch does it); one over the counts that are not zero, in float64. Plain torch (in ``counts``)
gives the same numbers; it is used on other devices and where numba is missing.
"""

from __future__ import annotations

import math
from functools import cache
from importlib.util import find_spec
from types import SimpleNamespace
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
def _loops() -> SimpleNamespace:
    """The compiled loops; numba is imported, and once compiles, when they are first needed."""
    import numba

    f = np.float32

    def compiled(**more: Any) -> Any:
        options = {"error_model": "numpy", "nogil": True, **more}

        def decorate(function: Any) -> Any:
            try:
                return numba.njit(cache=True, **options)(function)
            except RuntimeError:  # no folder that can be written to: compiled anew in each session
                return numba.njit(**options)(function)

        return decorate

    # Sums may be reordered, so that they become vector instructions; infinity and NaN stay what they are.
    fast = compiled(fastmath={"contract", "reassoc", "nsz"}, inline="always")

    @fast
    def exp_minus(v):
        """exp(-v) for float32 v >= 0, down to exp(-87); Cody and Waite's reduction, polynomial of Cephes' expf."""
        v = -min(v, f(87.0))
        n = np.floor(v * f(1.44269504) + f(0.5))
        r = v - n * f(0.693359375) + n * f(2.12194440e-4)
        p = f(1.9875691500e-4)
        p = p * r + f(1.3981999507e-3)
        p = p * r + f(8.3334519073e-3)
        p = p * r + f(4.1665795894e-2)
        p = p * r + f(1.6666665459e-1)
        p = p * r + f(5.0000001201e-1)
        power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)  # 2 ** n
        return (p * r * r + r + f(1.0)) * power

    @fast
    def log1p_unit(e):
        """log(1 + e) for float32 e in [0, 1]: 2 artanh(e / (2 + e)) by its series."""
        u = e / (f(2.0) + e)
        s = u * u
        p = f(1 / 15)
        for k in (13, 11, 9, 7, 5, 3):
            p = p * s + f(1) / f(k)
        return f(2.0) * u * (p * s + f(1.0))

    @compiled(fastmath={"contract", "reassoc", "nsz"})
    def nb_zeros(x, log_mu, log_theta, theta, d_mu, d_theta):
        """Derivatives of one cell as if all its counts were zero; the log mass, summed where they are. All (G,)."""
        total = f(0.0)
        for j in range(len(x)):
            a = log_mu[j] - log_theta[j]
            e = exp_minus(abs(a))
            plus = log1p_unit(e) + (f(0.0) if a <= 0 else a)  # log(1 + mu / theta)
            zero = -theta[j] * plus
            d_mu[j] = -theta[j] * ((e if a < 0 else f(1.0)) / (f(1.0) + e))
            d_theta[j] = zero - d_mu[j]
            total += f(0.0) if x[j] > 0 else zero
        return total

    @compiled(fastmath={"contract", "reassoc", "nsz"})
    def zinb_zeros(x, log_mu, log_theta, theta, logits, d_mu, d_theta, d_logits):
        """As ``nb_zeros``; with log P(no structural zero) where the count is not zero."""
        total = f(0.0)
        for j in range(len(x)):
            a, b = log_mu[j] - log_theta[j], logits[j]
            e = exp_minus(abs(a))
            nb_zero = -theta[j] * (log1p_unit(e) + (f(0.0) if a <= 0 else a))
            by_mu = -theta[j] * ((e if a < 0 else f(1.0)) / (f(1.0) + e))
            e = exp_minus(abs(b))
            tail = log1p_unit(e)
            structural, expressed = (f(0.0) if b >= 0 else b) - tail, (f(0.0) if b <= 0 else -b) - tail  # logs
            share = (e if b < 0 else f(1.0)) / (f(1.0) + e)  # P(structural zero)
            c = b - nb_zero
            e = exp_minus(abs(c))
            either = (structural if c > 0 else expressed + nb_zero) + log1p_unit(e)
            one = f(1.0) / (f(1.0) + e)
            from_nb = e * one if c > 0 else one  # P(a zero is no structural one)
            d_mu[j], d_theta[j] = from_nb * by_mu, from_nb * (nb_zero - by_mu)
            d_logits[j] = (f(0.0) if x[j] > 0 else f(1.0) - from_nb) - share
            total += expressed if x[j] > 0 else either
        return total

    @compiled()
    def digamma(v):
        """Derivative of log-gamma at v > 0: its asymptotic series (Abramowitz and Stegun, 6.3.18) from 8 on."""
        below = 0.0
        while v < 8.0:  # psi(v) = psi(v + 1) - 1 / v
            below -= 1.0 / v
            v += 1.0
        i = 1.0 / (v * v)
        tail = i * (1 / 12 - i * (1 / 120 - i * (1 / 252 - i * (1 / 240 - i / 132))))
        return below + math.log(v) - 0.5 / v - tail

    @compiled()
    def nb_seen(x, log_mu, log_theta, theta, d_mu, d_theta):
        """Replace the derivatives of one cell where x > 0; the log mass, summed there. All (G,)."""
        total = 0.0
        for j in range(len(x)):
            count = np.float64(x[j])
            if not count > 0.0:
                continue
            t, u = theta[j], np.float64(log_theta[j])
            a = np.float64(log_mu[j]) - u
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
            total += ways - t * plus - count * (plus - a)
            slope = (count - t * ratio) / (1.0 + ratio)  # theta (x - mu) / (theta + mu)
            d_mu[j] = slope
            d_theta[j] = t * (gap - plus) - slope
        return total

    # Over cells: x (m, G); log_mu, d_* (n, G); log_theta, theta (m, G) or (1, G); total (n,); n is a multiple of m.

    @compiled()
    def seen(x, log_mu, log_theta, theta, d_mu, d_theta, total):
        for i in range(len(log_mu)):
            row = i % len(x)
            own = row if len(theta) > 1 else 0
            total[i] += nb_seen(x[row], log_mu[i], log_theta[own], theta[own], d_mu[i], d_theta[i])

    @compiled()
    def nb(x, log_mu, log_theta, theta, theta32, d_mu, d_theta, total):
        for i in range(len(log_mu)):
            row = i % len(x)
            own = row if len(theta) > 1 else 0
            total[i] = nb_zeros(x[row], log_mu[i], log_theta[own], theta32[own], d_mu[i], d_theta[i])
            total[i] += nb_seen(x[row], log_mu[i], log_theta[own], theta[own], d_mu[i], d_theta[i])

    @compiled()
    def zinb(x, log_mu, log_theta, theta, theta32, logits, d_mu, d_theta, d_logits, total):
        for i in range(len(log_mu)):
            row = i % len(x)
            own = row if len(theta) > 1 else 0
            total[i] = zinb_zeros(
                x[row], log_mu[i], log_theta[own], theta32[own], logits[i], d_mu[i], d_theta[i], d_logits[i]
            )
            total[i] += nb_seen(x[row], log_mu[i], log_theta[own], theta[own], d_mu[i], d_theta[i])

    return SimpleNamespace(seen=seen, nb=nb, zinb=zinb)


def _flat(x: Tensor, log_mu: Tensor, log_theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments without gradient: x (m, G), log_mu (n, G) and log_theta (1 or m or n, G), contiguous."""
    width = x.shape[-1]
    log_theta = log_theta.detach().reshape(-1, width)
    if len(log_theta) not in (1, len(x)):  # as many as draws of z
        x = x.expand(log_mu.shape).reshape(-1, width)
    return x.detach().contiguous(), log_mu.detach().reshape(-1, width).contiguous(), log_theta.contiguous()


def _run(loop: str, *tensors: Tensor) -> None:
    getattr(_loops(), loop)(*(t.numpy() for t in tensors))


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
            _run("nb", *flat, theta, theta.float(), d_mu, d_theta, total)
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
            _run("zinb", *flat, theta, theta.float(), logits_flat, d_mu, d_theta, d_logits, total)
        else:
            nb_zero, d_mu, d_theta = _zeros(*flat[1:])
            expressed = logsigmoid(-logits_flat)
            zero = torch.logaddexp(logits_flat + expressed, expressed + nb_zero)  # logsigmoid(l) = l + logsigmoid(-l)
            from_nb = (expressed + nb_zero - zero).exp_()  # P(a zero is no structural one)
            seen = _seen(flat[0], zero)
            total = torch.where(seen, expressed, zero).sum(-1)
            _run("seen", *flat, theta, d_mu.mul_(from_nb), d_theta.mul_(from_nb), total)
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
