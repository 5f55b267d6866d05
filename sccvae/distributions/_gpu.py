"""Log mass of negative binomial counts and its derivatives in one pass over each cell, on a GPU, by Triton.

Importing this file imports triton. As ``_loops`` on the CPU; but in float32, in forms that lose few digits, where a
count is at most ``SMALL``: a sum over k below the count takes the place of log-gamma and digamma.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sccvae._rows import SparseRows

#: Genes of a cell that are worked on at a time.
BLOCK = 1024
#: Counts of a cell that are worked on at a time.
FEW = 128
#: Whole counts up to this one go without log-gamma.
SMALL = tl.constexpr(20)


@triton.jit
def _artanh_series(s):
    """1/3 + s/5 + s^2/7 ...: of s = u^2, (artanh(u) / u - 1) / s."""
    p = s * (1 / 15) + 1 / 13
    p = p * s + 1 / 11
    p = p * s + 1 / 9
    p = p * s + 1 / 7
    p = p * s + 1 / 5
    return p * s + 1 / 3


@triton.jit
def _log1p_unit(e):
    """log(1 + e) for e in [0, 1]."""
    u = e / (2 + e)
    s = u * u
    return 2 * u * (1 + s * _artanh_series(s))


@triton.jit
def _log_gamma(v):
    """Log-gamma of float64 v > 0, by Stirling's series from 8 on."""
    low = v < 8
    product = v * (v + 1) * (v + 2) * (v + 3) * (v + 4) * (v + 5) * (v + 6) * (v + 7)
    above = tl.where(low, v + 8, v)
    i = 1 / (above * above)
    tail = (1 / 12 - i * (1 / 360 - i * (1 / 1260 - i * (1 / 1680 - i / 1188)))) / above
    large = (above - 0.5) * tl.log(above) - above + 0.9189385332046727 + tail
    return large - tl.log(tl.where(low, product, 1.0))


@triton.jit
def _digamma(v):
    """Its derivative."""
    low = v < 8
    below = 1 / v + 1 / (v + 1) + 1 / (v + 2) + 1 / (v + 3) + 1 / (v + 4) + 1 / (v + 5) + 1 / (v + 6) + 1 / (v + 7)
    above = tl.where(low, v + 8, v)
    i = 1 / (above * above)
    tail = i * (1 / 12 - i * (1 / 120 - i * (1 / 252 - i * (1 / 240 - i / 132))))
    return tl.log(above) - 0.5 / above - tail - tl.where(low, below, 0.0)


@triton.jit
def _large(x, log_mu, log_theta):
    """Log mass of counts, and derivatives by log mu and log theta; in float64."""
    x, a, t = x.to(tl.float64), log_mu.to(tl.float64) - log_theta.to(tl.float64), tl.exp(log_theta.to(tl.float64))
    e = tl.exp(-tl.abs(a))
    plus = tl.where(a > 0, a, 0.0) + tl.where(e < 1e-4, e - e * e / 2 + e * e * e / 3, tl.log(1 + e))
    high = tl.where(a > 0, 1.0, e) / (1 + e)  # mu / (mu + theta)
    slope = x * (tl.where(a > 0, e, 1.0) / (1 + e)) - t * high
    mass = _log_gamma(x + t) - _log_gamma(t) - _log_gamma(x + 1) - t * plus - x * (plus - a)
    return mass, slope, t * (_digamma(x + t) - _digamma(t) - plus) - slope


@triton.jit
def _nb(x, log_mu, mu, log_theta, theta, counted: tl.constexpr):
    """Log mass of counts, and derivatives by log mu and log theta; of no more than zeros unless ``counted``."""
    r = tl.minimum(mu / theta, 1e30)
    small = r <= 1
    u = tl.where(small, r, 1.0) / tl.where(small, 2 + r, 2 * r + 1)
    s = u * u
    more = 2 * u * s * _artanh_series(s)
    plus = 2 * u + more + tl.where(small, 0.0, log_mu - log_theta)  # log(1 + r)
    high = r / (1 + r)
    slope = (x - mu) / (1 + r)
    rest = r * r / (2 + r) - more  # r - log(1 + r)
    by_theta = theta * tl.where(small, rest - r * high, high - plus)
    mass = -theta * plus
    if counted:
        low = theta < 1  # which of two forms of theta (psi(x + theta) - psi(theta)), beside what it nearly cancels with
        by_theta += tl.where(low, -x / (1 + r), x * high)
        mass += x * log_mu
        few = (x <= SMALL) & (x == tl.floor(x))
        whole = theta + theta * r
        for k in range(tl.max(tl.where(few, x, 0.0)).to(tl.int32)):
            below = few & (k < x)
            mass += tl.where(below, tl.log((theta + k) / (whole * (k + 1))), 0.0)
            by_theta += tl.where(below, tl.where(low, theta, -k) / (theta + k), 0.0)
        if tl.min(few.to(tl.int32)) == 0:
            mass_, slope_, by_theta_ = _large(x, log_mu, log_theta)
            mass = tl.where(few, mass, mass_.to(tl.float32))
            slope = tl.where(few, slope, slope_.to(tl.float32))
            by_theta = tl.where(few, by_theta, by_theta_.to(tl.float32))
    return mass, slope, by_theta


