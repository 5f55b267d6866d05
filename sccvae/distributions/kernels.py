"""Log mass of negative binomial counts and its gradients in one pass.

Two loops for each cell. One over all genes as if the count were zero, in float32, which the compiler turns into vector
instructions; one over the counts that are not zero, in float64. Around them the softmax that gives the means, and its
gradient, while the cell is in the cache. On an NVIDIA GPU Triton does the same (``_gpu``). For float64, on other
devices and where numba or Triton is missing torch does (``_by_torch``); dense counts there are left to ``masses``.
Dropping counts at random is here too.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from sccvae._compiled import has_numba, in_threads
from sccvae._rows import SparseRows, has_triton, random_bytes


def applies(x: Tensor | SparseRows, *parameters: Tensor) -> bool:
    """Whether the kernels can be used: one floating type and device; off the CPU or without numba for rows alone."""
    same = len({(t.dtype, t.device) for t in (x, *parameters)}) == 1
    return same and (isinstance(x, SparseRows) or (x.device.type == "cpu" and has_numba()))


def _by_loops(x: Tensor | SparseRows) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and has_numba()


def _by_triton(x: Tensor | SparseRows) -> bool:
    return x.dtype == torch.float32 and has_triton(x.device)


def _flat(scores: Tensor, log_theta: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments without gradient: scores (n, G), log_theta (r, G), and which row of it each has, (n,)."""
    scores, log_theta = (t.detach().reshape(-1, t.shape[-1]).contiguous() for t in (scores, log_theta))
    if rows is None:
        rows = torch.arange(len(log_theta), device=scores.device)  # one for all, for each cell, or each draw of a cell
    return scores, log_theta, rows.repeat(len(scores) // len(rows))


def _by_torch(
    x: SparseRows, log_mu: Tensor, log_theta: Tensor, own: Tensor, logits: Tensor, *derivatives: Tensor
) -> Tensor:
    """The same by torch: vectors as if each count were zero, then float64 where it is not; fills the derivatives.

    On a device it never waits for one, so that its operations can be recorded.
    """
    d_mu, d_theta, d_logits = derivatives
    theta = log_theta.double().exp()
    seen = (x.dense() > 0).repeat(len(log_mu) // len(x), 1)
    a = log_mu - log_theta[own]
    minus = -theta.to(a.dtype)[own]
    zero = softplus(a).mul_(minus)
    torch.mul(torch.sigmoid_(a), minus, out=d_mu)
    torch.sub(zero, d_mu, out=d_theta)
    if len(logits):
        expressed = logsigmoid(-logits)
        either = torch.logaddexp(logits + expressed, expressed + zero)  # logsigmoid(l) = l + logsigmoid(-l)
        from_nb = (expressed + zero - either).exp_()  # P(a zero is no structural one)
        d_mu.mul_(from_nb), d_theta.mul_(from_nb)
        torch.sub(torch.where(seen, 0.0, 1 - from_nb), torch.sigmoid(logits), out=d_logits)
        total = torch.where(seen, expressed, either)
    else:
        total = zero.masked_fill_(seen, 0.0)
    d_mu.masked_fill_(seen, 0.0), d_theta.masked_fill_(seen, 0.0)
    _add_seen(x, log_mu, log_theta, own, theta, d_mu, d_theta, total)
    return total.sum(-1)


def _add_seen(x: SparseRows, log_mu: Tensor, log_theta: Tensor, own: Tensor, theta: Tensor, *to: Tensor) -> None:
    """Add derivatives and log mass (n, G) of the counts above zero to what is there, each in a place of its own."""
    draws = torch.arange(0, len(log_mu), len(x), device=x.device)[:, None]  # the first cell of each
    places = (draws * x.n_columns + x.places).view(-1)  # (k, nnz)
    of_theta = (own[draws + x.rows] * x.n_columns + x.columns).view(-1)
    count, t = x.values.double().repeat(len(draws)), theta.view(-1)[of_theta]
    a = log_mu.view(-1)[places].double() - log_theta.view(-1)[of_theta].double()
    plus = torch.logaddexp(a, a.new_zeros(()))  # log(1 + mu / theta)
    slope = count * torch.sigmoid(-a) - t * torch.sigmoid(a)  # theta (x - mu) / (theta + mu)
    ways = torch.lgamma(count + t) - torch.lgamma(t) - torch.lgamma(count + 1)
    mass = ways - t * plus - count * (plus - a)
    by_theta = t * (torch.digamma(count + t) - torch.digamma(t) - plus) - slope
    for whole, part in zip(to, (slope, by_theta, mass), strict=True):
        whole.view(-1).scatter_add_(0, places, torch.where(count > 0, part, 0.0).to(whole.dtype))


def _to(shape: torch.Size, gradient: Tensor) -> Tensor:
    """The gradient (n, G) of a parameter that was broadcast from ``shape``."""
    n = math.prod(shape[:-1])
    return gradient.reshape(-1, n, shape[-1]).sum(0).reshape(shape)


class _NegativeBinomial(torch.autograd.Function):
    """Log mass of x summed over genes, (..., n); derivatives are found with it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor | SparseRows,
        scores: Tensor,
        log_depth: Tensor | None,
        log_theta: Tensor,
        rows: Tensor | None,
        logits: Tensor | None,
    ) -> Tensor:
        """See :func:`nb_sum` and :func:`zinb_sum`."""
        rows_of_x = x if isinstance(x, SparseRows) else SparseRows.of(x)
        scores_, log_theta_, own = _flat(scores, log_theta, rows)
        n = len(scores_)
        d_scores, d_theta = torch.empty_like(scores_), torch.empty_like(scores_)
        none = scores_.new_empty(0, x.shape[-1])
        inflated = none if logits is None else logits.detach().expand(scores.shape).reshape(n, -1).contiguous()
        d_logits, total = torch.empty_like(inflated), scores_.new_empty(n)
        found = d_scores, d_theta, d_logits
        if _by_loops(x):
            from sccvae.distributions import _loops  # numba is imported, and once compiles, when it is first needed

            top, depth = (none[:, 0],) * 2 if log_depth is None else (scores_.amax(-1), log_depth.detach().reshape(-1))
            theta = log_theta_.double().exp()
            given = scores_, top, depth, log_theta_, theta.float(), theta, own, inflated, *found, total
            arrays = *rows_of_x.arrays(), *(t.numpy() for t in given)
            in_threads(_loops.cells, n, n * x.shape[-1], *arrays)
        elif _by_triton(x):
            from sccvae.distributions import _gpu

            depth = None if log_depth is None else log_depth.detach().reshape(-1)
            total = _gpu.cells(rows_of_x, scores_, depth, log_theta_, own, inflated, *found)
        else:
            total = _by_torch(rows_of_x, scores_, log_theta_, own, inflated, *found)
        ctx.save_for_backward(*found)
        ctx.rows = own if rows is not None or len(log_theta_) == 1 else None
        ctx.shapes = scores.shape, log_theta.shape, None if logits is None else logits.shape
        return total.reshape(scores.shape[:-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None, Tensor, None, Tensor | None]:
        """Gradients by scores, log theta and logits, of their shapes, for that of the result, (..., n)."""
        d_scores, d_theta, d_logits = ctx.saved_tensors
        scores, log_theta, logits = ctx.shapes
        g = gradient.reshape(-1, 1)
        if ctx.rows is None:
            by_theta = _to(log_theta, g * d_theta)
        else:  # a product sums over the cells of each row
            n_rows = math.prod(log_theta[:-1])
            of_row = g if n_rows == 1 else g * (ctx.rows[:, None] == torch.arange(n_rows, device=g.device))
            by_theta = (of_row.T @ d_theta).reshape(log_theta)
        by_logits = None if logits is None else _to(logits, g * d_logits)
        return None, (g * d_scores).reshape(scores), None, by_theta, None, by_logits


def nb_sum(
    x: Tensor | SparseRows,
    log_mu: Tensor,
    log_theta: Tensor,
    log_depth: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Log mass of negative binomial counts in nats, summed over genes.

    Parameters
    ----------
    x
        Counts, (n, G), dense or the rows of those that are not zero.
    log_mu
        Log of the mean, (..., n, G); with ``log_depth`` the scores whose softmax times the depth is the mean.
    log_theta
        Log of the inverse dispersion, (1, G), (n, G) or (..., n, G); with ``rows`` (r, G).
    log_depth
        Log of the depth (library size) of each cell, (n, 1).
    rows
        Row of ``log_theta`` for each cell, (n,) int64.

    Returns
    -------
    (..., n), with gradients of first order by ``log_mu`` (or the scores) and ``log_theta``.
    """
    return _sum(x, log_mu, log_depth, log_theta, rows, None)


def zinb_sum(
    x: Tensor | SparseRows,
    log_mu: Tensor,
    log_theta: Tensor,
    logits: Tensor,
    log_depth: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Log mass of zero-inflated negative binomial counts in nats, summed over genes.

    Parameters
    ----------
    x, log_mu, log_theta, log_depth, rows
        As for :func:`nb_sum`.
    logits
        Log odds of a structural zero, (..., n, G).

    Returns
    -------
    (..., n), with gradients of first order by ``log_mu`` (or the scores), ``log_theta`` and ``logits``.
    """
    return _sum(x, log_mu, log_depth, log_theta, rows, logits)


def _sum(
    x: Tensor | SparseRows,
    scores: Tensor,
    log_depth: Tensor | None,
    log_theta: Tensor,
    rows: Tensor | None,
    logits: Tensor | None,
) -> Tensor:
    if log_depth is not None and not (_by_loops(x) or _by_triton(x)):  # only these take a softmax along
        scores, log_depth = scores.log_softmax(-1) + log_depth, None
    return _NegativeBinomial.apply(x, scores, log_depth, log_theta, rows, logits)


def shares(scores: Tensor, factor: Tensor | float, out: Tensor | None = None) -> Tensor:
    """Softmax of scores over the last axis, times a factor.

    Parameters
    ----------
    scores
        (..., n, G).
    factor
        A number, or (n, 1).
    out
        Like scores: where the loops put what they find, if they are used and it suits them.

    Returns
    -------
    (..., n, G), ``out`` or new; without a gradient, in float32 on the CPU, in about half of the time of
    :func:`torch.softmax`.
    """
    if scores.dtype != torch.float32 or not applies(scores) or scores.requires_grad:
        return torch.softmax(scores, -1) * factor
    from sccvae.distributions import _loops

    flat = scores.reshape(-1, scores.shape[-1]).contiguous()
    by_row = torch.as_tensor(factor, dtype=torch.float32).expand(*scores.shape[:-1], 1).reshape(-1)
    if out is None or out.shape != scores.shape or out.dtype != torch.float32 or not out.is_contiguous():
        out = torch.empty(scores.shape)
    given = (t.numpy() for t in (flat, flat.amax(-1), by_row.contiguous(), out.view(flat.shape)))
    in_threads(_loops.shares, len(flat), flat.numel(), *given)
    return out


def drop(x: Tensor, n: int) -> Tensor:
    """Set values to zero with probability n / 256, and multiply the others by 256 / (256 - n).

    Parameters
    ----------
    x
        Any shape.
    n
        From 0 to 255.

    Returns
    -------
    A new tensor like x.
    """
    random, factor = random_bytes(x.numel(), x.device), 256 / (256 - n)
    if applies(x) and x.dtype == torch.float32 and not x.requires_grad:
        from sccvae.distributions import _loops

        out = torch.empty(x.shape)
        _loops.drop(
            *(t.numpy() for t in (x.reshape(-1), random)), np.uint8(n), np.float32(factor), out.view(-1).numpy()
        )
        return out
    return x * (random.view(x.shape) >= n).to(x.dtype).mul_(factor)