@triton.jit
def _genes(
    at,
    here,
    x,
    scores,
    log_theta,
    logits,
    d_scores,
    d_theta,
    d_logits,
    top,
    shift,
    depth_share,
    inflated: tl.constexpr,
    counted: tl.constexpr,
):
    """Some genes of a cell: the sums of their log mass and of its derivatives by log mu; stores all derivatives."""
    score = tl.load(scores + at, mask=here, other=0.0)
    log_t = tl.load(log_theta + at, mask=here, other=0.0)
    log_mu, t = score + shift, tl.exp(log_t)
    mu = tl.exp(score - top) * depth_share
    value, by_mu, by_theta = _nb(x, log_mu, mu, log_t, t, counted)
    if inflated:
        b = tl.load(logits + at, mask=here, other=0.0)
        e = tl.exp(-tl.abs(b))
        tail = _log1p_unit(e)
        structural = tl.where(b < 0, b, 0.0) - tail  # logs
        expressed = tl.where(b > 0, -b, 0.0) - tail
        c = b - value
        f = tl.exp(-tl.abs(c))
        either = tl.where(c > 0, structural, expressed + value) + _log1p_unit(f)
        from_nb = tl.where(c > 0, f, 1.0) / (1 + f)  # P(a zero is no structural one)
        seen = x > 0
        value = tl.where(seen, expressed + value, either)
        by_mu = tl.where(seen, by_mu, by_mu * from_nb)
        by_theta = tl.where(seen, by_theta, by_theta * from_nb)
        by_logit = tl.where(seen, 0.0, 1 - from_nb) - tl.where(b < 0, e, 1.0) / (1 + e)
        tl.store(d_logits + at, by_logit, mask=here)
    tl.store(d_theta + at, by_theta, mask=here)
    tl.store(d_scores + at, by_mu, mask=here)
    return tl.sum(tl.where(here, value, 0.0)), tl.sum(tl.where(here, by_mu, 0.0))


@triton.jit
def _cells(
    starts,
    columns,
    counts,
    scores,
    log_depth,
    log_theta,
    own,
    logits,
    d_scores,
    d_theta,
    d_logits,
    total,
    n_counts,
    n_genes,
    softmax: tl.constexpr,
    inflated: tl.constexpr,
    block: tl.constexpr,
    few: tl.constexpr,
):
    """One cell: its log mass and the derivatives by its scores (or log means), log theta and logits.

    First the genes with a count, ``few`` at a time, then all others as zeros, ``block`` at a time.
    """
    i = tl.program_id(0).to(tl.int64)
    at, nan = tl.arange(0, block), float("nan")
    row = tl.load(own + i) * n_genes
    log_theta += row
    scores += i * n_genes
    logits += i * n_genes
    d_scores += i * n_genes
    d_theta += i * n_genes
    d_logits += i * n_genes
    top, summed = 0.0, 0.0
    if softmax:
        top = float("-inf")
    for start in range(0, n_genes, block):
        here = start + at < n_genes
        tl.store(d_scores + start + at, tl.full((block,), nan, tl.float32), mask=here)  # not done yet
        if softmax:
            score = tl.load(scores + start + at, mask=here, other=float("-inf"))
            higher = tl.maximum(top, tl.max(score))
            summed = summed * tl.exp(top - higher) + tl.sum(tl.exp(score - higher))
            top = higher
    shift, depth_share = 0.0, 1.0
    if softmax:
        depth = tl.load(log_depth + i % n_counts)
        shift, depth_share = depth - top - tl.log(summed), tl.exp(depth) / summed
    tl.debug_barrier()  # what one thread wrote, others go on with
    mass, slopes = 0.0, 0.0
    first, last = tl.load(starts + i % n_counts), tl.load(starts + i % n_counts + 1)
    for start in range(first, last, few):
        place = start + tl.arange(0, few)
        here = place < last
        x = tl.load(counts + place, mask=here, other=0.0)
        gene = tl.load(columns + place, mask=here, other=0)
        m, s = _genes(
            gene, here, x, scores, log_theta, logits, d_scores, d_theta, d_logits,
            top, shift, depth_share, inflated, True,
        )  # fmt: skip
        mass += m
        slopes += s
    tl.debug_barrier()
    for start in range(0, n_genes, block):
        here = start + at < n_genes
        found = tl.load(d_scores + start + at, mask=here, other=0.0)
        m, s = _genes(
            start + at, here & (found != found), 0.0, scores, log_theta, logits, d_scores, d_theta, d_logits,
            top, shift, depth_share, inflated, False,
        )  # fmt: skip
        mass += m
        slopes += s
    tl.store(total + i, mass)
    if softmax:
        tl.debug_barrier()
        for start in range(0, n_genes, block):
            here = start + at < n_genes
            score = tl.load(scores + start + at, mask=here, other=0.0)
            by_mu = tl.load(d_scores + start + at, mask=here, other=0.0)
            share = tl.exp(score - top) / summed
            tl.store(d_scores + start + at, by_mu - share * slopes, mask=here)


def cells(
    x: SparseRows,
    scores: Tensor,
    log_depth: Tensor | None,
    log_theta: Tensor,
    own: Tensor,
    logits: Tensor,
    *derivatives: Tensor,
) -> Tensor:
    """Log mass of each cell in nats, (n,); fills the derivatives. Arguments as for the loop of this name."""
    total = scores.new_empty(len(scores))
    softmax = log_depth is not None
    given = x.starts, x.columns, x.values, scores, log_depth if softmax else scores, log_theta, own
    sizes = len(x), x.n_columns, softmax, bool(len(logits)), BLOCK, FEW
    _cells[(len(scores),)](*given, logits, *derivatives, total, *sizes, num_warps=4)
    return total
